"""Units that several layers read: the order of removal, and what each removal costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lobs_native.solvers.joint import Reader, cheapest_first, joint_removal
from lobs_native.solvers.measurement import energy
from lobs_native.solvers.problem import Problem
from lobs_native.solvers.workspace import Workspace

DAMPING = 0.01
# The units of the inputs of each reader: one column each; two each, mixed, with two that stay; not
# all units.
COLUMNS = (
    [0, 1, 2, 3, 4, 5],
    [3, 0, 1, -1, 2, 5, 4, 0, 5, 1, 3, 2, 4, -1],
    [2, 4, 5],
)


def readers(bias: bool = False) -> list[Reader]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for i, columns in enumerate(COLUMNS):
        C = len(columns)
        x = torch.randn(200, C, generator=generator) @ torch.randn(C, C, generator=generator)
        if bias:
            x = torch.cat([x, torch.ones(200, 1)], 1)
        H = (x.T @ x).double() / len(x)
        weight = torch.randn(1, 5 + i, C, generator=generator, dtype=torch.float64)
        problem = Problem.of(
            weight,
            torch.randn(1, 5 + i, generator=generator, dtype=torch.float64) if bias else None,
            [H],
            damping=DAMPING,
            inverted=True,
            prune_bias=False,
            mask=None,
            workspace=Workspace("reference", None),
        )
        found.append(Reader(problem, torch.tensor(columns), 1 / energy(problem)))
    return found


def least_error(reader: Reader, gone: set[int]) -> float:
    """What the reader loses without these units, when all other inputs make up for it: damped, by
    a solution of its own for the rows."""
    problem = reader.problem
    H = problem.moments[0].clone()
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    w = problem.before[0].double()
    lost = torch.zeros(w.shape[1], dtype=torch.bool)
    lost[: len(reader.columns)] = torch.tensor([int(u) in gone for u in reader.columns])
    kept = ~lost
    pull = w[:, lost] @ H[lost]
    change = -w * lost
    change[:, kept] = torch.linalg.solve(H[kept][:, kept], pull[:, kept].T).T
    return float(((change @ H) * change).sum()) * reader.importance


@pytest.mark.parametrize("bias", [False, True])
def test_every_removal_is_the_cheapest_by_brute_force(bias):
    some = readers(bias)
    removal = joint_removal(some, 6)
    assert len(removal.order) == 5  # one stays
    gone: set[int] = set()
    before = 0.0
    for unit, spent in zip(removal.order, removal.spent, strict=True):
        costs = {
            u: sum(least_error(r, gone | {u}) for r in some) - before
            for u in range(6)
            if u not in gone
        }
        assert unit == min(costs, key=costs.__getitem__)
        assert spent == pytest.approx(costs[unit], rel=1e-6)
        gone.add(unit)
        before += costs[unit]


def test_one_unit_of_each_part_stays():
    parts = [torch.tensor([0, 1]), torch.tensor([2, 3, 4, 5, -1])]
    removal = joint_removal(readers(), 6, parts)
    assert len(removal.order) == 4
    assert not {0, 1} <= set(removal.order)
    scores = [torch.ones(len(c), dtype=torch.float64) for c in COLUMNS]
    assert len(cheapest_first(readers(), 6, parts, scores).order) == 4


def test_scores_are_summed_over_readers():
    scores: list[Tensor] = [torch.zeros(len(c), dtype=torch.float64) for c in COLUMNS]
    scores[0] += torch.tensor([5.0, 4, 3, 2, 1, 0])
    scores[1][3] = 100.0  # of a column that stays
    scores[2][2] = 10.0  # unit 5
    removal = cheapest_first(readers(), 6, [], scores)
    assert removal.order == [4, 3, 2, 1, 0]
    assert removal.spent == [1, 2, 3, 4, 5]
