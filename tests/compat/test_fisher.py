"""compat.fisher against the inverse in float64, and against SparseML's class if available (see
original_programs.py)."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
from helpers import original_programs, pretend
from helpers.pretend import CUDA
from helpers.tolerances import distance
from torch import Tensor

import lobs_native as lobs
from lobs_native.compat.fisher import EmpiricalBlockFisherInverse

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
CPU = torch.device("cpu")
# m, B, d, damp: blocks that divide the weights and that do not, one block that is too large, blocks
# of one weight, blocks computed by torch's products, and the default damping of oBERT.
CASES = [
    (40, 50, 1777, 1e-3),
    (70, 128, 1777, 1e-3),
    (9, 50, 100, 1e-2),
    (9, 20, 7, 1e-2),
    (9, 1, 30, 1e-2),
    (5, 600, 1300, 1e-2),
    (64, 50, 333, 1e-7),
]


def gradients(m: int, d: int) -> Tensor:
    """(m, d) float32 with very different norms; some weights have no gradients."""
    G = torch.randn(m, d) * torch.logspace(-2, 0, m)[:, None] * 0.3
    G[:, ::11] = 0.0
    return G


def inverse_of(G: Tensor, m: int, B: int, damp: float) -> Tensor:
    """(blocks, B, B) float64: the inverse of the damped mean of g g^T, block by block."""
    blocks = math.ceil(G.shape[1] / B)
    padded = torch.nn.functional.pad(G.to(F64), (0, blocks * B - G.shape[1]))
    each = padded.view(len(G), blocks, B)
    fisher = torch.einsum("kbi,kbj->bij", each, each) / m
    return torch.linalg.inv(fisher + damp * torch.eye(B, dtype=F64))


def with_gradients(m, B, d, damp, G, kind=EmpiricalBlockFisherInverse, **options):
    inverse = kind(m, B, d, damp, CPU, **options)
    for g in G:
        inverse.add_grad(g)
    return inverse


@pytest.mark.parametrize(("m", "B", "d", "damp"), CASES)
def test_after_m_gradients_it_is_the_inverse(m, B, d, damp):
    G = gradients(m, d)
    ours = with_gradients(m, B, d, damp, G)
    expected = inverse_of(G, m, B, damp)
    assert ours.f_inv.shape == (math.ceil(d / B), B, B)
    assert ours.f_inv.dtype == torch.float32
    assert distance(ours.f_inv, expected) < 1e-3
    v = torch.randn(d)
    padded = torch.nn.functional.pad(v.to(F64), (0, expected.shape[0] * B - d))
    product = (expected @ padded.view(-1, B, 1)).flatten()[:d]
    assert distance(ours.diag(), expected.diagonal(dim1=1, dim2=2).flatten()[:d]) < 1e-3
    assert distance(ours.mul(v), product) < 1e-3


@pytest.mark.parametrize("damp", [1e-2, 1e-7])
def test_in_float64_it_is_the_inverse_to_many_digits(damp):
    G = gradients(64, 333)
    ours = with_gradients(64, 50, 333, damp, G, dtype=F64)
    assert ours.mul(torch.ones(333)).dtype == F64
    expected = inverse_of(G, 64, 50, damp)
    assert bool(((ours.f_inv - expected).abs() <= 1e-6 * expected.abs().amax((1, 2))[0]).all())


@pytest.mark.parametrize("buffer", [1, 7, 64, None])
def test_the_result_does_not_depend_on_the_buffer(buffer):
    G = gradients(40, 120)
    ours = with_gradients(40, 50, 120, 1e-2, G, buffer=buffer)
    assert distance(ours.f_inv, inverse_of(G, 40, 50, 1e-2)) < 1e-4


def test_it_may_be_read_at_any_time():
    G = gradients(30, 120)
    ours = EmpiricalBlockFisherInverse(30, 50, 120, 1e-2, CPU)
    for k, g in enumerate(G, 1):
        ours.add_grad(g)
        if k in (1, 2, 17, 30):
            assert distance(ours.f_inv, inverse_of(G[:k], 30, 50, 1e-2)) < 1e-4
    assert distance(ours.diag(), ours.f_inv.diagonal(dim1=1, dim2=2).flatten()[:120]) == 0
    assert ours.F_inv is ours.f_inv


@pytest.mark.parametrize(("B", "most"), [(1, 1), (20, 10), (50, 16), (128, 64), (600, 64)])
def test_the_buffer_takes_at_most_half_the_memory_of_the_inverse(B, most):
    ours = EmpiricalBlockFisherInverse(1000, B, 6 * B, 1e-2, CPU)
    g = torch.randn(6 * B)
    held = []
    for _ in range(2 * most + 1):
        ours.add_grad(g)
        held.append(len(ours._buffer))
        assert ours._count < most or most == 1
    assert max(held) == most
    assert most == 1 or max(held) * 6 * B <= ours._inverse.numel() / 2
    assert bool(ours.f_inv.any())
    assert ours._buffer is None


def test_a_gradient_is_copied_and_may_have_any_shape_and_dtype():
    G = gradients(8, 120)
    ours = EmpiricalBlockFisherInverse(8, 50, 120, 1e-2, CPU)
    for g in G:
        lent = g.clone().view(10, 12).requires_grad_()
        ours.add_grad(lent)
        with torch.no_grad():
            lent.zero_()
    assert distance(ours.f_inv, inverse_of(G, 8, 50, 1e-2)) < 1e-4
    half = with_gradients(8, 50, 120, 1e-2, G.to(torch.bfloat16))
    assert distance(half.f_inv, inverse_of(G.to(torch.bfloat16), 8, 50, 1e-2)) < 1e-4


def test_a_padded_gradient_counts_if_its_end_is_zero():
    G = gradients(8, 120)
    padded = torch.nn.functional.pad(G, (0, 30))
    ours = with_gradients(8, 50, 120, 1e-2, padded)
    assert torch.equal(ours.f_inv, with_gradients(8, 50, 120, 1e-2, G).f_inv)
    with pytest.raises(lobs.ArgumentError, match="past the 120 weights"):
        ours.add_grad(torch.ones(150))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f.add_grad(torch.ones(119)), lobs.ShapeError, "g: 119 entries, expected 120"),
        (lambda f: f.mul(torch.ones(12)), lobs.ShapeError, "v: 12 entries"),
        (lambda f: f.add_grad([1.0]), lobs.DtypeError, "g: expected"),
        (lambda f: f.add_grad(torch.full((120,), torch.inf)), lobs.NonFiniteError, "g: inf at"),
        (lambda f: f.add_grad(torch.full((120,), 1e99, dtype=F64)), lobs.NonFiniteError, "g: inf"),
    ],
)
def test_wrong_vectors_are_refused_and_change_nothing(call, error, message):
    G = gradients(8, 120)
    ours = with_gradients(8, 50, 120, 1e-2, G[:5])
    with pytest.raises(error, match=message):
        call(ours)
    for g in G[5:]:
        ours.add_grad(g)
    assert torch.equal(ours.f_inv, with_gradients(8, 50, 120, 1e-2, G).f_inv)


def test_large_finite_gradients_are_accepted():
    """Their sum is infinite in float32."""
    ours = EmpiricalBlockFisherInverse(2, 8, 8, 1.0, CPU)
    g = torch.full((8,), 2e38)
    ours.add_grad(g)
    assert torch.equal(ours._buffer[0], g)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 50, 120, 1e-2, CPU), lobs.ArgumentError, "num_grads: 0"),
        ((8, 0, 120, 1e-2, CPU), lobs.ArgumentError, "fisher_block_size: 0"),
        ((8, 50, 0, 1e-2, CPU), lobs.ArgumentError, "num_weights: 0"),
        ((8, 50, 120, 0.0, CPU), lobs.ArgumentError, "damp: 0"),
        ((8, 50, 120, 1e-40, CPU), lobs.ArgumentError, "damp: 1e-40"),
        ((8, 50, 120, "1e-7", CPU), lobs.DtypeError, "damp: expected a number"),
        ((8, 50, 120, 1e-2, "nowhere"), lobs.BackendError, "device: 'nowhere'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        EmpiricalBlockFisherInverse(*arguments)


def test_an_inverse_that_rounding_made_indefinite_is_refused_from_then_on():
    ours = EmpiricalBlockFisherInverse(4, 10, 20, 1e-2, CPU)
    ours.f_inv.mul_(-1)
    ours.add_grad(torch.ones(20))
    with pytest.raises(lobs.NotPositiveDefiniteError, match=r"damp: 0\.01.*block 0"):
        ours.diag()
    for call in (ours.diag, lambda: ours.add_grad(torch.ones(20))):
        with pytest.raises(lobs.LobsError, match="start again"):
            call()


@pytest.fixture(params=["reference", "kernels"])
def device(request):
    """A pretend CUDA device."""
    with pretend.device(request.getfixturevalue("emulated") if "k" in request.param else None):
        yield


@pytest.mark.parametrize("B", [50, 600])
def test_tensors_stay_on_their_device(device, B):
    G = gradients(8, 700)
    ours = EmpiricalBlockFisherInverse(8, B, 700, 1e-2, CUDA)
    for g in G:
        ours.add_grad(g.to(CUDA))
    assert ours.f_inv.device == CUDA
    here = with_gradients(8, B, 700, 1e-2, G)
    assert distance(ours.f_inv.cpu(), here.f_inv) < 1e-4
    v = torch.randn(700)
    assert distance(ours.mul(v.to(CUDA)).cpu(), here.mul(v)) < 1e-4
    assert distance(ours.diag().cpu(), here.diag()) < 1e-4
    with pytest.raises(lobs.ShapeError, match="g is on cpu"):
        ours.add_grad(G[0])


# ---- patched into the hosts ----------------------------------------------------------------------


def as_published(attribute: str) -> type:
    """A class with the hosts' signatures that stores its inverse as ``attribute``."""

    class EmpiricalBlockFisherInverse:  # the name that the program knows
        def __init__(self, num_grads, fisher_block_size, num_weights, damp, device):
            self.m, self.B, self.d = num_grads, fisher_block_size, num_weights
            self.num_blocks = -(-self.d // self.B)
            inverse = torch.eye(self.B).div(damp).repeat(self.num_blocks, 1, 1)
            setattr(self, attribute, inverse)

        def add_grad(self, g):
            F = getattr(self, attribute)
            g = torch.nn.functional.pad(g, (0, self.num_blocks * self.B - g.numel()))
            g = g.view(self.num_blocks, self.B, 1)
            y = F @ g
            F -= y @ y.mT / (self.m + g.mT @ y)

        def diag(self):
            return getattr(self, attribute).diagonal(dim1=1, dim2=2).flatten()[: self.d]

        def mul(self, v):
            v = torch.nn.functional.pad(v, (0, self.num_blocks * self.B - v.numel()))
            return (getattr(self, attribute) @ v.view(-1, self.B, 1)).flatten()[: self.d]

    return EmpiricalBlockFisherInverse


MODULE = "sparseml.pytorch.sparsification.pruning.modifier_pruning_obs"


def check_patched(monkeypatch, original: type) -> None:
    module = ModuleType(MODULE)
    module.EmpiricalBlockFisherInverse = original
    monkeypatch.setitem(sys.modules, MODULE, module)
    G = gradients(6, 120)
    with lobs.compat.patch("fisher", verify=2) as record:
        ours = with_gradients(6, 50, 120, 1e-2, G, kind=module.EmpiricalBlockFisherInverse)
        assert isinstance(ours, EmpiricalBlockFisherInverse)
        for _ in range(2):
            ours.diag()
            ours.mul(torch.randn(120))
    assert module.EmpiricalBlockFisherInverse is original
    for line, calls in zip(record.lines, (6, 2, 2), strict=True):
        assert (line.calls, line.verified, line.exceeded) == (calls, calls // 2, 0), str(line)
        assert line.values < 1e-4


@pytest.mark.parametrize("attribute", ["f_inv", "F_inv"])
def test_patch_installs_it_and_verifies(monkeypatch, attribute):
    check_patched(monkeypatch, as_published(attribute))


def test_patch_is_verified_by_the_original(monkeypatch):
    check_patched(monkeypatch, original_programs.fisher_class())


@pytest.mark.parametrize(("m", "B", "d", "damp"), CASES)
def test_as_the_original(m, B, d, damp):
    G = gradients(m, d)
    theirs = with_gradients(m, B, d, damp, G, kind=original_programs.fisher_class())
    ours = with_gradients(m, B, d, damp, G)
    assert distance(ours.f_inv, theirs.f_inv) < 1e-3
    assert distance(ours.diag(), theirs.diag()) < 1e-3
    v = torch.randn(d)
    assert distance(ours.mul(v), theirs.mul(v)) < 1e-3
