"""All functions that take tensors, on a pretend CUDA device: none mixes devices, and results are on
the device of the inputs and equal to those of the CPU."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import pretend
from helpers.cases import conditioned, features
from helpers.pretend import CUDA
from helpers.tolerances import RELATIVE, distance
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native import ops
from lobs_native.errors import (
    ArgumentError,
    BackendError,
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
)
from lobs_native.ops import dispatch, solve
from lobs_native.solvers.settings import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

F64, F32 = torch.float64, torch.float32
R, C = 8, 16
ON_CPU = "exchanged on the CPU"  # the only note that is specific to a device


@pytest.fixture(params=["reference", "kernels"])
def device(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """A pretend device, and the backend to compare with on the CPU."""
    kernels = request.param == "kernels"
    row = request.getfixturevalue("emulated") if kernels else None
    with pretend.device(row):
        yield None if kernels else "reference"


def layer(dtype: torch.dtype = F32, bias: bool = False, mask: bool = False) -> dict[str, Any]:
    """A weight with one zero, a second moment with one dead column, a bias and a mask."""
    generator = torch.Generator().manual_seed(5)
    x = features(8 * C, C, seed=2)
    x[:, 3] = 0.0
    given: dict[str, Any] = {"weight": torch.randn(R, C, generator=generator).to(dtype)}
    given["weight"][2, 5] = 0.0
    if bias:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)
        given["bias"] = torch.randn(R, generator=generator).to(dtype)
    if mask:
        allowed = torch.rand(R, C // 4, generator=generator) > 0.1
        given["mask"] = allowed.repeat_interleave(4, 1)
    given["hessian"] = x.T @ x / len(x)
    return given


def moved(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(CUDA) if isinstance(v, Tensor) else v for k, v in given.items()}


def check_same(
    found: lobs.PrunedWeight,
    expected: lobs.PrunedWeight,
    backend: str | None,
    tolerance: float | None = None,
) -> None:
    """Everything except the device, the backend and the time."""
    for name in ("weight", "bias", "mask", "bias_mask"):
        here, there = getattr(found, name), getattr(expected, name)
        if there is None:
            assert here is None
            continue
        assert here.device == CUDA
        assert here.dtype == there.dtype
        if here.dtype == torch.bool:
            assert torch.equal(here.cpu(), there), name
        else:
            allowed = tolerance or 10 * RELATIVE.get(there.dtype, 1e-3)
            assert distance(here.cpu(), there) < allowed, name
    for name in ("sparsity", "damping", "method", "status", "dead_columns", "swaps"):
        assert getattr(found, name) == getattr(expected, name), name
    for name in ("error", "relative_error"):
        there = pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-7)
        assert getattr(found, name) == there, name
    assert found.backend == (backend or "emulated")
    assert [note for note in found.notes if ON_CPU not in note] == list(expected.notes)


def check_both(
    of: Callable[..., lobs.PrunedWeight],
    given: dict[str, Any],
    backend: str | None,
    tolerance: float | None = None,
) -> lobs.PrunedWeight:
    """``of(**given)`` gives the same on the device as on the CPU."""
    with torch._C.DisableTorchFunction():  # CPU tensors need no inspection
        expected = of(**given, backend=backend)
    found = of(**moved(given), backend=backend)
    check_same(found, expected, backend, tolerance)
    return found


# ---- one layer -----------------------------------------------------------------------------------

PARTS = [{}, {"bias": True}, {"bias": True, "mask": True}]
TARGETS: list[dict[str, Any]] = [
    *({"sparsity": 0.5, "scope": scope} for scope in ("layer", "row")),
    {"pattern": "2:4"},
    *({"pattern": "1x4", "sparsity": 0.5, "scope": scope} for scope in ("layer", "row")),
]


def named(value: Any) -> str:
    return " ".join(map(str, value.values())) or "plain" if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("parts", PARTS, ids=lambda p: "+".join(p) or "weight")
@pytest.mark.parametrize("target", TARGETS, ids=named)
@pytest.mark.parametrize("method", METHODS)
def test_prune_weight(method, target, parts, device):
    if target.get("pattern") == "2:4" and "mask" in parts:
        given = layer(**{**parts, "mask": False})
        given["mask"] = torch.ones(R, C, dtype=torch.bool)
        given["mask"][:, ::4] = False
    else:
        given = layer(**parts)
    check_both(lobs.prune_weight, {**given, **target, "method": method}, device)


@pytest.mark.parametrize("method", METHODS)
def test_prune_weight_in_other_types(method, device):
    for dtype in (F64, torch.float16):
        check_both(lobs.prune_weight, {**layer(dtype), "sparsity": 0.4, "method": method}, device)


@pytest.mark.parametrize("target", [{"sparsity": 0.3}, {"max_error": 0.3}], ids=named)
@pytest.mark.parametrize("method", METHODS)
def test_prune_weight_with_its_biases_and_by_error(method, target, device):
    given = {**layer(bias=True), **target, "method": method, "prune_bias": True}
    check_both(lobs.prune_weight, given, device)


@pytest.mark.parametrize("method", METHODS)
def test_prune_weight_by_a_mask_alone(method, device):
    check_both(lobs.prune_weight, {**layer(bias=True, mask=True), "method": method}, device)


def test_prune_weight_by_threshold_and_nothing_and_everything(device):
    check_both(lobs.prune_weight, {**layer(), "threshold": 0.4, "method": "lobs"}, device)
    for method in METHODS:
        for sparsity in (0.0, 1.0):
            given = {**layer(bias=True), "sparsity": sparsity, "method": method}
            check_both(lobs.prune_weight, given, device)


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=named)
@pytest.mark.parametrize("refine", ["solve", "exchange"])
@pytest.mark.parametrize("method", ["exact", "magnitude"])
def test_refined(method, refine, target, device):
    given = {**layer(bias=True), **target, "method": method, "refine": refine}
    found = check_both(lobs.prune_weight, given, device)
    notes = [note for note in found.notes if ON_CPU in note]
    assert len(notes) == (refine == "exchange" and device is None)


def test_inputs_that_are_all_the_same(device):
    """The effect of float32 at a condition of 16 / damping; below 1e-4 float64 does the work."""
    given = {**layer(), "hessian": torch.ones(C, C, dtype=F64), "sparsity": 0.5, "damping": 1e-4}
    for how in ({"scope": "layer"}, {"scope": "row"}, {"damping": 1e-6}, {"pattern": "1x4"}):
        check_both(lobs.prune_weight, {**given, **how}, device, tolerance=1e-2)


@pytest.mark.parametrize(
    "how", [{"scope": "row"}, {"pattern": "2:4"}, {"scope": "layer"}], ids=named
)
def test_rows_that_fail_in_float32_are_redone_wherever_they_are(how, device, monkeypatch):
    trace = ops.exact_trace

    def losing(W: Tensor, *args: Any, **options: Any) -> ops.Trace:
        done = trace(W, *args, **options)
        every_third = torch.arange(len(W), device=W.device) % 3 == 0
        return dataclasses.replace(done, lost=every_third) if W.dtype == types[0] else done

    monkeypatch.setattr(ops, "exact_trace", losing)
    types = [F32]
    given = {**layer(bias=True, mask="scope" in how), **how}
    given.update({} if "pattern" in how else {"sparsity": 0.5})
    found = check_both(lobs.prune_weight, given, device)
    assert any("redone in float64" in note for note in found.notes)
    types = [F64]
    given = {**given, "damping": 1e-5}
    with pytest.raises(NotPositiveDefiniteError, match=r"left no positive pivot in row 0 after"):
        lobs.prune_weight(**moved(given), backend=device)


def test_a_sample_of_many_rows_decides_how_far_to_trace(device):
    given = {"weight": torch.randn(70, 12), "hessian": layer()["hessian"][:12, :12]}
    check_both(lobs.prune_weight, {**given, "sparsity": 0.5}, device)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x4"])
@pytest.mark.parametrize("parts", PARTS[:2], ids=lambda p: "+".join(p) or "weight")
def test_trace(parts, pattern, device):
    given = {**layer(**parts), "pattern": pattern, "until": 0.6}
    here = lobs.trace_weight(**moved(given), backend=device)
    there = lobs.trace_weight(**given, backend=device)
    assert here.order.device == here.loss.device == CUDA
    assert torch.equal(here.order.cpu(), there.order)
    assert distance(here.loss.cpu(), there.loss) < 1e-4
    for scope in ("layer", "row"):
        for sparsity in (0.5,) if pattern == "2:4" else (0.25, 0.5, 0.75):
            found, expected = here.at(sparsity, scope), there.at(sparsity, scope)
            check_same(found, expected, device)
        for x, y in zip(here.curve(scope), there.curve(scope), strict=True):
            assert distance(x.cpu(), y) < 1e-4


def test_parts_on_other_devices_are_refused(device):
    given = layer(bias=True, mask=True)
    for name in ("hessian", "bias", "mask"):
        mixed = {**moved(given), name: given[name]}
        with pytest.raises(ShapeError, match=rf"{name} is on cpu but weight is on cuda:0"):
            lobs.prune_weight(**mixed, sparsity=0.5, backend=device)


def test_what_is_not_finite_is_named(device):
    given = moved(layer())
    for name in ("weight", "hessian"):
        bad = given[name].clone()
        bad[1, 2] = torch.nan
        with pytest.raises(NonFiniteError, match=rf"{name}: nan at \(1, 2\)"):
            lobs.prune_weight(**{**given, name: bad}, sparsity=0.5, backend=device)


def test_planned_memory(emulated):
    with pretend.device(emulated):
        plan = lobs.plan_memory(5000, 64, backend="cuda")
        assert plan.threads == 4  # two for each of two multiprocessors
        assert plan.scratch == plan.threads * ops.exact_bytes(64, backend="cuda")
        assert lobs.plan_memory(3, 64, backend="cuda").threads == 3
        one = ops.exact_bytes(64, backend="cuda")
        assert lobs.plan_memory(7, 64, memory=3 * one, backend="cuda").threads == 3
        with pytest.raises(MemoryError, match="one row needs"):
            lobs.plan_memory(7, 64, memory=one - 1, backend="cuda")
        given = {**layer(), "sparsity": 0.5}
        few = lobs.prune_weight(**moved(given), memory=3 * ops.exact_bytes(C, backend="cuda"))
        assert torch.equal(few.weight.cpu(), lobs.prune_weight(**moved(given)).weight.cpu())


def test_without_a_usable_gpu_plain_torch_takes_over_with_a_warning():
    ready, detail = next(row[1:] for row in lobs.backends() if row[0] == "cuda")
    if ready:
        pytest.skip(f"this machine has a GPU: {detail}")
    W, H = layer()["weight"], layer()["hessian"]
    with pretend.device(None, patched=False):
        with pytest.warns(RuntimeWarning, match="slowly: .*CUDA") as warned:
            out = lobs.prune_weight(W.to(CUDA), H.to(CUDA), sparsity=0.5)
        assert out.backend == "reference"
        assert {str(w.message) for w in warned} == {str(warned[0].message)}
        with pytest.raises(BackendError, match=r"'cuda' is not ready here: .*CUDA"):
            lobs.prune_weight(W.to(CUDA), H.to(CUDA), sparsity=0.5, backend="cuda")
    with pytest.raises(BackendError, match=r"'cuda' is not ready here: .*CUDA"):
        lobs.prune_weight(W, H, sparsity=0.5, backend="cuda")


# ---- second moments ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=str)
def test_hessian(dtype, device, monkeypatch):
    if device is not None:  # a Hessian takes no backend
        monkeypatch.setattr(dispatch, "_fastest", lambda _: "reference")
    x = features(50, C).to(dtype).view(5, 10, C)
    weights = torch.arange(50).view(5, 10) % 3

    def made(where: torch.device | str) -> lobs.Hessian:
        h = lobs.Hessian(C, bias=True, device=where)
        h.update(x.to(where)).update(x[0].to(where), weights[0].to(where))
        other = lobs.Hessian(C, bias=True, dtype=F32, device=where)
        return h.merge(other.update(x.to(where).transpose(0, 1), weights.T.to(where)))

    here, there = made(CUDA), made("cpu")
    assert here.device == here.matrix().device == CUDA
    assert here.rows == there.rows
    assert distance(here.matrix().cpu(), there.matrix()) < RELATIVE[F32]
    again = lobs.Hessian(C, bias=True, device=CUDA)
    for state in (here.state_dict(), {k: v.cpu() for k, v in here.state_dict().items()}):
        again.load_state_dict(state)
        assert again.device == again.matrix().device == CUDA
        assert torch.equal(again.matrix().cpu(), here.matrix().cpu())
        assert again.rows == here.rows
    assert there.merge(here).device.type == "cpu"
    assert lobs.Hessian.from_matrix(here.matrix()).device == CUDA
    with pytest.raises(ShapeError, match="x is on cpu"):
        here.update(x)
    before = here.matrix().cpu()
    bad = x.to(CUDA)
    bad[2, 3, 4] = torch.inf
    with pytest.raises(NonFiniteError, match=r"x: inf at \(2, 3, 4\)"):
        here.update(bad)
    assert torch.equal(here.matrix().cpu(), before)
    W = torch.randn(R, C)
    out = lobs.prune_weight(
        W.to(CUDA), here, sparsity=0.5, bias=torch.zeros(R, device=CUDA), backend=device
    )
    assert out.weight.device == CUDA


@pytest.mark.parametrize(("columns", "blocks"), [(C, 1), (C, 3), (520, 1)])
def test_streaming_inverse(columns, blocks, device):
    x = features(30, columns)

    def made(where: torch.device | str) -> lobs.StreamingInverse:
        inverse = lobs.StreamingInverse(columns, rows=30, alpha=100.0, blocks=blocks, device=where)
        return inverse.update(x[:29].to(where)).update(x[29].float().to(where))

    here, there = made(CUDA), made("cpu")
    assert here.inverse().device == CUDA
    assert distance(here.inverse().cpu(), there.inverse()) < 1e-9
    with pytest.raises(ShapeError, match="x is on cpu"):
        here.update(x)
    bad = x.to(CUDA)
    bad[1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"x: nan at \(1, 2\)"):
        here.update(bad)
    assert distance(here.inverse().cpu(), there.inverse()) < 1e-9


# ---- operations that are called directly, and what they say --------------------------------------


def test_operations(device):
    H = layer()["hessian"] + torch.eye(C, dtype=F64)
    W, score = torch.randn(R, C, dtype=F64), torch.randn(R, C, dtype=F64)
    live = torch.rand(R, C) > 0.2

    def both(of: Callable[..., Any], *given: Any, **options: Any) -> tuple[Any, Any]:
        there = [x.clone() if isinstance(x, Tensor) else x for x in given]
        here = [x.to(CUDA) if isinstance(x, Tensor) else x for x in given]
        found, expected = (of(*x, **options, backend=device) for x in (here, there))
        pairs = [*zip(here, there, strict=True)]
        pairs += zip(found, expected, strict=True) if isinstance(found, tuple) else []
        for x, y in pairs:
            if isinstance(x, Tensor):
                assert x.device == CUDA
                assert distance(x.cpu().double(), y.double()) < 1e-9
        return found, expected

    both(ops.saliency_argmin, W, H.diagonal(), live)
    both(ops.rank_rows, score, live)
    found, expected = both(ops.rank_lowest, score, 7)
    assert torch.equal(found.cpu(), expected)
    order, start = ops.rank_rows(score, live, backend="reference")
    both(ops.static_order_prune_, W, H, order, start)
    block = torch.linalg.cholesky(H, upper=True)[:8, :8].contiguous()
    gone, E = (score[:, :8] > 0).to(torch.uint8), torch.empty(R, 8, dtype=F64)
    both(ops.sweep_block_, W[:, :8].contiguous(), block, gone, E.clone())
    both(ops.sweep_block_, W[:, :8].contiguous(), block, gone * 0, E, group=4, per_group=2)
    found, expected = both(ops.admm_step_, score * 0.1, -W, W, live, count=R * C // 2)
    assert found.changed == expected.changed > 0
    kept = W.masked_fill(live, 0)
    both(ops.conjugate_step_, W, kept, kept.clone(), kept @ H, live, kept.square().sum(1))
    state = (~live).to(torch.uint8) * 2
    found, expected = both(ops.exact_trace, W, H, state=None, limit=9, update=True)
    assert torch.equal(found.order.cpu(), expected.order)
    found = ops.exact_trace(W.to(CUDA), H.to(CUDA), state=state.to(CUDA), backend=device)
    expected = ops.exact_trace(W, H, state=state, backend=device)
    assert torch.equal(found.order.cpu(), expected.order)
    assert torch.equal(found.count.cpu(), expected.count)


def test_operations_name_what_they_refuse(device):
    H, W = torch.eye(C, dtype=F64, device=CUDA), torch.ones(R, C, dtype=F64, device=CUDA)
    gone = torch.zeros(R, C, dtype=torch.uint8, device=CUDA)
    order = torch.tensor([0, 1, 1, 2], dtype=torch.int32, device=CUDA)
    start = torch.tensor([0, *[2] * (R - 1), 4], device=CUDA)
    bad = H.clone()
    bad[1, 1] = -1.0
    with pytest.raises(NotPositiveDefiniteError, match=r"A: -1.0 at \(1, 1\)"):
        ops.static_order_prune_(W, bad, order, start, backend=device)
    twice = torch.tensor([0, 1, 2, 2], dtype=torch.int32, device=CUDA)
    with pytest.raises(ArgumentError, match=f"column 2 of row {R - 1}"):
        ops.static_order_prune_(W, H, twice, start, backend=device)
    live = torch.ones(C, dtype=torch.bool, device=CUDA)
    with pytest.raises(NotPositiveDefiniteError, match="row 0, column 1"):
        ops.saliency_argmin(W, bad.diagonal(), live, backend=device)
    with pytest.raises(NotPositiveDefiniteError, match=r"A: -1.0 at \(1, 1\)"):
        ops.exact_trace(W, bad, backend=device)
    with pytest.raises(NotPositiveDefiniteError, match=r"U: -1.0 at \(1, 1\)"):
        ops.sweep_block_(W, bad, gone, torch.empty_like(W), backend=device)
    F = -torch.eye(4, dtype=F64, device=CUDA)[None]
    with pytest.raises(NotPositiveDefiniteError, match="block 0"):
        ops.inverse_update_(F, torch.ones(2, 4, dtype=F64, device=CUDA), 1.0, backend=device)
    with pytest.raises(NotPositiveDefiniteError, match="row 0"):
        ops.exchange_(W.clone(), bad, gone.bool(), backend=device)
    with pytest.raises(ShapeError, match="live is on cpu"):
        ops.saliency_argmin(W, H.diagonal(), live.cpu(), backend=device)


# ---- systems that torch solves -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_supports_are_solved_in_little_memory(dtype, device, monkeypatch):
    """The result is the same whether rows are solved one by one or all together."""
    M = conditioned(70, 30.0)
    P = torch.rand(40, 70) < torch.linspace(0, 1, 40)[:, None]
    X = torch.randn(40, 70, dtype=F64)
    expected = X.clone()
    ops.support_solve_(expected, M, P, backend="reference")
    for bytes_together in (1, 300_000, 256 << 20):
        monkeypatch.setattr(solve, "_SOLVED_TOGETHER", bytes_together)
        found = X.to(CUDA, dtype)
        ops.support_solve_(found, M.to(CUDA, dtype), P.to(CUDA), backend=device)
        assert distance(found.cpu(), expected) < RELATIVE[dtype]
        bad = M.clone()
        bad[7, 7] = -1.0
        with pytest.raises(NotPositiveDefiniteError, match=f"row {int(P[:, 7].int().argmax())}:"):
            ops.support_solve_(X.to(CUDA), bad.to(CUDA), P.to(CUDA), backend=device)


# ---- a network -----------------------------------------------------------------------------------


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 2, stride=2, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )


@pytest.mark.parametrize("inputs", ["pruned", "dense", "corrected"])
@pytest.mark.parametrize(
    "how",
    [
        {"method": "exact", "sparsity": 0.5},
        {"method": "exact", "sparsity": 0.5, "scope": "model", "sensitivity": None},  # no autograd
        {"method": "exact", "pattern": "1:2", "exclude": ["0", "7"], "refine": "exchange"},
        {"method": "sweep", "sparsity": 0.5, "prune_bias": True},
        {"method": "lobs", "sparsity": 0.5},
    ],
    ids=named,
)
def test_prune(how, inputs, device, monkeypatch):
    if device is not None:
        monkeypatch.setattr(dispatch, "_fastest", lambda _: "reference")
    there = network()
    here = copy.deepcopy(there).to(CUDA)
    batches = [torch.randn(16, 2, 6, 6) for _ in range(3)]
    expected = lobs.prune(there, batches, **how, inputs=inputs, backend=device, progress=False)
    found = lobs.prune(
        here, batches, **how, inputs=inputs, device=CUDA, backend=device, progress=False
    )
    assert found.removed == expected.removed
    for name, parameter in there.named_parameters():
        on_device = dict(here.named_parameters())[name]
        assert on_device.device == CUDA
        assert on_device.requires_grad
        assert distance(on_device.detach().cpu(), parameter.detach()) < 1e-3
    for name, mask in expected.masks.items():
        assert torch.equal(found.masks[name].cpu(), mask)
    for layer, other in zip(found.layers, expected.layers, strict=True):
        assert layer.error == pytest.approx(other.error, rel=1e-3)
        assert [n for n in layer.notes if ON_CPU not in n] == list(other.notes)
    assert found.error_bound.covered == expected.error_bound.covered
    assert found.error_bound.measured == pytest.approx(expected.error_bound.measured, rel=1e-3)
    assert json.dumps(found.to_dict())  # it contains no tensors


def test_prune_a_chain_and_restore_it(device, monkeypatch):
    if device is not None:
        monkeypatch.setattr(dispatch, "_fastest", lambda _: "reference")
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).to(CUDA)
    x = torch.randn(40, 12, device=CUDA)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        bad = x.clone()
        bad[3, 4] = torch.inf
    with pytest.raises(NonFiniteError, match="layer '0'"):
        lobs.prune(model, [x, bad], sparsity=0.5, backend=device, progress=False)
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), was)
    report = lobs.prune(model, [x], sparsity=0.5, backend=device, progress=False)
    assert report.error_bound.covered
    assert report.error_bound.spectral is not None
    assert report.error_bound.measured <= report.error_bound.spectral
    options = {"sparsity": 0.5, "scope": "model", "sensitivity": "bound", "progress": False}
    lobs.prune(model, [x], backend=device, **options)
    assert sum(int((layer.weight == 0).sum()) for layer in model[::2]) == 64


# ---- the pretence --------------------------------------------------------------------------------


def test_views_of_a_pretend_tensor_share_its_memory():
    with pretend.device(None):
        x = torch.arange(12.0, device=CUDA).view(3, 4)
        x[1:, ::2] = 0.0
        x.T[3].add_(1)
        x.diagonal().fill_(-1.0)
        x.split(2)[1].mul_(2)
        x.as_strided((2,), (4,), 1)[1] = 7.0
        x[x == 2] = 8.0
        assert x.cpu().tolist() == [[-1, 1, 8, 4], [0, 7, 0, 8], [0, 18, -2, 24]]
        assert x[:, 1].stride() == (4,)
        assert x[:, 1].data_ptr() == x.data_ptr() + 4
        assert x.T.contiguous().data_ptr() != x.data_ptr()


def test_the_pretend_device_refuses_what_cuda_refuses():
    with pretend.device(None):
        x, y = torch.ones(3, 4, device=CUDA), torch.ones(3, 4)
        refused: list[Callable[[], Any]] = [
            lambda: x + y,
            lambda: y.add_(x),
            lambda: x @ y.T,
            lambda: torch.cat([x, y]),
            lambda: torch.where(x > 0, x, y),
            lambda: y[torch.zeros(2, dtype=torch.int64, device=CUDA)],
            lambda: x.gather(1, torch.zeros(3, 1, dtype=torch.int64)),
            lambda: x.__setitem__(x > 0, torch.ones(12)),
            lambda: x[0, 0] * y,
            lambda: torch.ones(()).add_(x[0, 0]),
            lambda: nn.functional.linear(x, y),
        ]
        for call in refused:
            with pytest.raises(RuntimeError, match="same device"):
                call()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        allowed = x + torch.tensor(1.0) + x[torch.tensor([0, 1, 2])]
        x[0] = y[0]
        y.copy_(allowed)
        assert bool((y == 3).all())
        assert x.to("cpu").device.type == "cpu"
        assert torch.tensor([x[0, 0], x[1, 1]]).device.type == "cpu"
