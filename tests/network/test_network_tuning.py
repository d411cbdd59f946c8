"""Networks whose parameters are tuned together once all layers are pruned, towards what the
original network returned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.calibration.distance import Distance
from lobs_native.errors import ArgumentError
from lobs_native.network import tuning
from lobs_native.network.descent import Course, descend
from lobs_native.network.output_aim import recomputing
from lobs_native.rundir.underway import StoppedError, stop

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, TOKENS = 8, 11


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(2 * self.up(self.norm(x))))


class Language(nn.Module):
    """Tokens (B, T) to logits (B, T, TOKENS)."""

    def __init__(self, vocabulary: int | None = TOKENS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, TOKENS)
        self.config = SimpleNamespace(vocab_size=vocabulary)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids).cumsum(1) / 2  # a token sees those before it
        for block in self.blocks:
            x = block(x)
        return 3 * self.head(x)


def data(count: int = 10, padding: int = 0) -> list[dict[str, Tensor]]:
    """Batches whose last four positions are padding, with this token there."""
    torch.manual_seed(1)
    mask = torch.ones(16, 12, dtype=torch.long)
    mask[:, 8:] = 0
    every = [torch.randint(TOKENS, mask.shape) for _ in range(count)]
    return [{"ids": torch.where(mask == 1, ids, padding), "attention_mask": mask} for ids in every]


OPTIONS: dict[str, Any] = {
    "sparsity": 0.6, "include": ["*.up", "*.down"], "tune": "network", "progress": False,
}  # fmt: skip


def tuned(report: lobs.Report) -> dict[str, Any]:
    (found,) = report.settings["tuned"]
    return dict(found)


# ---- what a network returns ----------------------------------------------------------------------


def divergence(model: nn.Module, original: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """The mean over tokens that are no padding, in float64."""
    with torch.no_grad():
        logs = [
            [m(**b).double().log_softmax(-1)[b["attention_mask"] == 1] for m in (original, model)]
            for b in batches
        ]
    return float(torch.cat([(p.exp() * (p - q)).sum(1) for p, q in logs]).mean())


def test_logits_come_closer_to_the_original_ones():
    plain, model, original = Language(), Language(), Language()
    lobs.prune(plain, data(), **{**OPTIONS, "tune": None})
    report = lobs.prune(model, data(), **OPTIONS)
    found = tuned(report)
    assert found["kept"]
    assert found["name"] == "network"
    assert "Kullback-Leibler" in found["measure"]
    held_back = data()[5:6]
    for when, network in (("before", plain), ("after", model)):
        expected = divergence(network, original, held_back)
        assert found[f"held_back_{when}"] == pytest.approx(expected, rel=1e-3)
    assert divergence(model, original, data()) < 0.9 * divergence(plain, original, data())
    for name, p in model.named_parameters():
        stays = name.startswith(("embedding", "head"))
        assert torch.equal(p, original.get_parameter(name)) == stays, name
        if name.endswith(("up.weight", "down.weight")):
            assert torch.equal(p == 0, plain.get_parameter(name) == 0), name
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all("tuned with its network" in layer.notes[-1] for layer in report.layers)


def test_other_outputs_come_closer_by_the_squared_distance_and_more_so_with_more_passes():
    plain, model, original = Language(None), Language(None), Language(None)
    lobs.prune(plain, data(), inputs="dense", **{**OPTIONS, "tune": None})
    found = tuned(lobs.prune(model, data(), inputs="dense", tune_passes=20, **OPTIONS))
    (held_back,) = data()[5:6]
    counts = held_back["attention_mask"] == 1
    with torch.no_grad():
        y, before, after = (m(**held_back)[counts] for m in (original, plain, model))
    assert found["held_back_before"] == pytest.approx(float((before - y).norm() / y.norm()), 1e-4)
    assert found["held_back_after"] == pytest.approx(float((after - y).norm() / y.norm()), 1e-4)
    assert found["held_back_after"] < 0.7 * found["held_back_before"]


def test_the_rate_of_the_first_step_can_be_said():
    """With one step, a parameter moves by its rate along the sign of the gradient."""
    plain, model, batches = Language(), Language(), 2 * data(1)
    lobs.prune(plain, batches, **{**OPTIONS, "tune": None})
    lobs.prune(model, batches, tune_passes=1, tune_rate=0.01, **OPTIONS)
    for name, before in plain.named_parameters():
        if name.endswith("up.weight"):
            weights = before.detach()[before != 0]
            moved = (model.get_parameter(name).detach()[before != 0] - weights).abs()
            step = 0.01 * float(weights.square().mean().sqrt())  # where the gradient is not zero
            assert float(moved.median()) == pytest.approx(step, rel=1e-3)
            assert float(moved.max()) == pytest.approx(step, rel=1e-3)


def test_padding_does_not_count():
    models = [Language(), Language()]
    for model, padding in zip(models, (0, 7), strict=True):
        lobs.prune(model, data(padding=padding), **OPTIONS)
    for name, p in models[0].named_parameters():
        torch.testing.assert_close(p, models[1].get_parameter(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distances_and_their_gradients(logits, dtype):
    torch.manual_seed(2)
    x, y = (torch.randn(5, 7).to(dtype) for _ in range(2))
    counts = torch.tensor([1, 0, 1, 1, 0]).bool()
    a, b = x.double()[counts].requires_grad_(), y.double()[counts]
    if logits:
        p, q = b.log_softmax(1), a.log_softmax(1)
        expected, size = (p.exp() * (p - q)).sum(), 3.0
    else:
        expected, size = (a - b).square().sum(), float(b.square().sum())
    expected.backward()
    distance, x = Distance(logits), x.requires_grad_()
    loss = distance.differentiable(x, y.reshape(-1).split(14), counts, 7)
    (3 * loss).backward()
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    )
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad[counts].double(), 3 * a.grad, **tolerance)
    assert not x.grad[~counts].any()
    assert distance.size == pytest.approx(size)


@pytest.mark.parametrize("broken", [False, True])
def test_tokens_that_a_network_rules_out_add_nothing(broken):
    torch.manual_seed(2)
    x, y = torch.randn(2, 5, 7).unbind()
    whole, distance = Distance(True), Distance(True)
    expected = whole.differentiable(x[:, :6].reshape(-1), [y[:, :6].reshape(-1)], None, 6)
    x[:, 6] = y[:, 6] = -torch.inf
    if broken:
        x[3, 2] = torch.nan
    x = x.clone().requires_grad_()
    loss = distance.differentiable(x, [y.reshape(-1)], None, 7)
    if broken:
        assert loss.isnan()
    else:
        torch.testing.assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(loss, x)
        assert not gradient[:, 6].any()


# ---- steps and what is kept ----------------------------------------------------------------------


class Towards:
    """Parameters of a model that should be what ``points`` say, one for each batch."""

    measure = "distance"

    def __init__(self, p: nn.Parameter, points: list[Tensor]) -> None:
        self.p, self.points = p, points

    def loss(self, number: int) -> Tensor:
        with torch.enable_grad():
            return (self.p - self.points[number]).square().sum()

    def error(self, numbers: Any) -> float:
        return sum(float(self.loss(n).detach()) for n in numbers)


def test_one_step_is_that_of_adam_and_leaves_zeros():
    """Adam's first step is the rate along the sign of the gradient, whatever its size."""
    values = torch.tensor([3.0, 0.0, -1.0, 2.0, 0.0], dtype=torch.float64)
    p = nn.Parameter(values.clone())
    target = torch.tensor([1.0, 1.0, 1.0, 2.5, -9.0], dtype=torch.float64)
    course = Course(passes=1, rate=0.1, seed=0)
    out = descend("x", Towards(p, [target, target]), 2, {"p": p}, {"p": p}, course)
    gradient = 2 * (values - target)
    size = (values[values != 0].square().mean()).sqrt()
    expected = torch.where(values == 0, 0, values - 0.1 * size * gradient.sign())
    torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=0.0)
    assert out.kept
    assert out.held_back_after == pytest.approx(float((expected - target).square().sum()))


