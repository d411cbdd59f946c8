"""A search over divisions of a budget: what it keeps, and that it ends where it should."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lobs_native as lobs
from lobs_native.calibration.outputs import held_back_loss
from lobs_native.calibration.session import Session
from lobs_native.network import pruning, resources
from lobs_native.network.allocation import Costs
from lobs_native.network.search import Search

SIZES = {"a": 40, "b": 100, "c": 60}


class Kept:
    """A record in memory."""

    def __init__(self, made=()):
        self.made = list(made)

    def evaluations(self):
        return list(self.made)

    def keep_evaluation(self, loss, seconds):
        self.made.append((loss, seconds))


def search(evaluate, record=None, sizes=SIZES):
    """Of layers whose n-th removal costs n / size, half of all weights are to be removed."""
    costs = {
        name: Costs(
            torch.arange(1, n + 1, dtype=torch.float64) / n, stride=1, asked=n // 2,
            least=n // 4, most=3 * n // 4,
        )
        for name, n in sizes.items()
    }  # fmt: skip
    return Search(costs, sizes, evaluate, record)


def far_from(wanted, seen=None):
    """A loss that is least where shares are as ``wanted``."""

    def loss(shares):
        if seen is not None:
            seen.append(dict(shares))
        return sum((shares[name] - x) ** 2 for name, x in wanted.items())

    return loss


def test_every_division_keeps_the_budget_and_the_best_is_taken():
    """It comes close to the best, evaluates nothing twice, and every layer stays within bounds."""
    wanted, seen = {"a": 0.7, "b": 0.4, "c": 0.53}, []
    loss = far_from(wanted, seen)
    found = search(loss)
    best = found.best(60)
    for shares in seen:
        assert sum(round(shares[k] * n) for k, n in SIZES.items()) == 100
        assert all(0.25 <= x <= 0.75 for x in shares.values())
    assert len({tuple(x.values()) for x in seen}) == len(seen) == len(found.losses)
    assert loss(best) == min(found.losses) < found.losses[0] / 5


@pytest.mark.parametrize("allowed", [1, 5])
def test_so_many_divisions_are_tried_besides_the_first(allowed):
    seen = []
    best = search(far_from({"a": 0.7, "b": 0.4}, seen)).best(allowed)
    assert len(seen) == allowed + 1
    assert best in seen


def test_without_a_search_nothing_is_evaluated():
    seen = []
    found = search(far_from({"a": 0.7}, seen))
    assert found.best(0) == found.shares({})
    assert not seen
    assert found.summary() is None


def test_a_loss_that_gets_no_better_ends_it_where_it_began():
    """Also if the network is broken from the start."""
    for loss in (1.0, float("nan")):
        found = search(lambda _, loss=loss: loss)
        assert found.best(1000) == found.shares({})
        assert len(found.losses) < 30


def test_no_division_is_begun_after_the_time():
    found = search(far_from({"a": 0.7}))
    assert found.best(50, seconds=0.0) == found.shares({})
    assert len(found.losses) == 1
    old = Kept([(1.0, 20.0), (0.5, 20.0)])
    found = search(far_from({"a": 0.7}), old)
    found.best(50, seconds=30.0)
    assert len(found.losses) == 2


def test_what_is_on_record_is_not_evaluated_again():
    wanted, whole = {"a": 0.7, "b": 0.4}, Kept()
    best = search(far_from(wanted), whole).best(12)
    seen: list[dict[str, float]] = []
    again = search(far_from(wanted, seen), Kept(whole.made[:5]))
    assert again.best(12) == best
    assert len(seen) == len(whole.made) - 5
    assert again.losses == [loss for loss, _ in whole.made]


def test_many_layers_are_moved_by_kind_and_by_place():
    sizes = {f"{i}.{kind}": 40 for i in range(8) for kind in ("up", "down")}
    found = search(far_from({"0.up": 0.7, "7.up": 0.3}), sizes=sizes)
    place, up, down = found._directions()
    assert place["0.up"] == -0.5
    assert place["7.down"] == 0.5
    assert {k for k, x in up.items() if x} == {k for k in sizes if k.endswith("up")}
    assert {k for k, x in down.items() if x} == {k for k in sizes if k.endswith("down")}


# ---- pruning -------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def network():
    torch.manual_seed(3)
    blocks = nn.Sequential(*(Block(8) for _ in range(2)))
    return nn.Sequential(nn.Linear(8, 8), blocks, nn.Linear(8, 3))


def data():
    made = torch.Generator().manual_seed(1)
    mix = torch.randn(8, 8, generator=made)
    return [torch.randn(200, 8, generator=made) @ mix for _ in range(6)]


SETTINGS = {"sparsity": 0.7, "scope": "model", "held_back": 0.3, "progress": False}


def same_bits(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("inputs", ["corrected", "dense"])
def test_the_network_is_closer_than_without_a_search(inputs):
    """On the batches held back, by what the search says it is; and the same again."""
    models = [network() for _ in range(3)]
    plain = lobs.prune(models[0], data(), inputs=inputs, measure="all", **SETTINGS)
    report = lobs.prune(models[1], data(), inputs=inputs, measure="all", search=10, **SETTINGS)
    found = report.settings["search for a division"]
    assert found["evaluations"] == 11
    assert plain.error_bound.held_back**2 == pytest.approx(found["loss at first"], rel=1e-9)
    assert report.error_bound.held_back**2 == pytest.approx(found["least loss"], rel=1e-9)
    assert found["least loss"] < found["loss at first"]
    assert report.removed == plain.removed
    lobs.prune(models[2], data(), inputs=inputs, measure="all", search=10, **SETTINGS)
    assert same_bits(models[1], models[2])


def test_a_run_that_ends_in_the_middle_resumes_with_the_same_bits(tmp_path, monkeypatch):
    """Three of six evaluations are kept; the model is as it was in between."""
    whole, model = network(), network()
    lobs.prune(whole, data(), search=5, **SETTINGS)
    measured = []

    def failing(session, limit):
        measured.append(1)
        if len(measured) == 4:
            raise RuntimeError("the power is gone")
        return held_back_loss(session, limit)

    monkeypatch.setattr(pruning, "held_back_loss", failing)
    with pytest.raises(RuntimeError, match="the power is gone"):
        lobs.prune(model, data(), search=5, run_dir=tmp_path / "run", **SETTINGS)
    assert same_bits(model, network())
    report = lobs.prune(model, data(), search=5, run_dir=tmp_path / "run", **SETTINGS)
    assert len(measured) == 4 + 3
    assert report.settings["search for a division"]["evaluations"] == 6
    assert same_bits(model, whole)


class Logits(nn.Module):
    """A model that returns logits over its vocabulary, and something else."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=5)
        self.layer = nn.Linear(4, 5)

    def forward(self, x):
        return {"hidden": x * 2, "logits": self.layer(x)}


