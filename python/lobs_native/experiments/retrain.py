"""Light retraining: until the error of the original network is reached again, and no longer."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.experiments.data import Images
from lobs_native.experiments.networks import percent_wrong

AT_ONCE, RATE = 128, 1e-3


@dataclass(frozen=True)
class Retrained:
    """What a light retraining came to. ``curve``: (iterations, error in percent on the validation
    images)."""

    iterations: int
    reached: bool
    curve: tuple[tuple[int, float], ...]
    seconds: float


def retrain(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    training: Images,
    validation: Images,
    *,
    target: float,
    limit: int,
    every: int = 10,
    seed: int = 0,
    rate: float = RATE,
    teacher: nn.Module | None = None,
    vary: Callable[[Tensor], Tensor] | None = None,
) -> Retrained:
    """Train the kept weights, until the validation error is back at ``target``.

    Adam in batches of 128 images, its learning rate falling to zero along half a cosine over
    ``limit`` iterations; weights that were removed stay zero.

    Parameters
    ----------
    model : nn.Module
        Changed in place; its removed weights are zero. Where the target is not reached, it is left
        with the weights of its best validation error.
    masks : {layer name: bool tensor}
        True = kept.
    training, validation : Images
        The images to learn from, and those that decide when it ends.
    target : float
        Error in percent, usually that of the original network on the validation images.
    limit : int
        Iterations (batches) at most.
    every : int
        Iterations between two looks at the validation error.
    seed : int
        Of the order of the images and of dropout; the caller's random state is kept.
    rate : float
        Adam's learning rate at the start.
    teacher : nn.Module, optional
        Learn its outputs, by their mean squared distance, instead of the labels, which then only
        the validation uses. In eval mode; not modified.
    vary : callable, optional
        Makes other images of a batch of images.

    Returns
    -------
    Retrained
    """
    begun = time.perf_counter()
    curve = [(0, percent_wrong(model, validation))]
    best = (curve[0][1], copy.deepcopy(model.state_dict()))
    optimiser = torch.optim.Adam(model.parameters(), rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, limit))
    done = 0
    with torch.random.fork_rng(devices=[]), lobs.keep_masks(model, masks):
        torch.manual_seed(seed)
        batches = _endless(len(training))
        while curve[-1][1] > target and done < limit:
            model.train()
            for _ in range(min(every, limit - done)):
                rows = next(batches)
                x = training.x[rows] if vary is None else vary(training.x[rows])
                optimiser.zero_grad()
                _loss(model(x), x, training.y[rows], teacher).backward()
                optimiser.step()
                falling.step()
                done += 1
            curve.append((done, percent_wrong(model, validation)))
            if curve[-1][1] < best[0]:
                best = (curve[-1][1], copy.deepcopy(model.state_dict()))
    reached = curve[-1][1] <= target
    if not reached:
        model.load_state_dict(best[1])
    model.eval()
    return Retrained(done, reached, tuple(curve), time.perf_counter() - begun)


def _loss(out: Tensor, x: Tensor, y: Tensor, teacher: nn.Module | None) -> Tensor:
    if teacher is None:
        return nn.functional.cross_entropy(out, y)
    with torch.no_grad():
        wanted = teacher(x)
    return nn.functional.mse_loss(out, wanted)


def varied(images: Tensor) -> Tensor:
    """Images (B, 1, H, W), each moved by up to 1.5 of 14 of its half width, turned by up to 10
    degrees, scaled and sheared by up to 8%, at random."""

    def up_to(limit: float) -> Tensor:
        return (2 * torch.rand(len(images)) - 1) * limit

    turn, scale, shear = up_to(math.radians(10)), 1 + up_to(0.08), up_to(0.08)
    first = torch.stack([scale * turn.cos(), shear - scale * turn.sin(), up_to(1.5 / 14)], 1)
    second = torch.stack([scale * turn.sin(), scale * turn.cos(), up_to(1.5 / 14)], 1)
    grid = nn.functional.affine_grid(
        torch.stack([first, second], 1), list(images.shape), align_corners=False
    )
    return nn.functional.grid_sample(images, grid, align_corners=False)


def _endless(count: int) -> Iterator[Tensor]:
    """Batches of indices, every image once before any comes again."""
    while True:
        order = torch.randperm(count)
        yield from order.split(AT_ONCE)
