"""Exact greedy removal against a plain greedy algorithm with its own matrix per row, against all
possible masks, and against least squares."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import conditioned, features
from helpers.plain import Plain, error_of, least_squares
from helpers.tolerances import RELATIVE, distance
from torch import Tensor

from lobs_native import ops
from lobs_native.errors import NonFiniteError, NotPositiveDefiniteError

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATS = [torch.float64, torch.float32]
EPS = {dtype: torch.finfo(dtype).eps for dtype in FLOATS}


def moment_and_inverse(columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A second moment with the usual damping, and its inverse, both float64."""
    x = features(2 * columns + 3, columns, seed)
    H = x.T @ x / len(x)
    H.diagonal().add_(0.01 * H.diagonal().mean())
    A = torch.linalg.inv(H)
    return H, (A + A.T) / 2


def pair(columns: int, condition: float) -> tuple[Tensor, Tensor]:
    """A second moment with this condition number, and its inverse, as exact as the type allows."""
    Q = torch.linalg.eigh(conditioned(columns, 100.0, columns)).eigenvectors
    values = torch.logspace(0, -1, columns, base=condition, dtype=torch.float64)
    return (Q * values) @ Q.T, (Q / values) @ Q.T


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(7000 + seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def removed(trace: ops.Trace, row: int, columns: int) -> Tensor:
    gone = torch.zeros(columns, dtype=torch.bool)
    gone[trace.order[row, : int(trace.count[row])].long()] = True
    return gone


def check_ends(trace: ops.Trace) -> None:
    """Entries after the end of a row are marked as such."""
    past = torch.arange(trace.order.shape[1]) >= trace.count[:, None]
    assert bool((trace.order[past] == -1).all())
    assert bool((trace.order[~past] >= 0).all())
    assert bool((trace.loss[past] == 0).all())


# ---- against the plain greedy --------------------------------------------------------------------

PATTERNS: dict[str, dict[str, int]] = {
    "any": {},
    "any, again": {},
    "any, once more": {},
    "2:4": {"group": 4, "per_group": 2},
    "1:4": {"group": 4, "per_group": 3},
    "4:8": {"group": 8, "per_group": 4},
    "3:5": {"group": 5, "per_group": 2},
    "0:2": {"group": 2, "per_group": 2},
    "2:2": {"group": 2, "per_group": 0},
    "1x2": {"block": 2},
    "1x3": {"block": 3},
    "1x4": {"block": 4},
    "1x7": {"block": 7},
    "1x17": {"block": 17},
}
EACH = 16  # layers for each pattern; 224 in all


@functools.cache
def drawn(pattern: str, seed: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any], list[Plain]]:
    """W, H, A, options and the plain result of one random layer."""
    rng = np.random.default_rng([list(PATTERNS).index(pattern), seed])
    R, C = 3, int(rng.integers(1, 61))
    options: dict[str, Any] = dict(PATTERNS[pattern])
    block = options.get("block", 1)
    W = weights(R, C, int(rng.integers(1 << 30)))
    H, A = moment_and_inverse(C, int(rng.integers(1 << 30)))
    if rng.random() < 0.3:
        W[torch.from_numpy(rng.random((R, C)) < 0.2)] = 0
    if rng.random() < 0.5:
        options["limit"] = int(rng.integers(0, C + 3))
    if rng.random() < 0.6:
        units = (C + block - 1) // block
        state = rng.choice([0, 1, 2], (R, units), p=[0.7, 0.15, 0.15])
        state = np.repeat(state, block, 1)[:, :C].astype(np.uint8)
        options["state"] = torch.from_numpy(state)

    def plain(**more: Any) -> list[Plain]:
        given = {k: v for k, v in {**options, **more}.items() if k != "state"}
        states = options["state"].numpy() if "state" in options else [None] * R
        return [Plain(w, A.numpy(), s, **given) for w, s in zip(W.numpy(), states, strict=True)]

    expected = plain()
    if rng.random() < 0.4 and any(len(p.order) > 2 for p in expected):
        costs = np.concatenate([p.loss for p in expected])
        options["stop"] = float(np.quantile(costs, rng.uniform(0.2, 0.9)) * rng.uniform(0.9, 1.1))
        expected = plain(stop=options["stop"])
    return W, H, A, options, expected


