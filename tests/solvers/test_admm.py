"""Method "admm": as good as it claims to be, whatever has to be removed, kept or weighted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.cases import conditioned, correlated, features
from helpers.plain import damped, damped_error, least_squares
from helpers.tolerances import distance

import lobs_native as lobs
from lobs_native import ops
from lobs_native.solvers import admm, repair
from lobs_native.solvers.conjugate import conjugate_gradients_
from lobs_native.solvers.costs import costs_between
from lobs_native.solvers.inversion import invert_
from lobs_native.solvers.problem import Problem
from lobs_native.solvers.settings import LayerSettings
from lobs_native.solvers.weight import prune_groups
from lobs_native.solvers.workspace import Workspace

F64, F32 = torch.float64, torch.float32
TARGETS = (
    {"sparsity": 0.5},
    {"sparsity": 0.8},
    {"sparsity": 0.7, "scope": "row"},
    {"pattern": "2:4"},
)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_it_loses_less_than_exact_where_inputs_are_correlated(target):
    W, H = correlated(96, 128, 5)
    ours, exact = (lobs.prune_weight(W, H, method=m, **target) for m in ("admm", "exact"))
    assert ours.error < exact.error
    assert ours.sparsity == exact.sparsity


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("target", [*TARGETS, {"sparsity": 0.5, "pattern": "1x4"}], ids=str)
def test_its_kept_weights_are_nearly_the_best_for_its_mask(target, dtype):
    W, H = correlated(24, 64, 2)
    out = lobs.prune_weight(W.to(dtype), H, method="admm", **target)
    best = damped(H, 0.01)
    for w, row, kept in zip(W, out.weight.double(), out.mask, strict=True):
        expected = least_squares(w, best, ~kept)
        change, least = row - w, expected - w
        assert float(change @ best @ change) <= float(least @ best @ least) * 1.001
    assert out.optimality < 30
    assert out.notes == ()


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_same_bytes_for_any_number_of_threads(target):
    W, H = correlated(64, 320, 1)  # several blocks of the inverse
    found = set()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        out = lobs.prune_weight(W.float(), H, method="admm", **target)
        found.add(out.weight.numpy().tobytes())
    assert len(found) == 1


def test_few_samples_are_no_obstacle():
    x = features(24, 96, 3)
    W = torch.randn(48, 96, generator=torch.Generator().manual_seed(1), dtype=F64)
    H = x.T @ x / len(x)
    ours, exact = (lobs.prune_weight(W, H, sparsity=0.5, method=m) for m in ("admm", "exact"))
    assert damped_error(W, ours, H) < 1.05 * damped_error(W, exact, H)


def test_rows_that_count_more_keep_more():
    W, H = correlated(16, 64, 7)
    importance = torch.ones(1, 16, dtype=F64)
    importance[0, :8] = 100.0
    settings = LayerSettings(sparsity=0.7, method="admm")
    plain, weighted = (
        prune_groups(W[None], [H], settings, importance=given) for given in (None, importance)
    )
    assert int(weighted.mask[0, :8].sum()) > 1.3 * int(plain.mask[0, :8].sum())
    assert weighted.sparsity == plain.sparsity
    ones = prune_groups(W[None], [H], settings, importance=torch.ones(1, 16, dtype=F64))
    assert torch.equal(ones.weight, plain.weight)


def test_groups_compete_for_one_count():
    """Two groups as one layer: the group whose inputs are a hundred times larger keeps more."""
    W, H = correlated(16, 32, 4)
    settings = LayerSettings(sparsity=0.5, method="admm")
    out = prune_groups(torch.stack([W, W]), [H, 1e4 * H], settings)
    small, large = (int(kept.sum()) for kept in out.mask)
    assert small + large == W.numel()
    assert large > 2 * small
    alike = prune_groups(torch.stack([W, W]), [H, H], settings)
    assert abs(int(alike.mask[0].sum()) - int(alike.mask[1].sum())) < 0.02 * W.numel()


def test_what_the_mask_removes_and_existing_zeros_are_in_the_count():
    W, H = correlated(12, 40, 3)
    W[:, 5] = 0.0
    mask = torch.ones(12, 40, dtype=torch.bool)
    mask[:, 7] = False
    out = lobs.prune_weight(W, H, sparsity=0.5, mask=mask, method="admm")
    assert int((out.weight == 0).sum()) == 240
    assert not bool(out.mask[:, [5, 7]].any())
    # More of them than the count: the mask's first, then zeros from the first row on.
    out = lobs.prune_weight(W, H, sparsity=15 / 480, mask=mask, method="admm")
    assert not bool(out.mask[:, 7].any())
    assert (~out.mask[:, 5]).nonzero()[:, 0].tolist() == [0, 1, 2]
    assert int((~out.mask).sum()) == 15
    with pytest.raises(lobs.errors.ArgumentError, match="mask: it already removes"):
        lobs.prune_weight(W, H, sparsity=3 / 480, mask=mask, method="admm")


def test_a_bound_on_the_error_is_kept_and_used():
    W, H = correlated(16, 48, 6)
    energy = lobs.prune_weight(W, H, sparsity=0.5).energy
    out = lobs.prune_weight(W, H, max_error=0.05 * energy, method="admm")
    exact = lobs.prune_weight(W, H, max_error=0.05 * energy)
    assert 0.8 * 0.05 * energy < out.error <= 0.05 * energy
    assert out.sparsity > exact.sparsity - 0.02


@pytest.mark.parametrize(("columns", "method"), [(256, "exact"), (257, "admm")])
def test_auto_is_exact_in_narrow_layers_and_admm_in_wide_ones(columns, method):
    W, H = correlated(2, columns, 0)
    out = lobs.prune_weight(W, H, sparsity=0.5)
    assert out.method == method
    assert torch.equal(out.weight, lobs.prune_weight(W, H, sparsity=0.5, method=method).weight)
    with_bias = lobs.Hessian(columns - 1, bias=True).update(features(900, columns - 1))
    narrower = lobs.prune_weight(W[:, 1:], with_bias, sparsity=0.5, bias=torch.zeros(2, dtype=F64))
    assert narrower.method == method  # the column of ones counts
    report = lobs.prune(
        torch.nn.Linear(columns, 2, bias=False), [torch.rand(9, columns)], sparsity=0.5
    )
    assert report.layers[0].method == method


# ---- its parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 5, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_sweeping_a_matrix_inverts_it(order, dtype):
    H = conditioned(order, 100.0) + torch.eye(order, dtype=F64)
    M = H.to(dtype).tril()
    M += torch.full_like(M, 7.0).triu(1)  # which is not read
    assert invert_(M)
    assert torch.equal(M, M.T)
    assert distance(M, torch.linalg.inv(H)) < (1e-11 if dtype == F64 else 2e-5)


def test_sweeping_refuses_a_matrix_that_is_not_positive_definite():
    M = torch.eye(200, dtype=F64)
    M[150, 150] = -1.0
    assert not invert_(M)
    assert not invert_(torch.full((3, 3), torch.nan))


def test_conjugate_gradients_say_whether_they_arrived():
    W, H = correlated(6, 40, 1)
    H = damped(H, 0.01)
    removed = (torch.arange(40) % 2 == 0).expand(6, 40).contiguous()
    for most, arrived in ((1, False), (200, True)):
        w = W.masked_fill(removed, 0.0)[None]
        done = conjugate_gradients_(
            w, W.clone()[None], H[None], removed[None], gain=1e-12, tolerance=1e-6, most=most
        )
        assert done == arrived
    expected = torch.stack([least_squares(row, H, removed[0]) for row in W])
    assert distance(w[0], expected) < 1e-5


def test_solving_by_conjugate_gradients_gives_what_factorisations_give(monkeypatch):
    W, H = correlated(24, 64, 8)
    W = W.float()
    direct = lobs.prune_weight(W, H, sparsity=0.5, method="wanda", refine="solve")
    used = []

    def watched(*arguments, **how):
        used.append(conjugate_gradients_(*arguments, **{**how, "most": 200}))
        return used[-1]

    monkeypatch.setattr(repair, "_STEPS", 1e-3)
    monkeypatch.setattr(repair, "conjugate_gradients_", watched)
    out = lobs.prune_weight(W, H, sparsity=0.5, method="wanda", refine="solve")
    assert used == [True]
    assert distance(out.weight, direct.weight) < 1e-5
    assert out.error == pytest.approx(direct.error, rel=1e-9)
    # Steps that do not arrive leave it to the factorisations.
    monkeypatch.setattr(repair, "conjugate_gradients_", lambda *_, **__: False)
    again = lobs.prune_weight(W, H, sparsity=0.5, method="wanda", refine="solve")
    assert torch.equal(again.weight, direct.weight)


def test_costs_follow_a_power_law_between_the_counts_that_are_known():
    counts = [10, 40, 90, 100]
    costs = costs_between(counts, [float(n) ** 3 for n in counts])
    assert costs.shape == (100,)
    assert distance(costs.cumsum(0), torch.arange(1, 101, dtype=F64) ** 3) < 1e-12
    assert torch.equal(costs, costs.sort().values)
    assert float(costs_between([4], [16.0]).sum()) == pytest.approx(16.0)


def test_layers_share_a_budget_by_its_curve_as_by_exact_traces():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 48), torch.nn.Tanh()
    )
    data = [features(200, 32, seed).float() for seed in range(3)]
    shares = []
    for method in ("exact", "admm"):
        copy = torch.nn.Sequential(*(type(m)(32, 48) if i == 0 else m for i, m in enumerate(model)))
        copy.load_state_dict(model.state_dict())
        report = lobs.prune(copy, data, sparsity=0.6, scope="model", method=method)
        shares.append([layer.sparsity for layer in report.layers])
    assert shares[0] == pytest.approx(shares[1], abs=0.03)


def test_the_schedule_rises_and_begins_below_the_mean():
    for schedule in (admm._USUAL, admm._WIDE):
        assert list(schedule.inverted) == sorted(schedule.inverted)
        assert schedule.inverted[0] < 1 < schedule.inverted[-1]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("rows", "most"), [(40, 1.13), (8, 1.57)])  # usual, and wide layers
def test_resolvents_between_two_inverses_are_as_if_h_were_a_little_larger(rows, most, several):
    """By how much at most follows from the schedule; it is never smaller."""
    x = features(200, 24)
    problem = Problem.of(
        torch.randn(1, rows, 24),
        None,
        [(x.T @ x / len(x)).double()],
        damping=0.01,
        inverted=True,
        prune_bias=False,
        mask=None,
        workspace=Workspace(ops.select_backend(None, torch.device("cpu")), None),
    )
    chooser = admm.Admm(problem, LayerSettings(sparsity=0.5).resolved_pattern)
    if several:
        chooser.prepare()
    values = chooser.schedule.values
    low, high = chooser.schedule.inverted[0], chooser.schedule.inverted[-1]
    eigenvalues, V = torch.linalg.eigh(chooser.H[0].double())
    for i, M in enumerate(chooser._growing(values)):
        rho = float(chooser.mean) * low * (high / low) ** (i / (values - 1))
        found = torch.linalg.vecdot(V.T @ M[0].double(), V.T)  # rho / (rho + eigenvalue)
        as_if = rho / found - rho
        assert float((as_if / eigenvalues).min()) > 0.999
        assert float((as_if / eigenvalues).max()) < most
    assert i == values - 1


@pytest.mark.parametrize(("rows", "columns", "samples"), [(32, 1024, 2), (16, 700, 20)])
def test_few_samples_are_matched_however_badly_conditioned_they_make_h(rows, columns, samples):
    """Half of the weights can do what all of them did on so few samples."""
    x = torch.randn(samples, columns).relu()
    W = torch.randn(rows, columns)
    out = lobs.prune_weight(W, lobs.Hessian(columns).update(x), sparsity=0.5, method="admm")
    swept = lobs.prune_weight(W, lobs.Hessian(columns).update(x), sparsity=0.5, method="sweep")
    assert out.relative_error < min(1e-4, swept.relative_error)
