"""Errors of large layers from float32 products: within a millionth of float64, or in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.cases import conditioned, features
from torch import Tensor

import lobs_native as lobs
from lobs_native.solvers import measurement
from lobs_native.solvers.costs import Costs
from lobs_native.solvers.drift import Drift
from lobs_native.solvers.settings import LayerSettings
from lobs_native.solvers.weight import prune_groups

pytestmark = pytest.mark.usefixtures("one_thread")

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
R, C = 150, 96


@pytest.fixture
def narrow(monkeypatch):
    """Whether each measurement was done in float32; all sizes count as large."""
    monkeypatch.setattr(measurement, "_LARGE", 0)
    seen: list[bool] = []
    computed = measurement._in_float32

    def observed(*arguments: object) -> float | None:
        found = computed(*arguments)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(measurement, "_in_float32", observed)
    return seen


def outliers() -> Tensor:
    """Inputs of which one is large and one is far from zero, as in transformers."""
    x = features(400, C)
    x[:, 7] *= 300
    x[:, 50] += 50
    return x


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


MOMENTS = {
    "features": moment(features(400, C)),
    "few samples": moment(features(30, C)),
    "outliers": moment(outliers()),
    "means": moment(features(400, C) + 30),
    "10": conditioned(C, 10.0),
    "1e3": conditioned(C, 1e3),
    "1e5": conditioned(C, 1e5),
}


def weight(dtype: torch.dtype, rows: int = R, columns: int = C) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator).div_(columns**0.5).to(dtype)


def form(dW: Tensor, H: Tensor) -> float:
    dW = dW.to(F64)
    return float(((dW @ H) * dW).sum())


@pytest.mark.parametrize("method", ["sweep", "lobs", "wanda", "magnitude"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("H", MOMENTS.values(), ids=MOMENTS)
def test_error_and_energy_are_within_a_millionth(H, dtype, method, narrow):
    W = weight(dtype)
    for share in (0.05, 0.5, 0.95):
        out = lobs.prune_weight(W, H, sparsity=share, method=method)
        assert out.error == pytest.approx(form(out.weight.double() - W.double(), H), rel=1e-6)
        assert out.energy == pytest.approx(form(W, H), rel=1e-6)
    # The energy three times, and errors where they do not follow from the costs of removals.
    assert sum(narrow) >= (3 if method == "sweep" and dtype == F32 else 4)


def test_a_layer_is_large_from_some_size_on(narrow, monkeypatch):
    monkeypatch.undo()
    computed = []
    monkeypatch.setattr(
        measurement, "quadratic_form", lambda dW, H: computed.append(1) or form(dW, H)
    )
    W, x = weight(F32, 256, 512), features(1100, 512)
    out = lobs.prune_weight(W, moment(x), sparsity=0.5, method="magnitude")
    assert computed == []
    assert out.error == pytest.approx(form(out.weight.double() - W.double(), moment(x)), rel=1e-6)
    lobs.prune_weight(W[:, :511], moment(x[:, :511]), sparsity=0.5, method="magnitude")
    assert computed != []


def test_float64_weights_and_few_rows_are_measured_in_float64(narrow):
    H = MOMENTS["features"]
    for W in (weight(F64), weight(F32, 127)):
        out = lobs.prune_weight(W, H, sparsity=0.5, method="sweep")
        assert out.error == pytest.approx(form(out.weight.double() - W.double(), H), rel=1e-12)
    assert not any(narrow)


def test_where_float32_could_lose_more_float64_is_used(narrow):
    """Weights move to a twin of their input: the change is large, its error nearly nothing."""
    x = features(400, C // 2)
    H = moment(torch.cat([x, x + 1e-4 * features(400, C // 2, seed=1)], 1))
    W = weight(F32)
    kept = torch.ones(R, C, dtype=torch.bool)
    kept[:, : C // 2] = False
    out = lobs.prune_weight(W, H, mask=kept, method="lobs", damping=1e-4, refine="solve")
    narrow.clear()
    dW = out.weight.double() - W.double()
    problem_error = measurement_of(out, W, H)
    assert narrow == [False]
    assert problem_error == pytest.approx(form(dW, H), rel=1e-9)


def measurement_of(out: lobs.PrunedWeight, W: Tensor, H: Tensor) -> float:
    """measurement.error for weights that were computed before."""
    from lobs_native.solvers.problem import Problem
    from lobs_native.solvers.workspace import Workspace

    problem = Problem.of(
        W[None], None, [H], damping=0.01, inverted=False, prune_bias=False, mask=None,
        workspace=Workspace("cpu"),
    )  # fmt: skip
    return measurement.error(problem, out.weight[None], None)


@pytest.mark.parametrize("exponent", [-120, -60, 60, 100])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_scale_of_the_weights_does_not_matter(dtype, exponent, narrow):
    H = MOMENTS["features"]
    W = weight(dtype) * 2.0**exponent
    out = lobs.prune_weight(W, H, sparsity=0.5, method="sweep")
    assert out.error == pytest.approx(form(out.weight.double() - W.double(), H), rel=1e-6)
    assert out.energy == pytest.approx(form(W, H), rel=1e-6)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_groups_a_bias_and_a_drift_are_measured_like_in_float64(bias, narrow):
    generator = torch.Generator().manual_seed(3)
    W, moments, pull, inherited = [], [], [], 0.0
    for g in range(2):
        x = features(300, C, seed=g) * (1 + 9 * g)
        if bias:
            x = torch.cat([x, torch.ones(300, 1, dtype=F64)], 1)
        w = torch.randn(R, x.shape[1], generator=generator).double()
        left = 0.3 * features(300, R, seed=7 + g)
        W.append(w.float())
        moments.append(moment(x))
        pull.append(x.T @ left / 300)
        inherited += float(left.square().sum()) / 300
    before = torch.stack(W)
    given, extra = before[:, :, :C].contiguous(), before[:, :, C].contiguous() if bias else None
    out = prune_groups(
        given, moments, LayerSettings(sparsity=0.5, method="sweep"), bias=extra,
        drift=Drift(pull, inherited, 1.0),
    )  # fmt: skip
    after = out.weight if out.bias is None else torch.cat([out.weight, out.bias[:, :, None]], 2)
    dW = after.double() - before.double()
    expected = inherited
    for d, H, p in zip(dW, moments, pull, strict=True):
        expected += form(d, H) - 2 * float((p.T * d).sum())
    assert out.error == pytest.approx(expected, rel=1e-6)
    assert narrow == []  # it followed from the costs of the removals


@pytest.fixture
def products(monkeypatch):
    """How often an error was computed from products; all sizes count as large."""
    monkeypatch.setattr(measurement, "_LARGE", 0)
    seen: list[float] = []
    computed = measurement.error

    def observed(*arguments: object) -> float:
        seen.append(computed(*arguments))
        return seen[-1]

    monkeypatch.setattr(measurement, "error", observed)
    return seen


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_error_of_a_sweep_follows_from_the_costs_of_its_removals(pattern, products):
    x = features(400, C)
    x[:, [3, 60]] = 0  # dead: their weights go for nothing, and damping adds nothing for them
    target = {} if pattern == "2:4" else {"sparsity": 0.6}
    for H in (moment(x), MOMENTS["features"], MOMENTS["few samples"], MOMENTS["1e5"]):
        W = weight(F32)
        out = lobs.prune_weight(W, H, method="sweep", pattern=pattern, **target)
        assert out.error == pytest.approx(form(out.weight.double() - W.double(), H), rel=1e-6)
    assert products == []


def test_costs_that_do_not_fit_the_weights_are_not_taken_for_the_error(products, monkeypatch):
    """Rows that are off by different amounts say nothing of those that were not looked at."""
    from lobs_native.solvers.sweep import Sweep

    costs = Sweep.costs

    def scattered(self: Sweep, removed: Tensor, scope: str) -> Costs | None:
        found = costs(self, removed, scope)
        assert found is not None
        assert found.rows is not None
        noise = 1 + 1e-4 * torch.randn(found.rows.shape, generator=torch.Generator().manual_seed(0))
        return replace(found, rows=found.rows * noise)

    monkeypatch.setattr(Sweep, "costs", scattered)
    W, H = weight(F32), MOMENTS["features"]
    out = lobs.prune_weight(W, H, sparsity=0.5, method="sweep")
    assert products == [out.error]
    assert out.error == pytest.approx(form(out.weight.double() - W.double(), H), rel=1e-6)


def test_weights_that_were_rounded_are_measured_by_products(products):
    W, H = weight(BF16), MOMENTS["features"]
    out = lobs.prune_weight(W, H, sparsity=0.5, method="sweep")
    assert products == [out.error]


def test_methods_that_do_not_aim_at_the_best_weights_are_judged_by_some_of_their_rows():
    W, H = weight(F64, 100), MOMENTS["features"]
    out = lobs.prune_weight(W, H, sparsity=0.5, method="wanda")
    dW = out.weight - W
    residual = (dW @ H).masked_fill(~out.mask, 0.0).norm(dim=1)
    unit = C * torch.finfo(F64).eps * float(torch.linalg.matrix_norm(H, 2))
    ratio = residual / dW.norm(dim=1) / unit
    assert out.optimality == pytest.approx(float(ratio[::4].max()), rel=0.25)
    assert float(ratio[::4].max()) < float(ratio.max())


def test_errors_have_the_same_bits_for_any_number_of_threads(narrow):
    H, W = MOMENTS["features"], weight(F32)
    before, seen = torch.get_num_threads(), set()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        out = lobs.prune_weight(W, H, sparsity=0.5, method="sweep")
        seen.add((out.error, out.energy, out.optimality))
    torch.set_num_threads(before)
    assert len(seen) == 1
    assert all(narrow)
