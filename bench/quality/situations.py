"""Situations in which pruners are reported to go wrong, each with its neighbours.

    pip install ".[hf]" peft
    python bench/quality/situations.py [WORD ...] [--out FILE]

Small networks with random weights. A situation has a statement of what is right; it is tried for
every combination of the sizes, types, scopes, methods and ways of calibration that are listed, and
checked each time: masks are where zeros are, exactly as many weights are removed as were asked for,
everything else is as before, and what the statement says. The table has the number of neighbours,
and how many were wrong; FILE has the same, and what was seen where it was wrong.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

import lobs_native as lobs
from quality.situation import INPUTS, close, main, prune, situation

# ---- attention and padding -----------------------------------------------------------------------


@situation(
    "every projection of attention is pruned, whatever is packed",
    form=({}, {"vdim": 12}, {"kdim": 10}, {"kdim": 10, "vdim": 12}, {"bias": False}),
    batch_first=(True, False),
    inputs=INPUTS,
    method=("exact", "admm", "sweep"),
    dtype=(torch.float32, torch.float64),
)
def packed_attention(
    form: dict[str, Any], batch_first: bool, inputs: str, method: str, dtype: torch.dtype
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.MultiheadAttention(16, 2, batch_first=batch_first, **form)
            self.o = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            k, v = x[..., : self.a.kdim], x[..., : self.a.vdim]
            out: Tensor = self.o(self.a(x, k, v, need_weights=False)[0])
            return out

    data = [torch.randn(6, 7, 16, dtype=dtype) for _ in range(3)]
    report = prune(Net().to(dtype), data, inputs=inputs, method=method)
    names = [layer.name for layer in report.layers]
    assert names == ["a.q_proj", "a.k_proj", "a.v_proj", "a.out_proj", "o"], names


@situation(
    "padding is left out; nested tensors change nothing",
    nested=(True, False),
    blocks=("auto", None),
    inputs=INPUTS,
    scope=("layer", "row", "model"),
    norm_first=(True, False),
)
def nested_tensors_with_padding(nested: bool, norm_first: bool, **options: Any) -> None:
    lengths = torch.tensor([6, 4, 3, 5])
    mask = torch.arange(6)[None] >= lengths[:, None]
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested and not norm_first)
    data = [{"src": torch.randn(4, 6, 16), "src_key_padding_mask": mask} for _ in range(2)]
    report = prune(net, data, **options)
    rows = {layer.rows for layer in report.layers}
    assert rows == {float(2 * lengths.sum())}, f"rows {rows}"


# ---- experts -------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Stacked experts, each a gated network."""

    def __init__(self, count: int = 6, width: int = 12, inner: int = 18) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * inner, width) / width**0.5)
        self.down_proj = nn.Parameter(torch.randn(count, width, inner) / inner**0.5)

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in expert.unique().tolist():
            at = (expert == e).nonzero()[:, 0]
            gate, up = functional.linear(x[at], self.gate_up_proj[e]).chunk(2, -1)
            out[at] = functional.linear(functional.silu(gate) * up, self.down_proj[e])
        return out


