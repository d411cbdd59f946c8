"""ADMM's step: the projection on exactly the requested number of lowest weights, and the duals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError
from lobs_native.ops import AdmmStep

F64, F32 = torch.float64, torch.float32
SHAPES = [(1, 1), (1, 70), (40, 1), (5, 37), (3, 300), (7, 2051), (130, 260)]
KINDS = ["random", "few values", "equal", "wide", "signed zeros"]
# Every way to choose.
PLANS: list[dict[str, Any]] = [
    {"share": 0.5},
    {"share": 0.5, "by_row": True},
    {"share": 0.3, "unit": 4},
    {"share": 0.7, "unit": 4, "by_row": True},
    {"share": 0.5, "unit": 3},
    {"share": 0.4, "unit": 20, "by_row": True},
    {"group": 4, "per_group": 2},
    {"group": 3, "per_group": 1},
    {"group": 8, "per_group": 3},
    {"group": 16, "per_group": 8},
    {"group": 100, "per_group": 40},
]


def named(plan: dict[str, Any]) -> str:
    return ",".join(f"{k}={v}" for k, v in plan.items())


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def problem(R: int, C: int, dtype: torch.dtype, kind: str = "random") -> tuple[Tensor, ...]:
    """p, d, x and removed, so that y is of one kind; "few values" is full of ties."""
    x = torch.randn(R, C, dtype=F64)
    removed = torch.rand(R, C) < 0.4
    p = {
        "random": torch.randn(R, C, dtype=F64),
        "few values": (torch.randn(R, C, dtype=F64) * 2).round(),
        "equal": torch.full((R, C), 1.5, dtype=F64),
        "wide": 2.0 ** (torch.randn(R, C, dtype=F64) * 30),
        "signed zeros": torch.randn(R, C, dtype=F64).sign() * 0.0,
    }[kind]
    if kind == "random":
        return p.to(dtype), torch.randn(R, C, dtype=dtype), x.to(dtype), removed
    # x is zero and d as well, so that y = p.
    return p.to(dtype), torch.zeros(R, C, dtype=dtype), torch.zeros(R, C, dtype=dtype), removed


def counted(plan: dict[str, Any], R: int, C: int) -> dict[str, Any]:
    """The options of a call: a share becomes a count."""
    how = {k: v for k, v in plan.items() if k != "share"}
    if "share" in plan:
        units = C // plan.get("unit", 1) * (1 if plan.get("by_row") else R)
        how["count"] = round(plan["share"] * units)
    return how


def expected(
    p: Tensor, d: Tensor, x: Tensor, removed: Tensor, state: Tensor | None, how: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """d and removed by one sort of all units."""
    R, C = d.shape
    y = (p + x) + torch.where(removed, -(d + x), 0.0)
    unit, group = how.get("unit", 1), how.get("group", 0)
    whole = C - C % (group or unit)
    part = y[:, :whole].double().numpy().reshape(R, -1, unit)
    cost = np.abs(part[:, :, 0]) if unit == 1 else np.square(part).sum(axis=2)
    code = np.zeros_like(cost) if state is None else state[:, :whole:unit].numpy()
    row, column = np.indices(cost.shape)
    pool = column // group + row * C if group else row if how.get("by_row") else row * 0
    turn = np.choose(code.astype(int), [1, 0, 2])  # goes first, may go, stays
    order = np.lexsort([a.ravel() for a in (column, row, cost, turn, pool)])
    start = np.flatnonzero(np.diff(pool.ravel()[order], prepend=-1))  # of each pool
    rank = np.arange(len(order)) - np.repeat(start, np.diff(start, append=len(order)))
    goes = np.zeros(len(order), dtype=bool)
    goes[order] = rank < (how["per_group"] if group else how["count"])
    goes = (goes | (turn.ravel() == 0)) & (turn.ravel() < 2)
    now = torch.zeros_like(removed)
    now[:, :whole] = torch.from_numpy(goes.reshape(cost.shape).repeat(unit, axis=1))
    return torch.where(now, -y, y) - x, now


def stepped(
    given: tuple[Tensor, ...], how: dict[str, Any], backend: str, **more: Any
) -> tuple[Tensor, Tensor, AdmmStep]:
    p, d, x, removed = (t.clone() for t in given)
    step = ops.admm_step_(p, d, x, removed, **how, **more, backend=backend)
    assert torch.equal(p, given[0])
    assert torch.equal(x, given[2])
    return d, removed, step


def bits(*tensors: Tensor) -> tuple[bytes, ...]:
    return tuple(t.numpy().tobytes() for t in tensors)


def check(
    given: tuple[Tensor, ...], state: Tensor | None, how: dict[str, Any], backend: str
) -> AdmmStep:
    d, removed, step = stepped(given, how, backend, state=state)
    wanted_d, wanted = expected(*given, state, how)
    assert torch.equal(removed, wanted)
    assert bits(d) == bits(wanted_d)
    assert step.changed == int((wanted & ~given[3]).sum())
    return step


# ---- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=named)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_lowest_are_removed_and_every_bit_of_d_is_right(backend, shape, plan, dtype):
    if backend == "emulated" and shape[0] * shape[1] > 20_000:
        shape = (33, 260)
    check(problem(*shape, dtype), None, counted(plan, *shape), backend)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=named)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_among_equals_the_lowest_row_goes_first_then_the_lowest_column(backend, kind, plan, dtype):
    for shape in ((6, 40), (9, 131)):
        check(problem(*shape, dtype, kind), None, counted(plan, *shape), backend)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_count_from_none_to_all(backend, kind, by_row, dtype):
    given = problem(3, 21, dtype, kind)
    for count in (0, 1, 2, 10, 20, 21) if by_row else (0, 1, 31, 62, 63):
        check(given, None, {"count": count, "by_row": by_row}, backend)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=named)
@pytest.mark.parametrize("odds", [(0.9, 0.05, 0.05), (0.2, 0.7, 0.1), (0.1, 0.2, 0.7)])
def test_states_come_before_costs_even_where_that_changes_the_count(backend, odds, plan, dtype):
    for shape in ((11, 37), (4, 300)):
        state = torch.multinomial(torch.tensor(odds), shape[0] * shape[1], replacement=True)
        codes = state.to(torch.uint8).view(shape)
        for kind in ("random", "few values"):
            check(problem(*shape, dtype, kind), codes, counted(plan, *shape), backend)


def test_the_reference_by_hand():
    x = torch.tensor([[3.0, -1.0, 2.0, 1.0]], dtype=F64)
    d, removed = torch.zeros_like(x), torch.zeros(1, 4, dtype=torch.bool)
    step = ops.admm_step_(torch.zeros_like(x), d, x, removed, count=2, backend="reference")
    assert removed.tolist() == [[False, True, False, True]]
    assert d.tolist() == [[0.0, 2.0, 0.0, -2.0]]
    assert step == AdmmStep(2, 1.0)
    # u = -(d + x) = (-1, 1) where removed; y = p + x + u = (4, -1.5, 3, 2.5)
    p = torch.tensor([[1.0, 0.5, 1.0, 0.5]], dtype=F64)
    step = ops.admm_step_(p, d, x, removed, count=2, backend="reference")
    assert removed.tolist() == [[False, True, False, True]]
    assert d.tolist() == [[1.0, 2.5, 1.0, -3.5]]
    assert step == AdmmStep(0, 2.5)


# ---- the cut -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("kind", ["random", "few values", "equal"])
def test_a_guess_of_the_cut_changes_no_byte(backend, kind, unit, dtype):
    shape = (9, 300) if backend == "emulated" else (90, 1300)
    given = problem(*shape, dtype, kind)
    state = (torch.rand(shape) * 2.2).to(torch.uint8)
    for count, codes in ((shape[0] * shape[1] // 2 // unit, None), (900 // unit, state)):
        how = {"count": count, "unit": unit}
        plain = stepped(given, how, backend, state=codes)
        right = plain[2].cut
        for guess in (right, right * 0.97, right * 1.04, right * 1.3, 1e-30, 1e300, torch.inf):
            guessed = stepped(given, how, backend, state=codes, cut=guess)
            assert bits(*guessed[:2]) == bits(*plain[:2])
            assert guessed[2] == plain[2]


def test_the_cut_is_what_the_costliest_removed_unit_costs(backend):
    given = problem(20, 64, F32)
    y = (given[0] + given[2]) + torch.where(given[3], -(given[1] + given[2]), 0.0)
    for unit in (1, 4):
        _, removed, step = stepped(given, {"count": 100, "unit": unit}, backend)
        cost = y.double().square().view(20, -1, unit).sum(2)
        highest = float(cost[removed[:, ::unit]].max())
        wanted = highest if unit > 1 else float(y[removed].abs().max())
        assert step.cut == (0.0 if backend in ("emulated", "cuda") else pytest.approx(wanted))
    for how in ({"count": 5, "by_row": True}, {"group": 4, "per_group": 2}, {"count": 0}):
        assert stepped(given, how, backend)[2].cut == 0.0


# ---- threads and rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=named)
def test_results_do_not_depend_on_the_number_of_threads(backend, plan, dtype):
    if backend in ("reference", "emulated"):
        pytest.skip("no threads")
    given = problem(64, 2051, dtype)
    given[0][5:20, :100] = given[0][0, :100]  # rows that tie
    seen = set()
    how = counted(plan, 64, 2051)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        for cut in (0.0, 1.0):
            d, removed, step = stepped(given, how, backend, cut=cut)
            seen.add((*bits(d, removed), step))
    assert len(seen) == 1


def test_rows_alone_are_as_they_are_among_others(backend):
    given = problem(20, 300, F32)
    d, removed, _ = stepped(given, {"count": 150, "by_row": True}, backend)
    for r in (0, 7, 19):
        alone = stepped(tuple(t[r : r + 1] for t in given), {"count": 150, "by_row": True}, backend)
        assert bits(*alone[:2]) == bits(d[r : r + 1], removed[r : r + 1])


def test_iterations_reach_a_sparse_minimum(backend):
    """ADMM itself: the product with the kernel's d, then the step, finds a better support."""
    X = torch.randn(200, 24, dtype=F64) @ torch.randn(24, 24, dtype=F64)
    H = X.T @ X / 200
    W = torch.randn(8, 24, dtype=F64)
    H /= H.diagonal().mean()
    rho, count = 0.3, 96
    M = torch.linalg.inv(H + rho * torch.eye(24, dtype=F64))
    p, d, removed = torch.zeros_like(W), torch.zeros_like(W), torch.zeros(8, 24, dtype=torch.bool)

    def loss(gone: Tensor) -> float:
        total = 0.0
        for w, g in zip(W, gone, strict=True):
            left = H[g][:, g] - H[g][:, ~g] @ torch.linalg.solve(H[~g][:, ~g], H[~g][:, g])
            total += float(w[g] @ left @ w[g])
        return total

    ops.admm_step_(p, d, W, removed, count=count, backend=backend)
    by_magnitude = loss(removed)
    for _ in range(100):
        ops.admm_step_(d @ M * rho, d, W, removed, count=count, backend=backend)
    assert int(removed.sum()) == count
    assert loss(removed) < 0.8 * by_magnitude


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=named)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_y_that_is_not_finite_is_named(backend, value, plan, dtype):
    for shape in ((9, 131), (2, 2300)):
        p, d, x, removed = problem(*shape, dtype)
        p[1, 130] = p[-1, -1] = value
        how = counted(plan, *shape)
        with pytest.raises(NonFiniteError, match="row 1, column 130"):
            ops.admm_step_(p, d, x, removed, **how, cut=0.5, backend=backend)


