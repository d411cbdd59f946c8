"""Re-estimated batch normalisation: statistics of each layer's present inputs, and no other
change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError, BackendError, DtypeError, NonFiniteError
from lobs_native.network import batch_norm
from lobs_native.network.batch_norm import reestimate_batch_norm

pytestmark = pytest.mark.usefixtures("one_thread")


class Branches(nn.Module):
    """Every kind of layer, a shortcut, and modules not created in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.BatchNorm1d(4, affine=False)
        self.head = nn.Linear(6, 4)
        self.second = nn.BatchNorm2d(6, momentum=None)
        self.first = nn.BatchNorm2d(6, affine=False)
        self.short = nn.SyncBatchNorm(6)
        self.a = nn.Conv2d(3, 6, 3, bias=False)
        self.b = nn.Conv2d(6, 6, 3, groups=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.a(x)).relu()
        x = (self.second(self.b(x)) + self.short(x)).relu()
        return self.last(self.head(x.mean((2, 3))))


ORDER = ("first", "second", "short", "last")


def network() -> Branches:
    """A network whose statistics are not those of its inputs, as after pruning."""
    torch.manual_seed(1)
    model = Branches().eval()
    for name in ORDER:
        layer = getattr(model, name)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return model


def images(rows: int = 23) -> Tensor:
    return torch.randn(rows, 3, 7, 7, generator=torch.Generator().manual_seed(2)) * 3 + 1


def states(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def values(layer: nn.Module, run: Callable[[], Any]) -> Tensor:
    """(C, values) float64: the inputs of a layer while ``run`` is called."""
    seen: list[Tensor] = []
    with torch.no_grad():
        handle = layer.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].double().transpose(0, 1).flatten(1))
        )
        run()
        handle.remove()
    return torch.cat(seen, 1)


def by_hand(model: Branches, x: Tensor) -> None:
    """Re-estimate one layer after another from one eval-mode pass over all data at once."""
    for name in ORDER:
        layer = getattr(model, name)
        seen = values(layer, lambda: model(x))
        layer.running_mean.copy_(seen.mean(1))
        layer.running_var.copy_(seen.var(1))


@pytest.mark.parametrize("sizes", [[23], [1, 7, 15], [1] * 23])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_one_layer_after_another_by_hand(sizes, dtype):
    model, x = network().to(dtype), images().to(dtype)
    expected = copy.deepcopy(model)
    by_hand(expected, x)
    assert reestimate_batch_norm(model, x.split(sizes)) == 4
    for name in ORDER:
        for part in ("running_mean", "running_var"):
            value, reference = (getattr(getattr(m, name), part) for m in (model, expected))
            assert value.dtype == dtype
            torch.testing.assert_close(
                value, reference, rtol=1e-12 if dtype == torch.float64 else 1e-5,
                atol=1e-13 if dtype == torch.float64 else 1e-6,
            )  # fmt: skip


def test_every_layer_then_normalises_its_inputs_at_inference():
    model, x = network(), images()
    lobs.prune(model, [x], sparsity=0.7, method="magnitude", progress=False)
    assert reestimate_batch_norm(model, x.split(5)) == 4
    for name in ORDER:
        layer = getattr(model, name)
        seen = values(layer, lambda: [model(part) for part in x.split(9)])
        torch.testing.assert_close(layer.running_mean.double(), seen.mean(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), seen.var(1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (50, 3)),
        (nn.BatchNorm1d(3), (50, 3, 4)),
        (nn.BatchNorm2d(3), (50, 3, 4, 2)),
        (nn.BatchNorm3d(3), (50, 3, 4, 2, 2)),
        (nn.SyncBatchNorm(3), (50, 3, 4)),
    ],
)
def test_a_large_offset_costs_no_digits(layer, shape, monkeypatch):
    """float32 values around 1e6, where the sum of squares alone has lost the variance."""
    monkeypatch.setattr(batch_norm, "_PIECE", 7)
    x = torch.randn(shape) * 0.5 + 1e6
    x[:10] += 3  # batches of different means
    reestimate_batch_norm(layer, x.split(8))
    exact = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean, exact.mean(1).float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(layer.running_var, exact.var(1).float(), rtol=2e-7, atol=0)


def test_nothing_else_changes():
    model = network()
    model.train()
    model.second.eval()
    modes = [m.training for m in model.modules()]
    before, random = states(model), torch.get_rng_state()
    reestimate_batch_norm(model, [images()])
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert model.second.momentum is None
    assert model.first.momentum == 0.1
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != ("running" in name), name


def test_layers_without_statistics_are_left_alone():
    model = nn.Sequential(
        nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4), nn.InstanceNorm1d(4)
    )
    assert reestimate_batch_norm(model[:2], [torch.randn(6, 4)]) == 1
    assert model[0].running_mean is None


def test_layers_that_no_batch_reaches_keep_their_statistics():
    model = nn.ModuleDict({"used": nn.BatchNorm1d(4), "unused": nn.BatchNorm1d(4)})
    x = torch.randn(6, 4) + 5
    assert reestimate_batch_norm(model, [x], forward=lambda m, b: m["used"](b)) == 1
    assert torch.equal(model["unused"].running_mean, torch.zeros(4))
    torch.testing.assert_close(model["used"].running_mean, x.mean(0))


