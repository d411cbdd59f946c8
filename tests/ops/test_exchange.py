"""Swaps of kept weights for removed ones, against brute force over all swaps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from helpers.cases import conditioned, layer
from helpers.tolerances import RELATIVE, distance
from torch import Tensor

from lobs_native import ops
from lobs_native.errors import NotPositiveDefiniteError

pytestmark = pytest.mark.usefixtures("one_thread")

LEAST_GAIN = 1e-8  # swaps that lower the error by less than 1e-9 of it are not made


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Problem(NamedTuple):
    W: Tensor  # (R, C)
    H: Tensor  # (C, C), damped
    A: Tensor  # (C, C), its inverse
    kept: Tensor  # (R, C), at random, so that many swaps pay
    fixed: Tensor  # (R, C), about a fifth


def problem(R: int, C: int, share: float = 0.5, seed: int = 0) -> Problem:
    """A layer with a random ``share`` of every row removed."""
    W, H = layer(R, C, seed)
    H += (0.01 * H.diagonal().mean() + 1e-3) * torch.eye(C, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(R, C, generator=generator).argsort(dim=1)
    fixed = torch.rand(R, C, generator=generator) < 0.2
    A = torch.cholesky_inverse(torch.linalg.cholesky(H))
    return Problem(W, H, A.contiguous(), order >= round(share * C), fixed)


def repaired(w0: Tensor, H: Tensor, S: Tensor) -> tuple[Tensor, float]:
    """Best weights (C,) with the kept set S (C,), by least squares, and dw H dw^T."""
    w = torch.zeros_like(w0)
    w[S] = w0[S] + torch.linalg.solve(H[S][:, S], H[S][:, ~S] @ w0[~S])
    return w, float((w - w0) @ H @ (w - w0))


def allowed(S: Tensor, fixed: Tensor | None, group: int) -> list[tuple[int, int]]:
    """All swaps (kept, removed) of one row, by rising columns."""
    C = len(S)
    free = [fixed is None or not fixed[i] for i in range(C)]
    return [
        (i, j)
        for i in range(C)
        for j in range(C)
        if S[i] and not S[j] and free[i] and free[j] and (group == 0 or i // group == j // group)
    ]


def swapped(S: Tensor, i: int, j: int) -> Tensor:
    S = S.clone()
    S[i], S[j] = False, True
    return S


def brute_force_row(
    w0: Tensor, H: Tensor, S: Tensor, fixed: Tensor | None, group: int
) -> tuple[Tensor, int]:
    """The final set and the number of swaps, by trying every swap in every round."""
    done = 0
    while True:
        error = repaired(w0, H, S)[1]
        tried = [(repaired(w0, H, swapped(S, i, j))[1], i, j) for i, j in allowed(S, fixed, group)]
        if not tried or not min(tried)[0] - error < -1e-9 * error:
            return S, done
        _, i, j = min(tried)
        S = swapped(S, i, j)
        done += 1


def best_swap(w0: Tensor, H: Tensor, S: Tensor) -> tuple[float, int, int]:
    """The net change of the error, and the columns. Each removed column is put back in turn, by an
    inversion; then the surgeon's cost tells which one to remove."""
    error = repaired(w0, H, S)[1]
    back = torch.nonzero(~S)[:, 0]
    sets = S.repeat(len(back), 1)
    sets[torch.arange(len(back)), back] = True
    columns = torch.nonzero(sets)[:, 1].view(len(back), -1)  # (removed, kept + 1)
    D = torch.cholesky_inverse(torch.linalg.cholesky(H[columns[:, :, None], columns[:, None, :]]))
    g = torch.where(sets, 0.0, w0) @ H  # what the kept columns have to compensate for
    w = w0[columns] + (D @ g.gather(1, columns)[:, :, None])[:, :, 0]
    dw = torch.where(sets, torch.zeros(()), -w0).scatter(1, columns, w - w0[columns])
    net = ((dw @ H) * dw).sum(dim=1, keepdim=True) + w**2 / D.diagonal(dim1=1, dim2=2) - error
    net[columns == back[:, None]] = torch.inf
    j, i = divmod(int(net.argmin()), net.shape[1])
    return float(net.min()), int(columns[j, i]), int(back[j])


