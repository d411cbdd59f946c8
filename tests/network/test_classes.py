"""Networks whose outputs are logits over classes, as the caller says."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.calibration.outputs import held_back_loss
from lobs_native.calibration.session import Session
from lobs_native.errors import ArgumentError
from lobs_native.rundir.ledger import AnotherRunError

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = 5
OPTIONS: dict[str, Any] = {
    "sparsity": 0.6,
    "tune": "network",
    "tune_rate": 0.016,
    "tune_passes": 20,
    "inputs": "dense",
    "progress": False,
}


class Classifier(nn.Module):
    """Rows (B, 6) to logits (B, CLASSES), and, if it is to, what they are made of (B, 16)."""

    def __init__(self, *, with_hidden: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, CLASSES)
        self.with_hidden = with_hidden

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(2 * self.first(x))
        logits = 4 * self.second(hidden)
        return {"hidden": hidden, "logits": logits} if self.with_hidden else logits


def data(count: int = 10) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(20, 6, generator=generator) for _ in range(count)]


@torch.no_grad()
def divergence(model: Classifier, original: Classifier, batches: list[Tensor]) -> float:
    """The mean over rows, in float64, by torch's own function."""
    logs = [
        [(4 * m.second(torch.tanh(2 * m.first(x)))) for x in batches] for m in (original, model)
    ]
    p, q = (torch.cat(x).double().log_softmax(1) for x in logs)
    return float(nn.functional.kl_div(q, p, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("with_hidden", [False, True])
def test_they_are_tuned_by_the_divergence_of_their_probabilities(with_hidden):
    plain, model, original = (Classifier(with_hidden=with_hidden) for _ in range(3))
    lobs.prune(plain, data(), **{**OPTIONS, "tune": None, "tune_rate": None, "tune_passes": None})
    report = lobs.prune(model, data(), classes=CLASSES, **OPTIONS)
    (tuned,) = report.settings["tuned"]
    assert "Kullback-Leibler" in tuned["measure"]
    assert tuned["kept"]
    for when, network in (("before", plain), ("after", model)):
        expected = divergence(network, original, data()[5:6])
        assert tuned[f"held_back_{when}"] == pytest.approx(expected, rel=1e-3)
    assert divergence(model, original, data()) < 0.8 * divergence(plain, original, data())
    assert report.settings["classes"] == CLASSES


def test_nothing_is_taken_for_logits_unless_it_is_said():
    squared, divergent = Classifier(), Classifier()
    (tuned,) = lobs.prune(squared, data(), **OPTIONS).settings["tuned"]
    assert "relative to its size" in tuned["measure"]
    lobs.prune(divergent, data(), classes=CLASSES, **OPTIONS)
    distances = [divergence(m, Classifier(), data()) for m in (squared, divergent)]
    assert distances[1] < distances[0]


def test_what_is_said_goes_before_the_configuration():
    model = Classifier(with_hidden=True)
    model.config = SimpleNamespace(vocab_size=16)  # type: ignore[assignment]
    other = copy.deepcopy(model)
    other.config = SimpleNamespace(vocab_size=CLASSES)  # type: ignore[assignment]
    lobs.prune(model, data(), classes=CLASSES, **OPTIONS)
    lobs.prune(other, data(), **OPTIONS)
    assert all(torch.equal(p, other.get_parameter(n)) for n, p in model.named_parameters())


@torch.no_grad()
def test_divisions_are_compared_by_the_divergence():
    model, batches = Classifier().double(), [x.double() for x in data(3)]
    original = copy.deepcopy(model)
    session = Session(model, [], None, None, 0, False, held_back=batches, classes=CLASSES)
    session.originals.put("first.weight", model.first.weight.detach().clone())
    model.first.weight *= torch.rand(16, 6).double()
    session.changed.add("first.weight")
    expected = divergence(model, original, batches)
    assert held_back_loss(session) == pytest.approx(expected, rel=1e-12)


def test_a_search_says_the_divergence():
    model = Classifier()
    options = {"scope": "model", "held_back": 0.2, "sensitivity": None, "progress": False}
    report = lobs.prune(model, data(), sparsity=0.6, search=1, classes=CLASSES, **options)
    found = report.settings["search for a division"]
    held_back = [data()[i] for i in (2, 7)]
    expected = divergence(model, Classifier(), held_back)
    assert found["least loss"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("option", [{"tune": "network"}, {"search": 1, "scope": "model"}])
def test_an_output_without_such_rows_is_refused(option):
    model = Classifier(with_hidden=True)
    before = copy.deepcopy(model.state_dict())
    options = {"sparsity": 0.5, "held_back": 0.2, "progress": False, "classes": 4, **option}
    shapes = r"\[\(20, 16\), \(20, 5\)\]"
    for call in (lobs.prune, lobs.plan_prune):
        with pytest.raises(ArgumentError, match=rf"^classes: 4; .*{shapes}.*a forward that"):
            call(model, data(), **options)
    with pytest.raises(ArgumentError, match=r"^classes: 20; .*\[\(20,\)\]"):  # rows of one logit
        lobs.prune(
            model, data(), forward=lambda m, x: m(x)["logits"].sum(1), **{**options, "classes": 20}
        )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_it_is_refused_where_it_would_say_nothing():
    for option in ({}, {"tune": "blocks"}):
        with pytest.raises(ArgumentError, match=r"^classes: 5; .*pass tune='network' or search"):
            lobs.prune(Classifier(), data(), sparsity=0.5, classes=CLASSES, **option)


def test_a_run_with_other_classes_is_another_run(tmp_path):
    model = Classifier(with_hidden=True)
    lobs.prune(model, data(), classes=CLASSES, run_dir=tmp_path / "run", **OPTIONS)
    for other in (None, 16):
        with pytest.raises(AnotherRunError, match="classes"):
            lobs.prune(
                Classifier(with_hidden=True),
                data(),
                classes=other,
                run_dir=tmp_path / "run",
                **OPTIONS,
            )
