"""keep_masks: pruned weights stay zero under every optimizer; apply_masks and as_torch_prune."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import lobs_native as lobs
from lobs_native.errors import ArgumentError, DtypeError, ShapeError

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=5, line_search_fn="strong_wolfe"),
}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(40, 6, generator=generator),
        torch.randint(4, (40,), generator=generator),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x, y = data()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def revived(model: nn.Module, masks: dict[str, Tensor]) -> int:
    """The number of removed weights that are not zero."""
    return sum(
        int((model.get_submodule(name).weight.detach()[~mask] != 0).sum())
        for name, mask in masks.items()
    )


@pytest.fixture
def pruned() -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    model = network()
    report = lobs.prune(model, [data()[0]], sparsity=0.5, progress=False)
    yield model, report.masks
    assert not sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks, (
        "a hook was left behind"
    )


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["model", "optimizer"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_pruned_weights_are_zero_after_every_step(pruned, kind, by):
    model, masks = pruned
    before = copy.deepcopy(model.state_dict())
    named = model.named_parameters() if by == "optimizer" else model.parameters()
    optimizer = OPTIMIZERS[kind](named)
    with lobs.keep_masks(model if by == "model" else optimizer, masks):
        for _ in range(5):
            train(model, optimizer, 1)
            assert revived(model, masks) == 0
    changed = (model[0].weight != before["0.weight"])[masks["0"]]
    assert changed.float().mean() > 0.9, "the kept weights are trained"
    train(model, optimizer, 2)
    assert revived(model, masks) > 0, "without the handle they are revived, so the test can fail"


@pytest.mark.parametrize("kind", ["sgd", "adamw", "rmsprop"])
def test_momentum_from_before_pruning_revives_nothing(kind):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, 3)
    masks = lobs.prune(model, [data()[0]], sparsity=0.5, progress=False).masks
    with lobs.keep_masks(model, masks):
        train(model, optimizer, 1)
        assert revived(model, masks) == 0


def test_gradients_of_removed_weights_are_zero_and_the_others_untouched(pruned):
    model, masks = pruned
    x, y = data()
    nn.functional.cross_entropy(model(x), y).backward()
    whole = model[0].weight.grad.clone()
    model.zero_grad()
    with lobs.keep_masks(model, masks):
        for _ in range(2):  # gradients accumulate
            nn.functional.cross_entropy(model(x), y).backward()
    assert torch.equal(model[0].weight.grad, 2 * whole * masks["0"])


def test_a_line_search_never_leaves_the_mask(pruned):
    model, masks = pruned
    seen = []
    model[0].register_forward_pre_hook(lambda *_: seen.append(revived(model, masks)))
    with lobs.keep_masks(model, masks):
        train(model, OPTIMIZERS["lbfgs"](model.parameters()), 3)
    assert len(seen) > 6
    assert not any(seen)


def test_a_later_optimizer_is_observed_and_that_of_another_model_is_not(pruned):
    model, masks = pruned
    with lobs.keep_masks(model, masks):
        other = network()
        with torch.no_grad():
            model[0].weight[~masks["0"]] = 1.0
        train(other, OPTIMIZERS["sgd"](other.parameters()), 1)
        assert revived(model, masks) > 0
        train(model, OPTIMIZERS["sgd"](model.parameters()), 1)
        assert revived(model, masks) == 0


def test_apply_zeroes_after_a_change_without_an_optimizer(pruned):
    model, masks = pruned
    handle = lobs.keep_masks(model, masks)
    with torch.no_grad():
        model[2].weight.add_(float("nan"))
    handle.apply()
    assert revived(model, masks) == 0
    assert bool(model[2].weight[masks["2"]].isnan().all())
    handle.remove()
    handle.remove()  # a second call does nothing


def test_the_hooks_end_with_the_block_even_on_an_error(pruned):
    model, masks = pruned

    def fails() -> None:
        with lobs.keep_masks(model, masks):
            raise RuntimeError("training broke")

    with pytest.raises(RuntimeError, match="training broke"):
        fails()
    train(model, OPTIMIZERS["sgd"](model.parameters()), 2)
    assert revived(model, masks) > 0


def test_masks_are_copied_and_a_layer_may_be_frozen(pruned):
    model, masks = pruned
    model[2].weight.requires_grad_(False)
    own = {name: mask.clone() for name, mask in masks.items()}
    with lobs.keep_masks(model, own):
        own["0"].fill_(True)
        train(model, OPTIMIZERS["adamw"](model.parameters()), 2)
    assert revived(model, masks) == 0


def test_layers_that_share_a_parameter_are_kept_at_zero_together():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(2))
    report = lobs.prune(
        model,
        [x],
        sparsity=0.5,
        exclude="k_proj",
        forward=lambda m, x: m(x, x, x)[0],
        progress=False,
    )
    masks = report.masks
    assert set(masks) == {"q_proj", "v_proj", "out_proj"}
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with lobs.keep_masks(model, masks):
        for _ in range(3):
            optimizer.zero_grad()
            model(x, x, x)[0].square().sum().backward()
            optimizer.step()
            q, k, v = model.in_proj_weight.detach().chunk(3)
            assert torch.equal(q == 0, ~masks["q_proj"])
            assert torch.equal(v == 0, ~masks["v_proj"])
            assert bool((k != 0).all())
            assert torch.equal(model.out_proj.weight == 0, ~masks["out_proj"])
    lobs.as_torch_prune(model, masks)
    merged = torch.cat([masks["q_proj"], torch.ones_like(masks["q_proj"]), masks["v_proj"]])
    assert torch.equal(model.in_proj_weight_mask.bool(), merged)


# ---- the other forms -----------------------------------------------------------------------------


def test_apply_masks_zeroes_and_counts():
    model = network()
    bias = model[0].bias.detach().clone()
    masks = {"0": torch.arange(54).reshape(9, 6) % 3 != 0}
    before = model[0].weight.detach().clone()
    assert lobs.apply_masks(model, masks) == 18
    assert torch.equal(model[0].weight, before * masks["0"])
    assert torch.equal(model[0].bias, bias)
    assert lobs.apply_masks(model, masks) == 0


def test_as_torch_prune_gives_its_buffers_and_the_same_outputs(pruned):
    model, masks = pruned
    x, _ = data()
    before = model(x)
    assert lobs.as_torch_prune(model, masks) is model
    assert torch_prune.is_pruned(model)
    assert torch.equal(model[0].weight_mask.bool(), masks["0"])
    assert torch.equal(model(x), before)
    train(model, OPTIMIZERS["adamw"](model.parameters()), 3)
    for part in (model[0], model[2]):
        torch_prune.remove(part, "weight")
    assert revived(model, masks) == 0
    assert not torch.equal(model(x), before)


def test_a_model_that_is_one_layer_has_the_empty_name():
    layer = nn.Linear(6, 4)
    masks = lobs.prune(layer, [data()[0]], sparsity=0.5, progress=False).masks
    with lobs.keep_masks(layer, masks):
        train(layer, OPTIMIZERS["adamw"](layer.parameters()), 2)
    assert int((layer.weight == 0).sum()) == 12
    lobs.as_torch_prune(layer, masks)


# ---- wrong arguments -----------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], type[Exception], str]] = {
    "not a mapping": (lambda m: list(m.values()), DtypeError, "masks: expected"),
    "none": (lambda m: {}, ArgumentError, "masks: there are none"),
    "an unknown layer": (
        lambda m: {**m, "fc": m["0"]},
        ArgumentError,
        r"masks\['fc'\]: no layer .*'0', '2'",
    ),
    "a layer without weight": (lambda m: {"1": m["0"]}, ArgumentError, r"masks\['1'\]"),
    "another shape": (lambda m: {"0": m["0"].T}, ShapeError, r"masks\['0'\].*\(6, 9\).*\(9, 6\)"),
    "numbers": (lambda m: {"0": m["0"].float()}, DtypeError, r"masks\['0'\].*float32.*bool"),
    "not a tensor": (lambda m: {"0": [True]}, DtypeError, r"masks\['0'\].*list"),
    "a number as name": (lambda m: {0: m["0"]}, DtypeError, "masks: a key is a int"),
    "another network's": (lambda m: {"0": ~m["0"]}, ArgumentError, "27 of the 27 .*apply_masks"),
}
CALLS = [
    (call, wrong)
    for call in (lobs.keep_masks, lobs.apply_masks, lobs.as_torch_prune)
    for wrong in WRONG
    if call is not lobs.apply_masks or wrong != "another network's"  # apply_masks is for just that
]


@pytest.mark.parametrize(("call", "wrong"), CALLS)
def test_wrong_masks_are_refused_by_name_and_nothing_is_changed(pruned, wrong, call):
    model, masks = pruned
    change, error, message = WRONG[wrong]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        call(model, change(masks))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_anything_but_a_model_or_an_optimizer_is_refused(pruned):
    model, masks = pruned
    with pytest.raises(DtypeError, match=r"model_or_optimizer: .* got OrderedDict"):
        lobs.keep_masks(model.state_dict(), masks)
    for call in (lobs.apply_masks, lobs.as_torch_prune):
        with pytest.raises(DtypeError, match=r"model: .* got SGD"):
            call(OPTIMIZERS["sgd"](model.parameters()), masks)


def test_an_optimizer_without_names_is_refused_with_the_way_out(pruned):
    model, masks = pruned
    with pytest.raises(ArgumentError, match=r"model\.named_parameters\(\), or pass the model"):
        lobs.keep_masks(OPTIMIZERS["sgd"](model.parameters()), masks)


def test_a_computed_weight_is_refused(pruned):
    model, masks = pruned
    lobs.as_torch_prune(model, masks)
    for call in (lobs.keep_masks, lobs.apply_masks, lobs.as_torch_prune):
        with pytest.raises(ArgumentError, match=r"masks\['0'\].*weight of its own"):
            call(model, masks)


# ---- parameters that change ----------------------------------------------------------------------


def replaced(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.randn(9, 6))


def reloaded(model: nn.Module) -> None:
    model.load_state_dict({k: torch.randn(v.shape) for k, v in model.state_dict().items()})


def assigned(model: nn.Module) -> None:
    state = {k: torch.randn(v.shape) for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def converted(model: nn.Module) -> None:
    model.double()


def overwritten(model: nn.Module) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert model[0].weight.dtype == torch.float64


CHANGES = [replaced, reloaded, assigned, converted, overwritten]


@pytest.mark.parametrize("change", CHANGES)
def test_masks_follow_the_parameters_of_a_model(change):
    model = network()
    masks = lobs.prune(model, [data()[0]], sparsity=0.5, progress=False).masks
    handle = lobs.keep_masks(model, masks)
    old = model[0].weight
    change(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x = data()[0].to(model[0].weight.dtype)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        assert revived(model, masks) == 0
        # Only kept weights have entered the optimizer's state.
        moments = optimizer.state[model[0].weight]["exp_avg"]
        assert bool((moments[~masks["0"]] == 0).all())
        assert bool((moments[masks["0"]] != 0).any())
    handle.apply()
    handle.remove()
    for parameter in (old, *model.parameters()):
        assert not parameter._post_accumulate_grad_hooks


def test_a_parameter_of_another_shape_is_refused():
    model = network()
    masks = lobs.prune(model, [data()[0]], sparsity=0.5, progress=False).masks
    with lobs.keep_masks(model, masks) as handle:
        model[0].weight = nn.Parameter(torch.zeros(9, 7))
        with pytest.raises(ShapeError, match=r"shape \(9, 6\) was replaced by .*\(9, 7\)"):
            handle.apply()
