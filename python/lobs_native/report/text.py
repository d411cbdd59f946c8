"""Values as readable text, for pages and terminals alike."""

from __future__ import annotations

import math

__all__ = ["DASH", "number", "percent", "visible"]

DASH = "–"  # stands for an unknown value


def visible(value: object) -> str:
    """``str(value)`` with everything that does not print spelled out, so that it stays on its line:
    control characters, escape sequences, line breaks, direction marks, lone surrogates."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(value)
    )


def number(value: float | None) -> str:
    """Three significant digits; whole and large numbers in full; a dash for None."""
    if value is None:
        return DASH
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:#.3g}".rstrip(".")


def percent(value: float | None) -> str:
    """A fraction in percent with two decimals; a dash for None."""
    if value is None:
        return DASH
    return f"{100 * value:.2f} %" if math.isfinite(value) else str(value)