@situation(
    "a rare expert loses half, and on other rows at most 5% more than by magnitude in that scope",
    few=(0, 1, 2, 4, 8, 16, 64),
    method=("exact", "admm", "lobs", "wanda", "sweep"),
    scope=("layer", "row"),
)
def rare_experts(few: int, method: str, scope: str) -> None:
    dense = Experts()
    counts = torch.tensor([few, 150, 150, 150, 150, 150])
    expert = torch.repeat_interleave(torch.arange(6), counts)
    net, by_size = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(net, [(torch.randn(len(expert), 12), expert)], method=method, scope=scope)
    with torch.no_grad():
        for w in (by_size.gate_up_proj[0], by_size.down_proj[0]):
            rows = w if scope == "row" else w.view(1, -1)
            rows.scatter_(1, rows.abs().argsort(1)[:, : rows.shape[1] // 2], 0)
        for w in (net.gate_up_proj[0], net.down_proj[0]):
            assert int((w == 0).sum()) == w.numel() // 2
        test, first = torch.randn(2000, 12), torch.zeros(2000, dtype=torch.long)
        y = dense(test, first)
        lost, most = (float((n(test, first) - y).square().sum()) for n in (net, by_size))
    assert lost <= 1.05 * most, f"{lost / most:.3f} of magnitude's error"


# ---- weights that are used in several ways -------------------------------------------------------

SECOND_USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: functional.linear(x, w),
    "product": lambda x, w: x @ w.T,
    "einsum": lambda x, w: torch.einsum("ni,oi->no", x, w),
    "copy": lambda x, w: x @ w.T.contiguous(),
    "conv1d": lambda x, w: functional.conv1d(x[..., None], w[..., None])[..., 0],
}


@situation(
    "both inputs of a weight count, or it is left out and named",
    use=tuple(SECOND_USES),
    inputs=INPUTS,
    method=("exact", "sweep", "magnitude"),
    bias=(True, False),
    first=(True, False),
)
def a_weight_in_a_call_and_a_function(
    use: str, inputs: str, method: str, bias: bool, first: bool
) -> None:
    scale = torch.linspace(0, 10, 16)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(16, 16, bias=bias), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            second = SECOND_USES[use](x * scale, self.a.weight)
            out: Tensor = self.o(self.a(x) + second if first else second + self.a(x))
            return out

    net, x = Net(), [torch.randn(100, 16) for _ in range(3)]
    before = net.a.weight.detach().double()
    report = prune(net, x, inputs=inputs, method=method)
    if "a" not in {layer.name for layer in report.layers}:
        (skipped,) = report.skipped
        assert skipped.name == "a"
        assert use == "conv1d", skipped.reason
        return
    rows = torch.cat([part for each in x for part in (each, each * scale)]).double()
    change = net.a.weight.detach().double() - before
    seen = next(layer for layer in report.layers if layer.name == "a")
    assert seen.rows == len(rows)
    if inputs == "dense" or not bias:
        close(seen.error, float((rows @ change.T).square().sum()) / len(rows), "error")


@situation(
    "a weight that is an embedding as well is left alone, on purpose",
    tied=("function", "module"),
    inputs=INPUTS,
    scope=("layer", "row", "model"),
)
def an_output_layer_that_is_an_embedding(tied: str, inputs: str, scope: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h, self.head = nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
            self.table = nn.Embedding(40, 16)
            if tied == "module":
                self.table.weight = self.head.weight

        def forward(self, ids: Tensor) -> Tensor:
            own = functional.embedding(ids, self.head.weight)
            x = self.table(ids) if tied == "module" else own
            out: Tensor = self.head(torch.tanh(self.h(x)))
            return out

    report = prune(Net(), [torch.randint(0, 40, (8, 12))], inputs=inputs, scope=scope)
    assert [layer.name for layer in report.layers] == ["h"]
    reasons = {x.name: x.on_purpose for x in report.skipped}
    assert reasons["head"], reasons


# ---- layers of other kinds -----------------------------------------------------------------------


@situation(
    "every matrix of a recurrent layer is pruned; what cannot be is named and counted",
    kind=(nn.LSTM, nn.GRU, nn.RNN),
    layers=(1, 2),
    bidirectional=(True, False),
    batch_first=(True, False),
    inputs=INPUTS,
    method=("exact", "sweep"),
)
def recurrent_layers(
    kind: type[nn.RNNBase], layers: int, bidirectional: bool, batch_first: bool, **options: Any
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            form = {"batch_first": batch_first, "bidirectional": bidirectional}
            self.rnn = kind(8, 10, layers, **form)  # type: ignore[arg-type]
            width = 10 * (1 + bidirectional)
            self.bi, self.out = nn.Bilinear(width, width, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.rnn(x)[0][:, -1].contiguous()
            out: Tensor = self.out(self.bi(h, h))
            return out

    net = Net()
    report = prune(net, [torch.randn(12, 5, 8) for _ in range(2)], **options)
    matrices = sum(p.ndim > 1 for p in net.rnn.parameters())
    assert len(report.layers) == matrices + 1
    assert [(x.name, x.weights) for x in report.skipped] == [("bi", net.bi.weight.numel())]
    assert report.coverage is not None
    assert report.coverage.total == sum(p.numel() for p in net.parameters() if p.ndim > 1)


NORMALIZED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 8), (40, 16)),
    "convolution": (lambda: nn.Conv1d(8, 8, 4, groups=2), (4, 8, 12)),
    "depthwise": (lambda: nn.Conv1d(8, 8, 1, groups=8), (4, 8, 12)),
    "transposed": (lambda: nn.ConvTranspose1d(8, 6, 3), (4, 8, 12)),
}


@situation(
    "a normalized weight is pruned through its length and direction, empty slices too",
    kind=tuple(NORMALIZED),
    dim=(0, 1, -1, None),
    form=("parametrization", "hook"),
    weak=(False, True),
    inputs=INPUTS,
)
def weight_normalization(kind: str, dim: int | None, form: str, weak: bool, inputs: str) -> None:
    make, shape = NORMALIZED[kind]
    layer = make()
    if weak:
        with torch.no_grad():
            layer.weight[0] *= 1e-4  # a row that becomes empty
    normalize = weight_norm if form == "parametrization" else nn.utils.weight_norm
    net = nn.Sequential(normalize(layer, dim=dim))
    x = [torch.randn(shape) for _ in range(2)]
    report = prune(net, x, inputs=inputs)
    assert [layer.name for layer in report.layers] == ["0"], report.skipped
    zeros = int((net[0].weight == 0).sum())
    assert zeros == report.removed, f"{zeros} zeros in the weight, {report.removed} removed"


@situation(
    "an adapter is left alone, and the weight under it pruned",
    rank=(2, 4),
    targets=(("q",), ("q", "o")),
    inputs=INPUTS,
    method=("exact", "sweep"),
)
def adapters(rank: int, targets: tuple[str, ...], inputs: str, method: str) -> None:
    import peft

    net = nn.Sequential()
    net.add_module("q", nn.Linear(24, 24))
    net.add_module("act", nn.ReLU())
    net.add_module("o", nn.Linear(24, 8))
    config = peft.LoraConfig(r=rank, target_modules=list(targets))
    adapted = peft.get_peft_model(net, config)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.05)
    report = prune(adapted, [torch.randn(50, 24) for _ in range(2)], inputs=inputs, method=method)
    assert len(report.layers) == 2
    assert len(report.skipped) == 2 * len(targets)
    assert all("adapter" in x.reason and x.on_purpose for x in report.skipped)


