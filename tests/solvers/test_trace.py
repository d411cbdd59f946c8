"""One trace of a layer gives what pruning would give at every sparsity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.cases import features, layer
from helpers.plain import damped, error_of, mask_of, merged, traced
from helpers.tolerances import RELATIVE, distance
from torch import Tensor

import lobs_native as lobs
from lobs_native.errors import ArgumentError, DtypeError, PatternError
from lobs_native.solvers import result
from lobs_native.solvers.settings import SCOPES

pytestmark = pytest.mark.usefixtures("one_thread")

F64, F32 = torch.float64, torch.float32
SHARES = [0.0, 0.1, 0.5, 0.9, 1.0]


def uneven(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A layer whose rows differ in scale by a factor of a thousand."""
    W, H = layer(rows, columns, seed)
    generator = torch.Generator().manual_seed(seed)
    return W * 10 ** (3 * torch.rand(rows, 1, generator=generator, dtype=F64) - 1.5), H


def check_same(found: lobs.PrunedWeight, expected: lobs.PrunedWeight) -> None:
    """Whether weights are equal up to the rounding of another way to compute them."""
    assert torch.equal(found.mask, expected.mask)
    tolerance = RELATIVE[found.weight.dtype]
    assert distance(found.weight, expected.weight) < tolerance
    assert bool((found.weight[~found.mask] == 0).all())
    assert (found.bias is None) == (expected.bias is None)
    if found.bias is not None:
        assert distance(found.bias, expected.bias) < tolerance
    assert (found.bias_mask is None) == (expected.bias_mask is None)
    if found.bias_mask is not None:
        assert torch.equal(found.bias_mask, expected.bias_mask)
    assert found.error == pytest.approx(expected.error, rel=10 * tolerance)
    assert found.relative_error == pytest.approx(expected.relative_error, rel=10 * tolerance)
    for name in ("sparsity", "damping", "method", "backend", "status", "notes", "dead_columns"):
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("until", [1.0, 0.1])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", [(9, 30), (96, 24)], ids=str)
def test_a_cut_is_what_pruning_gives(shape, scope, until, dtype):
    """Rising and falling, so that rows traced too little are traced further in between."""
    W, H = uneven(*shape)
    W = W.to(dtype)
    trace = lobs.trace_weight(W, H, until=until)
    for share in (0.5, 0.1, 0.0, 0.9, 0.05, 1.0, 0.6):
        found = trace.at(share, scope)
        check_same(found, lobs.prune_weight(W, H, sparsity=share, scope=scope))
        assert found.seconds > 0


@pytest.mark.parametrize("until", [1.0, 0.2])
@pytest.mark.parametrize("seed", range(4))
def test_over_a_whole_layer_the_cheapest_removal_of_any_row_comes_next(seed, until):
    """Against rows traced one by one and merged by a heap."""
    W, H = uneven(25, 18, seed)
    rows = traced(W, damped(H, 0.01))
    trace = lobs.trace_weight(W, H, until=until)
    for count in (0, 1, 20, 200, 333, 449, 450):
        out = trace.at(count / 450)
        assert torch.equal(out.mask, mask_of(rows, merged(rows, count), 18))


@pytest.mark.parametrize(("w", "h"), [(1.0, 1.0), (2.0**-40, 1.0), (3.0, 2.0**30), (1e-3, 1e5)])
def test_order_and_losses_are_those_of_the_plain_greedy_in_units_of_the_error(w, h):
    W, H = layer(6, 20)
    W, H = W * w, H * h
    trace = lobs.trace_weight(W, H, damping=0.05)
    assert trace.order.shape == trace.loss.shape == (6, 20)
    assert trace.order.dtype == torch.int32
    assert trace.loss.dtype == F64
    assert lobs.trace_weight(W.float(), H).loss.dtype == F32
    for r, row in enumerate(traced(W, damped(H, 0.05))):
        assert trace.order[r].tolist() == row.order
        assert distance(trace.loss[r], torch.from_numpy(row.loss)) < 1e-10
    assert float(trace.loss.sum()) == pytest.approx(error_of(W, damped(H, 0.05)), rel=1e-10)
    assert trace.seconds > 0


