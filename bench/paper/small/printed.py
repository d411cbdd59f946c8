"""What the paper prints for the small networks (arXiv 1705.07565 v2): tables 1, 3 and 4.

Figures are read from their vector paths. Shares and errors are in percent.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Printed:
    """A row of table 1."""

    method: str
    network: str
    original: float
    kept: float
    pruned: float | None  # error before retraining
    retrained: float
    iterations: float


TABLE1 = (
    Printed("Random", "LeNet-300-100", 1.76, 8, 85.72, 2.25, 3.5e5),
    Printed("OBD", "LeNet-300-100", 1.76, 8, 86.72, 1.96, 8.1e4),
    Printed("LWC (magnitude)", "LeNet-300-100", 1.76, 8, 81.32, 1.95, 1.4e5),
    Printed("DNS", "LeNet-300-100", 1.76, 1.8, None, 1.99, 3.4e4),
    Printed("L-OBS", "LeNet-300-100", 1.76, 7, 3.10, 1.82, 510),
    Printed("L-OBS, iterative", "LeNet-300-100", 1.76, 1.5, 2.43, 1.96, 643),
    Printed("OBD", "LeNet-5", 1.27, 8, 86.72, 2.65, 2.9e5),
    Printed("LWC (magnitude)", "LeNet-5", 1.27, 8, 89.55, 1.36, 9.6e4),
    Printed("DNS", "LeNet-5", 1.27, 0.9, None, 1.36, 4.7e4),
    Printed("L-OBS", "LeNet-5", 1.27, 7, 3.21, 1.27, 740),
    Printed("L-OBS, iterative", "LeNet-5", 1.27, 0.9, 2.04, 1.66, 841),
    Printed("LWC (magnitude)", "CIFAR-Net", 18.57, 9, 87.65, 19.36, 1.62e5),
    Printed("L-OBS", "CIFAR-Net", 18.57, 9, 21.32, 18.76, 1020),
)
# Two stages (tables 3 and 4): the printed total after each.
TOTALS = {"LeNet-300-100": (8.7, 1.5), "LeNet-5": (9.5, 0.9)}

# Appendix, figure 2: only fc1 of LeNet-300-100 is pruned, not retrained; kept -> error.
_PRUNED = (50, 60, 70, 80, 85, 90, 93.3, 95, 96, 97, 98, 99)
_ACCURACY = {
    "L-OBS": (0.983, 0.983, 0.983, 0.983, 0.981, 0.976, 0.969, 0.955, 0.935, 0.911, 0.843, 0.636),
    "LWC": (0.978, 0.971, 0.965, 0.926, 0.869, 0.805, 0.765, 0.678, 0.633, 0.574, 0.479, 0.309),
}
FIGURE2 = {
    name: tuple((100 - p, 100 * (1 - a)) for p, a in zip(_PRUNED, values, strict=True))
    for name, values in _ACCURACY.items()
}
FIGURE2_DENSE = 1.61
# Figure 3: counts of L_q of fc1 in 15 bins of one width, up to 5.8e-3.
FIGURE3 = (228854, 4701, 1066, 426, 164, 108, 70, 37, 30, 20, 11, 5, 5, 1, 2)
# Figure 5: share of fc1 below a value of L_q.
FIGURE5 = {95.0: 2.61e-4, 99.0: 7.01e-4, 100.0: 5.81e-3}
