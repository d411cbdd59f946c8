"""One small symmetric system per row, all submatrices of one matrix, against torch's own solver."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.cases import conditioned
from helpers.tolerances import RELATIVE, distance
from torch import Tensor

from lobs_native import ops
from lobs_native.errors import DtypeError, NonFiniteError, NotPositiveDefiniteError, ShapeError

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATS = [torch.float64, torch.float32]
C = 150
SIZES = [0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, C]


def chosen_columns(sizes: list[int], columns: int) -> Tensor:
    """(len(sizes), columns) bool: row r has sizes[r] columns, spread at random."""
    generator = torch.Generator().manual_seed(3)
    chosen = torch.zeros(len(sizes), columns, dtype=torch.bool)
    for r, k in enumerate(sizes):
        chosen[r, torch.randperm(columns, generator=generator)[:k]] = True
    return chosen


def right_sides(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def check_outside(X: Tensor, chosen: Tensor) -> None:
    """Entries that are not chosen are +0."""
    assert bool((X[~chosen] == 0).all())
    assert not bool(torch.signbit(X[~chosen]).any())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_row_gets_the_solution_of_its_own_system(dtype, backend):
    """All sizes around the tiles together, so that rows of every size share the scratch."""
    M, b, P = conditioned(C, 30.0), right_sides(len(SIZES), C), chosen_columns(SIZES, C)
    X = b.to(dtype)
    M, sides = M.to(dtype), X.clone()
    before = M.clone(), P.clone()
    assert ops.support_solve_(X, M, P, backend=backend) == backend
    assert torch.equal(M, before[0])
    assert torch.equal(P, before[1])
    for r in range(len(SIZES)):
        p = P[r]
        if bool(p.any()):
            expected = torch.linalg.solve(M.double()[p][:, p], sides[r, p].double())
            assert distance(X[r, p], expected) < RELATIVE[dtype]
    check_outside(X, P)


@pytest.mark.parametrize("k", SIZES)
def test_a_row_is_the_same_alone_and_among_others(k, backend):
    M = conditioned(C, 30.0)
    b, P = right_sides(len(SIZES), C), chosen_columns(SIZES, C)
    together = b.clone()
    ops.support_solve_(together, M, P, backend=backend)
    r = SIZES.index(k)
    alone = b[r : r + 1].clone()
    ops.support_solve_(alone, M, P[r : r + 1].contiguous(), backend=backend)
    assert torch.equal(alone[0], together[r])


def backward_error(M: Tensor, x: Tensor, b: Tensor, eps: float) -> float:
    """LAPACK's ratio, ||M x - b|| / (k eps ||M|| ||x||), in float64."""
    M, x, b = M.double(), x.double(), b.double()
    norm = float(torch.linalg.matrix_norm(M, 2)) * float(x.norm()) * len(b) * eps
    return float((M @ x - b).norm()) / norm


@pytest.mark.parametrize(
    ("dtype", "condition"),
    [
        *((torch.float64, 10.0**p) for p in (0, 2, 4, 6, 8, 10, 12)),
        *((torch.float32, 10.0**p) for p in (0, 1, 2, 3, 4, 5)),
    ],
    ids=str,
)
def test_the_backward_error_is_a_few_roundings_whatever_the_condition(dtype, condition, backend):
    """LAPACK's threshold for its own solvers is 30. Ours is 1, except for one equation, where
    nothing averages out."""
    columns = 129
    M = conditioned(columns, condition).to(dtype)
    P = chosen_columns([columns, 100, 64, 17, 3, 1], columns)
    X = right_sides(len(P), columns).to(dtype)
    b = X.clone()
    ops.support_solve_(X, M, P, backend=backend)
    eps = torch.finfo(dtype).eps
    ratios = [backward_error(M[p][:, p], X[r, p], b[r, p], eps) for r, p in enumerate(P)]
    print(f"backward error of {columns} to 3 columns {max(ratios[:-1]):.3g}, of 1 {ratios[-1]:.3g}")
    assert max(ratios[:-1]) < 1
    assert ratios[-1] < 30


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_scale_of_the_matrix_does_not_matter(dtype, backend):
    M, P = conditioned(40, 100.0).to(dtype), chosen_columns([40, 17], 40)
    plain = right_sides(2, 40).to(dtype)
    other = plain.clone()
    ops.support_solve_(plain, M, P, backend=backend)
    ops.support_solve_(other, M * 2.0**20, P, backend=backend)
    assert torch.equal(other * 2.0**20, plain)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [2, 16, 17, 70])
