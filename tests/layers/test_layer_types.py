"""Layers that need the whole model: attention, experts, shared and computed weights, types that
users register, and padding."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.experts import Experts, routed
from helpers.tolerances import distance
from torch import Tensor, nn
from torch.nn import functional

import lobs_native as lobs
from lobs_native import layers as layers_package
from lobs_native.calibration.moments import Moments, calibrate
from lobs_native.calibration.session import Session
from lobs_native.errors import ArgumentError, DtypeError
from lobs_native.layers import layers_of


def seen(model: nn.Module, batches: list[Any], **options: Any) -> dict[str, Moments]:
    """Second moments of all layers of a model."""
    session = Session(
        model, batches, options.get("forward"), None, 0, False, options.get("mask", False)
    )
    with session.evaluating():
        return calibrate(layers_of(model), session, "test")


def moment(rows: Tensor, bias: bool = True) -> Tensor:
    X = rows.reshape(-1, rows.shape[-1]).double()
    X = torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1) if bias else X
    return X.T @ X / len(X)


def is_second_moment(hessian: lobs.Hessian, rows: Tensor, bias: bool = True) -> bool:
    count = rows.numel() // rows.shape[-1]
    return hessian.rows == count and distance(hessian.matrix(), moment(rows, bias)) < 1e-12


def states(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


# ---- attention -----------------------------------------------------------------------------------


class Attending(nn.Module):
    """Attention of x to y."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cross = options.pop("cross", False)
        self.attention = nn.MultiheadAttention(8, 2, **options).double()
        for p in self.attention.parameters():  # biases start at zero
            nn.init.normal_(p)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        x, y, z = (x, y, z) if self.cross else (x, x, x)
        return self.attention(x, y, z, need_weights=False)[0]