@lru_cache
def large(C: int, share: float) -> tuple[Problem, Tensor, Tensor]:
    """A problem with long rows, its final sets and its swaps. The columns that cost least on their
    own are removed at the start, so that there are not too many swaps."""
    p = problem(2, C, seed=C)
    p.kept[:] = (p.W**2 / p.A.diagonal()).argsort(dim=1).argsort(dim=1) >= round(share * C)
    final, swaps = p.kept.clone(), torch.zeros(2, dtype=torch.int64)
    for r in range(2):
        while True:
            net, i, j = best_swap(p.W[r], p.H, final[r])
            if not net < -1e-9 * repaired(p.W[r], p.H, final[r])[1]:
                break
            final[r] = swapped(final[r], i, j)
            swaps[r] += 1
    return p, final, swaps


# ---- the swaps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("with_fixed", [False, True], ids=["free", "fixed"])
@pytest.mark.parametrize("shape", [(3, 2), (6, 7), (5, 10)])
def test_it_ends_where_no_swap_helps(backend, shape, with_fixed, group):
    p = problem(*shape)
    fixed = p.fixed if with_fixed else None
    W, kept = p.W.clone(), p.kept.clone()
    swaps, left, used = ops.exchange_(W, p.A, kept, fixed=fixed, group=group, backend=backend)
    assert used == (ops._core.resolve("cpu") if ops.on_device(backend) else backend)
    assert swaps.dtype == torch.int64
    assert left.dtype == torch.float64
    for r in range(shape[0]):
        before, now = repaired(p.W[r], p.H, p.kept[r])[1], repaired(p.W[r], p.H, kept[r])[1]
        assert now <= before * (1 + RELATIVE[torch.float64])
        assert (int(swaps[r]) > 0) == (not torch.equal(kept[r], p.kept[r]))
        for i, j in allowed(kept[r], None if fixed is None else fixed[r], group):
            lower = repaired(p.W[r], p.H, swapped(kept[r], i, j))[1]
            assert lower >= now * (1 - LEAST_GAIN), (r, i, j)
        for part, was in zip(kept[r].split(group or 99), p.kept[r].split(group or 99), strict=True):
            assert int(part.sum()) == int(was.sum())
    if fixed is not None:
        assert torch.equal(kept[fixed], p.kept[fixed])


@pytest.mark.parametrize("group", [0, 3, 4])
@pytest.mark.parametrize("with_fixed", [False, True], ids=["free", "fixed"])
def test_each_swap_is_the_best_one(backend, with_fixed, group):
    p = problem(6, 10, seed=1)
    fixed = p.fixed if with_fixed else None
    expected = [
        brute_force_row(p.W[r], p.H, p.kept[r], None if fixed is None else fixed[r], group)
        for r in range(6)
    ]
    kept = p.kept.clone()
    swaps, _, _ = ops.exchange_(p.W.clone(), p.A, kept, fixed=fixed, group=group, backend=backend)
    assert torch.equal(kept, torch.stack([S for S, _ in expected]))
    assert swaps.tolist() == [done for _, done in expected]
    assert int(swaps.sum()) > 3


@pytest.mark.parametrize(("C", "share"), [(130, 0.5), (130, 0.9), (200, 0.3)])
def test_it_swaps_as_brute_force_does_in_long_rows(backend, C, share):
    p, final, made = large(C, share)
    W, kept = p.W.clone(), p.kept.clone()
    swaps, left, _ = ops.exchange_(W, p.A, kept, backend=backend)
    assert torch.equal(kept, final)
    assert torch.equal(swaps, made)
    assert int(made.min()) > 2
    for r in range(2):
        w, error = repaired(p.W[r], p.H, final[r])
        assert distance(W[r], w) < RELATIVE[torch.float64]
        assert float(left[r]) == pytest.approx(error, rel=1e-11)


