"""The rows of one layer, shared by several processes (threads, here): the bits of one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.errors import NotPositiveDefiniteError
from lobs_native.solvers import rows as rows_module
from lobs_native.solvers.drift import Drift
from lobs_native.solvers.problem import Problem
from lobs_native.solvers.repair import repair
from lobs_native.solvers.rows import Rows, blocks, own_share
from lobs_native.solvers.settings import LayerSettings
from lobs_native.solvers.weight import prune_groups
from lobs_native.solvers.workspace import Workspace


class InThreads(Rows):
    """Rows that threads share; what they pass lies in ``passed``."""

    def __init__(self, rank: int, passed: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(passed)
        self.passed, self.barrier = passed, barrier
        self.exchanges = 0

    def _all(self, own: Any) -> list[Any]:
        self.exchanges += 1
        self.passed[self.rank] = own
        self.barrier.wait(60)
        found = list(self.passed)
        self.barrier.wait(60)
        return found

    def joined(self, own: Tensor, count: int, *, whole_blocks: bool = False) -> Tensor:
        ends = self.ends(count, whole_blocks=whole_blocks)
        assert len(own) == ends[self.rank + 1] - ends[self.rank]
        return torch.cat(self._all(own.clone()))

    def values(self, own: Sequence[int]) -> list[list[int]]:
        return self._all(list(own))


def shared(size: int, run: Callable[[InThreads], Any]) -> list[Any]:
    """What ``run`` returns on each of so many threads."""
    passed, barrier = [None] * size, threading.Barrier(size)

    def one(rank: int) -> Any:
        try:
            return run(InThreads(rank, passed, barrier))
        except BaseException:
            barrier.abort()  # or the others would wait
            raise

    with ThreadPoolExecutor(size) as pool:
        return [done.result() for done in [pool.submit(one, rank) for rank in range(size)]]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_BLOCK", 16)


def layer(rows: int, columns: int, *, bias: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight (1, R, C), second moment, bias (1, R); two inputs are nearly alike, one is dead."""
    generator = torch.Generator().manual_seed(rows + columns)
    W = torch.randn(1, rows, columns, generator=generator)
    x = torch.randn(3 * columns, columns, dtype=torch.float64, generator=generator)
    x[:, 1] = x[:, 0] + 0.05 * x[:, 1]
    x[:, 5] = 0
    if bias:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    W[0, 3, :7] = 0
    return W, x.T @ x / len(x), torch.randn(1, rows, generator=generator) if bias else None


TARGETS = {
    "layer": {"sparsity": 0.5},
    "row": {"sparsity": 0.6, "scope": "row"},
    "2:4": {"pattern": "2:4"},
    "1x4": {"pattern": "1x4", "sparsity": 0.5},
    "max_error": {"max_error": 0.5},
    "mask": {},
    "masked": {"sparsity": 0.6},
    "exchange": {"sparsity": 0.5, "scope": "row", "refine": "exchange"},
    "solve": {"sparsity": 0.5, "refine": "solve"},
}


CASES = [
    (method, target)
    for method in ("exact", "admm", "sweep", "lobs", "magnitude", "wanda")
    for target in TARGETS
    if target != "max_error" or method in ("exact", "sweep")  # dozens of prunings
]


@pytest.mark.parametrize(("method", "target"), CASES)
def test_shared_rows_have_the_bits_of_one_process(method, target):
    W, H, b = layer(70, 24, bias=target in ("layer", "masked"))
    settings = LayerSettings(method=method, **TARGETS[target])
    mask = None
    if target.startswith("mask"):
        mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) < 0.8

    def prune(rows: Rows) -> Any:
        out = prune_groups(W, [H], settings, bias=b, mask=mask, rows=rows)
        return {k: v for k, v in vars(out).items() if k != "seconds"}

    one = prune(Rows())
    for size in (2, 5):
        for out in shared(size, prune):
            for name, value in one.items():
                same = torch.equal if isinstance(value, Tensor) else lambda a, b: a == b
                assert same(out[name], value), (name, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["exact", "admm"])
