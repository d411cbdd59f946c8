"""The tables of methods. A new one is one file and one line here."""

from __future__ import annotations

from lobs_native.solvers.admm import Admm
from lobs_native.solvers.columns import ExactColumns, MagnitudeColumns, WandaColumns
from lobs_native.solvers.exact import Exact
from lobs_native.solvers.method import Method
from lobs_native.solvers.patterns import Pattern
from lobs_native.solvers.ranked import Lobs, Magnitude, Wanda
from lobs_native.solvers.sweep import Sweep

__all__ = ["COLUMNS", "TABLE", "method_of"]

# In the order in which users see them.
TABLE: dict[str, type[Method]] = {
    "exact": Exact,
    "admm": Admm,
    "sweep": Sweep,
    "lobs": Lobs,
    "magnitude": Magnitude,
    "wanda": Wanda,
}

# Those that can remove inputs from all rows.
COLUMNS: dict[str, type[Method]] = {
    "exact": ExactColumns,
    "magnitude": MagnitudeColumns,
    "wanda": WandaColumns,
}


def method_of(name: str, pattern: Pattern) -> type[Method]:
    """The method of that name, for that pattern."""
    return COLUMNS[name] if pattern.whole_inputs else TABLE[name]
