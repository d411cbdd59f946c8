"""The change of the network's output, whatever it returns, and caches that models would keep."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.calibration import observe, outputs
from lobs_native.calibration.outputs import measure_change, sample_outputs
from lobs_native.calibration.seeding import seeded
from lobs_native.calibration.session import Session
from lobs_native.files.shelf import Shelf


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def pruned(model: nn.Module | None = None, **options: Any) -> lobs.Report:
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(20, 6, generator=generator) for _ in range(2)]
    return lobs.prune(model or network(), data, sparsity=0.5, progress=False, **options)


@dataclasses.dataclass
class Outputs:
    logits: Tensor
    states: list[Tensor]


OUTPUTS = {
    "dict": lambda y: {"logits": y},
    "tuple": lambda y: (y, None, 3),
    "nested": lambda y: {"a": ({"b": [y]}, "text")},
    "integers beside": lambda y: (y, y.argmax(1)),
    "dataclass": lambda y: Outputs(y, []),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_any_structure_are_measured(kind):
    expected = pruned().error_bound.measured
    bound = pruned(forward=lambda m, x: OUTPUTS[kind](m(x))).error_bound
    assert bound.measured == expected > 0
    assert not bound.covered


def test_several_outputs_are_measured_together():
    bound = pruned(forward=lambda m, x: (m(x), {"input": x.double()})).error_bound
    # The input does not change: the same difference over twice the rows.
    assert bound.measured == pytest.approx(pruned().error_bound.measured / 2**0.5)


@pytest.mark.parametrize("kind", ["integers", "nothing", "text", "scalar"])
def test_outputs_without_floating_point_tensors_are_not_measured(kind):
    def forward(model: nn.Module, x: Tensor) -> Any:
        y = model(x)
        return {"integers": y.argmax(1), "nothing": None, "text": "text", "scalar": y.sum()}[kind]

    assert pruned(forward=forward).error_bound.measured is None


def test_outputs_of_another_shape_than_the_original_s_are_not_measured():
    model = network()
    weight = model[0].weight.detach().clone()

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)[: 20 if torch.equal(model[0].weight, weight) else 10]

    assert pruned(model, forward=forward).error_bound.measured is None


def test_padding_does_not_count_in_the_change_of_the_output():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(6, 3).double()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.a(x)

    x, mask = torch.randn(4, 5, 6).double(), torch.ones(4, 5)
    mask[1, 2:] = mask[3, 4:] = 0
    model = Net()
    before = model.a(x)
    batch = {"x": x, "attention_mask": mask}
    report = lobs.prune(model, [batch], sparsity=0.5, progress=False)
    change = (model.a(x) - before)[mask != 0].detach()
    assert report.error_bound.measured == pytest.approx(float(change.norm()) / 16**0.5)


@pytest.mark.parametrize("shape", [(7, 5, 3), (7, 4), (7,), (1, 2, 3, 4)])
@pytest.mark.parametrize("limit", [None, 0, 40])
def test_outputs_that_wait_on_disk_are_measured_alike(limit, shape):
    model = nn.Linear(1, 1)
    session = Session(model, [torch.randn(shape), torch.randn(shape)], None, None, 0, False)
    session.forward = lambda m, x: (x.double() * m.weight[0], {"half": (x * m.weight[0]).half()})
    session.originals.put("weight", model.weight.detach() + 1)
    session.changed.add("weight")
    with session.evaluating():
        change = measure_change(session, limit)
    squares = sum(float(x.double().square().sum()) for x in session.batches)
    assert change.difference == pytest.approx(2 * squares, rel=1e-2)
    assert change.rows == pytest.approx(4 * torch.Size(shape).numel() / shape[-1])


@pytest.mark.parametrize("shape", [(70, 50, 3), (700, 4), (7,), (1, 2, 3, 4)])
@pytest.mark.parametrize("limit", [None, 0, 40])
def test_outputs_that_were_kept_beforehand_are_measured_like_those_of_another_run(limit, shape):
    generator = torch.Generator().manual_seed(0)
    model, batches = nn.Linear(1, 1), [torch.randn(shape, generator=generator) for _ in range(4)]
    batches[0][0] = 0.5
    session = Session(model, batches, None, None, 0, False)
    session.forward = lambda m, x: (x.double() * m.weight[0], torch.rand(3) * m.weight[0])
    session.originals.put("weight", model.weight.detach().clone())
    session.changed.add("weight")
    with session.evaluating(), Shelf(limit) as kept:
        sample = sample_outputs(session, kept, 512)
        model.weight += 1
        assert measure_change(session, sample=sample) == measure_change(session, None, 512)


def change_of(count: int, each: int, **options: Any) -> tuple[lobs.Report, list[int], float]:
    """Prune on so many batches; the report, the batches on which the output was measured, and the
    distance on those."""
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(each, 6, generator=generator) for _ in range(count)]
    ran: list[int] = []

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        ran.append(next(i for i, y in enumerate(data) if torch.equal(y, x)))
        return model(x)

    model, before = network(), network()
    report = lobs.prune(model, data, sparsity=0.5, forward=forward, progress=False, **options)
    batches = report.error_bound.batches or 0
    if options.get("measure") == "all":  # both networks on each
        last = ran[-2 * batches :: 2]
        assert last == ran[-2 * batches + 1 :: 2]
    else:
        last = ran[-batches:]
    x = torch.cat([data[i] for i in last])
    with torch.no_grad():
        distance = float((model(x) - before(x)).double().norm()) / len(x) ** 0.5
    return report, last, distance


@pytest.mark.parametrize(
    ("count", "each", "chosen"),
    [
        (4, 128, [0, 1, 2, 3]),
        (5, 128, [0, 1, 2, 3]),
        (8, 128, [0, 2, 4, 6]),
        (3, 2000, [0]),
        (7, 300, [0, 3]),
        (6, 20, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_the_change_of_the_output_is_measured_on_a_sample(count, each, chosen):
    report, measured, distance = change_of(count, each)
    assert measured == chosen
    bound = report.error_bound
    assert (bound.rows, bound.batches) == (each * len(chosen), len(chosen))
    assert bound.measured == pytest.approx(distance, rel=1e-5)


class Noisy(nn.Module):
    """Adds random numbers to its input, also in eval mode, or a recurrent layer; or neither."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a = kind, nn.Linear(6, 6)
        if kind == "recurrent":
            self.recurrent = nn.GRU(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "noisy":
            x = x + torch.rand_like(x)
        if self.kind == "recurrent":
            x = self.recurrent(x[None])[0][0]
        return self.a(x)


@pytest.mark.parametrize(
    ("kind", "looks"), [("plain", 0), ("noisy", 1), ("noisy on a device", 1), ("recurrent", 1)]
)
def test_the_look_at_the_first_batch_gives_a_part_of_the_sample_where_it_is_computed_alike(
    kind, looks, monkeypatch
):
    if kind == "noisy on a device":
        drawn = itertools.count()
        monkeypatch.setattr(observe, "random_state", lambda: {"0": torch.tensor(next(drawn))})
    torch.manual_seed(0)
    model, ran = Noisy(kind), []
    data = [torch.randn(200, 6) for _ in range(8)]

    def forward(model: nn.Module, x: Tensor) -> Any:
        ran.append(next(i for i, y in enumerate(data) if torch.equal(y, x)))
        return {"out": model(x)}

    original = copy.deepcopy(model)
    report = lobs.prune(
        model, data, sparsity=0.5, forward=forward, include=["a"], inputs="pruned", progress=False
    )
    before = ran[1 : ran.index(0, 1 + looks)]  # the look; the sample; then all, to calibrate
    assert before == [0] * looks + [2, 5]
    distance = 0.0
    with torch.no_grad():
        returned = {i: original(x) for i, x in enumerate(seeded(data, 0)) if i in (0, 2, 5)}
        for i, x in enumerate(seeded(data, 0)):
            if i in returned:
                distance += float((model(x) - returned[i]).double().square().sum())
    measured = report.error_bound.measured
    assert measured == pytest.approx((distance / 600) ** 0.5, rel=1e-5)


def test_the_change_of_the_output_is_measured_on_all_batches_if_asked():
    report, measured, distance = change_of(5, 1200, measure="all")
    assert measured == list(range(5))
    assert report.error_bound.rows == 6000
    assert report.error_bound.measured == pytest.approx(distance, rel=1e-5)


def test_where_the_theorem_holds_its_bound_is_compared_with_the_change_on_all_batches():
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(1200, 6, generator=generator) for _ in range(3)]
    bound = lobs.prune(network(), data, sparsity=0.5, progress=False).error_bound
    assert bound.covered
    assert (bound.rows, bound.batches) == (3600, 3)