def test_so_have_corrected_layers_with_importances(method, dtype):
    W, H, _ = layer(70, 24)
    W, generator = W.to(dtype), torch.Generator().manual_seed(1)
    pull = 0.1 * torch.randn(24, 70, generator=generator, dtype=torch.float64)
    drift = Drift([pull.index_fill(0, torch.tensor(5), 0.0)], 10.0, 1.0)
    importance = torch.rand(1, 70, generator=generator)
    settings = LayerSettings(method=method, sparsity=0.5)

    def prune(rows: Rows) -> Tensor:
        return prune_groups(W, [H], settings, importance=importance, drift=drift, rows=rows).weight

    one = prune(Rows())
    for size in (2, 4):
        assert all(torch.equal(x, one) for x in shared(size, prune))


@pytest.mark.parametrize("method", ["exact", "admm", "lobs"])
def test_each_does_its_own_rows(method, monkeypatch):
    """The kernels see a part of the rows, and something is exchanged."""
    W, H, _ = layer(64, 24)
    seen = []
    kernel = {"exact": "exact_trace", "admm": "admm_step_", "lobs": "static_order_prune_"}[method]
    real = getattr(ops, kernel)

    def watched(W: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append(len(W))
        return real(W, *rest, **options)

    monkeypatch.setattr(ops, kernel, watched)
    settings = LayerSettings(method=method, sparsity=0.5)

    def prune(rows: Rows) -> int:
        prune_groups(W, [H], settings, rows=rows)
        assert isinstance(rows, InThreads)
        return rows.exchanges

    assert min(shared(4, prune)) > 0
    assert max(seen) == 16


@pytest.mark.parametrize("count", [1, 15, 16, 31, 32, 47, 100, 1000])
def test_blocks_are_all_rows_in_order(count):
    parts = blocks(count)
    assert [r for part in parts for r in range(count)[part]] == list(range(count))
    assert all(part.start % 16 == 0 for part in parts)
    assert count < 16 or min(part.stop - part.start for part in parts) >= 16


@pytest.mark.parametrize("count", [1, 3, 40, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_row_and_block_is_that_of_one_process(count, size):
    rows = [InThreads(rank, [None] * size, threading.Barrier(1)) for rank in range(size)]
    for whole in (False, True):
        own = [range(count)[of.own(count, whole_blocks=whole)] for of in rows]
        assert [r for some in own for r in some] == list(range(count))
    starts = [
        of.own(count, whole_blocks=True).start + b.start
        for of in rows
        for b in of.own_blocks(count)
    ]
    assert starts == [b.start for b in blocks(count)]


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [0, 1, 37, 150, 299, 300, 400])
def test_own_shares_are_those_of_a_sort(kind, count):
    generator = torch.Generator().manual_seed(count)
    most = torch.iinfo(kind).max
    keys = torch.randint(0, most, (300,), generator=generator, dtype=kind)
    keys[torch.randint(0, 300, (200,), generator=generator)] = int(keys[7])  # many that are equal
    keys[3] = most
    parts = keys.split([100, 0, 50, 150])
    rank = torch.arange(4).repeat_interleave(torch.tensor([100, 0, 50, 150]))
    first = rank[keys.sort(stable=True).indices[:count]]
    found = shared(4, lambda rows: own_share(rows, parts[rows.rank], count))
    assert found == torch.bincount(first, minlength=4).tolist()
    assert own_share(Rows(), keys, count) == min(count, 300)


def test_rows_that_cannot_be_solved_by_one_are_solved_for_in_float64_by_all(monkeypatch):
    W, H, _ = layer(40, 24)
    removed = torch.zeros(1, 40, 24, dtype=torch.bool)
    removed[0, :, 0], removed[0, -1, :4] = True, True
    real = ops.support_solve_

    def narrow(X: Tensor, M: Tensor, chosen: Tensor, **options: Any) -> str:
        if X.dtype == torch.float32 and bool(chosen[-1, 3]):  # the last row, which is one's own
            raise NotPositiveDefiniteError("of the last row")
        return real(X, M, chosen, **options)

    monkeypatch.setattr(ops, "support_solve_", narrow)

    def run(rows: Rows) -> tuple[Tensor, list[str]]:
        workspace = Workspace("cpu", rows=rows)
        how: dict[str, Any] = {"damping": 0.01, "inverted": True, "prune_bias": False, "mask": None}
        problem = Problem.of(W, None, [H], workspace=workspace, **how)
        return repair(problem, removed), workspace.notes

    weights, notes = run(Rows())
    assert "in float64" in notes[0]
    for found in shared(2, run):
        assert torch.equal(found[0], weights)
        assert found[1] == notes
