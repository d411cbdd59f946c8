"""A whole network: calibration, order, choice of layers, and a model that is never left half
changed."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers.cases import features
from helpers.tolerances import distance
from torch import nn

import lobs_native as lobs
from lobs_native.errors import (
    ArgumentError,
    BackendError,
    DtypeError,
    NonFiniteError,
    NotPositiveDefiniteError,
    PatternError,
)
from lobs_native.network import allocation
from lobs_native.network import resources as run_plan


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 5)
    )


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=4), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 9, 4),
    )  # fmt: skip


def batches(count: int = 4, rows: int = 25) -> list[torch.Tensor]:
    return [features(rows, 20, seed=i).float() for i in range(count)]


def emptied(module: nn.Linear) -> nn.Linear:
    module.weight = nn.Parameter(torch.empty(0, module.in_features))
    return module


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_dense_inputs_equal_pruning_each_layer_by_hand():
    model, data = network(), batches()
    original = copy.deepcopy(model)
    report = lobs.prune(model, data, sparsity=0.5, inputs="dense", progress=False)
    x = torch.cat(data)
    for i in (0, 2, 4):
        seen = original[:i](x).detach()
        layer = original[i]
        h = lobs.Hessian(layer.in_features, bias=True).update(seen)
        out = lobs.prune_weight(layer.weight, h, sparsity=0.5, bias=layer.bias)
        assert distance(model[i].weight.detach(), out.weight) < 1e-5
        assert distance(model[i].bias.detach(), out.bias) < 1e-5
    assert [layer.name for layer in report.layers] == ["0", "2", "4"]


def test_pruned_inputs_come_from_the_pruned_layers_before():
    model, data = network(), batches()
    original = copy.deepcopy(model)
    lobs.prune(model, data, sparsity=0.5, inputs="pruned", progress=False)
    seen = model[:2](torch.cat(data)).detach()
    h = lobs.Hessian(30, bias=True).update(seen)
    out = lobs.prune_weight(original[2].weight, h, sparsity=0.5, bias=original[2].bias)
    assert distance(model[2].weight.detach(), out.weight) < 1e-5


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("make", [network, convolutional])
def test_reported_errors_are_the_change_of_each_layer_s_output(make, inputs):
    """Recompute every layer's error from its own inputs, with the module itself doing the
    arithmetic."""
    model = make().double()
    data = (
        [features(12, 20, i) for i in range(3)]
        if make is network
        else [torch.randn(5, 2, 8, 8).double() for _ in range(3)]
    )
    original = copy.deepcopy(model)
    report = lobs.prune(model, data, sparsity=0.6, inputs=inputs, progress=False)
    x = torch.cat(data)
    for layer in report.layers:
        i = int(layer.name)
        with torch.no_grad():
            seen = (original if inputs == "dense" else model)[:i](x)
            change = model[i](seen) - original[i](seen)
            size = original[i](seen)
        groups = getattr(model[i], "groups", 1)
        rows = change.numel() / change.shape[1] if change.ndim == 4 else len(change)
        assert layer.error == pytest.approx(float(change.square().sum()) / rows, rel=1e-6)
        assert layer.relative_error == pytest.approx(
            float(change.square().sum() / size.square().sum()), rel=1e-6
        )
        assert layer.rows == rows
        assert layer.columns * groups == model[i].weight[0].numel() * groups
        assert int((model[i].weight == 0).sum()) == round(0.6 * model[i].weight.numel())
        assert torch.equal(report.masks[layer.name], model[i].weight != 0)


def test_grouped_convolutions_are_ranked_over_the_whole_layer():
    """Exact count over the layer, although a group alone could not have it."""
    model = nn.Sequential(nn.Conv2d(10, 10, 3, groups=10))  # 9 weights a group
    with torch.no_grad():
        model[0].weight[3] *= 100
    report = lobs.prune(model, [torch.randn(4, 10, 6, 6)], sparsity=0.5, progress=False)
    zeros = (model[0].weight == 0).flatten(1).sum(1)
    assert int(zeros.sum()) == 45
    assert int(zeros[3]) == 0
    assert report.layers[0].columns == 9


def test_lower_error_than_magnitude_on_a_trained_network():
    torch.manual_seed(0)
    model = network()
    data = batches(8, 64)
    target = [torch.sin(x[:, :5] * 3) for x in data]
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        for x, y in zip(data, target, strict=True):
            optimiser.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimiser.step()
    change = {
        m: lobs.prune(
            copy.deepcopy(model), data, sparsity=0.6, method=m, inputs="pruned", progress=False
        ).error_bound.measured
        for m in ("exact", "lobs", "magnitude")
    }
    assert change["exact"] < change["lobs"] < 0.7 * change["magnitude"]


def test_patterns_hold_in_every_layer_and_can_be_overridden():
    model = network()
    report = lobs.prune(
        model,
        batches(),
        sparsity=0.7,
        overrides={"0": {"pattern": "2:4"}, "2": {"pattern": "1x5", "sparsity": 0.6}},
        progress=False,
    )
    assert [x.sparsity for x in report.layers] == [0.5, 58 / 96, 0.7]
    groups = (model[0].weight != 0).view(30, 5, 4).sum(2)
    assert (groups == 2).all()
    blocks = (model[2].weight != 0).view(16, 6, 5).sum(2)
    assert ((blocks == 0) | (blocks == 5)).all()


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_one_budget_for_the_model_is_the_global_greedy(inputs):
    """Merging all rows of all layers by the running maximum of their costs over the root of the
    layer's energy."""
    model, data = network().double(), [x.double() for x in batches()]
    original = copy.deepcopy(model)
    report = lobs.prune(
        model, data, sparsity=0.7, scope="model", spread=1.0, sensitivity=None, inputs=inputs,
        progress=False,
    )  # fmt: skip
    weights = sum(layer.weight.numel() for layer in original[::2])
    assert sum(int((layer.weight == 0).sum()) for layer in model[::2]) == round(0.7 * weights)
    assert report.sparsity == pytest.approx(0.7, abs=1e-3)
    x, traced = torch.cat(data), []
    for i in (0, 2, 4):
        h = lobs.Hessian(original[i].in_features, bias=True).update(x)
        t = lobs.trace_weight(original[i].weight, h, bias=original[i].bias)
        both = torch.cat([original[i].weight, original[i].bias[:, None]], 1).detach()
        unit = (both @ h.matrix() * both).sum()
        traced.append((t.loss / unit.sqrt()).cummax(1).values)
        x = torch.relu(original[i](x)).detach()
    first = torch.cat([t.reshape(-1) for t in traced]).argsort(stable=True)[: round(0.7 * weights)]
    whose = torch.cat([torch.full((t.numel(),), i) for i, t in enumerate(traced)])
    expected = whose[first].bincount(minlength=3).tolist()
    assert [int((layer.weight == 0).sum()) for layer in model[::2]] == expected
    assert len({layer.sparsity for layer in report.layers}) == 3


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.1, 1.0])
def test_a_layer_s_share_of_the_budget_is_bounded(spread):
    model = network()
    free = lobs.prune(
        copy.deepcopy(model), batches(), sparsity=0.7, scope="model", spread=1.0, progress=False
    )
    assert max(abs(layer.sparsity - 0.7) for layer in free.layers) > 0.1
    report = lobs.prune(
        copy.deepcopy(model), batches(), sparsity=0.7, scope="model", spread=spread, progress=False
    )
    assert report.removed == free.removed
    for layer, unbounded in zip(report.layers, free.layers, strict=True):
        weights = layer.shape[0] * layer.shape[1]
        assert abs(layer.sparsity - 0.7) <= spread + 0.5 / weights
        if spread == 1.0:
            assert layer.sparsity == unbounded.sparsity
    if spread == 0.0:
        plain = lobs.prune(copy.deepcopy(model), batches(), sparsity=0.7, progress=False)
        assert [x.sparsity for x in report.layers] == [x.sparsity for x in plain.layers]


