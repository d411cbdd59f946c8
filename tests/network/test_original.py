"""A network that is pruned again, towards what it returned before it was pruned the first time."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from helpers.stacks import batches, made
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.calibration.held_back import divided
from lobs_native.errors import ArgumentError, DtypeError
from lobs_native.network import pruning
from lobs_native.rundir.ledger import AnotherRunError

pytestmark = pytest.mark.usefixtures("one_thread")
AGAIN: dict[str, Any] = {"sparsity": 0.7, "progress": False}


def once() -> tuple[nn.Module, nn.Module]:
    """A network that was pruned and tuned, and what it was before."""
    model = made(blocks=2)
    original = copy.deepcopy(model)
    lobs.prune(model, batches(6), sparsity=0.5, tune="network", progress=False)
    return model, original


def same_bits(some: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, some.state_dict().values(), other.state_dict().values()))


@torch.no_grad()
def change(model: nn.Module, original: nn.Module, data: list[Tensor]) -> Tensor:
    """The squared change of the output, and its squared size, in float64."""
    twins = [copy.deepcopy(x).double() for x in (model, original)]
    y, y0 = (torch.cat([twin(x.double()) for x in data]) for twin in twins)
    return torch.stack(
        [(y - y0).square().sum(), y0.square().sum(), torch.tensor(y0[..., 0].numel())]
    )


def test_the_change_is_measured_and_tuned_from_the_original_network():
    model, original = once()
    passed = copy.deepcopy(model)
    report = lobs.prune(
        model, batches(6), original=original, held_back=0.2, tune="network", **AGAIN
    )
    kept, held_back = divided(batches(6), 0.2)
    squared, size, rows = change(model, original, kept)
    assert report.error_bound.measured == pytest.approx(float(squared / rows) ** 0.5, rel=1e-4)
    assert report.error_bound.output_norm == pytest.approx(float(size / rows) ** 0.5, rel=1e-5)
    squared, size, _ = change(model, original, held_back)
    assert report.error_bound.held_back == pytest.approx(float(squared / size) ** 0.5, rel=1e-4)
    squared, size, _ = change(model, original, kept[2:3])
    (tuned,) = report.settings["tuned"]
    assert tuned["held_back_after"] == pytest.approx(float(squared / size) ** 0.5, rel=1e-4)
    assert not report.error_bound.covered
    assert "not the one that was passed" in report.error_bound.reason
    names = dict(original.named_parameters())
    differing = [k for k, p in passed.named_parameters() if not torch.equal(p, names[k])]
    assert report.settings["parameters unlike the original's"] == len(differing) > 4
    for name, p in model.named_parameters():  # zeros stay zeros
        assert not p[passed.get_parameter(name) == 0].any(), name


@pytest.mark.parametrize("blocks", ["auto", None])
def test_corrected_layers_are_fitted_to_the_outputs_of_the_original_network(blocks):
    """In a network that is far from it, whatever is aimed at shows."""
    original = made(blocks=2)
    model = copy.deepcopy(original)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p *= 1 + 0.3 * torch.randn(p.shape)
    distances = []
    for aim in (None, original):
        pruned, data = copy.deepcopy(model), batches(40)
        lobs.prune(pruned, data, sparsity=0.1, original=aim, blocks=blocks, progress=False)
        squared, size, _ = change(pruned, original, data)
        distances.append(float(squared / size) ** 0.5)
    squared, size, _ = change(model, original, batches(40))
    distances.append(float(squared / size) ** 0.5)
    towards_itself, towards_original, before = distances
    assert towards_original < 0.7 * min(towards_itself, before)


@pytest.mark.parametrize("inputs", ["corrected", "pruned", "dense"])
def test_a_copy_of_the_model_itself_changes_no_bit(inputs):
    model, other = made(), made()
    options = {"inputs": inputs, "tune": "network", "held_back": 0.2, **AGAIN}
    expected = lobs.prune(model, batches(5), **options)
    report = lobs.prune(other, batches(5), original=made(), **options)
    assert same_bits(model, other)
    assert repr(report.error_bound) == repr(expected.error_bound)
    assert "parameters unlike the original's" not in report.settings


def test_it_is_neither_run_nor_changed():
    model, original = once()
    before = copy.deepcopy(original)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        raise AssertionError

    original.forward = types.MethodType(forward, original)  # type: ignore[method-assign]
    lobs.prune(model, batches(6), original=original, tune="blocks", **AGAIN)
    assert same_bits(original, before)


@pytest.mark.parametrize("when", ["removing", "tuning", "measuring"])
def test_on_an_error_the_model_is_as_it_was_passed(monkeypatch, when):
    model, original = once()
    before = copy.deepcopy(model)

    def end(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    place = {
        "removing": "lobs_native.network.layerwise.prune_layer",
        "tuning": "lobs_native.network.tuning.descend",
        "measuring": "lobs_native.network.pruning.error_bound_of",
    }
    monkeypatch.setattr(place[when], end)
    with pytest.raises(KeyboardInterrupt):
        lobs.prune(model, batches(6), original=original, tune="network", **AGAIN)
    assert same_bits(model, before)


def test_divisions_of_a_budget_are_tried_on_the_model_as_it_was_passed(monkeypatch):
    """Where no division is better than the first one, a search changes nothing."""
    model, original = once()
    other = copy.deepcopy(model)
    options = {"scope": "model", "held_back": 0.2, "original": original, **AGAIN}
    lobs.prune(model, batches(6), **options)
    losses = []

    def loss(session: Any, limit: Any) -> float:
        squared, size, _ = change(session.model, original, session.held_back)
        losses.append((kept(session, limit), float(squared / size)))
        return 1.0

    kept = pruning.held_back_loss
    monkeypatch.setattr(pruning, "held_back_loss", loss)
    lobs.prune(other, batches(6), search=2, **options)
    assert len(losses) == 3
    for found, expected in losses:
        assert found == pytest.approx(expected, rel=1e-4)
    assert same_bits(model, other)


def test_a_run_directory_resumes_with_the_same_original_network_only(tmp_path, monkeypatch):
    model, original = once()
    resumed = copy.deepcopy(model)
    options = {"tune": "network", **AGAIN}
    lobs.prune(model, batches(6), original=original, **options)

    def end(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    options["run_dir"] = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("lobs_native.network.tuning.descend", end)
        with pytest.raises(KeyboardInterrupt):
            lobs.prune(resumed, batches(6), original=original, **options)
    for other in (None, copy.deepcopy(resumed)):
        with pytest.raises(AnotherRunError, match="original"):
            lobs.prune(resumed, batches(6), original=other, **options)
    report = lobs.prune(resumed, batches(6), original=original, **options)
    assert report.settings["resumed layers"] == 12
    assert same_bits(model, resumed)


def test_limits_on_memory_change_no_bit():
    model, original = once()
    limited = copy.deepcopy(model)
    options = {"original": original, "tune": "network", **AGAIN}
    lobs.prune(model, batches(6), **options)
    plan = lobs.plan_prune(limited, batches(6), memory=10_000_000, **options)
    report = lobs.prune(limited, batches(6), memory=10_000_000, **options)
    assert plan.memory == report.settings["plan"]["memory"]
    assert same_bits(model, limited)


class Tied(nn.Module):
    """Two layers with one weight, of which the second one is called first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.first.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.first(torch.relu(self.second(x)))


