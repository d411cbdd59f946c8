"""One layer: the paper's procedure against a plain loop, targets, scopes, biases, and what the
result says."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.cases import conditioned, features, layer
from helpers.tolerances import distance
from torch import Tensor

import lobs_native as lobs
from lobs_native.errors import ArgumentError, NotPositiveDefiniteError, ShapeError
from lobs_native.solvers.settings import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")


def paper_loop(
    W: Tensor, H: Tensor, count: int, damping: float, last_free: int | None = None
) -> Tensor:
    """The procedure as printed, sequentially, in float64; columns from ``last_free`` on are never
    removed."""
    C = W.shape[1]
    A = torch.linalg.inv(H + damping * H.diagonal().mean() * torch.eye(C, dtype=torch.float64))
    w = W.double().clone()
    score = (w**2 / A.diagonal())[:, :last_free]
    mask = torch.ones_like(w)
    for flat in score.flatten().argsort(stable=True)[:count].tolist():
        r, q = divmod(flat, score.shape[1])
        w[r] -= w[r, q] / A[q, q] * A[:, q]
        mask[r, q] = 0
    return w * mask


@pytest.mark.parametrize("seed", range(50))
def test_lobs_equals_the_paper_s_loop(seed):
    """50 random layers: to 1e-10 in float64 and to 1e-4 in float32, biases on every second one."""
    R, C = 3 + seed % 17, 5 + 3 * (seed % 23)
    generator = torch.Generator().manual_seed(seed)
    # In float32, so that both dtypes rank the same numbers.
    W = torch.randn(R, C, generator=generator)
    x = features(2 * C + seed, C, seed)
    with_bias = seed % 2 == 1
    h = lobs.Hessian(C, bias=with_bias).update(x)
    b = torch.randn(R, generator=generator) if with_bias else None
    whole = W if b is None else torch.cat([W, b[:, None]], 1)
    sparsity = (0.1, 0.3, 0.5, 0.8, 0.95)[seed % 5]
    expected = paper_loop(whole, h.matrix(), math.ceil(sparsity * (R * C) - 0.5), 0.01, C)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        bias = None if b is None else b.to(dtype)
        out = lobs.prune_weight(W.to(dtype), h, sparsity=sparsity, method="lobs", bias=bias)
        assert torch.equal(out.mask, expected[:, :C] != 0)
        assert distance(out.weight, expected[:, :C]) < tolerance
        if bias is not None:
            assert out.bias is not None
            assert distance(out.bias, expected[:, C]) < tolerance


@pytest.mark.parametrize("method", METHODS)
def test_backends_agree(method, backend):
    W, H = layer(12, 40)
    out = lobs.prune_weight(W.float(), H, sparsity=0.6, method=method, backend=backend)
    other = lobs.prune_weight(W, H, sparsity=0.6, method=method, backend="reference")
    assert out.backend == backend
    assert torch.equal(out.mask, other.mask)
    assert out.error == pytest.approx(other.error, rel=1e-5)
    # Conjugate gradients end where the type of the weight can hardly tell the difference.
    assert distance(out.weight, other.weight) < (1e-3 if method == "admm" else 1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_the_error_is_the_incurred_one_of_the_final_weights(method, dtype):
    W, H = layer(9, 30)
    out = lobs.prune_weight(W.to(dtype), H, sparsity=0.5, method=method)
    d = out.weight.double() - W.to(dtype).double()
    w = W.to(dtype).double()
    assert out.error == pytest.approx(float((d @ H * d).sum()), rel=1e-12)
    assert out.relative_error == pytest.approx(
        float((d @ H * d).sum() / (w @ H * w).sum()), rel=1e-12
    )
    assert out.weight.dtype == dtype
    assert out.sparsity == 0.5
    assert out.damping == (0.0 if method in ("magnitude", "wanda") else 0.01)
    assert out.method == method
    assert out.backend.startswith("cpu_")
    assert out.status == "ok"


def test_the_error_is_the_change_of_the_layer_s_output():
    x = features(500, 20)
    W = torch.randn(8, 20, dtype=torch.float64)
    b = torch.randn(8, dtype=torch.float64)
    out = lobs.prune_weight(W, lobs.Hessian(20, bias=True).update(x), sparsity=0.7, bias=b)
    assert out.bias is not None
    change = x @ (out.weight - W).T + (out.bias - b)
    assert out.error == pytest.approx(float(change.square().sum() / 500), rel=1e-10)


def test_lobs_beats_wanda_beats_magnitude_on_uneven_inputs():
    x = features(2000, 60) * torch.logspace(0, 2, 60, dtype=torch.float64)
    h = lobs.Hessian(60).update(x)
    W = torch.randn(30, 60)
    error = {
        m: lobs.prune_weight(W, h, sparsity=0.5, method=m).error
        for m in ("lobs", "wanda", "magnitude")
    }
    assert error["lobs"] < error["wanda"] < error["magnitude"]


def test_magnitude_and_wanda_keep_what_they_do_not_remove():
    W, H = layer(7, 12)
    for method, score in (("magnitude", W.abs()), ("wanda", W.abs() * H.diagonal().sqrt())):
        out = lobs.prune_weight(W, H, sparsity=0.25, method=method)
        assert torch.equal(out.weight[out.mask], W[out.mask])
        assert float(score[~out.mask].max()) <= float(score[out.mask].min())


def test_row_scope_gives_every_row_the_same_count():
    W, H = layer(11, 25)
    W[0] *= 100
    for method in METHODS:
        rows = lobs.prune_weight(W, H, sparsity=0.4, method=method, scope="row")
        assert (~rows.mask).sum(1).tolist() == [10] * 11
        whole = lobs.prune_weight(W, H, sparsity=0.4, method=method, scope="layer")
        assert int((~whole.mask).sum()) == 110
        assert int((~whole.mask)[0].sum()) == 0


# ---- targets -------------------------------------------------------------------------------------


def test_threshold_removes_what_the_paper_s_rule_removes():
    """Eq. 5-7: sqrt(L_q) <= epsilon with L_q = w_q^2 / (2 [Psi^-1]_qq), a half that lives nowhere
    else."""
    W, H = layer(10, 20)
    A = torch.linalg.inv(H + 0.01 * H.diagonal().mean() * torch.eye(20, dtype=torch.float64))
    root = (0.5 * W**2 / A.diagonal()).sqrt()
    for epsilon in (0.0, float(root.flatten().sort().values[70]) * (1 + 1e-12), 1e9, math.inf):
        out = lobs.prune_weight(W, H, threshold=epsilon, method="lobs")
        assert torch.equal(~out.mask, root <= epsilon)
        by_count = lobs.prune_weight(W, H, sparsity=out.sparsity, method="lobs")
        assert torch.equal(out.weight, by_count.weight)


def test_threshold_never_removes_a_bias_by_itself():
    x = features(90, 6)
    out = lobs.prune_weight(
        torch.randn(4, 6),
        lobs.Hessian(6, bias=True).update(x),
        threshold=math.inf,
        method="lobs",
        bias=torch.ones(4),
    )
    assert out.sparsity == 1.0
    assert out.bias is not None
    assert bool((out.bias != 0).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_max_error_stays_below_and_comes_close(method, scope):
    W, H = layer(10, 30)
    limit = lobs.prune_weight(W, H, sparsity=0.5, method=method, scope=scope).error
    out = lobs.prune_weight(W, H, max_error=limit, method=method, scope=scope)
    assert out.error <= limit
    assert out.sparsity >= 0.45
    assert lobs.prune_weight(W, H, max_error=0.0, method=method, scope=scope).sparsity == 0.0


# ---- biases and masks ----------------------------------------------------------------------------


def test_pruned_biases_count_and_are_masked():
    """As the authors' code does: the ones column is ranked like any other."""
    x = features(300, 15)
    W, b = torch.randn(10, 15, dtype=torch.float64), torch.randn(10, dtype=torch.float64) * 0.01
    h = lobs.Hessian(15, bias=True).update(x)
    out = lobs.prune_weight(W, h, sparsity=0.5, method="lobs", bias=b, prune_bias=True)
    expected = paper_loop(torch.cat([W, b[:, None]], 1), h.matrix(), 80, 0.01)
    assert out.bias_mask is not None
    assert out.bias is not None
    assert distance(torch.cat([out.weight, out.bias[:, None]], 1), expected) < 1e-10
    assert int((~out.bias_mask).sum()) > 0
    assert int((~out.mask).sum() + (~out.bias_mask).sum()) == 80
    assert torch.equal(out.bias == 0, ~out.bias_mask)