@pytest.mark.parametrize("spread", [0.2, 0.5, 0.999])
def test_a_layer_keeps_at_least_half_of_the_requested_weights(spread):
    """The bound that matters at high sparsity, where a difference of 0.2 reaches to 1."""
    options = {"sparsity": 0.9, "scope": "model", "sensitivity": None, "progress": False}
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)  # cheap to empty
    free = lobs.prune(copy.deepcopy(model), batches(), spread=1.0, **options)
    assert free.layers[0].sparsity > 0.96
    report = lobs.prune(copy.deepcopy(model), batches(), spread=spread, **options)
    assert report.removed == free.removed
    weights = report.layers[0].shape[0] * report.layers[0].shape[1]
    assert abs(report.layers[0].sparsity - 0.95) <= 0.5 / weights


@pytest.mark.parametrize("stride", [1, 3])
def test_shares_within_bounds_are_optimal(stride):
    """Against all ways to share a budget among three layers, by the costs of their removals."""
    parts, costs = [], []
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        cost = (torch.rand(12, generator=generator) * (1 + i)).double().sort().values
        costs.append(cost)
        kept = cost[stride - 1 : 9 : stride].contiguous()
        parts.append(allocation.Costs(kept, stride, 6, 3, 9))
    found = allocation.shares(parts)
    assert sum(found) == 18
    ways = [w for w in itertools.product(range(3, 10), repeat=3) if sum(w) == 18]
    cost = {w: sum(float(c[:n].sum()) for c, n in zip(costs, w, strict=True)) for w in ways}
    best = min(cost.values())
    if stride == 1:
        assert cost[tuple(found)] == pytest.approx(best, rel=1e-12)
    else:
        assert best <= cost[tuple(found)] < 1.2 * best