# ---- models and data -----------------------------------------------------------------------------


@situation(
    "a network of inference tensors is pruned, or is as before where pruning fails",
    inputs=INPUTS,
    method=("exact", "admm", "sweep", "magnitude"),
    fails=(False, True),
)
def inference_tensors(inputs: str, method: str, fails: bool) -> None:
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    before, data = [p.clone() for p in net.parameters()], [torch.randn(40, 16) for _ in range(3)]
    if not fails:
        prune(net, data, inputs=inputs, method=method)
        return
    data[2][0, 0] = torch.nan
    try:
        prune(net, data, inputs=inputs, method=method)
    except lobs.NonFiniteError:
        same = [torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
        assert all(same), f"after an error, {same.count(False)} tensors are not as before"
        return
    raise AssertionError("NaN in the data is not refused")


@situation(
    "a typed error that names the argument",
    what=("scripted", "traced", "frozen", "labels", "named labels", "no rows", "generator twice"),
    inputs=INPUTS,
)
def what_cannot_be_pruned(what: str, inputs: str) -> None:
    net: nn.Module = nn.Sequential(nn.Linear(16, 8))
    data: Any = [torch.randn(40, 16) for _ in range(2)]
    made: dict[str, Callable[[], nn.Module]] = {
        "scripted": lambda: torch.jit.script(net),
        "traced": lambda: torch.jit.trace(net, data[0]),
        "frozen": lambda: torch.jit.freeze(torch.jit.script(net.eval())),
    }
    names = "model" if what in made else "calibration"
    if what in made:
        net = made[what]()
    elif what == "labels":
        data = [(x, torch.zeros(40).long()) for x in data]
    elif what == "named labels":
        data = [{"input": x, "labels": torch.zeros(40).long()} for x in data]
    elif what == "no rows":
        data = [x[:0] for x in data]
    else:  # what has been used up
        data = iter(data)
        list(data)
    said = "it is not refused"
    try:
        lobs.prune(net, data, sparsity=0.5, inputs=inputs, progress=False)
    except lobs.LobsError as error:
        said = str(error)
    assert said.startswith(f"{names}: "), said


@situation(
    "layers come in the order of the data's flow, whatever the order of batches; errors are right",
    order=("ABB", "BAB", "BBA", "AB", "BA"),
    inputs=("corrected", "pruned"),
    method=("exact", "sweep"),
    sparsity=(0.5, 0.7),
)
def layers_first_reached_later(order: str, inputs: str, method: str, sparsity: float) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, which: str) -> Tensor:
            out: Tensor = self.c(self.a(x) if which == "A" else self.b(x))
            return out

    net = Net()
    dense = copy.deepcopy(net)
    data = [(torch.randn(100, 16), which) for which in order]
    report = lobs.prune(net, data, sparsity=sparsity, inputs=inputs, method=method, progress=False)
    assert report.layers[-1].name == "c", [layer.name for layer in report.layers]
    with torch.no_grad():
        hidden = [
            torch.cat([(m.a if which == "A" else m.b)(x) for x, which in data]).double()
            for m in (net, dense)
        ]
        now, then = net.double().c(hidden[0]), dense.double().c(hidden[inputs == "corrected"])
    close(report.layers[-1].error, float((now - then).square().sum()) / len(now), "c", 1e-3)


if __name__ == "__main__":
    from quality import situations_of_folders, situations_of_types  # noqa: F401  (enters them)

    main((__doc__ or "").splitlines()[0])