def test_what_was_not_traced_is_marked():
    W, H = layer(5, 20)
    trace = lobs.trace_weight(W, H, until=0.25)
    assert trace.order.shape == (5, 5)
    assert bool((trace.order >= 0).all())
    whole = lobs.trace_weight(W, H)
    assert torch.equal(trace.order, whole.order[:, :5])
    trace.at(0.6)
    past = trace.order < 0
    assert bool((trace.loss[past] == 0).all())
    k = trace.order.shape[1]
    assert torch.equal(trace.order[~past], whole.order[:, :k][~past])


# ---- the curve -----------------------------------------------------------------------------------


@pytest.mark.parametrize("until", [1.0, 0.3])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_the_curve_holds_the_losses_of_the_cuts(dtype, scope, until):
    """In the damped second moment, exactly; and never less than what is incurred."""
    W, H = uneven(24, 20)
    W = W.to(dtype)
    trace = lobs.trace_weight(W, H, until=until)
    sparsity, error = trace.curve(scope)
    assert sparsity.dtype == error.dtype == F64
    assert len(sparsity) == len(error) > 5
    assert (float(sparsity[0]), float(error[0])) == (0.0, 0.0)
    assert bool((sparsity.diff() > 0).all())
    assert bool((error.diff() >= 0).all())
    if until == 1:
        assert float(sparsity[-1]) == 1
        whole = error_of(W.double(), damped(H, 0.01))
        assert float(error[-1]) == pytest.approx(whole, rel=10 * RELATIVE[dtype])
    elif scope == "row":
        assert float(sparsity[-1]) == 0.3
    for i in torch.linspace(1, len(sparsity) - 1, 6).long().tolist():
        out = trace.at(float(sparsity[i]), scope)
        assert out.sparsity == float(sparsity[i])
        lost = error_of((out.weight - W).double(), damped(H, 0.01))
        assert float(error[i]) == pytest.approx(lost, rel=20 * RELATIVE[dtype])
        assert out.error <= float(error[i]) * (1 + 20 * RELATIVE[dtype])


def test_the_curve_has_the_requested_number_of_points():
    W, H = layer(6, 20)
    trace = lobs.trace_weight(W, H)
    sparsity, error = trace.curve()
    assert len(sparsity) == 6 * 20 + 1
    for points in (1, 2, 7, 120, 121, 500):
        few, lost = trace.curve(points=points)
        assert len(few) == min(points, 121)
        place = (few * 120).round().long()
        assert torch.equal(error[place], lost)
        assert float(few[0]) == 0
        if points > 1:
            assert float(few[-1]) == 1


def test_the_curve_does_not_depend_on_what_was_cut_before():
    W, H = uneven(70, 16)
    trace = lobs.trace_weight(W, H, until=0.25)
    before = trace.curve("row")
    trace.at(0.5)
    trace.at(0.25, "row")
    after = trace.curve("row")
    n = len(before[0])
    assert len(after[0]) >= n
    assert torch.equal(before[0], after[0][:n])
    assert torch.equal(before[1], after[1][:n])


# ---- biases, masks, patterns ---------------------------------------------------------------------


