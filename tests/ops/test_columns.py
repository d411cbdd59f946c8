"""Greedy removal of groups of columns from all rows, against plain updates and brute force."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.errors import (
    ArgumentError,
    DtypeError,
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
)

F64, F32 = torch.float64, torch.float32
CLOSE = {F64: 1e-9, F32: 2e-3}  # relative: float32 costs are differences of larger numbers


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def starts(widths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *widths]).cumsum(0)


def problem(R: int, widths: Sequence[int], dtype: torch.dtype = F64) -> ops.ColumnLayer:
    """A layer whose columns differ enough that float32 and float64 agree on the order."""
    C = sum(widths)
    mixing = torch.randn(C, C, dtype=F64) / C**0.5 + torch.eye(C, dtype=F64)
    X = torch.randn(4 * C + 8, C, dtype=F64) @ mixing
    H = X.T @ X / len(X) + 0.1 * torch.eye(C, dtype=F64)
    W = torch.randn(R, C, dtype=F64) * torch.rand(C, dtype=F64).mul(3).exp()
    return ops.ColumnLayer(W.to(dtype), torch.linalg.inv(H).to(dtype), starts(widths))


def columns(layer: ops.ColumnLayer, units: Sequence[int]) -> Tensor:
    of = [torch.arange(int(layer.start[u]), int(layer.start[u + 1])) for u in units]
    return torch.cat([torch.arange(0), *of])


def error(layer: ops.ColumnLayer, units: Sequence[int]) -> float:
    """What the best repair leaves when units are gone: tr(W_S A_SS^-1 W_S^T), directly."""
    S = columns(layer, units)
    W, A = layer.W.to(F64)[:, S], layer.A.to(F64)[S][:, S]
    return layer.scale * float((torch.linalg.solve(A, W.T) * W.T).sum())


def check(trace: ops.ColumnsTrace, layers: Sequence[ops.ColumnLayer], close: float) -> None:
    """Every prefix costs what a direct solution says, and no other unit would have cost less."""
    units = range(len(layers[0].start) - 1)
    gone: list[int] = []
    before = 0.0
    for u, cost in zip(trace.order, trace.cost, strict=True):
        after = {v: sum(error(x, [*gone, v]) for x in layers) for v in units if v not in gone}
        assert after[u] == pytest.approx(before + cost, rel=close)
        assert after[u] <= min(after.values()) * (1 + close)
        before = after[u]
        gone.append(u)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize(
    "widths",
    [[1], [1] * 9, [1] * 35, [3] * 5, [4] * 6, [5, 1, 2, 0, 7], [17, 16], [64], [9] * 8],
    ids=lambda w: "-".join(map(str, w[:5])) + f"x{len(w)}",
)
@pytest.mark.parametrize("R", [1, 30])
def test_every_removal_is_the_cheapest_and_costs_what_it_says(backend, R, widths, dtype):
    layer = problem(R, widths, dtype)
    before = layer.W.clone(), layer.A.clone()
    trace = ops.columns_trace([layer], len(widths), backend=backend)
    assert trace.backend == backend
    assert sorted(trace.order) == list(range(len(widths)))
    check(trace, [layer], CLOSE[dtype])
    assert torch.equal(layer.W, before[0])
    assert torch.equal(layer.A, before[1])


@pytest.mark.parametrize("widths", [[1] * 150, [8] * 24, [3, 8, 5, 1] * 9], ids=len)
def test_long_traces_are_those_of_the_plain_updates(backend, widths):
    layer = problem(20, widths)
    trace = ops.columns_trace([layer], len(widths) - 3, backend=backend)
    wanted = ops.columns_trace([layer], len(widths) - 3, backend="reference")
    assert trace.order == wanted.order
    assert trace.cost == pytest.approx(wanted.cost, rel=1e-7)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_units_of_several_layers_cost_the_sum(backend, dtype):
    layers = [
        problem(8, [1] * 12, dtype),
        problem(5, [4, 0] * 6, dtype),  # does not read every unit
        problem(30, [2, 3, 1] * 4, dtype),
    ]
    layers = [
        ops.ColumnLayer(x.W, x.A, x.start, s) for x, s in zip(layers, (1, 0.3, 7), strict=True)
    ]
    trace = ops.columns_trace(layers, 12, backend=backend)
    check(trace, layers, CLOSE[dtype])


def test_one_of_each_set_stays(backend):
    layer = problem(6, [2] * 8)
    layer.W[:, :4] *= 1e-3  # units 0 and 1 are the cheapest
    sets = [torch.tensor([0, 1]), torch.tensor([1, 5, 7]), torch.arange(8)]
    trace = ops.columns_trace([layer], 8, sets=sets, backend=backend)
    left = set(range(8)) - set(trace.order)
    assert all(left & set(s.tolist()) for s in sets)
    assert {0, 1} - {trace.order[0]} <= left
    more = [u for u in left if all((left - {u}) & set(s.tolist()) for s in sets if u in s)]
    assert more == []  # it went on as far as the sets allow


def test_units_that_go_first_do_so_whatever_they_cost(backend):
    layer = problem(6, [1] * 9)
    first = torch.zeros(9, dtype=F64)
    first[[6, 2]], first[4] = -1.0, -2.0
    layer.W[:, [2, 4, 6]] *= 100
    trace = ops.columns_trace([layer], 9, first=first, backend=backend)
    assert trace.order[:3] == [4, 2, 6]
    assert sum(trace.cost[:3]) == pytest.approx(error(layer, [2, 4, 6]))


@pytest.mark.parametrize("width", [1, 3])
def test_ties_go_to_the_lowest_unit(backend, width):
    n = 40
    eye = torch.eye(n * width, dtype=F64)
    W = torch.ones(3, n * width, dtype=F64)
    W[:, 5 * width : 7 * width] = 0.5
    trace = ops.columns_trace([ops.ColumnLayer(W, eye, starts([width] * n))], n, backend=backend)
    assert trace.order == [5, 6, *(u for u in range(n) if u not in (5, 6))]
    assert trace.cost == [0.75 * width] * 2 + [3.0 * width] * (n - 2)


def test_a_unit_that_costs_nothing_goes_at_no_cost(backend):
    layer = problem(4, [2] * 5)
    layer.W[:, 6:8] = 0
    trace = ops.columns_trace([layer], 1, backend=backend)
    assert (trace.order, trace.cost) == ([3], [0.0])


@pytest.mark.parametrize("widths", [[1] * 100, [6] * 20], ids=len)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_going_on_is_the_same_as_never_having_stopped(backend, widths, dtype):
    layer, n = problem(15, widths, dtype), len(widths)
    whole = ops.columns_trace([layer], n, backend=backend)
    parts = ops.columns_trace([layer], 0, backend=backend)
    assert parts.order == []
    for limit in (1, n // 3, n // 3, n // 4, n // 2, n + 5):
        parts.extend(limit)
    assert (parts.order, parts.cost) == (whole.order, whole.cost)


@pytest.mark.parametrize("widths", [[1] * 300, [5] * 40], ids=len)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(backend, widths, dtype):
    if backend in ("reference", "emulated"):
        pytest.skip("no threads")
    layer, seen = problem(70, widths, dtype), set()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        trace = ops.columns_trace([layer], len(widths), backend=backend)
        seen.add((tuple(trace.order), tuple(trace.cost)))
    assert len(seen) == 1


def test_rows_may_have_gaps_and_columns_may_lie_anywhere(backend):
    layer = problem(7, [3] * 6)
    wanted = ops.columns_trace([layer], 6, backend=backend)
    wide = torch.full((7, 31), torch.nan, dtype=F64)
    wide[:, :18] = layer.W
    for W in (wide[:, :18], layer.W.T.contiguous().T):
        for A in (layer.A, layer.A.T.contiguous().T):
            found = ops.columns_trace([ops.ColumnLayer(W, A, layer.start)], 6, backend=backend)
            assert (found.order, found.cost) == (wanted.order, wanted.cost)


@pytest.mark.parametrize("width", [1, 4])
def test_a_singular_block_is_an_error_that_names_its_unit(backend, width):
    layer = problem(5, [width] * 4)
    s = slice(2 * width, 3 * width)
    layer.A[s, s] = 0.0 if width == 1 else 1.0  # of rank one
    with pytest.raises(NotPositiveDefiniteError, match=r"layers\[1\].A: .* of unit 2: raise"):
        ops.columns_trace([problem(5, [2] * 4), layer], 4, backend=backend)


@pytest.mark.parametrize("width", [1, 2])
def test_rounding_that_eats_a_pivot_is_an_error_after_the_removals_before(backend, width):
    """Two units that are nearly the same: when one has gone, nothing is left of the other."""
    n = 6
    A = torch.eye(n * width, dtype=F64)
    for i in range(width):
        A[i, width + i] = A[width + i, i] = 1 - 1e-17
    W = torch.arange(1.0, n * width + 1, dtype=F64)[None]
    trace = ops.columns_trace([ops.ColumnLayer(W, A, starts([width] * n))], 0, backend=backend)
    with pytest.raises(NotPositiveDefiniteError, match="unit 1 after 1 removals"):
        trace.extend(n)
    assert trace.order == [0]
    assert trace.cost == pytest.approx([float((W[:, :width] ** 2).sum())])


def test_wrong_arguments_are_named():
    layer = problem(3, [2] * 4)
    W, A, start = layer.W, layer.A, layer.start
    with pytest.raises(ArgumentError, match=r"^layers: none"):
        ops.columns_trace([], 1)
    for wrong, kind, message in (
        (ops.ColumnLayer(W, A[:7, :7], start), ShapeError, r"layers\[0\].A is \(7, 7\)"),
        (ops.ColumnLayer(W.half(), A, start), DtypeError, r"layers\[0\].W"),
        (ops.ColumnLayer(W, A.float(), start), DtypeError, r"layers\[0\].A"),
        (ops.ColumnLayer(W, A, start.int()), DtypeError, r"layers\[0\].start"),
        (ops.ColumnLayer(W, A, start[:-1]), ArgumentError, r"layers\[0\].start: it must rise"),
        (ops.ColumnLayer(W, A, start.flip(0)), ArgumentError, r"layers\[0\].start: it must rise"),
        (ops.ColumnLayer(W, A, start, -1.0), ArgumentError, r"layers\[0\].scale: -1"),
        (ops.ColumnLayer(W * torch.nan, A, start), NonFiniteError, r"layers\[0\].W"),
        (ops.ColumnLayer(W, A * torch.inf, start), NonFiniteError, r"layers\[0\].A"),
    ):
        with pytest.raises(kind, match=message):
            ops.columns_trace([wrong], 1)
    with pytest.raises(ShapeError, match=r"layers\[1\].start has 4 entries"):
        ops.columns_trace([layer, problem(3, [2] * 3)], 1)
    with pytest.raises(ShapeError, match="first has 3 entries but there are 4 units"):
        ops.columns_trace([layer], 1, first=torch.zeros(3, dtype=F64))
    for bad, message in (([0, 4], "0 .. 4; units are 0 .. 3"), ([1, 1], "a unit occurs twice")):
        with pytest.raises(ArgumentError, match=f"sets: {message}"):
            ops.columns_trace([layer], 1, sets=[torch.tensor(bad)])
    with pytest.raises(ArgumentError, match="limit"):
        ops.columns_trace([layer], -1)


def test_no_rows_and_no_units_are_no_cost(backend):
    A = torch.eye(3, dtype=F64)
    trace = ops.columns_trace([ops.ColumnLayer(A[:0], A, starts([1, 2]))], 2, backend=backend)
    assert (trace.order, trace.cost) == ([0, 1], [0.0, 0.0])
    empty = ops.ColumnLayer(A[:, :0], A[:0, :0], torch.tensor([0]))
    assert ops.columns_trace([empty], 3, backend=backend).order == []