def test_among_removals_of_equal_cost_those_of_the_first_layers_are_made():
    same = torch.ones(8, dtype=torch.float64)
    parts = [allocation.Costs(same, 1, 4, least, most) for least, most in ((0, 8), (1, 8), (0, 8))]
    assert allocation.shares(parts) == [8, 4, 0]
    assert allocation.shares(parts[1:]) == [8, 0]
    nothing = allocation.Costs(same[:0], 1, 0, 0, 0)
    assert allocation.shares([nothing, nothing]) == [0, 0]


def test_a_layer_can_be_left_out_of_the_budget_of_the_model():
    report = lobs.prune(
        network(),
        batches(),
        sparsity=0.5,
        scope="model",
        overrides={"4": {"scope": "row", "sparsity": 0.25}},
        progress=False,
    )
    assert report.layers[2].sparsity == 0.25
    removed = sum(round(x.sparsity * x.shape[0] * x.shape[1]) for x in report.layers[:2])
    assert removed == (30 * 20 + 16 * 30) // 2


def test_refine_is_passed_on_and_reported():
    errors = {}
    for refine in (None, "solve", "exchange"):
        report = lobs.prune(
            network(), batches(), sparsity=0.7, refine=refine, inputs="dense", progress=False
        )
        errors[refine] = report.layers[0].error
        assert (sum(x.swaps for x in report.layers) > 0) == (refine == "exchange")
        assert report.settings["refine"] == refine
    assert errors["exchange"] < errors["solve"] * 1.0001


# ---- choosing layers -----------------------------------------------------------------------------


def test_include_exclude_and_overrides():
    model = network()
    report = lobs.prune(
        model,
        batches(),
        sparsity=0.5,
        exclude="4",
        overrides={"*": {"damping": 0.1}, "2": {"sparsity": 0.25, "scope": "row"}},
        progress=False,
    )
    assert [(x.name, x.sparsity, x.damping, x.scope) for x in report.layers] == [
        ("0", 0.5, 0.1, "layer"),
        ("2", 7 / 30, 0.1, "row"),
    ]
    assert report.layers[1].asked == "sparsity 0.25"
    assert int((model[4].weight == 0).sum()) == 0
    report = lobs.prune(network(), batches(), sparsity=0.5, include=["0", "4"], progress=False)
    assert [x.name for x in report.layers] == ["0", "4"]
    report = lobs.prune(
        network(),
        batches(),
        sparsity=0.5,
        overrides={"2": {"method": "lobs", "threshold": 0.0}},
        progress=False,
    )
    assert report.layers[1].asked == "threshold 0"
    assert (
        report.layers[1].sparsity == report.layers[1].dead_columns / 30
    )  # dead inputs cost nothing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": "fc*"}, r"include: 'fc\*' matches no prunable layer; there are '0', '2', '4'"),
        ({"exclude": ["0", "9"]}, "exclude: '9' matches no"),
        ({"overrides": {"7": {"sparsity": 0.1}}}, "overrides: '7' matches no"),
        ({"overrides": {"0": {"ratio": 0.1}}}, "'ratio'"),
        ({"overrides": {"0": {"sparsity": 1.5}}}, r"sparsity: 1\.5"),
        ({"exclude": "*"}, "no layer is left"),
        ({"inputs": "sparse"}, "inputs: 'sparse'"),
        ({"sparsity": None}, "exactly one"),
        ({"threshold": 0.1}, "exactly one"),
        ({"method": "greedy"}, "method: 'greedy'"),
        (
            {"scope": "model", "method": "lobs"},
            "scope: 'model' needs method 'auto'",
        ),
        ({"scope": "model", "pattern": "1x5"}, "scope: 'model'"),
        ({"scope": "network"}, "scope: 'network'"),
        ({"refine": "polish"}, "refine: 'polish'"),
        ({"refine": "exchange", "pattern": "1x5"}, "refine: 'exchange'"),
        ({"sparsity": 0.7, "pattern": "2:4"}, "pattern '2:4' removes 0.5"),
        (
            {"pattern": "2:4", "strict": True},
            r"layer '2': pattern: '2:4' does not divide rows of 30",
        ),
        ({"memory": 0}, "memory: 0"),
        ({"damping": -1.0}, "damping: -1"),
        ({"backend": "tpu"}, "backend"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_before_anything_runs(arguments, message):
    model = network()
    before = states(model)
    with pytest.raises(lobs.LobsError, match=message):
        lobs.prune(model, batches(), **{"sparsity": 0.5, "progress": False, **arguments})
    assert same(states(model), before)


def test_too_little_memory_leaves_the_model_unchanged():
    model = network()
    before = states(model)
    with pytest.raises(
        MemoryError, match=r"memory: layer '0' needs .* together, more than the 60,000 allowed"
    ):
        lobs.prune(model, batches(), sparsity=0.5, memory=60_000, progress=False)
    assert same(states(model), before)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": "resnet"}, DtypeError),
        ({"calibration": []}, ArgumentError),
        ({"calibration": iter([])}, ArgumentError),
        ({"calibration": torch.ones(3, 20)}, DtypeError),
        ({"calibration": 5}, DtypeError),
        ({"calibration": [5]}, DtypeError),
        ({"include": 3}, DtypeError),
        ({"overrides": [("0", 1)]}, DtypeError),
        ({"forward": "model(x)"}, DtypeError),
        ({"seed": 0.5}, DtypeError),
        ({"device": "nowhere"}, BackendError),
        ({"device": "meta"}, BackendError),
        ({"prune_bias": 1}, DtypeError),
        ({"pattern": "2:4:8"}, PatternError),
        ({"memory": 1.5}, DtypeError),
        ({"model": nn.Sequential(nn.ReLU())}, ArgumentError),
        ({"model": nn.Sequential(nn.Linear(20, 3, device="meta"))}, DtypeError),
        ({"model": nn.Sequential(emptied(nn.Linear(20, 1)))}, ArgumentError),
    ],
)
def test_wrong_types_are_refused(arguments, error):
    settings = {
        "model": network(),
        "calibration": batches(),
        "sparsity": 0.5,
        "progress": False,
        **arguments,
    }
    with pytest.raises(error):
        lobs.prune(settings.pop("model"), settings.pop("calibration"), **settings)