class Sum:
    """Two parameters whose sum should be 1: autograd returns one tensor as the gradient of both."""

    measure = "distance"

    def __init__(self, a: nn.Parameter, b: nn.Parameter) -> None:
        self.a, self.b = a, b

    def loss(self, number: int) -> Tensor:
        with torch.enable_grad():
            return (self.a + self.b - 1).square().sum()

    def error(self, numbers: Any) -> float:
        return float(self.loss(0).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_with_one_gradient_are_masked_each_by_their_own_zeros(dtype):
    a = nn.Parameter(torch.tensor([2.0, 0.0, 3.0]))
    b = nn.Parameter(torch.tensor([0.0, 3.0, 3.0], dtype=dtype))
    descend("x", Sum(a, b), 2, {"a": a, "b": b}, {"a": a, "b": b}, Course(1, 0.1, 0))
    assert (a == 0).tolist() == [False, True, False]
    assert (b == 0).tolist() == [True, False, False]
    for p, before in ((a, [2.0, 3.0]), (b, [3.0, 3.0])):
        values = torch.tensor(before, dtype=p.dtype)
        moved = values - 0.1 * values.square().mean().sqrt()
        torch.testing.assert_close(p.detach()[p != 0], moved)


def test_only_what_is_better_on_the_batches_held_back_is_kept():
    """There, the target is in the other direction."""
    values = torch.ones(4)
    p = nn.Parameter(values.clone())
    points = [values + 1, values - 1]  # the second one is held back
    out = descend("x", Towards(p, points), 2, {"p": p}, {"p": p}, Course(2, 0.1, 0))
    assert torch.equal(p.detach(), values)
    assert not out.kept
    assert (out.error_before, out.held_back_before) == (out.error_after, out.held_back_after)


def test_the_best_pass_is_kept_and_steps_that_are_not_finite_are_left_out():
    p = nn.Parameter(torch.tensor([1.0]))
    aim = Towards(p, [torch.tensor([9.0]), torch.tensor([1.15])])
    errors = []

    def error(numbers: Any) -> float:
        errors.append(Towards.error(aim, numbers))
        return errors[-1]

    aim.error = error  # type: ignore[method-assign]
    out = descend("x", aim, 2, {"p": p}, {}, Course(4, 0.1, 0))
    assert out.held_back_after == min(errors[1:6]) < errors[5]
    assert float(aim.error([1])) == out.held_back_after
    aim.points[0][:] = torch.nan
    before = p.detach().clone()
    descend("x", aim, 2, {"p": p}, {}, Course(1, 0.1, 0))
    assert torch.equal(p.detach(), before)


def test_half_precision_is_tuned_in_single_precision():
    """Each step is less than the spacing of bfloat16 at these values."""
    p = nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    target = torch.full((4,), 2.0)
    descend("x", Towards(p, [target, target]), 2, {"p": p}, {"p": p}, Course(40, 5e-4, 0))
    torch.testing.assert_close(p.detach().float(), torch.full((4,), 1.0078125))


# ---- runs ----------------------------------------------------------------------------------------


def test_a_limit_on_memory_recomputes_blocks_and_changes_no_bit(monkeypatch):
    plain, limited = Language(), Language()
    lobs.prune(plain, data(), **OPTIONS)
    seen = []
    monkeypatch.setattr(
        tuning, "recomputing", lambda blocks: recomputing(seen.append(b) or b for b in blocks)
    )
    report = lobs.prune(limited, data(), memory=50_000_000, **OPTIONS)
    assert seen == 2 * list(limited.blocks)  # when the output is first looked at as well
    assert not any("forward" in vars(block) for block in limited.blocks)
    assert all(torch.equal(p, limited.get_parameter(n)) for n, p in plain.named_parameters())
    original = 10 * 16 * 12 * TOKENS * 4  # all outputs, on disk
    without = lobs.plan_prune(Language(), data(), memory=50_000_000, **{**OPTIONS, "tune": None})
    assert report.settings["plan"]["disk"] == without.disk + original


def test_the_plan_counts_what_tuning_takes(monkeypatch):
    """Four copies of what is tuned and its masks, one gradient more, the gradient of an output, and
    pieces."""
    monkeypatch.setattr("lobs_native.network.resources._layer_memory", lambda *_: 0)
    plan = lobs.plan_prune(Language(), data(), **OPTIONS)
    output = 16 * 12 * TOKENS * 4
    assert plan.backward
    tuned = 17 * 2 * (16 + 16 * 8 * 2 + 16 + 8) + 4 * 16 * 8
    assert plan.layer == tuned + output + 48 * output


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_run_that_was_killed_resumes_with_the_bits_of_a_whole_one(tmp_path, monkeypatch, when):
    from lobs_native.network import pruning

    whole, resumed = Language(), Language()
    lobs.prune(whole, data(), **OPTIONS)

    def end(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def interrupted(*args: Any) -> Any:
        stop.set()
        return descend(*args)

    with monkeypatch.context() as patch:
        if when == "after":
            patch.setattr(pruning, "error_bound_of", end)
        else:
            patch.setattr(tuning, "descend", end if when == "before" else interrupted)
        try:
            with pytest.raises((KeyboardInterrupt, StoppedError)):
                lobs.prune(resumed, data(), run_dir=tmp_path / "run", **OPTIONS)
        finally:
            stop.clear()
    untouched = Language().state_dict()
    assert all(torch.equal(v, untouched[k]) for k, v in resumed.state_dict().items())
    if when == "after":
        monkeypatch.setattr(tuning, "descend", end)  # it is not tuned again
    report = lobs.prune(resumed, data(), run_dir=tmp_path / "run", **OPTIONS)
    assert tuned(report)["kept"]
    assert all(torch.equal(p, resumed.get_parameter(n)) for n, p in whole.named_parameters())


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


class Wrapped(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.way = Language(), way

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Any:
        y = self.inner(ids, attention_mask)
        if self.way == "tokens":
            return y.argmax(-1)
        return y.detach() if self.way == "detached" else Opaque.apply(y)


@pytest.mark.parametrize("way", ["tokens", "detached", "opaque"])
def test_an_output_that_cannot_be_differentiated_is_refused(way):
    model = Wrapped(way)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=r"tune: the model.*differentiated.*use 'blocks'"):
        lobs.prune(model, data(3), **OPTIONS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_it_is_refused_without_data_to_hold_back_or_in_inference_mode():
    with pytest.raises(ArgumentError, match=r"tune: 'network' needs two batches.*there is 1"):
        lobs.prune(Language(), data(1), **OPTIONS)
    with pytest.raises(ArgumentError, match="tune_passes: it is how long to tune"):
        lobs.prune(Language(), data(2), tune_passes=2, **{**OPTIONS, "tune": None})
    with pytest.raises(ArgumentError, match=r"tune_rate: .*; pass tune"):
        lobs.prune(Language(), data(2), tune_rate=0.01, **{**OPTIONS, "tune": None})
    with torch.inference_mode():
        model = Language()
    with pytest.raises(ArgumentError, match=r"tune: the model was made .*inference_mode"):
        lobs.prune(model, data(2), **OPTIONS)
