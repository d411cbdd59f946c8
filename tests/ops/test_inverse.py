"""Updates of the inverse: r samples at once equal r rank-1 updates."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import features
from helpers.tolerances import RELATIVE, distance

import lobs_native as lobs
from lobs_native import ops
from lobs_native.errors import ArgumentError, LobsError, NonFiniteError, NotPositiveDefiniteError
from lobs_native.ops import inverse

FLOATS = [torch.float64, torch.float32]


def start(blocks: int, B: int, alpha: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.eye(B, dtype=dtype).mul(alpha).repeat(blocks, 1, 1)


def direct(G: torch.Tensor, blocks: int, B: int, alpha: float, m: float) -> torch.Tensor:
    """(I / alpha + G_b^T G_b / m)^-1 for every block, float64."""
    padded = torch.zeros(len(G), blocks * B, dtype=torch.float64)
    padded[:, : G.shape[1]] = G
    g = padded.view(len(G), blocks, B).transpose(0, 1)  # (blocks, r, B)
    whole = torch.eye(B, dtype=torch.float64) / alpha + g.transpose(1, 2) @ g / m
    # Not linalg.inv: for several blocks on several threads it fails at random in torch 2.13.
    return torch.cholesky_inverse(torch.linalg.cholesky(whole))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("B", [1, 2, 16, 31, 33, 50, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("r", [1, 15, 16, 17, 40])
def test_update_equals_the_direct_inverse(backend, dtype, B, r):
    blocks = 7
    G = torch.randn(r, blocks * B, dtype=dtype)
    F = start(blocks, B, 2.0, dtype)
    used = ops.inverse_update_(F, G, float(r), backend=backend)
    # On a device a block must fit into shared memory.
    assert used == backend or (used == "torch" and dtype == torch.float64 and B > 100)
    assert distance(F, direct(G, blocks, B, 2.0, r)) < RELATIVE[dtype] * 5


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_many_at_once_equal_one_at_a_time(backend, dtype):
    G = torch.randn(20, 30, dtype=dtype)
    together, single = start(3, 10, 5.0, dtype), start(3, 10, 5.0, dtype)
    ops.inverse_update_(together, G, 20.0, backend=backend)
    for g in G:
        ops.inverse_update_(single, g[None], 20.0, backend=backend)
    assert distance(together, single) < RELATIVE[dtype]


def test_the_result_stays_exactly_symmetric(backend):
    F = start(5, 33, 10.0, torch.float32)
    ops.inverse_update_(F, torch.randn(50, 165), 50.0, backend=backend)
    assert torch.equal(F, F.transpose(1, 2))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("B", [1, 3, 17, 50])
def test_blocks_that_are_nearly_multiples_of_the_identity_are_not_taken_for_them(backend, dtype, B):
    """The product with a multiple of the identity may be skipped, block by block."""
    F = start(6, B, 2.0, dtype)
    F[1, B - 1, B - 1] = 3.0
    F[2, B - 1, 0] = F[2, 0, B - 1] = 0.5
    F[4] *= 0.25
    F[5, B // 2, B - 1] = F[5, B - 1, B // 2] = 0.25
    whole, G = torch.zeros(6, B, B, dtype=torch.float64), torch.randn(20, 6 * B, dtype=dtype)
    for b, g in enumerate(G.double().split(B, 1)):
        whole[b] = torch.cholesky_inverse(torch.linalg.cholesky(F[b].double())) + g.T @ g / 20
    ops.inverse_update_(F, G, 20.0, backend=backend)
    expected = torch.cholesky_inverse(torch.linalg.cholesky(whole))
    assert distance(F, expected) < RELATIVE[dtype] * 5


def test_missing_columns_count_as_zero(backend):
    G = torch.randn(6, 17, dtype=torch.float64)
    F = start(4, 5, 3.0, torch.float64)
    ops.inverse_update_(F, G, 6.0, backend=backend)
    assert distance(F, direct(G, 4, 5, 3.0, 6)) < 1e-12
    assert F[3, 2:, 2:].tolist() == (torch.eye(3, dtype=torch.float64) * 3).tolist()


def test_strided_samples_give_the_same_bits(backend):
    wide = torch.randn(9, 100, dtype=torch.float64)
    G = wide[:, 10:50]
    a, b = start(4, 10, 3.0, torch.float64), start(4, 10, 3.0, torch.float64)
    ops.inverse_update_(a, G, 9.0, backend=backend)
    ops.inverse_update_(b, G.contiguous(), 9.0, backend=backend)
    assert torch.equal(a, b)


def test_a_block_that_lost_definiteness_is_named(backend):
    F = start(6, 8, 1.0, torch.float64)
    F[4] *= -100
    with pytest.raises(NotPositiveDefiniteError, match="block 4"):
        ops.inverse_update_(F, torch.randn(3, 48, dtype=torch.float64), 1.0, backend=backend)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_blocks_that_lost_definiteness_stay_as_they_were_and_the_others_are_updated(backend, dtype):
    if backend == "reference":
        pytest.skip("the reference stops at the first")
    G = torch.randn(40, 37 * 20, dtype=dtype)  # more blocks than are worked on at a time
    F = start(37, 20, 1.0, dtype)
    for b in (3, 7, 35):
        F[b] *= -100
    before = F.clone()
    with pytest.raises(NotPositiveDefiniteError, match="block 3 "):
        ops.inverse_update_(F, G, 40.0, backend=backend)
    expected = direct(G, 37, 20, 1.0, 40.0)
    for b in range(37):
        if b in (3, 7, 35):
            assert torch.equal(F[b], before[b])
        else:
            assert distance(F[b], expected[b]) < RELATIVE[dtype] * 5


def test_a_failure_among_the_last_of_many_samples_is_named(backend, monkeypatch):
    """Samples are passed in parts; the failure is in one of the later ones."""
    monkeypatch.setattr(inverse, "_SAMPLES", 8)
    G = torch.zeros(20, 12, dtype=torch.float64)
    G[18, 5] = 2.0
    F = start(3, 4, -1.0, torch.float64)
    with pytest.raises(NotPositiveDefiniteError, match="block 1 "):
        ops.inverse_update_(F, G, 1.0, backend=backend)
    G[19, 11] = torch.inf
    before = F.clone()
    with pytest.raises(NonFiniteError, match=r"G: inf at \(19, 11\)"):
        ops.inverse_update_(F, G, 1.0, backend=backend)
    assert torch.equal(F, before)


def test_a_nan_is_named_and_changes_nothing(backend):
    G = torch.randn(5, 24)
    G[3, 20] = torch.nan
    F = start(3, 8, 1.0, torch.float32)
    before = F.clone()
    with pytest.raises(NonFiniteError, match=r"G: nan at \(3, 20\)"):
        ops.inverse_update_(F, G, 5.0, backend=backend)
    assert torch.equal(F, before)


def test_large_blocks_go_through_torch_and_agree():
    G = torch.randn(700, 600, dtype=torch.float64)
    F = start(1, 600, 1e3, torch.float64)
    assert ops.inverse_update_(F, G, 700.0) == "torch"
    assert distance(F, direct(G, 1, 600, 1e3, 700)) < 1e-10
    F[0] *= -1e6
    with pytest.raises(NotPositiveDefiniteError, match="block 0"):
        ops.inverse_update_(F, G, 700.0)


def test_several_large_blocks_agree_too(monkeypatch):
    G = torch.randn(40, 3 * 520 - 7, dtype=torch.float64)
    expected = direct(G, 3, 520, 1e3, 40)
    for together in (1, 2 * 520 * 520, 1 << 24):
        monkeypatch.setattr(inverse, "_TOGETHER", together)
        F = start(3, 520, 1e3, torch.float64)
        assert ops.inverse_update_(F, G, 40.0) == "torch"
        assert distance(F, expected) < 1e-10
        F[1:] *= -1e6
        with pytest.raises(NotPositiveDefiniteError, match="block 1 "):
            ops.inverse_update_(F, G, 40.0)


# ---- the paper's recursion -----------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1e2, 1e6])
def test_after_all_samples_it_is_the_ridge_inverse(alpha):
    x = features(500, 40)
    s = lobs.StreamingInverse(40, rows=500, alpha=alpha)
    for part in x.split(123):
        s.update(part)
    H = lobs.Hessian(40).update(x).matrix()
    assert (
        distance(s.inverse(), torch.linalg.inv(H + torch.eye(40, dtype=torch.float64) / alpha))
        < 1e-9
    )
    assert s.seen == 500
    assert s.inverse().shape == (40, 40)


def test_a_dead_input_keeps_alpha():
    x = features(50, 6)
    x[:, 2] = 0
    inverse = lobs.StreamingInverse(6, rows=50, alpha=1e4).update(x).inverse()
    assert inverse[2, 2].item() == 1e4
    assert inverse[2, [0, 1, 3, 4, 5]].abs().max().item() == 0.0


def test_blocks_are_the_diagonal_of_nothing_else():
    x = torch.randn(30, 23, dtype=torch.float64)
    s = lobs.StreamingInverse(23, rows=30, alpha=10.0, blocks=4).update(x)
    assert s.inverse().shape == (4, 6, 6)
    assert distance(s.inverse(), direct(x, 4, 6, 10.0, 30)) < 1e-11


def test_one_sample_may_be_a_vector():
    x = torch.randn(5, dtype=torch.float64)
    a = lobs.StreamingInverse(5, rows=3, alpha=2.0).update(x).inverse()
    assert distance(a, direct(x[None], 1, 5, 2.0, 3)) < 1e-13


def test_a_failed_update_closes_the_object():
    s = lobs.StreamingInverse(4, rows=1, alpha=1.0)
    s._inverse.mul_(-100)
    with pytest.raises(NotPositiveDefiniteError):
        s.update(torch.ones(1, 4))
    with pytest.raises(LobsError, match="start again"):
        s.inverse()


def test_empty_blocks_are_refused():
    with pytest.raises(ArgumentError, match=r"blocks: .*5 are enough"):
        lobs.StreamingInverse(10, rows=1, blocks=6)