@pytest.mark.parametrize(
    ("how", "error", "name"),
    [
        ({}, ArgumentError, "count"),
        ({"count": -1}, ArgumentError, "count"),
        ({"count": 25}, ArgumentError, "count: 25; there are 24"),
        ({"count": 9, "by_row": True}, ArgumentError, "count: 9; there are 8"),
        ({"count": 7, "unit": 4}, ArgumentError, "count: 7; there are 6"),
        ({"count": 1, "unit": 9}, ArgumentError, "count: 1; there are 0"),
        ({"count": 1.0}, DtypeError, "count"),
        ({"count": 1, "unit": 0}, ArgumentError, "unit"),
        ({"count": 1, "group": 4, "per_group": 2}, ArgumentError, "count"),
        ({"group": 4, "per_group": 5}, ArgumentError, "per_group"),
        ({"unit": 2, "group": 4, "per_group": 2}, ArgumentError, "unit"),
        ({"count": 1, "by_row": 1}, DtypeError, "by_row"),
        ({"count": 1, "cut": -1.0}, ArgumentError, "cut"),
        ({"count": 1, "cut": float("nan")}, ArgumentError, "cut"),
        ({"count": 1, "state": torch.full((3, 8), 3, dtype=torch.uint8)}, ArgumentError, "state"),
        ({"count": 1, "state": torch.zeros(3, 7, dtype=torch.uint8)}, ShapeError, "state"),
    ],
)
def test_wrong_options_are_named_and_nothing_is_written(how, error, name):
    p, d, x, removed = problem(3, 8, F32)
    before = bits(p, d, x, removed)
    with pytest.raises(error, match=name):
        ops.admm_step_(p, d, x, removed, **how)
    assert bits(p, d, x, removed) == before


