"""Light retraining: only until the error of the original network is reached again."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lobs_native as lobs
from paper.data import Images
from paper.networks import percent_wrong

AT_ONCE, RATE = 128, 1e-3


@dataclass(frozen=True)
class Retrained:
    """The outcome of a light retraining.

    ``curve`` holds (iterations, error in percent on the validation images).
    """

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
    at_once: int = AT_ONCE,
    teacher: nn.Module | None = None,
    temperature: float = 1.0,
    vary: Callable[[Tensor], Tensor] | None = None,
) -> Retrained:
    """Train the kept weights, until the validation error is back at ``target``.

    Adam, its learning rate falling to zero along half a cosine over ``limit`` iterations; weights
    that were removed stay zero.

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
    at_once : int
        Images of a batch.
    teacher : nn.Module, optional
        Learn its outputs, their softmax after division by the temperature (Hinton, Vinyals & Dean
        2015), and the label only where its answer is different: of images that ``vary`` returns
        it may know less than the labels do. In eval mode; not modified.
    temperature : float
        1 or more; with a teacher only.
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
        batches = _endless(len(training), at_once)
        while curve[-1][1] > target and done < limit:
            model.train()
            for _ in range(min(every, limit - done)):
                rows = next(batches)
                x = training.x[rows] if vary is None else vary(training.x[rows])
                optimiser.zero_grad()
                out = model(x)
                loss = nn.functional.cross_entropy(out, training.y[rows], reduction="none")
                if teacher is not None:
                    with torch.no_grad():
                        wanted = teacher(x)
                    right = wanted.argmax(1) == training.y[rows]
                    loss = torch.where(right, _distance(out, wanted, temperature), loss)
                loss.mean().backward()
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


def _distance(out: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """(B,) Kullback-Leibler divergences from softened outputs.

    Their gradients have the size that they have without softening.
    """
    target = (wanted / temperature).softmax(1)
    logs = (out / temperature).log_softmax(1)
    return nn.functional.kl_div(logs, target, reduction="none").sum(1) * temperature**2


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


def _endless(count: int, at_once: int) -> Iterator[Tensor]:
    """Batches of indices; every image once before any comes again."""
    while True:
        order = torch.randperm(count)
        yield from order.split(at_once)