def attended(attention: nn.MultiheadAttention, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The input of the output projection for one sequence, computed head by head: x (L, E),
    y (S, kdim), z (S, vdim) -> (L, E)."""
    E, heads = attention.embed_dim, attention.num_heads
    if attention.in_proj_weight is None:
        weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    else:
        weights = list(attention.in_proj_weight.split(E))
    q, k, v = (t @ w.T for t, w in zip((x, y, z), weights, strict=True))
    if attention.in_proj_bias is not None:
        q, k, v = (t + b for t, b in zip((q, k, v), attention.in_proj_bias.split(E), strict=True))
    if attention.bias_k is not None:
        k, v = torch.cat([k, attention.bias_k[0]]), torch.cat([v, attention.bias_v[0]])
    parts = []
    for q_h, k_h, v_h in zip(*(t.chunk(heads, 1) for t in (q, k, v)), strict=True):
        share = torch.softmax(q_h @ k_h.T / (E / heads) ** 0.5, 1)
        parts.append(share @ v_h)
    return torch.cat(parts, 1)


ATTENTIONS = {
    "self": {},
    "self, batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "cross": {"cross": True, "batch_first": True},
    "bias_k": {"add_bias_kv": True, "batch_first": True},
    "three weights": {"cross": True, "kdim": 5, "vdim": 3, "batch_first": True},
    "three weights, no bias": {"cross": True, "kdim": 5, "vdim": 3, "bias": False},
}


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_every_projection_of_attention_sees_its_own_inputs(kind):
    model = Attending(**ATTENTIONS[kind])
    attention = model.attention
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    y = torch.randn(3, 4, attention.kdim, dtype=torch.float64)
    z = torch.randn(3, 4, attention.vdim, dtype=torch.float64)
    if not model.cross:
        y = z = x
    out = torch.stack([attended(attention, *one) for one in zip(x, y, z, strict=True)])
    batch = tuple(t if attention.batch_first else t.transpose(0, 1) for t in (x, y, z))
    found = seen(model, [batch])
    bias = attention.in_proj_bias is not None
    expected = {"q_proj": x, "k_proj": y, "v_proj": z, "out_proj": out.detach()}
    assert list(found) == [f"attention.{name}" for name in expected]
    for name, rows in expected.items():
        (h,) = found[f"attention.{name}"]
        assert is_second_moment(h, rows, bias), name


@pytest.mark.parametrize("kind", ["self", "three weights"])
def test_attention_weights_survive_the_round_trip_bit_for_bit(kind):
    model = Attending(**ATTENTIONS[kind])
    before = states(model)
    for layer in layers_of(model):
        layer.write_back(layer.weight().clone(), layer.bias().clone())
    assert same(states(model), before)
    for layer in layers_of(model):
        layer.write_back(layer.weight() * 2, layer.bias() * 3)
    changed = states(model)
    assert all(
        torch.equal(changed[k], v * (3 if k.endswith("bias") else 2)) for k, v in before.items()
    )


def test_packed_attention_is_pruned_in_place_and_restored_on_failure():
    model = Attending(batch_first=True)
    parameter, before = model.attention.in_proj_weight, states(model)
    x = [torch.randn(5, 7, 8, dtype=torch.float64)] * 3
    calls = iter(range(99))

    def forward(m: nn.Module, b: Tensor) -> Tensor:
        if next(calls) > 2:
            raise KeyboardInterrupt
        return m(b, b, b)

    with pytest.raises(KeyboardInterrupt):
        lobs.prune(model, x, sparsity=0.5, forward=forward, progress=False)
    assert same(states(model), before)
    assert torch.backends.mha.get_fastpath_enabled()
    report = lobs.prune(model, [(b, b, b) for b in x], sparsity=0.5, progress=False)
    assert model.attention.in_proj_weight is parameter
    zeros = [int((part == 0).sum()) for part in parameter.split(8)]
    assert zeros == [32, 32, 32]
    assert int((model.attention.out_proj.weight == 0).sum()) == 32
    assert report.layers[0].shape == (8, 8)
    for i, name in enumerate("qkv"):
        mask = report.masks[f"attention.{name}_proj"]
        assert torch.equal(mask, parameter.split(8)[i] != 0)
    assert not torch.equal(model.attention.in_proj_bias, before["attention.in_proj_bias"])


def test_every_layer_of_an_encoder_is_pruned_although_torch_would_fuse_it():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    report = lobs.prune(model, [torch.randn(4, 9, 8)] * 2, sparsity=0.5, progress=False)
    assert len(report.layers) == 12
    assert report.skipped == ()
    assert {x.rows for x in report.layers} == {72.0}


def test_a_watched_weight_used_outside_a_product_is_refused():
    class Odd(Attending):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.how(self.attention.in_proj_weight))

    x = [torch.randn(5, 8, dtype=torch.float64)]
    for how, message in (
        (lambda w: w[4:12], "in parts"),
        (lambda w: w[:4], "in parts"),
        (lambda w: w[:8].T, "another orientation"),
        (lambda w: w * 2, r"aten::mul"),
        (lambda w: w.float().double(), "_to_copy"),
    ):
        model = Odd()
        model.how = how
        with pytest.raises(ArgumentError, match=rf"'attention\..*{message}.*exclude it"):
            lobs.prune(model, x, sparsity=0.5, progress=False)


def test_weights_are_seen_in_inference_mode_as_left_operands_and_in_batched_products():
    class Odd(Attending):
        def forward(self, x: Tensor) -> Tensor:
            E = self.attention
            q, k, v = E.in_proj_weight.split(8)
            with torch.inference_mode():
                functional.linear(x, q)
            (k @ x.flatten(0, 1).T, torch.bmm(x, v.T.expand(len(x), 8, 8)))
            return functional.linear(x[0, 0], E.out_proj.weight)

    x = torch.randn(3, 4, 8, dtype=torch.float64)
    found = seen(Odd(), [x])
    for name in "qkv":
        assert is_second_moment(found[f"attention.{name}_proj"][0], x)
    assert is_second_moment(found["attention.out_proj"][0], x[:1, :1])


# ---- experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_every_expert_sees_the_rows_routed_to_it(transposed):
    model = Experts(transposed)
    x, chosen = routed([30, 3, 20, 25])
    found = seen(model, [(x, chosen)])
    assert list(found) == ["gate_up_proj", "down_proj"]
    for e in range(4):
        rows = x[chosen[:, 0] == e]
        inside = torch.stack([model.hidden(row, torch.tensor(e)) for row in rows]).detach()
        assert is_second_moment(found["gate_up_proj"][e], rows, transposed)
        assert is_second_moment(found["down_proj"][e], inside, transposed)


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_is_pruned_as_it_would_be_alone(transposed):
    model, (x, chosen) = Experts(transposed), routed([64, 64, 64, 64])
    before = states(model)
    report = lobs.prune(
        model, [(x, chosen)], sparsity=0.5, scope="row", inputs="dense", progress=False
    )
    for e in range(4):
        rows = x[chosen[:, 0] == e]
        W = before["gate_up_proj"][e]
        bias = before["gate_up_proj_bias"][e] if transposed else None
        out = lobs.prune_weight(
            W.T.contiguous() if transposed else W,
            moment(rows, transposed),
            sparsity=0.5,
            scope="row",
            bias=bias,
        )
        got = model.gate_up_proj[e].T if transposed else model.gate_up_proj[e]
        assert distance(got.detach(), out.weight) < 1e-9
        if transposed:
            assert distance(model.gate_up_proj_bias[e].detach(), out.bias) < 1e-9
    assert torch.equal(report.masks["gate_up_proj"], model.gate_up_proj != 0)
    assert report.layers[0].rows == 256


@pytest.mark.parametrize("scope", ["layer", "row"])
def test_experts_without_rows_are_pruned_by_magnitude_and_few_rows_are_noted(scope):
    model, (x, chosen) = Experts(True), routed([40, 0, 5, 40])
    before = states(model)
    report = lobs.prune(model, [(x, chosen)], sparsity=0.5, scope=scope, progress=False)
    notes = " ".join(report.layers[0].notes)
    assert "1 of 4 experts saw no rows and were pruned by magnitude: 1" in notes
    assert "1 of 4 experts: fewer rows (5) than columns (6)" in notes
    was, now = before["gate_up_proj"][1], model.gate_up_proj[1]
    kept = now != 0
    assert 0 < int(kept.sum()) < kept.numel()
    assert torch.equal(now[kept], was[kept])
    assert torch.equal(model.gate_up_proj_bias[1], before["gate_up_proj_bias"][1])
    for r in range(16) if scope == "row" else [slice(None)]:
        assert was[:, r][kept[:, r]].abs().min() >= was[:, r][~kept[:, r]].abs().max()


def test_transformers_experts_run_one_by_one_whatever_the_configuration():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    model.set_experts_implementation("grouped_mm")
    ids = [torch.randint(0, 40, (4, 12))]
    calls: list[tuple[Tensor, Tensor]] = []
    block = model.model.layers[0].mlp
    handle = block.experts.register_forward_pre_hook(lambda m, args: calls.append(args[:2]))
    with torch.no_grad():
        model(*ids)
    handle.remove()
    found = seen(model, ids)["model.layers.0.mlp.experts.gate_up_proj"]
    ((hidden, chosen),) = calls
    for e in range(3):
        rows = hidden[(chosen == e).any(1)]
        assert found[e].rows == len(rows)
        assert distance(found[e].matrix(), moment(rows, False)) < 1e-6
    report = lobs.prune(model, ids, sparsity=0.5, progress=False)
    assert sum("experts" in x.name for x in report.layers) == 2
    assert config._experts_implementation == "grouped_mm"


# ---- one weight, several uses --------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, biases: bool, third: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 6, bias=biases).double()
        self.b = nn.Linear(6, 6, bias=biases).double()
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("biases", [False, True])
def test_tied_layers_are_pruned_once_for_the_inputs_of_both(biases):
    model = Tied(biases)
    original = copy.deepcopy(model)
    x = torch.randn(50, 6).double()
    report = lobs.prune(model, [x], sparsity=0.5, progress=False)
    inside = torch.relu(original.a(x)).detach()
    H = moment(torch.cat([x, inside]), bias=False)
    out = lobs.prune_weight(original.a.weight, H, sparsity=0.5)
    assert distance(model.a.weight.detach(), out.weight) < 1e-9
    assert model.b.weight is model.a.weight
    (layer,) = report.layers
    assert (layer.name, layer.rows) == ("a", 100)
    assert "the weight is shared with 'b': pruned once for both inputs" in layer.notes
    assert any("biases are not shared" in note for note in layer.notes) == biases
    if biases:
        assert torch.equal(model.a.bias, original.a.bias)
        assert torch.equal(model.b.bias, original.b.bias)
    assert report.weights == 36


def test_a_shared_bias_is_updated():
    model = Tied(True)
    model.b.bias = model.a.bias
    original = copy.deepcopy(model)
    x = torch.randn(50, 6).double()
    lobs.prune(model, [x], sparsity=0.5, progress=False)
    inside = torch.relu(original.a(x)).detach()
    out = lobs.prune_weight(
        original.a.weight, moment(torch.cat([x, inside])), sparsity=0.5, bias=original.a.bias
    )
    assert distance(model.a.weight.detach(), out.weight) < 1e-9
    assert distance(model.a.bias.detach(), out.bias) < 1e-9


def test_a_weight_shared_with_an_excluded_layer_is_not_pruned():
    model = Tied(False)
    model.c = nn.Linear(6, 2).double()
    report = lobs.prune(
        model,
        [torch.randn(50, 6).double()],
        sparsity=0.5,
        exclude="b",
        forward=lambda m, x: m.c(m(x)),
        progress=False,
    )
    assert [x.name for x in report.layers] == ["c"]
    excluded, tied = report.skipped
    assert (excluded.name, excluded.reason) == ("b", "excluded")
    assert tied.name == "a"
    assert "tied to b.weight" in tied.reason
    assert int((model.a.weight == 0).sum()) == 0


def test_parameters_in_one_storage_are_tied_only_if_they_overlap():
    memory = torch.randn(72).double()
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False).double() for _ in range(4)))
    model[0].weight = nn.Parameter(memory[:36].view(6, 6))
    model[1].weight = nn.Parameter(memory[36:].view(6, 6))
    x = [torch.randn(50, 6).double()]
    report = lobs.prune(copy.deepcopy(model), x, sparsity=0.5, progress=False)
    assert len(report.layers) == 4
    model[2].weight = nn.Parameter(memory[30:66].view(6, 6))
    report = lobs.prune(model, x, sparsity=0.5, progress=False)
    assert [x.name for x in report.layers] == ["3"]
    assert {x.name for x in report.skipped} == {"0", "1", "2"}


class Block(nn.Module):
    def __init__(self, a: nn.Linear | None = None) -> None:
        super().__init__()
        self.a = a or nn.Linear(6, 6).double()
        self.b = nn.Linear(6, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


class Stacked(nn.Module):
    def __init__(self, share: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = Block()
        second = Block(first.a if share == "module" else None)
        if share == "weight":
            second.a.weight = first.a.weight
        self.blocks = nn.ModuleList([first, second])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("share", ["module", "weight"])
def test_blocks_that_share_a_weight_are_not_calibrated_one_by_one(share):
    model = Stacked(share)
    x = [torch.randn(40, 6).double()]
    report = lobs.prune(model, x, sparsity=0.5, progress=False)
    assert report.layers[0].rows == 80
    assert report.settings["blocks"] == []


# ---- computed weights ----------------------------------------------------------------------------


def test_a_parametrized_weight_is_assigned_to():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    plain = copy.deepcopy(model)
    nn.utils.parametrizations.weight_norm(model[0])
    x = [torch.randn(60, 8).double()]
    report = lobs.prune(model, x, sparsity=0.5, progress=False)
    lobs.prune(plain, x, sparsity=0.5, progress=False)
    assert nn.utils.parametrize.is_parametrized(model[0], "weight")
    assert distance(model[0].weight.detach(), plain[0].weight.detach()) < 1e-12
    assert torch.equal(model[0].weight == 0, plain[0].weight == 0)
    assert torch.equal(report.masks["0"], model[0].weight != 0)


def test_an_interrupted_run_restores_the_parameters_of_a_parametrized_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3)).double()
    nn.utils.parametrizations.weight_norm(model[0])
    before, calls = states(model), iter(range(99))

    def forward(m: nn.Module, b: Tensor) -> Tensor:
        if next(calls) > 1:
            raise KeyboardInterrupt
        return m(b)

    x = [torch.randn(60, 8).double()]
    with pytest.raises(KeyboardInterrupt):
        lobs.prune(model, x, sparsity=0.5, forward=forward, blocks=None, progress=False)
    assert same(states(model), before)


class Directed(nn.Module):
    """A parametrization that turns a row of zeros, which has no direction, into NaN."""

    def forward(self, X: Tensor) -> Tensor:
        length = X.norm(dim=1, keepdim=True)
        return X / length * length

    def right_inverse(self, W: Tensor) -> Tensor:
        return W


def test_a_parametrization_that_cannot_hold_the_pruned_weight_is_refused_and_restored():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5)).double()
    nn.utils.parametrize.register_parametrization(model[0], "weight", Directed())
    before = states(model)
    with pytest.raises(ArgumentError, match=r"'0': its parametrization cannot hold the.*exclude"):
        lobs.prune(model, [torch.randn(60, 8).double()], sparsity=1.0, progress=False)
    assert same(states(model), before)


def normalized(module: nn.Module, old: bool, dim: int | None) -> nn.Module:
    """``module`` with weight normalization, in its older form as a hook or as a parametrization."""
    if not old:
        return nn.utils.parametrizations.weight_norm(module, dim=dim)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(module, dim=dim)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.parametrize(("groups", "kernel"), [(1, 3), (4, 1)])
def test_weight_normalization_holds_any_zeros(old, dim, groups, kernel):
    plain = nn.Conv1d(4, 8, kernel, groups=groups).double()
    weak = plain.weight.detach()
    weak[0] *= 1e-4  # this slice becomes empty, along dimension 0
    weak[:, :, 1:2] *= 1e-4  # and this one along dimension 2
    model = nn.Sequential(normalized(copy.deepcopy(plain), old, dim))
    x = [torch.randn(4, 4, 20).double()]
    report = lobs.prune(model, x, sparsity=0.5, progress=False)
    expected = nn.Sequential(plain)
    lobs.prune(expected, x, sparsity=0.5, progress=False)
    now = model[0](x[0])  # the hook computes the weight in a forward
    assert distance(now.detach(), expected(x[0]).detach()) < 1e-12
    assert torch.equal(model[0].weight == 0, plain.weight == 0)
    assert not bool(plain.weight[0].any())
    assert torch.equal(report.masks["0"], plain.weight != 0)
    assert "0.weight" not in dict(model.named_parameters())


# ---- types that users register -------------------------------------------------------------------


class Scaled(nn.Linear):
    """A known type with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, 2 * self.weight, self.bias)


