"""One block of SparseGPT's sweep, against the loop that its contract states."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers.cases import layer
from helpers.tolerances import RELATIVE, distance
from torch import Tensor

from lobs_native import ops
from lobs_native.errors import ArgumentError, NotPositiveDefiniteError, ShapeError
from lobs_native.solvers.inversion import invert

pytestmark = pytest.mark.usefixtures("one_thread")

F64, F32 = torch.float64, torch.float32
ROWS = (1, 3, 17, 65)
COLUMNS = (1, 5, 8, 31, 33, 40, 127, 128, 130)
# (columns of a group, how many go): a part of a panel of columns, all of it, and many panels
GROUPS = [(4, 2), (4, 1), (8, 4), (5, 3), (16, 8), (20, 13), (40, 1)]


def problem(R: int, B: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights (R, B) and the upper factor (B, B) of a damped inverse, with 1e30 below its diagonal,
    which must not be read."""
    W, H = layer(R, B)
    U = torch.linalg.cholesky(invert(H, 0.01, "H").A, upper=True)
    return W.to(dtype), (U + torch.full((B, B), 1e30, dtype=F64).tril(-1)).to(dtype)


def sequential(
    W: Tensor,
    U: Tensor,
    codes: Tensor,
    group: int = 0,
    per_group: int = 0,
    follow: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """W, gone and E in float64 by the plain loop.

    Rounding may decide between two scores that are nearly equal. With ``follow``, the masks that
    were found, the loop makes the same choice if it is as good as its own, and fails otherwise.
    """
    w, u, gone = W.double().numpy().copy(), U.double().numpy(), codes.numpy().copy()
    found = None if follow is None else follow.numpy()
    E = np.zeros(W.shape)
    for j in range(w.shape[1]):
        if group and j % group == 0:
            for r in range(len(w)):
                columns = range(j, j + group)
                score = {k: (w[r, k] / u[k, k]) ** 2 for k in columns}
                first = {k for k in columns if gone[r, k] == 1}
                free = sorted((k for k in columns if gone[r, k] == 0), key=lambda k: (score[k], k))
                choice = first | set(free[: max(0, per_group - len(first))])
                if found is not None:
                    other = {k for k in columns if found[r, k] == 1}
                    assert first <= other <= first | set(free)
                    assert len(other) == len(choice)
                    costs = (sorted(score[k] for k in x - first) for x in (other, choice))
                    assert all(abs(a - b) <= 1e-3 * b for a, b in zip(*costs, strict=True))
                    choice = other
                gone[r, j : j + group] = [k in choice for k in columns]
        goes = gone[:, j] == 1
        E[goes, j] = w[goes, j] / u[j, j]
        w[:, j:] -= E[:, j, None] * u[j, j:]
        w[goes, j] = 0
    return torch.from_numpy(w), torch.from_numpy(gone), torch.from_numpy(E)


def random_codes(R: int, B: int, *, stay: bool) -> Tensor:
    """(R, B) bytes: a third each of free, goes and, with ``stay``, stays."""
    return torch.randint(0, 3 if stay else 2, (R, B), dtype=torch.uint8)


def bits(*tensors: Tensor) -> tuple[bytes, ...]:
    return tuple(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)


def swept(
    W: Tensor, U: Tensor, codes: Tensor, group: int, per_group: int, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh W, gone and E. E holds NaN before the call: all of it must be written."""
    W, gone, E = W.clone(), codes.clone(), torch.full_like(W, torch.nan)
    used = ops.sweep_block_(W, U, gone, E, group=group, per_group=per_group, backend=backend)
    assert backend is None or used == backend
    return W, gone, E


def assert_zeros(W: Tensor, gone: Tensor, E: Tensor) -> None:
    """Removed weights are exactly +0, and so are the errors of those that stay."""
    for zero in (W[gone == 1], E[gone != 1]):
        assert (zero == 0).all()
        assert not torch.signbit(zero).any()


# ---- given masks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("B", COLUMNS)
def test_a_given_mask_is_carried_out_as_by_the_loop(backend, dtype, B):
    for R in ROWS:
        W, U = problem(R, B, dtype)
        codes = random_codes(R, B, stay=True)  # 2 is not a removal, with or without groups
        found, gone, E = swept(W, U, codes, 0, 0, backend)
        expected, _, errors = sequential(W, U, codes)
        assert distance(found, expected) < RELATIVE[dtype]
        assert distance(E, errors) < RELATIVE[dtype]
        assert torch.equal(gone, codes)
        assert_zeros(found, gone, E)


def test_no_removal_changes_nothing_and_a_full_one_leaves_nothing(backend):
    W, U = problem(19, 21, F64)
    W[:, ::4] *= -0.0
    found, _, E = swept(W, U, torch.zeros(19, 21, dtype=torch.uint8), 0, 0, backend)
    assert torch.equal(found, W)
    assert not E.any()
    ones = torch.ones(19, 21, dtype=torch.uint8)
    found, _, E = swept(W, U, ones, 0, 0, backend)
    assert_zeros(found, ones, E)
    expected = torch.linalg.solve_triangular(U.triu(), W, upper=True, left=False)
    assert distance(E, expected) < RELATIVE[F64]  # all weights go, and E U = W


def test_blocks_of_any_width_make_the_same_sweep(backend):
    """Cutting the columns is only bookkeeping: E of one block repairs the columns to its right."""
    W, U = problem(9, 50, F64)
    codes = random_codes(9, 50, stay=False)
    whole, _, _ = swept(W, U, codes, 0, 0, backend)
    for width in (1, 7, 16, 49):
        cut = W.clone()
        for j in range(0, 50, width):
            block = slice(j, min(j + width, 50))
            E = torch.empty(9, block.stop - j, dtype=F64)
            gone = codes[:, block].contiguous()
            ops.sweep_block_(cut[:, block], U[block, block], gone, E, backend=backend)
            cut[:, block.stop :] -= E @ U[block, block.stop :]
        assert distance(cut, whole) < RELATIVE[F64]


# ---- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize(("group", "per_group"), GROUPS, ids=str)
@pytest.mark.parametrize("coded", [False, True], ids=["free", "codes"])
def test_groups_are_chosen_as_by_the_loop(backend, dtype, group, per_group, coded):
    for R in ROWS:
        for B in (group, 120 // group * group):
            W, U = problem(R, B, dtype)
            codes = random_codes(R, B, stay=True) * int(coded)
            found, gone, E = swept(W, U, codes, group, per_group, backend)
            follow = None if dtype == F64 else gone
            expected, mask, errors = sequential(W, U, codes, group, per_group, follow)
            assert torch.equal(gone, mask)
            assert distance(found, expected) < RELATIVE[dtype]
            assert distance(E, errors) < RELATIVE[dtype]
            assert_zeros(found, gone, E)
            if not coded:
                assert (gone.view(R, -1, group).sum(2) == per_group).all()


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("shape", [(129, 129, 60), (300, 150, 70), (387, 129, 129), (260, 65, 30)])
def test_groups_and_blocks_wider_than_any_part_that_a_kernel_takes_at_once(backend, dtype, shape):
    B, group, per_group = shape
    W, U = problem(5, B, dtype)
    codes = random_codes(5, B, stay=True)
    codes[:2] = 0
    found, gone, E = swept(W, U, codes, group, per_group, backend)
    follow = None if dtype == F64 else gone
    expected, mask, errors = sequential(W, U, codes, group, per_group, follow)
    assert torch.equal(gone, mask)
    assert distance(found, expected) < RELATIVE[dtype]
    assert distance(E, errors) < RELATIVE[dtype]
    assert_zeros(found, gone, E)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize(("group", "per_group"), GROUPS, ids=str)
def test_ties_go_to_the_lowest_column(backend, dtype, group, per_group):
    """Equal weights, or few different ones, so that no rounding can break a tie."""
    B = 6 * group
    equal = torch.ones(21, B, dtype=dtype)
    equal[::2] *= -1
    # Removals in one group change all columns of the next group equally, by eighths.
    within = torch.arange(B) // group
    U = torch.where(within[:, None] + 1 == within, 0.125, 0.0).to(dtype)
    U.diagonal().fill_(0.5)
    free = torch.zeros(21, B, dtype=torch.uint8)
    found, gone, _ = swept(equal, U, free, group, per_group, backend)
    lowest = torch.arange(B) % group < per_group
    assert torch.equal(gone, lowest.to(torch.uint8).expand(21, B))
    assert found[0, group + per_group : 2 * group].unique().numel() <= 1
    assert not torch.equal(found[:, group:], equal[:, group:].where(~lowest[group:], 0))
    few = torch.randint(-2, 3, (21, B)).to(dtype)
    codes = random_codes(21, B, stay=True)
    for before in (codes, free):
        found, gone, E = swept(few, torch.eye(B, dtype=dtype), before, group, per_group, backend)
        expected, mask, errors = sequential(few, torch.eye(B), before, group, per_group)
        assert torch.equal(gone, mask)
        assert torch.equal(found.double(), expected)
        assert torch.equal(E.double(), errors)


def test_codes_by_hand(backend):
    W = torch.tensor([[1.0, 2.0, 9.0, 3.0]], dtype=F64).repeat(8, 1)
    codes = [
        [0, 0, 0, 0],
        [0, 0, 1, 0],  # goes first, and counts
        [2, 0, 0, 0],  # stays
        [1, 1, 0, 1],  # more than there is room for
        [1, 2, 2, 0],
        [2, 2, 2, 0],  # fewer than wanted
        [2, 2, 2, 2],
        [1, 2, 2, 2],
    ]
    goes = [[0, 1], [0, 2], [1, 3], [0, 1, 3], [0, 3], [3], [], [0]]
    _, gone, _ = swept(W, torch.eye(4, dtype=F64), torch.tensor(codes).byte(), 4, 2, backend)
    assert [[j for j in range(4) if row[j]] for row in gone.tolist()] == goes
    assert int(gone.max()) == 1


def test_weights_are_scored_as_they_stand_at_the_first_column_of_their_group(backend):
    U = torch.eye(4, dtype=F64)
    U[0, 2] = 0.75
    free = torch.zeros(1, 4, dtype=torch.uint8)
    # The removal of column 0 brings column 2 from 2 to 1.25, below column 3: too late within a
    # group of four, in time for the second group of two.
    W = torch.tensor([[1.0, 3.0, 2.0, 1.5]], dtype=F64)
    found, gone, E = swept(W, U, free, 4, 2, backend)
    assert gone.tolist() == [[1, 0, 0, 1]]
    assert found.tolist() == [[0.0, 3.0, 1.25, 0.0]]
    assert E.tolist() == [[1.0, 0.0, 0.0, 1.5]]
    found, gone, E = swept(W, U, free, 2, 1, backend)
    assert gone.tolist() == [[1, 0, 1, 0]]
    assert found.tolist() == [[0.0, 3.0, 0.0, 1.5]]
    assert E.tolist() == [[1.0, 0.0, 1.25, 0.0]]
    U[3, 3] = 4.0  # in units of its pivot, column 3 is the lowest now
    _, gone, E = swept(W, U, free, 4, 1, backend)
    assert gone.tolist() == [[0, 0, 0, 1]]
    assert E.tolist() == [[0.0, 0.0, 0.0, 0.375]]


@pytest.mark.parametrize("exponent", [-80, 80])
def test_the_scale_of_the_weights_does_not_matter(backend, exponent):
    """Squares of these scores are beyond float32 on either side."""
    W, U = problem(20, 24, F32)
    free = torch.zeros(20, 24, dtype=torch.uint8)
    found, gone, E = swept(W, U, free, 4, 2, backend)
    scaled, same, e = swept(W * 2.0**exponent, U, free, 4, 2, backend)
    assert torch.equal(same, gone)
    assert bits(scaled * 2.0**-exponent, e * 2.0**-exponent) == bits(found, E)


def test_a_group_of_nothing_to_remove_keeps_all_but_what_is_coded(backend):
    W, U = problem(5, 12, F64)
    codes = random_codes(5, 12, stay=True)
    _, gone, _ = swept(W, U, codes, 4, 0, backend)
    assert torch.equal(gone == 1, codes == 1)
    _, gone, _ = swept(W, U, codes, 4, 4, backend)
    assert torch.equal(gone == 1, codes != 2)


# ---- memory --------------------------------------------------------------------------------------


def frame(x: Tensor, above: int, left: int, below: int, right: int) -> tuple[Tensor, Tensor]:
    """A NaN matrix with x in it, and the view of x."""
    R, B = x.shape
    big = torch.full((above + R + below, left + B + right), torch.nan, dtype=x.dtype)
    view = big[above : above + R, left : left + B]
    view.copy_(x)
    return big, view


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("group", [0, 4, 20])
@pytest.mark.parametrize("shape", [(1, 20), (3, 20), (17, 40), (33, 140)], ids=str)
def test_parts_of_larger_tensors_get_the_same_and_nothing_outside_is_written(
    backend, dtype, group, shape
):
    R, B = shape
    W, U = problem(R, B, dtype)
    codes = random_codes(R, B, stay=group > 0)
    expected = swept(W, U, codes, group, group // 2, backend)
    big_w, w = frame(W, 2, 3, 1, 50)
    big_u, u = frame(U, 1, 2, 1, 7)
    big_e, e = frame(torch.zeros_like(W), 1, 1, 2, 2)
    line = torch.full((R * B + 40,), 9, dtype=torch.uint8)
    gone = line[20 : 20 + R * B].view(R, B).copy_(codes)
    used = ops.sweep_block_(w, u, gone, e, group=group, per_group=group // 2, backend=backend)
    assert used == backend
    assert bits(w, gone, e) == bits(*expected)
    assert bits(u) == bits(U)
    assert (line[:20] == 9).all()
    assert (line[20 + R * B :] == 9).all()
    for big, view in ((big_w, w), (big_u, u), (big_e, e)):
        view.fill_(torch.nan)
        assert torch.isnan(big).all()


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("threads_as_before")
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("group", [0, 4, 20])
def test_the_same_bytes_for_any_number_of_threads(backend, dtype, group):
    if backend == "reference":
        pytest.skip("the reference is torch's own arithmetic, which may depend on the threads")
    W, U = problem(5001, 60, dtype)
    codes = random_codes(5001, 60, stay=True)
    seen = set()
    # A device does not use them; its own threads run in other orders with LOBS_EMULATOR_ORDER.
    repeats = 1 if ops.on_device(backend) else 5
    for threads in (1, 8) if ops.on_device(backend) else (1, 2, 3, 8):
        torch.set_num_threads(threads)
        for _ in range(repeats):
            seen.add(bits(*swept(W, U, codes, group, group // 2, backend)))
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_rows_do_not_see_each_other(backend, dtype):
    """The result for a row is the same alone, at the edge of a slab of rows, and among others."""
    W, U = problem(70, 24, dtype)
    codes = random_codes(70, 24, stay=True)
    found, gone, E = swept(W, U, codes, 4, 2, backend)
    for r in (0, 15, 16, 31, 32, 63, 69):
        one = slice(r, r + 1)
        alone = swept(W[one], U, codes[one], 4, 2, backend)
        assert bits(*alone) == bits(found[one], gone[one], E[one])


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("pivot", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("group", [0, 5])
def test_a_pivot_that_is_not_positive_is_named_and_nothing_written(backend, dtype, pivot, group):
    W, U = problem(6, 20, dtype)
    U[7, 7] = U[13, 13] = pivot
    gone = random_codes(6, 20, stay=True)
    E = torch.full_like(W, torch.nan)
    before = bits(W, U, gone, E)
    with pytest.raises(NotPositiveDefiniteError, match=r"\(7, 7\)"):
        ops.sweep_block_(W, U, gone, E, group=group, per_group=group // 2, backend=backend)
    assert bits(W, U, gone, E) == before


def test_groups_must_fill_the_block():
    W, U = problem(2, 10, F64)
    gone, E = torch.zeros(2, 10, dtype=torch.uint8), torch.empty_like(W)
    for group, per_group in ((4, 2), (5, 6), (11, 1)):
        with pytest.raises(ArgumentError, match="group"):
            ops.sweep_block_(W, U, gone, E, group=group, per_group=per_group)
    with pytest.raises(ShapeError, match="U"):
        ops.sweep_block_(W, U[:9, :9], gone, E)


def test_no_rows_are_no_work(backend):
    empty = torch.empty(0, 8, dtype=F64)
    gone = torch.empty(0, 8, dtype=torch.uint8)
    args = (empty, torch.eye(8, dtype=F64), gone, torch.empty_like(empty))
    assert ops.sweep_block_(*args, group=4, per_group=2, backend=backend) == backend
