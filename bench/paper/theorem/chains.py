"""Random networks that Theorem 3.2 covers, pruned in random ways."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lobs_native as lobs

__all__ = ["ACTIVATIONS", "ChainRun", "chain_run"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU6": nn.ReLU6,
    "LeakyReLU": lambda: nn.LeakyReLU(0.1),
    "ELU": nn.ELU,
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
    "Softplus": nn.Softplus,
    "Hardtanh": nn.Hardtanh,
    "Identity": nn.Identity,
}
_METHODS = ("lobs", "exact", "sweep", "wanda", "magnitude")
_ROWS = 400  # inputs to calibrate on, and as many others


@dataclass(frozen=True)
class ChainRun:
    """One network: how far its output moved, and the bounds of the theorem.

    All are ``||output - original||_F / sqrt(rows)`` on the calibration inputs, except
    ``elsewhere``.
    """

    name: str
    widths: tuple[int, ...]
    activation: str
    method: str
    inputs: str
    sparsity: tuple[float, ...]  # of the layers
    measured: float
    spectral: float
    frobenius: float
    output: float  # ||original||_F / sqrt(rows)
    elsewhere: float  # measured on inputs that were not calibrated on

    @property
    def violated(self) -> bool:
        """Whether the theorem is violated by more than rounding in float64 explains."""
        slack = 1 + 1e-9
        return self.measured > self.spectral * slack or self.spectral > self.frobenius * slack


def chain_run(seed: int, inputs: str) -> ChainRun:
    """Build the network of this seed, prune it and compare.

    It has 1 to 7 layers of 3 to 96 units, in float64. Width, depth, activation, biases, the size of
    the weights, the correlation of the inputs, the method and the sparsity of each layer (0.05 to
    0.98) are drawn. ``inputs`` is as for :func:`lobs_native.prune`.
    """
    draw = random.Random(seed)
    depth = draw.randint(1, 7)
    widths = tuple(round(3 * 32 ** draw.random()) for _ in range(depth + 1))
    activation = draw.choice(list(ACTIVATIONS))
    method = draw.choice(_METHODS)
    shares = tuple(round(draw.uniform(0.05, 0.98), 2) for _ in range(depth))
    generator = torch.Generator().manual_seed(seed)
    model = _network(draw, generator, widths, activation)
    data = _data(draw, generator, widths[0])
    seen, other = data[:_ROWS], data[_ROWS:]
    with torch.no_grad():
        before = model(other)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    report = lobs.prune(
        model,
        list(seen.split(150)),
        sparsity=0.5,
        method=method,
        inputs=inputs,
        damping=10 ** draw.uniform(-6, 0),
        overrides={name: {"sparsity": s} for name, s in zip(names, shares, strict=True)},
        progress=False,
    )
    with torch.no_grad():
        elsewhere = float((model(other) - before).norm()) / math.sqrt(len(other))
    return dataclasses.replace(
        compared(f"chain {seed}", report, inputs, elsewhere),
        widths=widths,
        activation=activation,
        method=method,
    )


def compared(name: str, report: lobs.Report, inputs: str, elsewhere: float) -> ChainRun:
    """What a report says about the theorem, which must cover the network."""
    bound = report.error_bound
    values = (bound.measured, bound.spectral, bound.frobenius, bound.output_norm)
    assert bound.covered, bound.reason
    measured, spectral, frobenius, output = (float(v) for v in values if v is not None)
    return ChainRun(
        name=name,
        widths=(),
        activation="ReLU",
        method=report.layers[0].method,
        inputs=inputs,
        sparsity=tuple(layer.sparsity for layer in report.layers),
        measured=measured,
        spectral=spectral,
        frobenius=frobenius,
        output=output,
        elsewhere=elsewhere,
    )


def _network(
    draw: random.Random, generator: torch.Generator, widths: tuple[int, ...], activation: str
) -> nn.Sequential:
    size, bias = 10 ** draw.uniform(-0.5, 0.5), draw.random() < 0.7
    steps: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layer = nn.Linear(before, after, bias=bias).double()
        with torch.no_grad():
            layer.weight.normal_(0.0, size * (2 / before) ** 0.5, generator=generator)
            if bias:
                layer.bias.normal_(0.0, 0.3, generator=generator)
        steps += [layer, ACTIVATIONS[activation]()]
    return nn.Sequential(*steps[:-1]).eval()


def _data(draw: random.Random, generator: torch.Generator, width: int) -> Tensor:
    """(2 * ROWS, width) float64: correlated, with an offset, and with some rare inputs."""
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    mixing = torch.eye(width, dtype=torch.float64) + draw.uniform(0, 1) * mixing
    x = torch.randn(2 * _ROWS, width, generator=generator, dtype=torch.float64) @ mixing
    x += draw.uniform(0, 2)
    rare = torch.rand(width, generator=generator) < 0.2
    often = torch.rand(2 * _ROWS, width, generator=generator) < 0.05
    return torch.where(rare & ~often, 0.0, x)