class ScaledLayer(layers_package.Linear):
    module_type = Scaled

    def columns(self, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield from super().columns(2 * inputs)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_package, "LAYERS", list(layers_package.LAYERS))


@pytest.mark.usefixtures("registry")
def test_a_registered_type_is_pruned_by_its_own_description():
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(6, 4)).double()
    x = torch.randn(50, 6).double()
    with pytest.raises(ArgumentError, match="register_layer"):
        lobs.prune(model, [x], sparsity=0.5, progress=False)
    assert lobs.register_layer(ScaledLayer) is ScaledLayer
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    report = lobs.prune(model, [x], sparsity=0.5, progress=False)
    out = lobs.prune_weight(W, moment(2 * x), sparsity=0.5, bias=b)
    assert distance(model[0].weight.detach(), out.weight) < 1e-9
    assert distance(model[0].bias.detach(), out.bias) < 1e-9
    assert report.layers[0].kind == "Scaled"


@pytest.mark.usefixtures("registry")
def test_a_class_that_cannot_be_registered_is_refused():
    class Without(lobs.Layer):
        pass

    class Again(layers_package.Linear):
        pass

    with pytest.raises(DtypeError, match=r"layer: expected a subclass of lobs_native\.Layer"):
        lobs.register_layer(Scaled)
    with pytest.raises(ArgumentError, match=r"Without\.module_type must be"):
        lobs.register_layer(Without)
    with pytest.raises(ArgumentError, match="Linear already describes Linear"):
        lobs.register_layer(Again)
    lobs.register_layer(ScaledLayer)
    with pytest.raises(ArgumentError, match="ScaledLayer already describes Scaled"):
        lobs.register_layer(ScaledLayer)