@pytest.mark.parametrize("prune_bias", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_a_bias_is_repaired_and_removed_only_on_request(dtype, scope, prune_bias):
    W = layer(12, 15)[0].to(dtype)
    h = lobs.Hessian(15, bias=True).update(features(80, 15))
    b = torch.linspace(-0.2, 0.3, 12).to(dtype)
    options: dict[str, Any] = {"bias": b, "prune_bias": prune_bias}
    trace = lobs.trace_weight(W, h, until=0.4, **options)
    assert bool((trace.order == 15).any()) == prune_bias
    for share in (0.2, 0.7, 1.0, 0.4):
        out = trace.at(share, scope)
        check_same(out, lobs.prune_weight(W, h, sparsity=share, scope=scope, **options))
        if not prune_bias:
            assert not torch.equal(out.bias, b)
            assert not bool((trace.order == 15).any())
    sparsity, error = trace.curve(scope)
    out = trace.at(float(sparsity[-1]), scope)
    H = damped(h.matrix(), 0.01)
    change = torch.cat([out.weight - W, (out.bias - b)[:, None]], 1).double()
    assert float(error[-1]) == pytest.approx(error_of(change, H), rel=20 * RELATIVE[dtype])


@pytest.mark.parametrize("scope", SCOPES)
def test_what_a_mask_removes_is_traced_first(scope):
    W, H = uneven(14, 16)
    mask = torch.ones(14, 16, dtype=torch.bool)
    mask[::2, [1, 5, 8]] = False
    mask[3, 2] = False
    trace = lobs.trace_weight(W, H, mask=mask)
    for r in range(14):
        first = set((~mask[r]).nonzero()[:, 0].tolist())
        assert set(trace.order[r, : len(first)].tolist()) == first
    for share in (0.25, 0.6, 1.0):
        check_same(
            trace.at(share, scope),
            lobs.prune_weight(W, H, sparsity=share, scope=scope, mask=mask),
        )
    error = trace.curve(scope)[1]
    assert bool((error.diff() >= 0).all())
    with pytest.raises(ArgumentError, match="mask: it already removes 22 of 224"):
        trace.at(0.09, scope)
    if scope == "layer":
        state = torch.where(mask, 0, 1).to(torch.uint8)
        rows = traced(W, damped(H, 0.01), state)
        taken = merged(rows, 90, first=(~mask).sum(1).tolist())
        assert torch.equal(trace.at(90 / 224).mask, mask_of(rows, taken, 16))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "0:2", "8:8"])
@pytest.mark.parametrize("until", [1.0, 0.2])
def test_cuts_of_groups_follow_the_pattern(until, pattern, scope):
    W, H = uneven(10, 16)
    keep, size = map(int, pattern.split(":"))
    trace = lobs.trace_weight(W, H, pattern=pattern, until=until)
    out = trace.at(1 - keep / size, scope)
    check_same(out, lobs.prune_weight(W, H, pattern=pattern, scope=scope))
    assert bool((out.mask.reshape(-1, size).sum(1) == keep).all())
    for wrong in (1 - keep / size + 0.01, 1 - keep / size - 0.01):
        with pytest.raises(ArgumentError, match="sparsity"):
            trace.at(wrong)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1x3", "1x4"])
def test_cuts_of_long_rows_follow_the_pattern(pattern):
    """A trace drops weights that stay and pruning repairs them: both must choose the same."""
    W, H = layer(3, 300)
    share = {"2:4": 0.5, "1:4": 0.75}.get(pattern, 0.9)
    trace = lobs.trace_weight(W, H, pattern=pattern)
    check_same(
        trace.at(share, "row"),
        lobs.prune_weight(W, H, pattern=pattern, sparsity=share, scope="row", method="exact"),
    )


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("until", [1.0, 0.3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_blocks_are_cut_whole(size, until, scope):
    W, H = uneven(72, 16)
    trace = lobs.trace_weight(W, H, pattern=f"1x{size}", until=until)
    order = trace.order[:, : trace.order.shape[1] // size * size].reshape(72, -1, size)
    step = torch.arange(size)
    assert bool(((order == order[:, :, :1] + step) | (order < 0)).all())
    for share in (0.1, 0.5, 0.9):
        out = trace.at(share, scope)
        check_same(out, lobs.prune_weight(W, H, pattern=f"1x{size}", sparsity=share, scope=scope))
        if scope == "layer":
            rows = traced(W, damped(H, 0.01), block=size)
            count = math.ceil(share * 72 * 16 / size - 0.5)
            assert torch.equal(out.mask, mask_of(rows, merged(rows, count, size), 16))
    sparsity, error = trace.curve(scope)
    assert bool((error.diff() >= 0).all())
    i = len(sparsity) // 2
    out = trace.at(float(sparsity[i]), scope)
    lost = error_of(out.weight - W, damped(H, 0.01))
    assert float(error[i]) == pytest.approx(lost, rel=1e-9)


# ---- what else is promised -----------------------------------------------------------------------


def test_the_reference_traces_the_same(backend):
    W, H = layer(4, 12)
    trace = lobs.trace_weight(W, H, backend=backend)
    other = lobs.trace_weight(W, H, backend="reference")
    assert torch.equal(trace.order, other.order)
    out = trace.at(0.5)
    assert out.backend == backend
    assert torch.equal(out.mask, other.at(0.5).mask)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=str)
def test_the_trace_keeps_the_weights_and_inputs_that_it_was_made_from(dtype, with_bias):
    """A weight is usually pruned in place next; later cuts must not see that."""
    W, H = layer(6, 20)
    W, b = W.to(dtype), None
    if with_bias:
        b = torch.ones(6, dtype=dtype)
        H = torch.block_diag(H, torch.ones(1, 1, dtype=F64))
    trace = lobs.trace_weight(W, H, bias=b)
    before = trace.at(0.3)
    W.zero_()
    H.zero_()
    if b is not None:
        b.zero_()
    after = trace.at(0.3)
    assert torch.equal(before.weight, after.weight)
    assert b is None or torch.equal(before.bias, after.bias)
    assert before.error == after.error > 0


def test_a_cut_belongs_to_the_caller():
    W, H = layer(4, 9)
    trace = lobs.trace_weight(W, H)
    first = trace.at(0.5)
    kept = first.weight.clone()
    first.weight.zero_()
    first.mask.fill_(False)
    trace.order.zero_()
    trace.loss.zero_()
    assert torch.equal(trace.at(0.5).weight, kept)


def test_inputs_are_not_modified():
    W, H = layer(5, 9)
    before = W.clone(), H.clone()
    lobs.trace_weight(W, H).at(0.5)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])