class Caching(nn.Module):
    """A stack of blocks, each of which is passed a cache if the configuration says so."""

    def __init__(self, use_cache: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(use_cache=use_cache)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.cached = 0

    def forward(self, x: Tensor) -> Tensor:
        cache: list[Tensor] | None = [] if self.config.use_cache else None
        self.cached += cache is not None
        for block in self.blocks:
            x = block(x, cache)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor, cache: list[Tensor] | None) -> Tensor:
        if cache is not None:
            cache.append(x)
        return x + self.a(x)


@pytest.mark.parametrize("use_cache", [True, False, None])
def test_models_run_without_the_cache_of_their_configuration(use_cache):
    model = Caching(use_cache)
    report = pruned(model)
    assert report.settings["blocks"] == ["blocks"]
    assert model.cached == 0
    assert model.config.use_cache is use_cache


def test_models_run_without_the_caches_of_configurations_inside_others():
    model = Caching(False)
    inner = model.config
    model.config = SimpleNamespace(text_config=SimpleNamespace(use_cache=True, parent=inner))
    seen: list[bool] = []

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        seen.append(model.config.text_config.use_cache)
        model.config, before = inner, model.config
        try:
            return model(x)
        finally:
            model.config = before

    pruned(model, forward=forward)
    assert set(seen) == {False}
    assert model.config.text_config.use_cache is True