@pytest.mark.parametrize("pattern", PATTERNS)
def test_order_losses_and_weights_are_those_of_the_plain_greedy(pattern, backend):
    for seed in range(EACH):
        W, H, A, options, expected = drawn(pattern, seed)
        trace = ops.exact_trace(W.clone(), A, **options, backend=backend)
        repaired = W.clone()
        again = ops.exact_trace(repaired, A, **options, update=True, backend=backend)
        for found in (trace, again):
            assert found.backend == backend
            assert not bool(found.lost.any())
            check_ends(found)
            for r, plain in enumerate(expected):
                k = int(found.count[r])
                assert found.order[r, :k].tolist() == plain.order, (seed, r)
                off = np.abs(found.loss[r, :k].numpy() - plain.loss)
                assert bool((off <= 1e-10 * (plain.loss + 1e-3 * plain.loss.sum())).all())
        for r, plain in enumerate(expected):
            gone = removed(again, r, W.shape[1])
            assert distance(repaired[r], plain.weight) < 1e-10
            assert distance(repaired[r], least_squares(W[r], H, gone)) < 1e-10
            assert not bool(torch.signbit(repaired[r][gone]).any())
            assert bool((repaired[r][gone] == 0).all())


def test_the_random_layers_reach_every_way_a_row_can_end():
    """The table above is useless if limits and stops never take effect."""
    ends = {"limit": 0, "stop": 0, "nothing left": 0}
    for pattern in PATTERNS:
        for seed in range(EACH):
            W, _, _, options, expected = drawn(pattern, seed)
            block = options.get("block", 1)
            for plain in expected:
                if len(plain.order) + block > options.get("limit", W.shape[1]):
                    ends["limit"] += 1
                elif "stop" in options:
                    ends["stop"] += 1
                else:
                    ends["nothing left"] += 1
    assert min(ends.values()) >= 20, ends


def test_without_update_nothing_is_written(backend):
    W, H = weights(4, 40), moment_and_inverse(40)[1]
    before = W.clone()
    ops.exact_trace(W, H, backend=backend)
    assert torch.equal(W, before)
    other = W.T.contiguous().T
    trace = ops.exact_trace(other, H, backend=backend)  # any strides, as nothing is written
    assert torch.equal(trace.order, ops.exact_trace(W, H, backend=backend).order)


# ---- against all masks ---------------------------------------------------------------------------


def errors_of_all_masks(w: Tensor, H: Tensor) -> Tensor:
    """(2**C,) the least possible error; bit q of the index says that column q is removed."""
    C = len(w)
    gone = (torch.arange(2**C)[:, None] >> torch.arange(C) & 1).bool()  # (2**C, C)
    taken = torch.where(gone, w, 0.0)
    both = ~gone[:, :, None] & ~gone[:, None, :]
    systems = torch.where(both, H, torch.eye(C, dtype=H.dtype))
    change = torch.linalg.solve(systems, torch.where(gone, 0.0, taken @ H))
    change = torch.where(gone, -w, change)
    return (change @ H * change).sum(1)


@pytest.mark.parametrize("C", [1, 2, 3, 5, 8, 10])
def test_every_removal_is_the_best_single_one_of_all(C, backend):
    """Each step by a table of all masks; the losses add up to the error of the repaired weights."""
    W, (H, A) = weights(3, C), moment_and_inverse(C)
    trace = ops.exact_trace(W, A, backend=backend)
    for r in range(len(W)):
        table = errors_of_all_masks(W[r], H)
        ones = torch.tensor([bin(m).count("1") for m in range(len(table))])
        mask, lost = 0, 0.0
        for k, q in enumerate(trace.order[r].tolist()):
            others = [i for i in range(C) if not mask >> i & 1]
            assert q == min(others, key=lambda i, m=mask: float(table[m | 1 << i]))
            mask |= 1 << q
            lost += float(trace.loss[r, k])
            assert lost == pytest.approx(float(table[mask]), rel=1e-10)
            assert float(table[ones == k + 1].min()) <= lost * (1 + 1e-10)
            repaired = W[r : r + 1].clone()
            ops.exact_trace(repaired, A, limit=k + 1, update=True, backend=backend)
            assert error_of(repaired - W[r], H) == pytest.approx(lost, rel=1e-10)


# ---- sizes around tiles and panels ---------------------------------------------------------------

SIZES = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300, 520]