def test_ties_go_to_the_lowest_kept_column_then_to_the_lowest_removed(backend):
    # With A = I everything is exact in small integers: a swap gains w_j^2 - w_i^2.
    W = torch.tensor(
        [[3, 1, 3, 2, 1, 1, 3, 2.0], [1, 1, 2, 2, 1, 2, 1, 2], [5, 2, 5, 1, 5, 1, 2, 1]],
        dtype=torch.float64,
    )
    start = torch.tensor(
        [[0, 1, 0, 1, 1, 1, 0, 1], [1, 1, 0, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 1, 1, 1]],
        dtype=torch.bool,
    )
    # The first row swaps 1 for 0, 4 for 2, 5 for 6.
    after = [
        [[1, 0, 0, 1, 1, 1, 0, 1], [1, 0, 1, 1, 0, 1, 0, 1], [1, 0, 1, 1, 0, 0, 1, 1]],
        [[0, 1, 1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 1, 1, 0]],
        [[1, 1, 0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0, 1, 1], [1, 1, 1, 0, 1, 0, 1, 0]],
    ]
    for limit in (1, 2, 3):
        kept = start.clone()
        swaps, _, _ = ops.exchange_(
            W.clone(),
            torch.eye(8, dtype=torch.float64),
            kept,
            limit=limit,
            backend=backend,
        )
        assert swaps.tolist() == [limit] * 3
        assert kept.int().tolist() == [steps[limit - 1] for steps in after]


def test_a_gain_that_is_only_rounding_is_left_alone(backend):
    A = torch.eye(2, dtype=torch.float64)
    for more, expected in ((1e-11, 0), (1e-6, 1)):
        W = torch.tensor([[1.0, 1.0 + more]], dtype=torch.float64)
        kept = torch.tensor([[True, False]])
        swaps, _, _ = ops.exchange_(W, A, kept, backend=backend)
        assert swaps.tolist() == [expected]
        assert kept.tolist() == [[not expected, bool(expected)]]


@pytest.mark.parametrize("limit", [1, 2])
def test_the_limit_holds_and_the_first_swaps_are_the_same(backend, limit):
    p = problem(8, 9, seed=2)
    all_swaps, _, _ = ops.exchange_(p.W.clone(), p.A, p.kept.clone(), backend=backend)
    assert int(all_swaps.max()) > 2  # else the limit would not show
    W, kept = p.W.clone(), p.kept.clone()
    swaps, _, _ = ops.exchange_(W, p.A, kept, limit=limit, backend=backend)
    assert torch.equal(swaps, all_swaps.clamp(max=limit))
    for r in range(8):
        crossed = int((kept[r] != p.kept[r]).sum())
        assert crossed <= 2 * int(swaps[r])
        if limit == 1 and int(swaps[r]):
            tried = [
                repaired(p.W[r], p.H, swapped(p.kept[r], i, j))[1]
                for i, j in allowed(p.kept[r], None, 0)
            ]
            assert repaired(p.W[r], p.H, kept[r])[1] == pytest.approx(min(tried), rel=1e-11)


# ---- the weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 0, 1], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(2, 1), (4, 10), (3, 31), (3, 64), (2, 97)])
def test_the_weights_are_the_best_for_the_final_set(backend, shape, share, limit):
    p = problem(*shape, share=share)
    W, kept = p.W.clone(), p.kept.clone()
    swaps, left, _ = ops.exchange_(W, p.A, kept, limit=limit, backend=backend)
    if limit == 0:
        assert torch.equal(kept, p.kept)
        assert not swaps.any()
    for r in range(shape[0]):
        w, error = repaired(p.W[r], p.H, kept[r])
        assert distance(W[r] - p.W[r], w - p.W[r]) < RELATIVE[torch.float64]
        dw = W[r] - p.W[r]
        assert float(left[r]) == pytest.approx(float(dw @ p.H @ dw), rel=1e-11, abs=1e-300)
        assert float(left[r]) == pytest.approx(error, rel=1e-11, abs=1e-300)
    gone = W[~kept]
    assert (gone == 0).all()
    assert not torch.signbit(gone).any()