# ---- padding -------------------------------------------------------------------------------------


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 5).double()
        self.conv = nn.Conv1d(5, 4, 1).double()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.conv(self.a(x).transpose(1, 2))


def padded(dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(3, 7, dtype=dtype)
    mask[0, 5:] = mask[2, :3] = 0
    x = torch.randn(3, 7, 6).double()
    x[mask == 0] = 1e4
    return x, mask


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
def test_padding_is_left_out_and_reported(dtype):
    x, mask = padded(dtype)
    batch = {"x": x, "attention_mask": mask}
    found = seen(Masked(), [batch, batch], mask=True)
    assert found["a"][0].rows == 2 * 16
    assert distance(found["a"][0].matrix(), moment(x[mask != 0])) < 1e-12
    assert found["conv"][0].rows == 2 * 21
    report = lobs.prune(Masked(), [batch], sparsity=0.5, progress=False)
    assert "5 rows were padding (attention_mask) and were left out" in report.layers[0].notes
    assert any(note.startswith("padding was counted") for note in report.layers[1].notes)
    report = lobs.prune(Masked(), [batch], sparsity=0.5, token_mask=None, progress=False)
    assert [x.rows for x in report.layers] == [21, 21]
    assert not any("padding" in note for x in report.layers for note in x.notes)


def test_the_theorem_does_not_cover_outputs_of_padding():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 5).double()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.a(x)

    x, mask = padded()
    for attention_mask, covered in ((mask, False), (torch.ones_like(mask), True)):
        batch = {"x": x, "attention_mask": attention_mask}
        report = lobs.prune(Net(), [batch], sparsity=0.5, progress=False)
        assert report.error_bound.covered == covered
        assert ("padding" in report.error_bound.reason) != covered