def test_a_layer_that_is_called_twice_gets_all_its_inputs():
    layer = nn.BatchNorm1d(2)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(40, 2) * 3
    seen = values(layer, lambda: model.eval()(x))
    assert reestimate_batch_norm(model, x.split(13)) == 1
    torch.testing.assert_close(layer.running_mean.double(), seen.mean(1))
    torch.testing.assert_close(layer.running_var.double(), seen.var(1))


def test_each_pass_ends_at_its_layer():
    model, calls = network(), []
    model.b.register_forward_hook(lambda *_: calls.append("b"))
    model.head.register_forward_hook(lambda *_: calls.append("head"))
    reestimate_batch_norm(model, images().split(12))
    # b: the pass that finds the order, and those for second, short and last; head: two of them
    assert calls.count("b") == 2 * 4
    assert calls.count("head") == 2 * 2


@pytest.mark.parametrize("how", ["tuple", "dict", "iterator", "forward", "device"])
def test_batches_of_every_form(how):
    expected, model, x = network(), network(), images()
    by_hand(expected, x)
    parts = x.split(8)
    batches: Any = {
        "tuple": [(part,) for part in parts],
        "dict": [{"x": part} for part in parts],
        "iterator": iter(parts),
        "forward": [{"image": part, "label": 3} for part in parts],
        "device": list(parts),
    }[how]
    forward = (lambda m, batch: m(batch["image"])) if how == "forward" else None
    device = "cpu" if how == "device" else None
    assert reestimate_batch_norm(model, batches, forward=forward, device=device) == 4
    for name in ORDER:
        torch.testing.assert_close(
            getattr(model, name).running_var, getattr(expected, name).running_var
        )


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [2, 5, 11])
def test_a_forward_that_fails_restores_everything(error, at):
    model = network()
    model.train()
    before, random, count = states(model), torch.get_rng_state(), 0

    def forward(m: nn.Module, batch: Tensor) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise error("stop")
        return m(batch)

    with pytest.raises(error, match="stop"):
        reestimate_batch_norm(model, images().split(10), forward=forward)
    assert same(states(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_forward_in_training_mode_is_refused():
    model = network()
    before = states(model)
    with pytest.raises(ArgumentError, match=r"forward: it calls layer 'first' in training mode"):
        reestimate_batch_norm(model, [images()], forward=lambda m, x: m.train()(x))
    assert same(states(model), before)
    assert not any(m.training for m in model.modules())


def test_a_statistic_that_is_not_finite_names_its_layer():
    model, x = network(), images()
    before = states(model)
    x[4, 1, 2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layer 'first': mean of its input .* nan at \(0,\)"):
        reestimate_batch_norm(model, x.split(6))
    assert same(states(model), before)


def test_a_statistic_beyond_the_range_of_its_dtype_is_refused():
    layer = nn.BatchNorm1d(2).half()
    with pytest.raises(NonFiniteError, match=r"variance of its input .* inf"):
        reestimate_batch_norm(layer, [torch.tensor([[1e3, 0], [-1e3, 1]]).half()])
    assert torch.equal(layer.running_var, torch.ones(2).half())


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        ({"model": "net"}, DtypeError, r"model: expected an nn\.Module, got str"),
        ({"model": nn.Linear(3, 3)}, ArgumentError, r"model: it has no nn\.BatchNorm"),
        ({"model": nn.InstanceNorm2d(3, track_running_stats=True)}, ArgumentError, "model: it has"),
        (
            {"model": nn.BatchNorm2d(3, track_running_stats=False)}, ArgumentError,
            r"model: it has no nn\.BatchNorm",
        ),
        ({"model": nn.BatchNorm2d(3, device="meta")}, DtypeError, "running_mean: .* meta device"),
        ({"model": nn.LazyBatchNorm2d()}, DtypeError, "running_mean: .* UninitializedBuffer"),
        ({"calibration": images()}, DtypeError, "calibration: .* wrap a single batch in a list"),
        ({"calibration": None}, DtypeError, "calibration: .* NoneType"),
        ({"calibration": []}, ArgumentError, "calibration: empty"),
        ({"calibration": [3]}, DtypeError, "calibration: a batch is a int"),
        (
            {"model": nn.BatchNorm1d(3), "calibration": [torch.ones(1, 3)]}, ArgumentError,
            "calibration: layer '' is fed 1 values per channel",
        ),
        (
            {"model": nn.BatchNorm1d(3), "calibration": [torch.ones(0, 3)]}, ArgumentError,
            "calibration: layer '' is fed 0 values per channel",
        ),
        ({"forward": 3}, DtypeError, "forward: expected callable"),
        ({"forward": lambda m, b: b}, ArgumentError, "calibration: no batch reaches any"),
        ({"device": "nowhere"}, BackendError, "device: 'nowhere'"),
        ({"device": "meta"}, BackendError, "device: meta"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_and_change_nothing(broken, error, message):
    arguments: dict[str, Any] = {"model": network(), "calibration": [images()], **broken}
    model = arguments["model"]
    known = isinstance(model, nn.Module) and "meta" not in message and "Lazy" not in str(model)
    before = states(model) if known else {}
    with pytest.raises(error, match=message):
        reestimate_batch_norm(**arguments)
    assert same(before, model.state_dict() if known else {})
