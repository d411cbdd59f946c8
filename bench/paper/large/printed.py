"""What the paper and the authors' code say of AlexNet, VGG-16 and ResNet-50."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KEPT", "PAPER", "PaperRun", "kept_shares"]


@dataclass(frozen=True)
class PaperRun:
    """The authors' computation of the inverse Hessians, and the error that they print."""

    hours: float
    processors: int
    machine: str
    images: str
    errors: str  # top-1 / top-5 in percent


PAPER = {
    "alexnet": PaperRun(
        2.9,
        48,
        "48 Intel Xeon E5-1650 CPUs",
        "not printed; 100,000 in the code of 2018, every 3rd position",
        "43.30 / 20.08, at 11 % kept 50.04 / 26.87, retrained 43.11 / 20.01",
    ),
    "vgg16": PaperRun(
        10.2,
        48,
        "48 Intel Xeon E5-1650 CPUs",
        "not printed; 200 in the code of 2018 (with batch normalisation), every 5th position",
        "31.66 / 10.12, at 7.5 % kept 37.32 / 14.82, retrained 32.02 / 10.97 (two stages)",
    ),
    "resnet50": PaperRun(
        33.0,
        64,
        "64 CPUs (Xeon E5-2697A v4)",
        "about 100,000 in the code (4,001 batches of 25), every position",
        "top-5 accuracy 91.96, at 50 % kept 89.71, not retrained (figure 2)",
    ),
}

# Shares kept of each layer, in percent, in the order of the layers.
KEPT: dict[str, tuple[float, ...]] = {
    # validate-alexnet.py of the authors' code of 2018; the paper prints no ratios for its layers
    "alexnet": (80, 35, 35, 35, 35, 10, 10, 35),
    # table 5, after the first of two stages
    "vgg16": (70, 50, 70, 70, 60, 60, 60, 50, 50, 50, 70, 70, 60, 8, 10, 30),
    # figure 2: all layers the same
    "resnet50": (50,),
}


def kept_shares(network: str, layers: list[str], kept: float | None) -> dict[str, float]:
    """The share kept of each layer, in (0, 1]: ``kept`` of all, or the paper's."""
    shares = KEPT[network] if kept is None else (100 * kept,)
    if len(shares) == 1:
        shares = shares * len(layers)
    return {name: share / 100 for name, share in zip(layers, shares, strict=True)}