def test_a_weight_with_two_names_is_compared_and_kept_once():
    model = Tied()
    original, data = copy.deepcopy(model), [torch.randn(30, 6) for _ in range(4)]
    lobs.prune(model, data, sparsity=0.3, progress=False)
    report = lobs.prune(model, data, original=original, sparsity=0.6, progress=False)
    squared, _, rows = change(model, original, data)
    assert report.error_bound.measured == pytest.approx(float(squared / rows) ** 0.5, rel=1e-4)
    assert float((model.second.weight == 0).float().mean()) == pytest.approx(0.6, abs=0.03)


def halved(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).half()


def sharing(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    other.head.weight = model.head.weight
    return other


def counting(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    other.register_buffer("count", torch.zeros(1))
    return other


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda model: model.state_dict(), DtypeError, "expected an nn.Module, got OrderedDict"),
        (lambda model: model, ArgumentError, r"shares the parameter 'embed.weight' with the model"),
        (sharing, ArgumentError, r"shares the parameter 'head.weight'.*copy.deepcopy"),
        (lambda model: made(blocks=1), ArgumentError, r"only one of it .* parameter 'layers.1"),
        (lambda model: made(width=8), ArgumentError, r"'embed.weight' is \(8, 5\) .*\(12, 5\)"),
        (halved, ArgumentError, r"torch.float16, and the model's .*torch.float32"),
        (counting, ArgumentError, "only one of it and the model has the buffer 'count'"),
    ],
)
def test_networks_that_the_model_was_not_are_refused(make, error, match):
    model = made()
    before = copy.deepcopy(model)
    for call in (lobs.prune, lobs.plan_prune):
        with pytest.raises(error, match=f"^original: .*{match}"):
            call(model, batches(4), original=make(model), **AGAIN)
    assert same_bits(model, before)


def test_buffers_must_be_those_of_the_model():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    original, data = copy.deepcopy(model), [torch.randn(8, 1, 8, 8) for _ in range(3)]
    lobs.reestimate_batch_norm(model, data)
    with pytest.raises(ArgumentError, match=r"buffer '1.running_mean' has other values.*re-estim"):
        lobs.prune(model, data, original=original, **AGAIN)


def test_it_is_refused_with_offloaded_weights(tmp_path):
    model = made()
    with pytest.raises(ArgumentError, match="original: with offload"):
        lobs.prune(model, batches(4), original=made(), offload=tmp_path, **AGAIN)
