"""Conjugate gradients with a support for each row, against float64 and against direct solutions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.tolerances import RELATIVE, distance
from torch import Tensor

from lobs_native import ops
from lobs_native.errors import DtypeError, ShapeError
from lobs_native.ops import reference

F64, F32 = torch.float64, torch.float32
SHAPES = [(1, 1), (1, 40), (17, 1), (5, 37), (3, 700), (20, 1027)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def problem(R: int, C: int, dtype: torch.dtype) -> list[Tensor]:
    """w, g, p, h, removed and rr in the middle of a solution."""
    removed = torch.rand(R, C) < 0.4
    g, p = (torch.randn(R, C, dtype=dtype).masked_fill_(removed, 0) for _ in range(2))
    h = p * 1.5 + torch.randn(R, C, dtype=dtype) * 0.1
    rr = g.to(F64).square().sum(dim=1)
    return [torch.randn(R, C, dtype=dtype), g, p, h, removed, rr]


def copied(given: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in given]


def bits(tensors: list[Tensor]) -> tuple[bytes, ...]:
    return tuple(t.numpy().tobytes() for t in tensors)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_is_that_of_float64(backend, shape, dtype):
    given = problem(*shape, dtype)
    found = copied(given)
    assert ops.conjugate_step_(*found, backend=backend) == backend
    wanted = [t.to(F64) if t.is_floating_point() else t.clone() for t in given]
    reference.conjugate_step_(*wanted)
    for a, b in zip(found, wanted, strict=True):
        if a.is_floating_point():
            assert distance(a, b) < RELATIVE[dtype]
    w, g, p, h, removed, _ = found
    assert torch.equal(w[removed], given[0][removed])
    assert not bool(g[removed].any() | p[removed].any())
    assert torch.equal(h, given[3])
    assert torch.equal(removed, given[4])


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_rows_are_solved_each_on_its_own_columns(backend, dtype):
    R, C = 6, 20
    X = torch.randn(100, C, dtype=F64)
    H = X.T @ X / 100 + 0.1 * torch.eye(C, dtype=F64)
    removed = torch.rand(R, C) < 0.5
    removed[0], removed[1] = False, True
    removed[2, 1:] = True
    b = torch.randn(R, C, dtype=F64).masked_fill_(removed, 0)
    w = torch.zeros(R, C, dtype=dtype)
    g, p = b.to(dtype, copy=True), b.to(dtype, copy=True)
    rr = g.to(F64).square().sum(dim=1)
    for _ in range(60):
        ops.conjugate_step_(w, g, p, p @ H.to(dtype), removed, rr, backend=backend)
    for r in range(R):
        S = ~removed[r]
        wanted = torch.zeros(C, dtype=F64)
        wanted[S] = torch.linalg.solve(H[S][:, S], b[r, S])
        torch.testing.assert_close(w[r].to(F64), wanted, rtol=RELATIVE[dtype], atol=1e-5)
    assert bool((rr < 1e-9).all())


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_a_row_that_is_done_or_not_positive_definite_stays_as_it_is(backend, dtype):
    given = problem(6, 37, dtype)
    w, g, p, h, _, rr = given
    g[0] = p[0] = 0
    rr[0] = 0  # done
    h[1] = -p[1]  # q < 0
    h[2] = 0  # q = 0
    for row, value in ((3, torch.nan), (4, torch.inf)):  # q is not finite
        kept = int((p[row] != 0).nonzero()[0])
        h[row, kept] = p[row, kept].sign() * value
    found = copied(given)
    ops.conjugate_step_(*found, backend=backend)
    rows = [0, 1, 2, 3, 4]
    for a, b in zip(found[:3], (w, g, p), strict=True):
        assert torch.equal(a[rows], b[rows])
        assert not torch.equal(a[5], b[5])
    assert found[5][rows].tolist() == [0.0] * 5


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_what_h_holds_outside_the_support_does_not_matter(backend, dtype):
    given = problem(5, 131, dtype)
    other = copied(given)
    other[3][other[4]] = torch.nan
    found = copied(given)
    ops.conjugate_step_(*found, backend=backend)
    ops.conjugate_step_(*other, backend=backend)
    assert bits(found[:3] + found[5:]) == bits(other[:3] + other[5:])


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_rows_may_have_gaps_between_them(backend, dtype):
    given = problem(7, 37, dtype)
    found = copied(given)
    ops.conjugate_step_(*found, backend=backend)
    spaced = []
    for t in given[:4]:
        wide = torch.full((7, 50), torch.nan, dtype=dtype)
        wide[:, :37] = t
        spaced.append(wide[:, :37])
    rr = given[5].clone()
    ops.conjugate_step_(*spaced, given[4], rr, backend=backend)
    assert bits([t.contiguous() for t in spaced[:3]] + [rr]) == bits(found[:3] + found[5:])


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(backend, dtype):
    if backend in ("reference", "emulated"):
        pytest.skip("no threads")
    given = problem(101, 300, dtype)
    seen = set()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        found = copied(given)
        ops.conjugate_step_(*found, backend=backend)
        seen.add(bits(found))
    assert len(seen) == 1


def test_wrong_arguments_are_named_and_nothing_is_written():
    given = problem(3, 8, F32)
    before = bits(given)
    names = ("w", "g", "p", "h", "removed", "rr")
    for i, name in enumerate(names):
        wrong = [*given]
        wrong[i] = given[i][:2]
        with pytest.raises(ShapeError, match="g" if i == 0 else f"^{name}"):
            ops.conjugate_step_(*wrong)
        wrong[i] = given[i].to(torch.float16)
        with pytest.raises(DtypeError, match=f"^{name}"):
            ops.conjugate_step_(*wrong)
    w, g, p, h, removed, rr = given
    with pytest.raises(ShapeError, match="p: shares memory with g"):
        ops.conjugate_step_(w, g, g, h, removed, rr)
    with pytest.raises(ShapeError, match="h: shares memory with p"):
        ops.conjugate_step_(w, g, p, p, removed, rr)
    with pytest.raises(ShapeError, match=r"w: .* contiguous"):
        ops.conjugate_step_(w.T.contiguous().T, g, p, h, removed, rr)
    assert bits(given) == before


def test_no_rows_are_no_work(backend):
    empty = [torch.empty(0, 8) for _ in range(4)]
    removed, rr = torch.empty(0, 8, dtype=torch.bool), torch.empty(0, dtype=F64)
    assert ops.conjugate_step_(*empty, removed, rr, backend=backend) == backend