@torch.no_grad()
def test_logits_are_compared_by_their_divergence():
    """In nats for each row, against torch's own; the rest of the output does not count."""
    torch.manual_seed(0)
    model = Logits().double()
    batches = [torch.randn(3, 7, 4).double(), torch.randn(2, 7, 4).double()]
    session = Session(model, [], None, None, 0, False, held_back=batches)
    weight = model.layer.weight
    session.originals.put("layer.weight", weight.detach().clone())
    before = [model(x)["logits"].log_softmax(-1) for x in batches]
    weight *= torch.rand(5, 4).double()
    session.changed.add("layer.weight")
    after = [model(x)["logits"].log_softmax(-1) for x in batches]
    total = sum(
        float(nn.functional.kl_div(q, p, reduction="sum", log_target=True))
        for p, q in zip(before, after, strict=True)
    )
    assert held_back_loss(session) == pytest.approx(total / 35, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scope": "model"}, "search: 3 divisions are compared on batches that are held back"),
        ({"held_back": 0.3}, "search: 3 divisions of a budget that layers share"),
    ],
)
def test_a_search_needs_a_budget_and_batches(settings, message):
    with pytest.raises(lobs.ArgumentError, match=message):
        lobs.prune(network(), data(), sparsity=0.5, search=3, progress=False, **settings)


def test_a_limit_on_the_time_needs_a_search():
    with pytest.raises(lobs.ArgumentError, match="search_seconds: it limits a search"):
        lobs.prune(network(), data(), search_seconds=3.0, **SETTINGS)


@pytest.mark.parametrize(
    ("more", "seconds"),
    [({}, 10.0), ({"search": 3}, 50.0), ({"search": 3, "search_seconds": 15.0}, 25.0)],
)
def test_a_plan_has_the_time_of_the_search(monkeypatch, more, seconds):
    """Where a run without one takes ten seconds: the first division, three more, and the run."""
    monkeypatch.setattr(resources, "_seconds", lambda *_: 10.0)
    assert lobs.plan_prune(network(), data(), **{**SETTINGS, **more}).seconds == seconds