def test_the_lowest_row_that_is_not_positive_definite_is_named(size, dtype, backend):
    """Two columns are too much alike: only a row that chooses both fails."""
    M = torch.eye(90, dtype=dtype)
    M[3, 80] = M[80, 3] = 1.5
    P = torch.zeros(5, 90, dtype=torch.bool)
    P[:, :size] = True
    P[:, 3] = True
    P[[2, 4], 80] = True
    X = torch.ones(5, 90, dtype=dtype)
    count = int(P[2].sum())
    with pytest.raises(NotPositiveDefiniteError, match=rf"\b{count} columns of row 2\b"):
        ops.support_solve_(X, M, P, backend=backend)
    P[[2, 4], 80] = False
    X = torch.ones(5, 90, dtype=dtype)
    ops.support_solve_(X, M, P, backend=backend)
    assert torch.equal(X, P.to(dtype))


@pytest.mark.parametrize("pivot", [0.0, -1.0, -math.inf])
def test_a_first_pivot_that_is_not_positive_is_refused(pivot, backend):
    M = torch.eye(4)
    M[1, 1] = pivot
    error = NonFiniteError if math.isinf(pivot) else NotPositiveDefiniteError
    with pytest.raises(error):
        ops.support_solve_(torch.ones(1, 4), M, torch.ones(1, 4, dtype=torch.bool), backend=backend)
    X = torch.ones(1, 4)
    free = torch.tensor([[True, False, True, False]])
    if not math.isinf(pivot):
        ops.support_solve_(X, M, free, backend=backend)  # nothing is divided by it
        assert X.tolist() == [[1, 0, 1, 0]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_nothing_written(value, backend):
    P = torch.ones(3, 5, dtype=torch.bool)
    for at in ((0, 0), (2, 4), (1, 3)):
        X, M = torch.ones(3, 5), torch.eye(5)
        X[at] = value
        before = X.clone()
        with pytest.raises(NonFiniteError, match=rf"X: .* at \({at[0]}, {at[1]}\)"):
            ops.support_solve_(X, M, P, backend=backend)
        assert X.equal(before) or math.isnan(value)
        X = torch.ones(3, 5)
        M[at] = value
        with pytest.raises(NonFiniteError, match=rf"M: .* at \({at[0]}, {at[1]}\)"):
            ops.support_solve_(X, M, P, backend=backend)
        assert bool((X == 1).all())


def test_an_output_that_is_not_contiguous_is_refused(backend):
    M, P = torch.eye(4), torch.ones(3, 4, dtype=torch.bool)
    for X in (torch.ones(4, 3).T, torch.ones(3, 8)[:, ::2], torch.ones(3, 9)[:, 1:5]):
        with pytest.raises(ShapeError, match="X"):
            ops.support_solve_(X, M, P, backend=backend)
    with pytest.raises(DtypeError, match="M"):
        ops.support_solve_(torch.ones(3, 4), M.double(), P, backend=backend)


def test_inputs_may_lie_in_memory_in_any_way(backend):
    """The matrix is symmetric and so equal to its transpose; the chosen columns are not."""
    M, P = conditioned(20, 9.0), chosen_columns([7, 20, 0], 20)
    X = right_sides(3, 20)
    expected = X.clone()
    ops.support_solve_(expected, M, P, backend=backend)
    wide = torch.full((40, 40), math.nan, dtype=torch.float64)
    wide[1::2, 1::2] = M
    ops.support_solve_(X, wide[1::2, 1::2], P.T.contiguous().T, backend=backend)
    assert torch.equal(X, expected)


def test_nothing_to_solve(backend):
    for rows, columns in ((0, 5), (3, 0), (0, 0)):
        X = torch.ones(rows, columns)
        P = torch.ones(rows, columns, dtype=torch.bool)
        assert ops.support_solve_(X, torch.eye(columns), P, backend=backend) == backend
    X = torch.full((2, 3), -1.0)
    ops.support_solve_(X, torch.eye(3), torch.zeros(2, 3, dtype=torch.bool), backend=backend)
    check_outside(X, torch.zeros(2, 3, dtype=torch.bool))