LARGE: dict[str, dict[str, int]] = {
    "any": {},
    "2:4": {"group": 4, "per_group": 2},
    "1:5": {"group": 5, "per_group": 4},
    "1x3": {"block": 3},
    "1x16": {"block": 16},
    "1x17": {"block": 17},
    "1x48": {"block": 48},
    "1x64": {"block": 64},
}


@functools.cache
def sized(C: int, limit: int, pattern: str) -> tuple[Tensor, Tensor, Tensor, Plain]:
    """W (1, C), H and A of condition 100, and the plain result."""
    H, A = pair(C, 100.0)
    W = weights(1, C, C)
    options: dict[str, Any] = LARGE[pattern]
    return W, H, A, Plain(W[0].numpy(), A.numpy(), limit=limit, **options)


def skip_what_is_slow(C: int, backend: str) -> None:
    if backend == "reference" and C > 65:
        pytest.skip("the reference has no tiles, and is slow")


def check_size(C: int, limit: int, pattern: str, dtype: torch.dtype, backend: str) -> None:
    """float64 must make the plain removals; float32 must lose no more and repair as well."""
    W, H, A, plain = sized(C, limit, pattern)
    for update in (False, True):
        found = W.to(dtype, copy=True)
        trace = ops.exact_trace(
            found, A.to(dtype), limit=limit, update=update, backend=backend, **LARGE[pattern]
        )
        k = int(trace.count[0])
        assert not bool(trace.lost[0])
        assert k == len(plain.order)
        gone = removed(trace, 0, C)
        assert int(gone.sum()) == k
        if dtype == torch.float64:
            assert trace.order[0, :k].tolist() == plain.order
            off = np.abs(trace.loss[0, :k].numpy() - plain.loss)
            assert bool((off <= 1e-9 * (plain.loss + 1e-3 * plain.loss.mean())).all())
        lost = float(trace.loss[0].double().sum())
        assert lost == pytest.approx(float(plain.loss.sum()), rel=10 * RELATIVE[dtype])
        if update:
            assert distance(found[0], least_squares(W[0], H, gone)) < 10 * RELATIVE[dtype]
            assert bool((found[0][gone] == 0).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("C", SIZES)
def test_sizes_around_tiles_and_panels(C, dtype, backend):
    """Up to all columns, so that dead slots are squeezed out, several times for the long rows."""
    skip_what_is_slow(C, backend)
    for limit in sorted({1, (C + 1) // 2, max(1, C - 1), C}):
        check_size(C, limit, "any", dtype, backend)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("pattern", [name for name in LARGE if name != "any"])
@pytest.mark.parametrize("C", [129, 300, 520])
def test_patterns_in_long_rows(C, pattern, dtype, backend):
    skip_what_is_slow(C, backend)
    check_size(C, C, pattern, dtype, backend)


@pytest.mark.parametrize("C", [300, 520])
def test_long_rows_with_columns_that_stay_and_columns_that_go_first(C, backend):
    """Without update, columns that stay are dropped at once; with it, they are carried along."""
    skip_what_is_slow(C, backend)
    W, H, A, _ = sized(C, C, "any")
    rng = np.random.default_rng(C)
    state = rng.choice([0, 1, 2], (1, C), p=[0.6, 0.1, 0.3]).astype(np.uint8)
    plain = Plain(W[0].numpy(), A.numpy(), state[0])
    for update in (False, True):
        found = W.clone()
        trace = ops.exact_trace(
            found, A, state=torch.from_numpy(state), update=update, backend=backend
        )
        k = int(trace.count[0])
        assert trace.order[0, :k].tolist() == plain.order
        assert float(trace.loss.sum()) == pytest.approx(float(plain.loss.sum()), rel=1e-11)
    assert distance(found[0], least_squares(W[0], H, removed(trace, 0, C))) < 1e-11


# ---- accuracy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("condition", [1e0, 1e2, 1e4, 1e6])
def test_float32_loses_what_float64_loses(condition, share, backend):
    """By loss, not by mask: the sum of losses is within max(C, condition) eps of the incurred
    error, and that is at most a thousandth above the one in float64."""
    R, C = 6, 96
    (H, A), W = pair(C, condition), weights(R, C)
    incurred = {}
    for dtype in FLOATS:
        found = W.to(dtype, copy=True)
        trace = ops.exact_trace(
            found, A.to(dtype), limit=int(share * C), update=True, backend=backend
        )
        assert not bool(trace.lost.any())
        incurred[dtype] = error_of(found.double() - W.to(dtype).double(), H)
        said = float(trace.loss.double().sum())
        assert abs(said - incurred[dtype]) <= max(C, condition) * EPS[dtype] * incurred[dtype]
    assert incurred[torch.float32] <= incurred[torch.float64] * (1 + 1e-3)


# ---- ties and zeros ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("C", [1, 7, 64, 130, 300])
def test_ties_go_to_the_lowest_column(C, dtype, backend):
    W, A = torch.full((2, C), -0.75, dtype=dtype), torch.eye(C, dtype=dtype)
    assert ops.exact_trace(W, A, backend=backend).order.tolist() == [list(range(C))] * 2
    groups = ops.exact_trace(W, A, group=4, per_group=2, backend=backend)
    first = [q for q in range(C - C % 4) if q % 4 < 2]
    assert groups.count.tolist() == [len(first)] * 2
    assert groups.order[:, : len(first)].tolist() == [first] * 2
    blocks = ops.exact_trace(W, A, block=3, backend=backend)
    assert blocks.order[0, : C - C % 3].tolist() == list(range(C - C % 3))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zeros_go_first_and_cost_nothing(dtype, backend):
    C = 70
    W, A = weights(3, C).to(dtype), moment_and_inverse(C)[1].to(dtype)
    W[0, [3, 17, 69]] = 0.0
    W[1, [5, 6]] = -0.0
    W[2] = 0.0
    before = W.clone()
    trace = ops.exact_trace(W, A, limit=5, update=True, backend=backend)
    assert trace.order[0, :3].tolist() == [3, 17, 69]
    assert trace.loss[0, :3].tolist() == [0, 0, 0]
    assert float(trace.loss[0, 3]) > 0
    assert trace.order[1, :2].tolist() == [5, 6]
    assert trace.order[2].tolist() == [0, 1, 2, 3, 4]
    assert trace.loss[2].tolist() == [0] * 5
    only = before.clone()
    ops.exact_trace(only[:1], A, limit=3, update=True, backend=backend)
    assert torch.equal(only, before)  # the removal of zeros repairs nothing
    assert not bool(torch.signbit(W[1, [5, 6]]).any())


def test_no_removals_change_nothing(backend):
    W, A = weights(3, 20), moment_and_inverse(20)[1]
    before = W.clone()
    for options in ({"limit": 0}, {"stop": 0.0}, {"group": 2}, {"block": 4, "limit": 3}):
        trace = ops.exact_trace(W, A, update=True, backend=backend, **options)
        assert trace.count.tolist() == [0, 0, 0]
        assert not bool(trace.lost.any())
        check_ends(trace)
        assert torch.equal(W, before)


# ---- rows that rounding ends ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_that_rounding_ends_is_marked_and_the_others_are_right(dtype, backend):
    """Columns 1 and 4 are equal up to rounding: removing both would divide by rounding error."""
    C = 7
    A = torch.eye(C, dtype=dtype)
    A[1, 4] = A[4, 1] = 1.0
    W = torch.tensor([[5.0, 1.0, 2.0, 6.0, 3.0, 7.0, 8.0]] * 3, dtype=dtype)
    before = W.clone()
    state = torch.zeros(3, C, dtype=torch.uint8)
    state[1, 4] = 2
    state[2, [2, 1]] = 1
    state[2, 3:] = 2
    trace = ops.exact_trace(W, A, state=state, update=True, backend=backend)
    assert trace.lost.tolist() == [True, False, False]
    check_ends(trace)
    # 1 goes first and 4 compensates for it: 3 - 1 = 2, over a diagonal of zero, so 4 never goes.
    k = int(trace.count[0])
    assert trace.order[0, 0] == 1
    assert trace.loss[0, 0] == 1
    assert 4 not in trace.order[0, :k].tolist()
    assert torch.equal(W[0], before[0])  # lost rows keep their values
    assert trace.order[1].tolist() == [1, 2, 0, 3, 5, 6, -1]
    assert W[1].tolist() == [0, 0, 0, 0, 2, 0, 0]
    assert trace.order[2, :3].tolist() == [1, 2, 0]
    assert W[2].tolist() == [0, 0, 0, 6, 2, 7, 8]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_negative_diagonal_ends_a_row_before_it_is_divided_by(dtype, backend):
    """Columns 1 and 4 are more alike than any two columns can be."""
    A = torch.eye(6, dtype=dtype)
    A[1, 4] = A[4, 1] = 1.5
    W = torch.tensor([[5.0, 1.0, 2.0, 6.0, 3.0, 7.0], [5.0, 1.0, 2.0, 6.0, 0.0, 7.0]], dtype=dtype)
    before = W.clone()
    trace = ops.exact_trace(W, A, update=True, backend=backend)
    assert trace.lost.tolist() == [True, True]
    assert trace.count.tolist() == [1, 1]
    assert trace.order[:, 0].tolist() == [1, 4]
    assert torch.equal(W, before)


def test_what_float32_cannot_do_is_marked_and_the_good_removals_counted(backend):
    """Condition 1e9 without damping: the removals before the end cost the same as in float64."""
    C = 80
    A, W = pair(C, 1e9)[1], weights(4, C)
    trace = ops.exact_trace(W.float(), A.float(), backend=backend)
    check_ends(trace)
    if backend == "reference":  # works in float64, on the rounded matrix
        return
    assert bool(trace.lost.any())
    assert bool((trace.count[trace.lost] < C).all())
    assert bool((trace.count[~trace.lost] == C).all())
    assert bool(torch.isfinite(trace.loss).all())
    exact = ops.exact_trace(W, A, backend=backend)
    k = int(trace.count.min()) // 4
    assert k > 4
    off = (trace.loss[:, :k].sum(1) / exact.loss[:, :k].sum(1) - 1).abs()
    assert float(off.max()) < 1e-2


def test_blocks_that_rounding_ends_are_marked(backend):
    A = torch.eye(6)
    A[2, 3] = A[3, 2] = 1.0
    W = torch.tensor([[1.0, 1, 5, 5, 2, 2]])
    trace = ops.exact_trace(W, A, block=2, backend=backend)
    assert trace.lost.tolist() == [True]
    assert 2 not in trace.order[0, : int(trace.count[0])].tolist()
    assert int(trace.count[0]) % 2 == 0
    check_ends(trace)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(value, backend):
    W, A = weights(3, 9), moment_and_inverse(9)[1]
    for at in ((0, 0), (2, 8), (1, 5)):
        for update in (False, True):
            wrong = W.clone()
            wrong[at] = value
            with pytest.raises(NonFiniteError, match=rf"W: -?(nan|inf) at \({at[0]}, {at[1]}\)"):
                ops.exact_trace(wrong, A, update=update, backend=backend)
            wrong, before = A.clone(), W.clone()
            wrong[at] = value
            with pytest.raises(NonFiniteError, match=r"A: "):
                ops.exact_trace(W, wrong, update=update, backend=backend)
            assert torch.equal(W, before)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_diagonal_that_is_not_positive_is_named(value, backend):
    A = torch.eye(5)
    A[3, 3] = value
    with pytest.raises(NotPositiveDefiniteError, match=r"\(3, 3\)"):
        ops.exact_trace(torch.ones(2, 5), A, backend=backend)


# ---- memory --------------------------------------------------------------------------------------


def test_little_memory_means_fewer_threads_and_the_same_bytes(backend):
    W, A = weights(16, 200).float(), moment_and_inverse(200)[1].float()
    needed = ops.exact_bytes(200, backend=backend)
    if backend == "reference":
        assert needed == 0
        return
    assert needed > 0
    torch.set_num_threads(8)
    try:
        free = ops.exact_trace(W, A, backend=backend)
        for memory in (needed, 2 * needed + 1, 100 * needed):
            tight = ops.exact_trace(W, A, memory=memory, backend=backend)
            assert torch.equal(free.order, tight.order)
            assert torch.equal(free.loss, tight.loss)
        with pytest.raises(MemoryError, match=rf"memory: .*{needed} bytes.* {needed - 1} allowed"):
            ops.exact_trace(W, A, memory=needed - 1, backend=backend)
    finally:
        torch.set_num_threads(1)


def test_the_bytes_asked_for_grow_with_the_work():
    small = ops.exact_bytes(512, limit=64)
    assert 0 < small < ops.exact_bytes(512) < ops.exact_bytes(1024)
    assert ops.exact_bytes(512, torch.float64) > 1.5 * ops.exact_bytes(512)
    assert ops.exact_bytes(512, block=16) > ops.exact_bytes(512)
    # Far below C * C, a matrix per row, which the plain greedy algorithm needs.
    assert ops.exact_bytes(4096) < 0.75 * 4096 * 4096 * 4
