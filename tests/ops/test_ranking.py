"""Selection of exactly the requested number of cheapest removals, and their order."""

from __future__ import annotations

import pytest
import torch

from lobs_native import ops
from lobs_native.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError
from lobs_native.ops import reference


def scores(rows: int, columns: int, kind: str) -> torch.Tensor:
    """(rows, columns) float64 of one kind; "few values" is full of ties."""
    random = torch.randn(rows, columns, dtype=torch.float64)
    return {
        "random": random,
        "few values": (random * 2).round(),
        "equal": torch.full_like(random, -1.5),
        "wide": random.sign() * 2.0 ** (random * 300),
        "infinite": torch.where(random > 0.5, torch.inf, random),
        "signed zeros": random.sign() * 0.0,
    }[kind]


KINDS = ["random", "few values", "equal", "wide", "infinite", "signed zeros"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 70_000), (1, 200_001), (2, 20_001), (9, 17_000), (5, 37), (40, 300)]
)
def test_exactly_the_lowest_are_chosen_with_ties_to_the_lowest_column(backend, kind, shape):
    score = scores(*shape, kind)
    C = shape[1]
    for count in sorted({0, 1, C // 3, C - 1, C}):
        chosen = ops.rank_lowest(score, count, backend=backend)
        assert torch.equal(chosen, reference.rank_lowest(score, count))
        assert chosen.sum(1).tolist() == [count] * shape[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 30), (20, 1000)])
def test_rows_are_in_rising_order_with_ties_to_the_lowest_column(backend, kind, shape):
    score = scores(*shape, kind)
    chosen = torch.rand(shape) < 0.6
    chosen[-1] = False
    order, start = ops.rank_rows(score, chosen, backend=backend)
    expected: list[int] = []
    for r in range(shape[0]):
        assert int(start[r]) == len(expected)
        columns = [q for q in range(shape[1]) if chosen[r, q]]
        expected += sorted(columns, key=lambda q: (float(score[r, q]), q))
    assert order.tolist() == expected
    assert int(start[-1]) == len(expected)
    assert order.dtype == torch.int32


def test_the_reference_by_hand():
    score = torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 5.0]], dtype=torch.float64)
    assert reference.rank_lowest(score, 3).tolist() == [
        [False, True, True, True],
        [True, True, True, False],
    ]
    order, start = reference.rank_rows(score, score < 3)
    assert order.tolist() == [1, 3, 2, 0, 1, 2]
    assert start.tolist() == [0, 3, 6]


def test_wrong_arguments_are_named():
    score = torch.zeros(2, 3, dtype=torch.float64)
    for count, error in (
        (-1, ArgumentError),
        (4, ArgumentError),
        (1.0, DtypeError),
        (True, DtypeError),
    ):
        with pytest.raises(error, match="count"):
            ops.rank_lowest(score, count)
    with pytest.raises(DtypeError, match="score"):
        ops.rank_lowest(score.float(), 1)
    with pytest.raises(NonFiniteError, match="score"):
        ops.rank_lowest(score / 0, 1)
    with pytest.raises(ShapeError, match="chosen"):
        ops.rank_rows(score, torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(DtypeError, match="chosen"):
        ops.rank_rows(score, score)


def test_the_same_for_any_number_of_threads():
    score = scores(1, 300_000, "few values")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(ops.rank_lowest(score, 100_000))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, results[0]) for x in results)