def test_the_configuration_is_restored_after_a_failure():
    model = Caching(True)
    model.blocks[1].a.bias = nn.Parameter(torch.full((6,), 1e38))
    with pytest.raises(lobs.NonFiniteError):
        lobs.prune(model, [torch.full((4, 6), 3e38)], sparsity=0.5, progress=False)
    assert model.config.use_cache is True


def test_the_outputs_of_a_batch_are_freed_before_the_model_runs_on_the_next():
    made: list[weakref.ref[Tensor]] = []

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        assert (paired and len(made) % 2) or all(output() is None for output in made)
        made.append(weakref.ref(output := model(x)))
        return output

    paired = True  # both networks run on a batch one after the other
    session = Session(network(), [torch.randn(5, 6)] * 3, forward, None, 0, False)
    with session.evaluating():
        assert measure_change(session).difference == 0
        assert len(made) == 6
        paired = False
        sample = sample_outputs(session, Shelf(), 512)
        assert measure_change(session, sample=sample).difference == 0
    assert len(made) == 12


@pytest.mark.parametrize("masked", [None, "rows", "entries"])
def test_large_rows_are_measured_in_pieces_alike(masked, monkeypatch):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(6, 50).double()

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.a(x).sum(-1) if masked == "entries" else self.a(x).transpose(0, 1).mT.mT

    x, mask = torch.randn(4, 4, 6).double(), torch.ones(4, 4)
    mask[1, 2:] = 0
    mask[2:, 1] = 0
    batch = {"x": x, "attention_mask": mask} if masked else {"x": x}

    def measured(limit: int | None = None) -> Any:
        session = Session(Net(), [batch], None, None, 0, False, token_mask=True)
        session.originals.put("a.weight", session.model.a.weight.detach() + 1)
        session.changed.add("a.weight")
        with session.evaluating():
            return dataclasses.astuple(measure_change(session, limit))

    whole = measured()
    monkeypatch.setattr(outputs, "PIECE", 64)
    assert measured() == pytest.approx(whole)
    assert measured(0) == pytest.approx(whole)