def test_wrong_tensors_are_named():
    p, d, x, removed = problem(3, 8, F32)
    for name, given in {
        "p": (p[:2], d, x, removed),
        "x": (p, d, x[:, :7], removed),
        "removed": (p, d, x, removed[:2]),
        "d": (p, d.T.contiguous().T, x, removed),
    }.items():
        with pytest.raises(ShapeError, match=f"^{name}"):
            ops.admm_step_(*given, count=1)
    for name, given in {
        "p": (p.double(), d, x, removed),
        "x": (p, d, x.half(), removed),
        "removed": (p, d, x, removed.to(torch.uint8)),
    }.items():
        with pytest.raises(DtypeError, match=f"^{name}"):
            ops.admm_step_(*given, count=1)
    with pytest.raises(ShapeError, match="p: shares memory with d"):
        ops.admm_step_(d, d, x, removed, count=1)


def test_groups_and_units_wider_than_the_rows_remove_nothing(backend):
    given = problem(3, 8, F32)
    for how in ({"group": 9, "per_group": 4}, {"count": 0, "unit": 9}):
        _, removed, step = stepped(given, how, backend)
        assert not bool(removed.any())
        assert step == AdmmStep(0, 0.0)


def test_no_weights_are_no_work(backend):
    for shape in ((0, 8), (3, 0)):
        empty, removed = torch.empty(shape), torch.empty(shape, dtype=torch.bool)
        args = (empty, empty.clone(), empty.clone(), removed)
        assert ops.admm_step_(*args, count=0, backend=backend) == AdmmStep(0, 0.0)
