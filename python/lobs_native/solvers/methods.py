"""The table of methods. A new one is one file and one line here."""

from __future__ import annotations

from lobs_native.solvers.admm import Admm
from lobs_native.solvers.exact import Exact
from lobs_native.solvers.method import Method
from lobs_native.solvers.ranked import Lobs, Magnitude, Wanda
from lobs_native.solvers.sweep import Sweep

__all__ = ["TABLE"]

# In the order in which users see them.
TABLE: dict[str, type[Method]] = {
    "exact": Exact,
    "admm": Admm,
    "sweep": Sweep,
    "lobs": Lobs,
    "magnitude": Magnitude,
    "wanda": Wanda,
}