@pytest.mark.parametrize("method", METHODS)
def test_masked_weights_are_removed_first_whatever_they_cost(method):
    W, H = layer(6, 10)
    mask = torch.ones(6, 10, dtype=torch.bool)
    mask[2, 3] = mask[5, 9] = False
    W[2, 3] = 1e3
    out = lobs.prune_weight(W, H, sparsity=0.1, mask=mask, method=method)
    assert not out.mask[2, 3]
    assert not out.mask[5, 9]
    assert int((~out.mask).sum()) == 6
    with pytest.raises(ArgumentError, match=r"mask: it already removes 2 of 60"):
        lobs.prune_weight(W, H, sparsity=1 / 60, mask=mask, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_existing_zeros_are_removed_first_and_cost_nothing(method):
    W, H = layer(8, 10)
    W[torch.rand(8, 10) < 0.4] = 0
    zeros = int((W == 0).sum())
    out = lobs.prune_weight(W, H, sparsity=zeros / 80, method=method)
    assert torch.equal(out.weight, W)
    assert out.error == 0.0
    assert torch.equal(out.mask, W != 0)


# ---- notes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "admm", "sweep", "lobs"])
def test_little_damping_switches_to_float64_with_a_note(method):
    H = conditioned(30, 1e7)
    W = torch.randn(5, 30)
    careful = lobs.prune_weight(W, H, sparsity=0.5, damping=1e-6, method=method)
    exact = lobs.prune_weight(W.double(), H, sparsity=0.5, damping=1e-6, method=method)
    assert any("float64" in note for note in careful.notes)
    assert exact.notes == ()
    assert distance(careful.weight, exact.weight) < 1e-6


def test_a_raised_damping_is_in_the_result():
    H = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    H[0, 1] = H[1, 0] = math.sqrt(2.0) * 1.05  # slightly indefinite
    out = lobs.prune_weight(torch.randn(2, 3), H, sparsity=0.5, damping=0.01)
    assert out.status == "damping raised"
    assert out.damping == 0.1
    assert any("0.01" in note and "0.1" in note for note in out.notes)
    H[0, 1] = H[1, 0] = 30.0
    with pytest.raises(NotPositiveDefiniteError, match="hessian"):
        lobs.prune_weight(torch.randn(2, 3), H, sparsity=0.5, damping=0.01)


def test_few_rows_are_noted():
    h = lobs.Hessian(20).update(features(5, 20))
    assert (
        "fewer rows (5) than columns (20)"
        in lobs.prune_weight(torch.randn(2, 20), h, sparsity=0.5).notes[0]
    )


def test_rounding_that_makes_zeros_is_noted():
    W = torch.tensor([[1.0, 6e-8, 2.0, 3.0]], dtype=torch.float16)  # 6e-8 is the smallest half
    H = torch.eye(4, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 0.5
    H[1, 1] = 100.0
    out = lobs.prune_weight(W, H, sparsity=0.25, method="magnitude")
    assert out.notes == ()
    mask = torch.tensor([[True, True, True, False]])
    H[1, 3] = H[3, 1] = -(6e-8 / 3.0) * 100.0 * 0.9999  # compensation moves w_1 to almost zero
    moved = lobs.prune_weight(W, H, sparsity=0.25, mask=mask, damping=0.001)
    zeroed = bool(((moved.weight == 0) & moved.mask).any())
    assert zeroed == any("became zero" in note for note in moved.notes)


def test_hints_name_the_missing_ones_column():
    x = features(40, 4)
    with pytest.raises(ShapeError, match="bias=True"):
        lobs.prune_weight(
            torch.ones(2, 4), lobs.Hessian(4).update(x), sparsity=0.5, bias=torch.ones(2)
        )
    with pytest.raises(ShapeError, match="pass bias="):
        lobs.prune_weight(torch.ones(2, 4), lobs.Hessian(4, bias=True).update(x), sparsity=0.5)


@pytest.mark.parametrize("refine", [None, "solve", "exchange"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_inputs_are_not_modified(dtype, method, refine):
    W, H = layer(5, 9)
    W = W.to(dtype)
    b = torch.randn(5, dtype=dtype)
    with_ones = torch.block_diag(H, torch.ones(1, 1, dtype=torch.float64))
    mask = torch.rand(5, 9) > 0.1
    inputs = (W, H, with_ones, b, mask)
    before = [x.clone() for x in inputs]
    for share in (0.0, 0.5):
        out = lobs.prune_weight(W, with_ones, sparsity=share, bias=b, method=method, refine=refine)
        assert out.weight.data_ptr() != W.data_ptr()
        assert out.bias is not None
        assert out.bias.data_ptr() != b.data_ptr()
        out = lobs.prune_weight(W, H, sparsity=share, method=method, refine=refine)
        assert out.weight.data_ptr() != W.data_ptr()
    out = lobs.prune_weight(W, H, mask=mask, method=method, refine=refine)
    assert out.mask.data_ptr() != mask.data_ptr()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