def test_weights_tied_to_an_embedding_are_skipped_or_refused_by_both_names():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
    model[2].weight = model[0].weight
    data = [torch.randint(0, 9, (5,))]
    with pytest.raises(ArgumentError, match=r"'2'.*2\.weight is tied to 0\.weight"):
        lobs.prune(model, data, sparsity=0.5, include=["1", "2"], progress=False)
    table = model[0].weight.clone()
    report = lobs.prune(model, data, sparsity=0.5, progress=False)
    assert [x.name for x in report.layers] == ["1"]
    assert report.skipped[0].name == "2"
    assert "tied to 0.weight" in report.skipped[0].reason
    assert torch.equal(model[0].weight, table)
    with pytest.raises(ArgumentError, match=r"no layer is left .*'2' cannot: .*tied"):
        lobs.prune(model, data, sparsity=0.5, exclude="1", progress=False)


def test_a_module_with_two_names_stays_pruned():
    model = network()
    model.again = model[0]
    report = lobs.prune(
        model,
        batches(),
        sparsity=0.5,
        include="0",
        forward=lambda m, x: m[4](m[3](m[2](m[1](m[0](x))))),
        progress=False,
    )
    assert int((model[0].weight == 0).sum()) == report.removed == 300
    assert torch.equal(model[0].weight != 0, report.masks["0"])
    assert report.error_bound.measured > 0


def test_a_module_used_twice_is_pruned_once_with_both_inputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(20, 20)
            self.again = self.a

        def forward(self, x):
            return self.again(torch.relu(self.a(x)))

    report = lobs.prune(Net(), batches(2), sparsity=0.5, progress=False)
    assert [(x.name, x.rows) for x in report.layers] == [("a", 100)]
    assert "twice" in report.error_bound.reason


def test_a_layer_that_is_never_called_is_skipped_with_a_warning_or_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(20, 4), nn.Linear(20, 4)

        def forward(self, x):
            return self.used(x)

    model = Net()
    with pytest.warns(UserWarning, match="unused") as warned:
        report = lobs.prune(model, batches(), sparsity=0.5, progress=False)
    assert warned[0].filename == __file__  # the call of prune, not a line inside it
    assert report.skipped[0].name == "unused"
    assert [x.name for x in report.layers] == ["used"]
    with pytest.raises(ArgumentError, match="never calls 'unused'"):
        lobs.prune(model, batches(), sparsity=0.5, include="un*d", progress=False)
    with pytest.raises(ArgumentError, match="never calls 'unused'"):
        lobs.prune(model, batches(), sparsity=0.5, strict=True, progress=False)


