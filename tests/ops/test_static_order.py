"""Removal in a fixed order, the paper's method, against one triangular solve per row."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import layer
from helpers.tolerances import RELATIVE, distance

from lobs_native import ops
from lobs_native.errors import ArgumentError, NotPositiveDefiniteError
from lobs_native.solvers.inversion import invert


def random_orders(R: int, C: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Row r loses a random number of random columns in random order."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, C + 1, (R,), generator=generator)
    parts = [torch.randperm(C, generator=generator)[:k] for k in counts]
    start = torch.zeros(R + 1, dtype=torch.int64)
    start[1:] = counts.cumsum(0)
    return torch.cat(parts).to(torch.int32), start


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 8), (3, 31), (12, 33), (4, 127), (4, 129), (20, 132)]
)
def test_it_equals_the_triangular_solve(backend, dtype, shape):
    W, H = layer(*shape)
    A = invert(H, 0.01, "H").A
    order, start = random_orders(*shape)
    found = W.to(dtype)
    assert ops.static_order_prune_(found, A.to(dtype), order, start, backend=backend) == backend
    expected = W.clone()
    for r in range(shape[0]):
        P = order[start[r] : start[r + 1]].long()
        c = torch.linalg.solve_triangular(A[P][:, P].tril(), -W[r, P, None], upper=False)[:, 0]
        expected[r] += A[:, P] @ c
        expected[r, P] = 0
    assert distance(found, expected) < RELATIVE[dtype]


def test_removed_weights_are_positive_zeros(backend):
    W, H = layer(6, 20)
    order, start = random_orders(6, 20)
    ops.static_order_prune_(W, invert(H, 0.01, "H").A, order, start, backend=backend)
    row = torch.repeat_interleave(torch.arange(6), start.diff())
    gone = W[row, order.long()]
    assert (gone == 0).all()
    assert not torch.signbit(gone).any()
    assert int((W == 0).sum()) == len(order)


def test_no_removals_change_nothing(backend):
    W, H = layer(3, 9)
    before = W.clone()
    ops.static_order_prune_(
        W, H, torch.zeros(0, dtype=torch.int32), torch.zeros(4, dtype=torch.int64), backend=backend
    )
    assert torch.equal(W, before)


def test_the_order_matters():
    """Without downdating the result depends on the order: reversing it must change the weights."""
    W, H = layer(1, 10)
    A = invert(H, 0.01, "H").A
    order, start = torch.arange(6, dtype=torch.int32), torch.tensor([0, 6])
    one, other = W.clone(), W.clone()
    ops.static_order_prune_(one, A, order, start)
    ops.static_order_prune_(other, A, order.flip(0), start)
    assert distance(one, other) > 1e-3


def test_a_pivot_that_is_not_positive_is_named_and_nothing_written(backend):
    W, H = layer(3, 7)
    A = invert(H, 0.01, "H").A.clone()
    A[5, 5] = 0
    before = W.clone()
    with pytest.raises(NotPositiveDefiniteError, match=r"\(5, 5\)"):
        ops.static_order_prune_(
            W, A, torch.tensor([5], dtype=torch.int32), torch.tensor([0, 0, 1, 1]), backend=backend
        )
    assert torch.equal(W, before)
    ops.static_order_prune_(
        W, A, torch.tensor([4], dtype=torch.int32), torch.tensor([0, 0, 1, 1]), backend=backend
    )


@pytest.mark.parametrize(
    ("order", "start", "column", "row"),
    [
        ([3, 1, 3, 0], [0, 0, 4, 4], 3, 1),  # twice in a row
        ([3, 1, 3, 1], [0, 2, 4, 4], None, 0),  # once in each of two
        ([0, 7, 0, 0], [0, 1, 2, 4], 7, 1),  # the first failure of several
        ([0, 6, -1], [0, 1, 3, 3], -1, 1),
        ([*range(7), *range(7)], [0, 0, 0, 14], 0, 2),  # more than there are columns
        ([2, 2, 5], [0, 3, 3, 3], 2, 0),  # before a pivot that is not positive
    ],
)
def test_an_order_that_is_none_is_named_and_nothing_written(backend, order, start, column, row):
    W, H = layer(3, 7)
    A = invert(H, 0.01, "H").A.clone()
    A[5, 5] = -1 if len(order) == 3 else 1
    before = W.clone()
    args = (torch.tensor(order, dtype=torch.int32), torch.tensor(start))
    if column is None:
        ops.static_order_prune_(W, A, *args, backend=backend)
        return
    with pytest.raises(ArgumentError, match=f"column {column} of row {row} "):
        ops.static_order_prune_(W, A, *args, backend=backend)
    assert torch.equal(W, before)
