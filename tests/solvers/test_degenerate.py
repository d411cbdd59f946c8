"""Edge cases of inputs: singular, duplicated, dead, tiny, huge, one of everything.

A defined result or a defined error for each; never a NaN, an infinity or a wrong number in silence.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from helpers.cases import conditioned, features
from torch import Tensor

import lobs_native as lobs
from lobs_native import ops
from lobs_native.errors import LobsError, NonFiniteError, NotPositiveDefiniteError
from lobs_native.solvers.settings import METHODS, SCOPES

pytestmark = pytest.mark.usefixtures("one_thread")

C = 12


def weight(rows: int = 6, columns: int = C, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()


def with_lowest(eigenvalue: float) -> Tensor:
    """(C, C), a positive diagonal, mean eigenvalue 1; the lowest is along the vector of ones."""
    others = (C - eigenvalue) / (C - 1)
    return others * torch.eye(C).double() + (eigenvalue - others) / C


def incurred(
    before: Tensor, out: lobs.PrunedWeight, H: Tensor, bias: Tensor | None = None
) -> float:
    """tr(dW H dW^T) of what was returned, in float64."""
    dW = out.weight.double() - before.double()
    if bias is not None:
        dW = torch.cat([dW, (out.bias.double() - bias.double())[:, None]], 1)
    return float(((dW @ H) * dW).sum())


def all_finite(out: lobs.PrunedWeight) -> bool:
    tensors = [out.weight] if out.bias is None else [out.weight, out.bias]
    numbers = (out.error, out.relative_error, out.damping, out.sparsity)
    return all(bool(torch.isfinite(t).all()) for t in tensors) and all(map(math.isfinite, numbers))


# ---- singular second moments ---------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
def test_fewer_rows_than_columns_is_noted_and_gives_a_finite_result(method, scope):
    h = lobs.Hessian(C).update(features(5, C))
    out = lobs.prune_weight(weight(), h, sparsity=0.5, method=method, scope=scope)
    assert any("fewer rows (5) than columns (12)" in note for note in out.notes)
    assert all_finite(out)
    assert out.error == pytest.approx(incurred(weight(), out, h.matrix()), rel=1e-9)


def test_as_many_rows_as_columns_need_no_note():
    h = lobs.Hessian(C).update(features(C, C))
    assert lobs.prune_weight(weight(), h, sparsity=0.5).notes == ()


def test_duplicate_columns_stand_in_for_each_other():
    """If one of two equal inputs is removed, its weight moves to the other at almost no cost."""
    x = features(100, 6)
    H = lobs.Hessian(C).update(torch.cat([x, x], 1)).matrix()
    W = weight()
    out = lobs.prune_weight(W, H, sparsity=1 / 12, scope="row", damping=1e-6)
    assert all_finite(out)
    assert out.relative_error < 1e-6
    moved = out.weight[:, :6] + out.weight[:, 6:]
    assert torch.allclose(moved, W[:, :6] + W[:, 6:], rtol=1e-4, atol=1e-4)
    plain = lobs.prune_weight(W, H, sparsity=1 / 12, scope="row", method="magnitude")
    assert plain.relative_error > 1e3 * out.relative_error


@pytest.mark.parametrize(
    "H",
    [
        torch.ones(4, 4, dtype=torch.float64),
        torch.diag(torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64)),
        torch.tensor([[4.0, 2, 0], [2, 1, 0], [0, 0, 1]], dtype=torch.float64),
    ],
    ids=["rank 1", "dead column", "duplicate column"],
)
def test_damping_0_on_a_singular_moment_is_an_error_that_names_the_way_out(H):
    W = weight(3, len(H))
    before = W.clone()
    with pytest.raises(NotPositiveDefiniteError, match=r"damping 0\b.*larger damping"):
        lobs.prune_weight(W, H, sparsity=0.5, damping=0)
    assert torch.equal(W, before)
    for method in ("magnitude", "wanda"):  # these invert nothing
        out = lobs.prune_weight(W, H, sparsity=0.5, damping=0, method=method)
        assert out.damping == 0
        assert out.status == "ok"


def test_damping_0_on_a_regular_moment_is_used_unchanged():
    H = conditioned(C, 100.0)
    out = lobs.prune_weight(weight(), H, sparsity=0.5, damping=0)
    assert out.damping == 0
    assert out.status == "ok"
    assert all_finite(out)


# ---- the ladder ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("lowest", "factor"), [(-0.005, 1), (-0.05, 10), (-0.5, 100)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_where_cholesky_fails_the_next_damping_is_used_and_noted(lowest, factor, dtype):
    """The lowest eigenvalue, as a fraction of the mean, decides which step of the ladder holds."""
    H = with_lowest(lowest)
    assert float(H.diagonal().mean()) == pytest.approx(1)
    assert float(torch.linalg.eigvalsh(H)[0]) == pytest.approx(lowest)
    out = lobs.prune_weight(weight().to(dtype), H, sparsity=0.5, damping=0.01)
    assert out.damping == pytest.approx(0.01 * factor, rel=1e-15)
    if factor == 1:
        assert out.status == "ok"
        # Rounding differs between processors and may cause the weights to be solved for again.
        assert all("solved for again in float64" in note for note in out.notes)
    else:
        assert out.status == "damping raised"
        expected = f"damping 0.01; {0.01 * factor:g} was used"
        assert [note for note in out.notes if expected in note]
    assert bool(torch.isfinite(out.weight).all())


def test_the_end_of_the_ladder_is_an_error_that_lists_its_steps():
    with pytest.raises(NotPositiveDefiniteError, match=r"0\.01, 0\.1, 1\b"):
        lobs.prune_weight(weight(), with_lowest(-2.0), sparsity=0.5, damping=0.01)


# ---- dead columns --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", ["lobs", "wanda"])
def test_weights_on_dead_inputs_are_counted_and_go_first(method, scope, bias):
    x = features(60, C)
    x[:, [2, 9]] = 0
    h = lobs.Hessian(C, bias=bias).update(x)
    W = weight()
    W[:, [2, 9]] *= 1e3  # by magnitude they would stay
    b = torch.ones(len(W), dtype=torch.float64) if bias else None
    out = lobs.prune_weight(W, h, sparsity=2 / C, method=method, scope=scope, bias=b)
    assert out.dead_columns == 2
    expected = torch.ones_like(out.mask)
    expected[:, [2, 9]] = False
    assert torch.equal(out.mask, expected)
    assert out.error == 0
    assert torch.equal(out.weight[expected], W[expected])


def test_magnitude_counts_dead_inputs_but_ignores_them():
    x = features(60, C)
    x[:, 2] = 0
    W = weight()
    W[:, 2] = 1e3
    h = lobs.Hessian(C).update(x)
    out = lobs.prune_weight(W, h, sparsity=0.5, method="magnitude")
    assert out.dead_columns == 1
    assert bool(out.mask[:, 2].all())


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("method", METHODS)
def test_where_every_input_is_dead_any_removal_is_free(method, damping):
    W = weight()
    h = lobs.Hessian(C).update(torch.zeros(20, C))
    out = lobs.prune_weight(W, h, sparsity=0.25, method=method, damping=damping)
    assert out.dead_columns == C
    assert (out.error, out.relative_error) == (0, 0)
    assert int((~out.mask).sum()) == W.numel() // 4
    if method != "magnitude":  # all cost nothing: the first ones go
        assert not bool(out.mask.reshape(-1)[: W.numel() // 4].any())
    assert torch.equal(out.weight[out.mask], W[out.mask])


# ---- sizes and scales ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, C), (C, 1)])
def test_one_row_or_one_column(rows, columns, method, dtype):
    W = weight(rows, columns).to(dtype)
    h = lobs.Hessian(columns).update(features(30, columns) + 0.1)
    for scope in SCOPES:
        for share in (0.0, 0.5, 1.0):
            out = lobs.prune_weight(W, h, sparsity=share, method=method, scope=scope)
            assert all_finite(out)
            assert out.error == pytest.approx(incurred(W, out, h.matrix()), rel=1e-9, abs=1e-300)
            if share == 1:
                assert out.relative_error == pytest.approx(1)


def test_one_column_and_one_row_of_every_operation(backend):
    H = torch.zeros(1, 1, dtype=torch.float64)
    ops.hessian_accumulate_(H, torch.tensor([[3.0]]), backend=backend)
    assert float(H) == 9
    F = torch.full((1, 1, 1), 2.0, dtype=torch.float64)
    ops.inverse_update_(F, torch.tensor([[1.0]], dtype=torch.float64), 2.0, backend=backend)
    assert float(F) == 1
    one = torch.ones(1, dtype=torch.bool)
    column, value = ops.saliency_argmin(torch.tensor([[3.0]]), torch.ones(1), one, backend=backend)
    assert (column.tolist(), value.tolist()) == ([0], [9.0])
    W = torch.tensor([[3.0]])
    first = torch.tensor([0], dtype=torch.int32)
    ops.static_order_prune_(W, torch.ones(1, 1), first, torch.tensor([0, 1]), backend=backend)
    assert float(W) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_column_at_a_million_times_the_scale(dtype):
    x = features(200, C)
    x[:, 5] *= 1e6
    W = weight()
    W[:, 5] *= 1e-6
    H = lobs.Hessian(C).update(x.to(dtype)).matrix()
    for damping in (0.01, 1e-9):
        out = lobs.prune_weight(W.to(dtype), H, sparsity=0.5, damping=damping)
        exact = lobs.prune_weight(W, H, sparsity=0.5, damping=damping)
        assert all_finite(out)
        assert torch.equal(out.mask, exact.mask)
        assert out.relative_error == pytest.approx(exact.relative_error, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 1e37])
@pytest.mark.parametrize("method", METHODS)
def test_inputs_whose_squares_leave_float32(method, scale):
    x = (features(50, C) * scale).float()
    h = lobs.Hessian(C).update(x)
    exact = x.double().T @ x.double() / len(x)
    assert float((h.matrix() - exact).abs().max()) <= 1e-12 * float(exact.abs().max())
    W = weight().float()
    out = lobs.prune_weight(W, h, sparsity=0.5, method=method)
    assert all_finite(out)
    assert out.dead_columns == 0
    assert out.error == pytest.approx(incurred(W, out, exact), rel=1e-6)


@pytest.mark.parametrize("exponent", [-200, -160, -100, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_scale_of_the_row_weights_does_not_matter(dtype, exponent):
    """A mean with weights t and one with weights a * t are the same."""
    x = torch.randint(-8, 8, (30, C), generator=torch.Generator().manual_seed(0)).to(dtype)
    t = torch.arange(1, 31, dtype=torch.float64)
    plain = lobs.Hessian(C).update(x, t)
    other = lobs.Hessian(C).update(x, t * 2.0**exponent)
    assert torch.allclose(other.matrix(), plain.matrix(), rtol=1e-6, atol=0)


def test_a_sum_kept_in_float32_that_overflows_is_an_error():
    h = lobs.Hessian(C, dtype=torch.float32).update(torch.full((2, C), 1e30))
    with pytest.raises(NonFiniteError, match="overflowed"):
        h.matrix()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e100, 1e160, 1e250, 1e300])
@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e20, 1.2e308])
def test_float64_up_to_its_limits_gives_a_true_result_or_a_lobs_error(scale, size, method):
    """A cost that float64 cannot hold may be called infinite; it must not be called zero or NaN."""
    W = weight() * size
    H = torch.eye(C, dtype=torch.float64) * scale
    try:
        out = lobs.prune_weight(W, H, sparsity=0.5, method=method)
    except LobsError:
        return
    assert bool(torch.isfinite(out.weight).all())
    assert out.error > 0
    assert not math.isnan(out.error)
    assert not math.isnan(out.relative_error)
    assert 0 < out.relative_error <= 1 or out.error == math.inf


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float16, 60000.0), (torch.bfloat16, 3e38), (torch.float32, 3e38)],
    ids=str,
)
def test_a_kept_weight_that_outgrows_its_dtype_is_not_returned_silently(dtype, value):
    """One of two equal inputs is removed, and the other would need twice its weight."""
    x = features(50, 1).repeat(1, 2)
    W = torch.full((1, 2), value, dtype=dtype)
    try:
        out = lobs.prune_weight(W, lobs.Hessian(2).update(x), sparsity=0.5, damping=1e-3)
    except LobsError as error:
        assert "weight" in str(error)  # noqa: PT017  (both ways out are right)
        return
    assert bool(torch.isfinite(out.weight).all())
    assert out.error > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (torch.float32, torch.float16),
        (torch.float64, torch.bfloat16),
        (torch.float16, torch.float64),
    ],
    ids=str,
)
def test_the_error_is_that_of_the_returned_tensors_whatever_types_mix(wide, narrow, method):
    h = lobs.Hessian(C, bias=True).update(features(60, C))
    W = weight().to(wide)
    bias = torch.linspace(1, 2, len(W), dtype=torch.float64).sqrt().to(narrow)
    out = lobs.prune_weight(W, h, sparsity=0.5, method=method, bias=bias)
    assert out.bias.dtype == narrow
    assert out.error == pytest.approx(incurred(W, out, h.matrix(), bias), rel=1e-9)


# ---- every 16-bit pattern ------------------------------------------------------------------------

HALVES = [torch.float16, torch.bfloat16]


def every_pattern(dtype: torch.dtype) -> Tensor:
    """All 65,536 values of a 16-bit type, by bit pattern."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("order", ["by pattern", "shuffled"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_products_of_all_finite_16_bit_values_are_exact(dtype, order, backend):
    """One row at a time, so that nothing but the products can round. Shuffled, scales meet."""
    values = every_pattern(dtype)
    values = values[torch.isfinite(values)]
    if order == "shuffled":
        # Products of bfloat16 that float32 cannot hold are not promised next to ones that it can.
        inside = values.double().abs()
        values = values[((inside > 2.0**-50) & (inside < 2.0**58)) | (inside == 0)]
        generator = torch.Generator().manual_seed(0)
        values = values[torch.randperm(len(values), generator=generator)]
    seen = 0
    # Every value meets all others of its part. The emulation takes seconds for parts of 512.
    for x in values.split(256 if backend == "emulated" else 512):
        H = torch.zeros(len(x), len(x), dtype=torch.float64)
        ops.hessian_accumulate_(H, x[None], backend=backend)
        exact = x.double()
        assert torch.equal(H, torch.outer(exact, exact).tril())
        seen += len(x)
    assert seen == len(values)
    assert seen > 20_000


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_one_column_of_all_finite_16_bit_values_is_summed_as_in_float64(dtype, backend):
    values = every_pattern(dtype)
    values = values[torch.isfinite(values)]
    assert len(values) == {torch.float16: 63_488, torch.bfloat16: 65_280}[dtype]
    H = torch.zeros(1, 1, dtype=torch.float64)
    ops.hessian_accumulate_(H, values[:, None], backend=backend)
    expected = math.fsum(v * v for v in values.double().tolist())
    # Odd squares round the same way again and again; a device's float32 sums are one after another.
    rel = 4e-7 if ops.on_device(backend) else 1e-7
    assert float(H) == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_16_bit_pattern_that_is_not_finite_is_refused_where_it_stands(dtype):
    """All of them, each at its own position among zeros; negative zeros and denormals are not."""
    values = every_pattern(dtype)
    wrong = values[~torch.isfinite(values)]
    assert len(wrong) == {torch.float16: 2048, torch.bfloat16: 256}[dtype]
    H = torch.zeros(16, 16, dtype=torch.float64)
    X = torch.zeros(128, 16, dtype=dtype)
    for k, value in enumerate(wrong):
        r, c = divmod(k % X.numel(), 16)
        X[r, c] = value
        with pytest.raises(NonFiniteError, match=re.escape(f"X: {float(value)} at ({r}, {c})")):
            ops.hessian_accumulate_(H, X)
        X[r, c] = 0
    assert int(torch.count_nonzero(H)) == 0
    ops.hessian_accumulate_(H, X)  # nothing is left behind


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("at", [(0, 0), (1023, 15), (1024, 0), (1500, 7), (1999, 15)])
def test_the_first_of_several_bad_values_is_named(at, layout, dtype, backend):
    """Around 1024, where a second look begins."""
    X = torch.ones(2000, 16, dtype=dtype)
    X[at] = float("inf")
    X[1999, 15] = float("-inf") if at != (1999, 15) else float("inf")
    X = X.T.contiguous().T if layout == "columns" else X
    H = torch.zeros(16, 16, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=re.escape(f"X: inf at {at}")):
        ops.hessian_accumulate_(H, X, backend=backend)
    assert int(torch.count_nonzero(H)) == 0