def test_notes_of_the_trace_are_those_of_the_pruning():
    h = lobs.Hessian(20).update(features(5, 20))
    W = layer(3, 20)[0].float()
    trace = lobs.trace_weight(W, h, damping=1e-6)
    for _ in range(2):
        found = trace.at(0.5)
        assert found.notes == lobs.prune_weight(W, h, sparsity=0.5, damping=1e-6).notes
        assert any("fewer rows (5)" in note for note in found.notes)
        assert any("float64" in note for note in found.notes)


def test_notes_of_one_cut_do_not_reach_the_next(monkeypatch):
    """With a threshold that anything exceeds, every cut is solved for again, with one note."""
    W, H = layer(6, 20)
    trace = lobs.trace_weight(W.float(), H)
    assert trace.at(0.5).notes == ()
    with monkeypatch.context() as patch:
        patch.setattr(result, "OPTIMAL", 0.0)
        first, second = trace.at(0.5).notes, trace.at(0.5).notes
    assert len(first) == 1
    assert first == second
    assert trace.at(0.5).notes == ()


@pytest.mark.parametrize("memory", [10_000, 10**9])
def test_memory_is_a_limit_on_scratch(memory):
    W, H = layer(3, 40)
    if memory < 10**6:
        with pytest.raises(MemoryError, match=f"memory: .* more than the {memory} allowed"):
            lobs.trace_weight(W, H, memory=memory)
    else:
        trace = lobs.trace_weight(W, H, memory=memory)
        assert torch.equal(trace.order, lobs.trace_weight(W, H).order)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"until": 0}, ArgumentError, "until"),
        ({"until": 1.01}, ArgumentError, "until"),
        ({"method": "lobs"}, ArgumentError, "method"),
        ({"pattern": "3:7"}, PatternError, "pattern"),
        ({"pattern": "1x5"}, PatternError, "pattern"),
        ({"prune_bias": True}, ArgumentError, "prune_bias"),
        ({"memory": 0}, ArgumentError, "memory"),
        ({"damping": -1}, ArgumentError, "damping"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, named):
    W, H = layer(3, 12)
    with pytest.raises(error, match=named):
        lobs.trace_weight(W, H, **arguments)


def test_wrong_arguments_of_a_cut_are_named():
    W, H = layer(3, 12)
    trace = lobs.trace_weight(W, H)
    for sparsity in (-0.1, 1.1, math.nan):
        with pytest.raises(ArgumentError, match="sparsity"):
            trace.at(sparsity)
    with pytest.raises(ArgumentError, match="scope"):
        trace.at(0.5, "column")
    with pytest.raises(ArgumentError, match="scope"):
        trace.curve("column")
    with pytest.raises(ArgumentError, match="points"):
        trace.curve(points=0)
    with pytest.raises(DtypeError, match="points"):
        trace.curve(points=2.5)