@pytest.mark.parametrize(("condition", "bound"), [(1e2, 0.01), (1e4, 0.02), (1e6, 0.12)])
def test_the_gradient_on_the_kept_weights_vanishes_after_many_swaps(backend, condition, bound):
    """In units of C * eps * |dw| * |H|. The accuracy that the pivots of all swaps have lost must be
    recovered at the end; otherwise the error is several times as large."""
    C = 64
    H = conditioned(C, condition)  # of norm 1
    H = (H + H.T) / 2
    A = torch.linalg.inv(H)
    dense = torch.randn(4, C, dtype=torch.float64)
    W, kept = dense.clone(), torch.rand(4, C).argsort(dim=1) >= C // 2
    swaps, _, _ = ops.exchange_(W, (A + A.T) / 2, kept, backend=backend)
    assert int(swaps.min()) >= 5
    dw = W - dense
    unit = C * torch.finfo(torch.float64).eps * dw.norm(dim=1, keepdim=True)
    found = float(((dw @ H) / unit)[kept].abs().max())
    assert found < (1 if backend == "reference" else bound)


def test_nothing_to_swap_leaves_the_sets_alone(backend):
    p = problem(3, 12)
    for fixed in (p.kept, ~p.kept):  # one side of every swap is held
        kept = p.kept.clone()
        swaps, _, _ = ops.exchange_(p.W.clone(), p.A, kept, fixed=fixed, backend=backend)
        assert not swaps.any()
        assert torch.equal(kept, p.kept)
    kept = p.kept.clone()
    swaps, _, _ = ops.exchange_(p.W.clone(), p.A, kept, group=1, backend=backend)
    assert not swaps.any()
    assert torch.equal(kept, p.kept)


# ---- failures and threads ------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 0], ids=str)
def test_the_row_on_which_a_is_not_definite_is_named_and_left_as_it_was(backend, limit):
    p = problem(5, 40)
    A = p.A.clone()
    A[:, 33] = A[33] = 0
    A[33, 33] = -1e-3
    kept = p.kept.clone()
    kept[:, 33] = True
    kept[2, 33] = kept[4, 33] = False
    held = torch.zeros_like(kept)
    held[:, 33] = True
    W, found = p.W.clone(), kept.clone()
    with pytest.raises(NotPositiveDefiniteError, match=r"row 2\b"):
        ops.exchange_(W, A, found, fixed=held, limit=limit, backend=backend)
    for r in (2, 4):
        assert torch.equal(W[r], p.W[r])
        assert torch.equal(found[r], kept[r])
    good = [0, 1, 3]
    ops.exchange_(
        p.W[good], A, kept[good], fixed=held[good], limit=limit, backend=backend
    )  # these rows never divide by it


def test_a_bad_pivot_met_only_in_a_swap_is_reported(backend):
    # Kept column 2 has a negative variance: removing it seems to gain, but is impossible.
    A = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    W = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    kept = torch.tensor([[True, True, True], [True, False, True]])
    with pytest.raises(NotPositiveDefiniteError, match=r"row 1\b"):
        ops.exchange_(W, A, kept, backend=backend)
    assert W.tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("group", [0, 4])
def test_the_same_bytes_for_any_number_of_threads(backend, group):
    if backend == "reference":
        pytest.skip("the reference is torch's own arithmetic, which may depend on the threads")
    p = problem(17, 70)
    seen = set()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        W, kept = p.W.clone(), p.kept.clone()
        swaps, left, _ = ops.exchange_(W, p.A, kept, fixed=p.fixed, group=group, backend=backend)
        seen.add(tuple(t.numpy().tobytes() for t in (W, kept, swaps, left)))
    assert int(swaps.sum()) > 17
    assert len(seen) == 1
