"""Choices and targets of one layer, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lobs_native import checks
from lobs_native.checks import check_choice
from lobs_native.errors import ArgumentError, PatternError
from lobs_native.solvers.patterns import Blocks, GroupsOf, Pattern, Unstructured

__all__ = ["METHODS", "REFINES", "SCOPES", "Target", "check_damping", "check_refine"]

METHODS = ("exact", "sweep", "lobs", "magnitude", "wanda")

SCOPES = ("row", "layer")

REFINES = ("solve", "exchange")


@dataclass(frozen=True)
class Target:
    """How far to go: one of the three, or none of them where a pattern or a mask says it."""

    sparsity: float | None = None
    threshold: float | None = None
    max_error: float | None = None

    @classmethod
    def of(
        cls,
        sparsity: Any,
        threshold: Any,
        max_error: Any,
        method: str,
        pattern: Pattern,
        masked: bool = False,
    ) -> Target:
        """Check the three arguments; ArgumentError names what is wrong."""
        given = {
            name: checks.real(value, name)
            for name, value in (
                ("sparsity", sparsity),
                ("threshold", threshold),
                ("max_error", max_error),
            )
            if value is not None
        }
        if isinstance(pattern, GroupsOf):
            return cls._of_groups(given, pattern)
        if not given and masked:
            return cls()
        if len(given) != 1:
            said = ", ".join(f"{k}={v:g}" for k, v in given.items()) or "none"
            raise ArgumentError(
                f"sparsity, threshold, max_error: give exactly one of them, not {said}"
            )
        ((name, value),) = given.items()
        if name == "sparsity" and not 0 <= value <= 1:
            raise ArgumentError(
                f"sparsity: {value:g}; it is a fraction from 0 (remove nothing) to 1 (remove all)"
            )
        if value < 0:
            raise ArgumentError(f"{name}: {value:g}; it must be >= 0")
        if name == "threshold" and method != "lobs":
            raise ArgumentError(
                f"threshold: it bounds the paper's sqrt(L_q), which method {method!r} has not; "
                "use sparsity"
            )
        if name == "threshold" and not isinstance(pattern, Unstructured):
            raise ArgumentError(f"threshold: it removes single weights; pattern is {pattern.name}")
        return cls(**given)

    @classmethod
    def _of_groups(cls, given: dict[str, float], pattern: GroupsOf) -> Target:
        extra = [name for name in given if name != "sparsity"]
        if extra or not math.isclose(
            given.get("sparsity", pattern.sparsity), pattern.sparsity, abs_tol=1e-9
        ):
            said = ", ".join(f"{k}={v:g}" for k, v in given.items())
            raise ArgumentError(
                f"{said}: pattern {pattern.name!r} removes {pattern.sparsity:g} of the weights; "
                "leave sparsity, threshold and max_error out"
            )
        return cls(sparsity=pattern.sparsity)


def check_damping(damping: Any) -> float:
    """``damping`` as a finite fraction >= 0."""
    value = checks.real(damping, "damping")
    if not 0 <= value < math.inf:
        raise ArgumentError(
            f"damping: {value:g}; it is a fraction of the mean diagonal of H, finite and >= 0"
        )
    return value


def check_refine(refine: Any, pattern: Pattern) -> str | None:
    """``refine`` if it is None or one of REFINES and possible for the pattern."""
    if refine is None:
        return None
    check_choice(refine, "refine", REFINES)
    if refine == "exchange" and isinstance(pattern, Blocks):
        raise PatternError(
            f"refine: 'exchange' swaps single weights, pattern is {pattern.name!r}; use 'solve'"
        )
    return str(refine)
