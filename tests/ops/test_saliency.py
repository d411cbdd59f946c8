"""The cheapest removal of every row."""

from __future__ import annotations

import pytest
import torch

from lobs_native import ops
from lobs_native.errors import NonFiniteError, NotPositiveDefiniteError
from lobs_native.ops import reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (20, 512), (9, 1301)])
@pytest.mark.parametrize("shared", [True, False])
def test_all_backends_find_the_same_column_and_value(backend, dtype, shape, shared):
    W = torch.randn(shape, dtype=dtype)
    diag = torch.rand(shape[1:] if shared else shape, dtype=dtype) + 0.01
    live = torch.rand(shape) > 0.3
    column, value = ops.saliency_argmin(W, diag, live, backend=backend)
    expected_column, expected_value = reference.saliency_argmin(W, diag.expand(shape), live)
    assert torch.equal(column, expected_column)
    assert torch.equal(value, expected_value)
    for r in range(shape[0]):  # which is the argmin
        costs = {
            q: float(W[r, q] ** 2 / diag.expand(shape)[r, q]) for q in range(shape[1]) if live[r, q]
        }
        assert int(column[r]) == (min(costs, key=costs.__getitem__) if costs else -1)


def test_removing_it_costs_exactly_that():
    """s_q is the increase of w H w^T when w_q goes and the others re-adjust."""
    x = torch.randn(200, 6, dtype=torch.float64)
    H = x.T @ x / 200
    w = torch.randn(1, 6, dtype=torch.float64)
    A = torch.linalg.inv(H)
    column, value = ops.saliency_argmin(w, A.diagonal(), torch.ones(6, dtype=torch.bool))
    q = int(column)
    change = -(w[0, q] / A[q, q]) * A[:, q]
    assert float(w[0, q] + change[q]) == pytest.approx(0.0, abs=1e-15)
    assert float(change @ H @ change) == pytest.approx(float(value), rel=1e-12)


def test_a_tie_goes_to_the_lowest_column(backend):
    W = torch.ones(4, 1200)
    live = torch.ones(1200, dtype=torch.bool)
    live[:3] = False
    column, value = ops.saliency_argmin(W, torch.ones(1200), live, backend=backend)
    assert column.tolist() == [3] * 4
    assert value.tolist() == [1.0] * 4


def test_nothing_live_gives_minus_one_and_infinity(backend):
    live = torch.tensor([[False] * 5, [False, False, True, False, False]])
    column, value = ops.saliency_argmin(torch.ones(2, 5), torch.ones(5), live, backend=backend)
    assert column.tolist() == [-1, 2]
    assert value.tolist() == [float("inf"), 1.0]


def test_a_cost_that_overflows_is_still_a_candidate(backend):
    column, value = ops.saliency_argmin(
        torch.full((1, 3), 1e30),
        torch.full((3,), 1e-30),
        torch.tensor([False, True, True]),
        backend=backend,
    )
    assert column.tolist() == [1]
    assert value.tolist() == [float("inf")]


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_a_live_diagonal_that_is_not_positive_is_named(backend, bad):
    diag = torch.ones(3, 700)
    diag[1, 600] = bad
    diag[2, 0] = bad
    live = torch.ones(3, 700, dtype=torch.bool)
    with pytest.raises(NotPositiveDefiniteError, match="row 1, column 600"):
        ops.saliency_argmin(torch.ones(3, 700), diag, live, backend=backend)
    live[:, [0, 600]] = False  # a dead entry may be anything
    assert ops.saliency_argmin(torch.ones(3, 700), diag, live, backend=backend)[0].tolist() == [
        1,
        1,
        1,
    ]


def test_a_live_weight_that_is_not_finite_is_named(backend):
    W = torch.ones(2, 9)
    W[1, 8] = torch.inf
    with pytest.raises(NonFiniteError, match="row 1, column 8"):
        ops.saliency_argmin(W, torch.ones(9), torch.ones(9, dtype=torch.bool), backend=backend)


def test_no_columns_means_nothing_to_remove(backend):
    column, value = ops.saliency_argmin(
        torch.ones(2, 0), torch.ones(0), torch.ones(0, dtype=torch.bool), backend=backend
    )
    assert column.tolist() == [-1, -1]
    assert value.tolist() == [float("inf")] * 2