# ---- running the model ---------------------------------------------------------------------------


def test_batches_may_be_tensors_tuples_dicts_or_anything_with_a_forward():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(20, 6)

        def forward(self, x, scale=None):
            return self.a(x if scale is None else x * scale)

    torch.manual_seed(1)
    start, data = Net(), batches()
    found = []
    for calibration, forward in (
        (data, None),
        ([(x, torch.ones(1)) for x in data], None),
        ([{"x": x, "scale": torch.ones(1)} for x in data], None),
        ([[x, "label"] for x in data], lambda m, b: m(b[0])),
        (iter(data), None),
        ((x for x in data), None),
        (torch.utils.data.DataLoader(torch.cat(data), batch_size=25), None),
    ):
        model = copy.deepcopy(start)
        lobs.prune(model, calibration, sparsity=0.5, forward=forward, progress=False)
        found.append(model.a.weight.detach())
    assert all(torch.equal(w, found[0]) for w in found)


def test_the_model_s_mode_and_the_random_state_are_kept():
    model = nn.Sequential(nn.Linear(20, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    model.train()
    model[1].eval()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    lobs.prune(model, batches(), sparsity=0.5, progress=False)
    assert torch.equal(torch.rand(1), expected)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model[0]._forward_pre_hooks


def test_the_same_seed_gives_the_same_network_even_with_a_stochastic_forward():
    def forward(model, x):
        return model(x + 0.1 * torch.randn_like(x))

    results = []
    for _ in range(2):
        torch.manual_seed(5)
        model = network()
        torch.rand(len(results) + 1)
        lobs.prune(model, batches(), sparsity=0.5, forward=forward, seed=7, progress=False)
        results.append(states(model))
    assert same(*results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_kept_and_counts_exact(dtype):
    model = network().to(dtype)
    lobs.prune(model, [x.to(dtype) for x in batches()], sparsity=0.5, progress=False)
    for i in (0, 2, 4):
        assert model[i].weight.dtype == dtype
        assert int((model[i].weight == 0).sum()) >= model[i].weight.numel() // 2


def test_many_small_passes_equal_one_large(monkeypatch):
    a, b = network(), network()
    b.load_state_dict(a.state_dict())
    lobs.prune(a, batches(), sparsity=0.5, inputs="dense", progress=False)
    monkeypatch.setattr(run_plan, "STATISTICS", 1)
    lobs.prune(b, batches(), sparsity=0.5, inputs="dense", progress=False)
    assert same(states(a), states(b))


# ---- all or nothing ------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_a_layer_that_fails_leaves_every_weight_unchanged(inputs):
    """The last layer has dependent inputs and no damping; the ones before it were pruned
    already."""
    model = nn.Sequential(nn.Linear(20, 30, bias=False), nn.Linear(30, 4, bias=False))
    with torch.no_grad():
        model[0].weight[5] = model[0].weight[6] = 0  # two dead inputs for the second layer
    before = states(model)
    with pytest.raises(NotPositiveDefiniteError, match=r"layer '1': .*damping"):
        lobs.prune(model, batches(), sparsity=0.5, inputs=inputs, damping=0.0, progress=False)
    assert same(states(model), before)


def test_a_nan_in_the_data_is_reported_with_the_layer():
    model, data = network(), batches()
    data[2][3, 4] = torch.nan
    before = states(model)
    with pytest.raises(NonFiniteError, match=r"layer '0': its input .*nan at \(3, 4\)"):
        lobs.prune(model, data, sparsity=0.5, progress=False)
    assert same(states(model), before)


def test_a_nan_in_a_weight_is_reported_with_its_name():
    model = network()
    with torch.no_grad():
        model[2].bias[3] = torch.inf
    with pytest.raises(NonFiniteError, match=r"2\.bias: inf at \(3,\)"):
        lobs.prune(model, batches(), sparsity=0.5, progress=False)


@pytest.mark.parametrize("after", [2, 6, 11])
def test_an_interruption_at_any_batch_restores_the_model(after):
    model = network()
    before = states(model)
    calls = 0

    def forward(m, x):
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return m(x)

    with pytest.raises(KeyboardInterrupt):
        lobs.prune(model, batches(), sparsity=0.5, forward=forward, progress=False)
    assert same(states(model), before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_few_rows_are_noted_per_layer():
    report = lobs.prune(network(), batches(1, 10), sparsity=0.5, progress=False)
    assert "fewer rows (10) than columns (20)" in report.layers[0].notes[0]