@pytest.mark.parametrize("mask", ["additive", "four dimensions", "all ones", "another length"])
def test_with_a_mask_that_does_not_fit_the_rows_every_row_counts(mask):
    x, fitting = padded()
    attention_mask = {
        "additive": fitting * -1e4,
        "four dimensions": fitting[:, None, None],
        "all ones": torch.ones_like(fitting),
        "another length": fitting[:, 1:],
    }[mask]
    found = seen(Masked(), [{"x": x, "attention_mask": attention_mask}], mask=True)
    assert found["a"][0].rows == 21
    assert found["a"].unmasked == (mask == "another length")


def test_an_encoder_decoder_s_mask_is_ignored_since_it_may_be_of_either_side():
    x, mask = padded()
    model = Masked()
    model.config = type("Config", (), {"is_encoder_decoder": True})()
    assert seen(model, [{"x": x, "attention_mask": mask}], mask=True)["a"][0].rows == 21


def test_padding_is_left_out_when_blocks_are_replayed():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    x, mask = padded()
    batch = {"x": x, "attention_mask": mask}
    report = lobs.prune(Net(), [batch, batch], sparsity=0.5, progress=False)
    assert report.settings["blocks"] == ["blocks"]
    assert {x.rows for x in report.layers} == {32}


@pytest.mark.parametrize(("value", "error"), [("always", ArgumentError), (1, DtypeError)])
def test_token_mask_is_auto_or_none(value, error):
    with pytest.raises(error, match="token_mask"):
        lobs.prune(Tied(False), [torch.randn(9, 6)], sparsity=0.5, token_mask=value)
