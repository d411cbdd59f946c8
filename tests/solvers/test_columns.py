"""Pattern "columns": inputs that no row reads any more."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import features
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError, PatternError
from lobs_native.solvers.methods import COLUMNS, TABLE
from lobs_native.solvers.settings import LayerSettings
from lobs_native.solvers.weight import prune_groups

DAMPING = 0.01
R = 5


def moment(columns: int, seed: int = 0) -> Tensor:
    x = features(4 * columns, columns, seed)
    return x.T @ x / len(x)


def weights(columns: int, rows: int = R, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def damped(H: Tensor) -> Tensor:
    return H + DAMPING * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def error(W: Tensor, after: Tensor, H: Tensor) -> float:
    change = (after - W).double()
    return float(((change @ H) * change).sum())


def best_without(W: Tensor, H: Tensor, gone: list[int]) -> Tensor:
    """The least squares solution on the inputs that stay."""
    kept = [j for j in range(W.shape[1]) if j not in gone]
    after = torch.zeros_like(W)
    after[:, kept] = torch.linalg.solve(H[kept][:, kept], H[kept] @ W.T).T
    return after


def removed_columns(out: lobs.PrunedWeight) -> list[int]:
    """The removed inputs; every row has lost the same."""
    assert bool((out.mask == out.mask[:1]).all())
    assert bool((out.weight[~out.mask] == 0).all())
    return (~out.mask[0]).nonzero()[:, 0].tolist()


def columns_of(units: list[int], size: int) -> list[int]:
    return sorted(u * size + i for u in units for i in range(size))


@pytest.mark.parametrize(("size", "columns"), [(1, 8), (2, 10), (3, 12)])
def test_every_removal_is_the_cheapest_one_with_exact_repair(size, columns):
    W, H = weights(columns), moment(columns)
    Hd, gone, units = damped(H), [], columns // size
    for count in range(1, units):
        costs = {
            u: error(W, best_without(W, Hd, columns_of([*gone, u], size)), Hd)
            for u in range(units)
            if u not in gone
        }
        gone.append(min(costs, key=lambda u: costs[u]))
        share = count / units
        out = lobs.prune_weight(W, H, sparsity=share, pattern=f"{size} columns", damping=DAMPING)
        assert removed_columns(out) == columns_of(gone, size)
        assert torch.allclose(out.weight, best_without(W, Hd, columns_of(gone, size)), atol=1e-9)
        assert out.predicted == pytest.approx(min(costs.values()))
        assert out.sparsity == pytest.approx(share)
        assert out.method == "exact"


@pytest.mark.parametrize("size", [1, 3])
def test_the_order_is_that_of_plain_updates(size):
    """With more columns than are computed ahead, and more removals than are left out at once."""
    W, H = weights(300), moment(300)
    Hd, units = damped(H), 300 // size
    order: list[int] = []
    A = torch.linalg.inv(Hd)
    B = W.T @ W
    for _ in range(250 // size):
        a, b = (
            M.view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            for M in (A, B)
        )
        cost = torch.linalg.solve(a, b).diagonal(dim1=1, dim2=2).sum(1)
        cost[order] = torch.inf
        order.append(int(cost.argmin()))
        s = slice(order[-1] * size, (order[-1] + 1) * size)
        q = torch.linalg.solve(A[s, s], A[s])
        p = B[s] - 0.5 * B[s, s] @ q
        A, B = A - q.T @ A[s], B - p.T @ q - q.T @ p
        A[s, s] = torch.eye(size, dtype=A.dtype)  # of what has gone
    for share in (0.33, 0.57, 0.83):
        out = lobs.prune_weight(W, H, sparsity=share, pattern=f"{size} columns", damping=DAMPING)
        count = round(share * units)
        assert removed_columns(out) == columns_of(order[:count], size)
        assert out.predicted == pytest.approx(error(W, out.weight, Hd), rel=1e-9)


@pytest.mark.parametrize("method", COLUMNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_the_nearest_number_of_units_goes_and_zeros_go_first(share, size, dtype, method):
    W = weights(24).to(dtype)
    W[:, 8:12] = 0
    out = lobs.prune_weight(
        W, moment(24), sparsity=share, pattern=f"{size} columns", method=method, scope="row"
    )
    gone = removed_columns(out)
    assert len(gone) == size * -int(-(share * 24 / size - 0.5) // 1)
    if len(gone) >= 4:
        assert set(range(8, 12)) <= set(gone)
    assert out.weight.dtype == dtype
    if method != "exact":
        assert torch.equal(out.weight[out.mask], W[out.mask])


def test_a_bias_takes_part_in_the_repair():
    x = features(100, 6)
    x = torch.cat([x + 3, torch.ones(100, 1, dtype=torch.float64)], 1)
    H, W, bias = x.T @ x / 100, weights(6), torch.linspace(-1, 1, R, dtype=torch.float64)
    out = lobs.prune_weight(W, H, sparsity=0.5, pattern="columns", bias=bias, damping=DAMPING)
    joined = torch.cat([W, bias[:, None]], 1)
    after = best_without(joined, damped(H), removed_columns(out))
    assert torch.allclose(out.weight, after[:, :-1], atol=1e-9)
    assert torch.allclose(out.bias, after[:, -1], atol=1e-9)


def test_columns_of_a_mask_go_first_and_alone_without_a_target():
    W, H = weights(12), moment(12)
    mask = torch.ones(R, 12, dtype=torch.bool)
    mask[:, [2, 3, 10, 11]] = False
    alone = lobs.prune_weight(W, H, pattern="2 columns", mask=mask, damping=DAMPING)
    assert removed_columns(alone) == [2, 3, 10, 11]
    assert torch.allclose(alone.weight, best_without(W, damped(H), [2, 3, 10, 11]), atol=1e-9)
    more = lobs.prune_weight(W, H, sparsity=0.5, pattern="2 columns", mask=mask)
    assert {2, 3, 10, 11} < set(removed_columns(more))
    with pytest.raises(ArgumentError, match="mask"):
        lobs.prune_weight(W, H, sparsity=0.2, pattern="2 columns", mask=mask)
    mask[0, 2] = True
    with pytest.raises(ArgumentError, match="mask: it does not consist of 2 columns of all rows"):
        lobs.prune_weight(W, H, sparsity=0.5, pattern="2 columns", mask=mask)


def test_groups_share_the_number_of_removals():
    W = torch.stack([weights(6), 10 * weights(6, seed=8)])
    moments = [moment(6), 4 * moment(6, 1)]
    settings = LayerSettings(sparsity=0.5, pattern="columns", method="exact")
    out = prune_groups(W, moments, settings)
    first, second = ((~mask[0]).nonzero()[:, 0].tolist() for mask in out.mask)
    assert len(first) == 6
    assert second == []
    even = prune_groups(torch.stack([W[0], W[0]]), [moments[0]] * 2, settings)
    assert torch.equal(even.mask[0], even.mask[1])


def test_rows_that_matter_more_decide():
    W, H = weights(6, rows=2), torch.eye(6, dtype=torch.float64)
    settings = LayerSettings(sparsity=0.5, pattern="columns", method="exact")
    for row in range(2):
        importance = torch.full((1, 2), 1e-9, dtype=torch.float64)
        importance[0, row] = 1.0
        out = prune_groups(W[None], [H], settings, importance=importance)
        smallest = W[row].abs().argsort()[:3].sort().values
        assert (~out.mask[0, 0]).nonzero()[:, 0].tolist() == smallest.tolist()


def test_an_error_can_be_the_target():
    W, H = weights(16), moment(16)
    whole = lobs.prune_weight(W, H, sparsity=1.0, pattern="columns").error
    out = lobs.prune_weight(W, H, max_error=0.2 * whole, pattern="columns")
    gone = len(removed_columns(out))
    assert 0 < gone < 16
    assert out.error <= 0.2 * whole
    more = lobs.prune_weight(W, H, sparsity=(gone + 1) / 16, pattern="columns")
    assert more.error > 0.2 * whole


def test_any_number_of_threads_gives_the_same_bytes():
    W, H = weights(200, rows=70).float(), moment(200)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        found.append(lobs.prune_weight(W, H, sparsity=0.5, pattern="columns").weight)
    torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("method", sorted(set(TABLE) - set(COLUMNS)))
def test_methods_that_go_by_rows_are_refused(method):
    with pytest.raises(PatternError, match="'columns' works with the methods 'exact'"):
        lobs.prune_weight(weights(4), moment(4), sparsity=0.5, pattern="columns", method=method)


def test_exchange_is_refused_and_units_must_fit():
    with pytest.raises(PatternError, match="refine: 'exchange' swaps single weights"):
        lobs.prune_weight(weights(4), moment(4), sparsity=0.5, pattern="columns", refine="exchange")
    with pytest.raises(PatternError, match="'3 columns' does not divide rows of 4 weights"):
        lobs.prune_weight(weights(4), moment(4), sparsity=0.5, pattern="3 columns")
    with pytest.raises(PatternError, match="at least 1"):
        lobs.prune_weight(weights(4), moment(4), sparsity=0.5, pattern="0 columns")


@pytest.mark.parametrize("inputs", ["dense", "pruned", "corrected"])
def test_layers_of_a_network_lose_inputs(inputs):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    with torch.no_grad():
        model[2].weight[0, 0] = 0.0  # a zero among weights that stay does not stop the correction
    data = [torch.randn(64, 8) for _ in range(3)]
    report = lobs.prune(
        model,
        data,
        sparsity=0.5,
        pattern="columns",
        include=["2", "4"],
        inputs=inputs,
        progress=False,
    )
    for layer in (model[2], model[4]):
        assert int((layer.weight == 0).all(0).sum()) == 8
    assert [layer.sparsity for layer in report.layers] == [0.5, 0.5]
    assert not any("not corrected" in note for layer in report.layers for note in layer.notes)
