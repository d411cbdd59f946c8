"""The settings of one layer: what users may choose, each choice checked, and all of them
together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lobs_native import checks
from lobs_native.errors import ArgumentError, PatternError
from lobs_native.solvers.methods import COLUMNS, TABLE
from lobs_native.solvers.options import Options, number, option
from lobs_native.solvers.patterns import Pattern, pattern_of

__all__ = [
    "AUTO",
    "LAYER_OPTIONS",
    "METHODS",
    "NARROW",
    "REFINES",
    "SCOPES",
    "TARGETS",
    "LayerOptions",
    "LayerSettings",
    "Target",
    "merged",
]

METHODS = tuple(TABLE)

AUTO = "auto"  # exact for narrow layers, admm for the others
NARROW = 256  # columns up to which exact removal takes less time, and loses no more

SCOPES = ("row", "layer")

REFINES = ("solve", "exchange")


def _sparsity(value: Any, name: str) -> float:
    checks.sparsity(value, name)
    return number(value, name)


def _not_negative(value: Any, name: str) -> float:
    limit = number(value, name)
    if limit < 0:
        raise ArgumentError(f"{name}: {limit:g}; it must be >= 0")
    return limit


def _pattern(value: Any, name: str) -> Pattern | str:
    pattern_of(value)
    kept: Pattern | str = value
    return kept


def _damping(value: Any, name: str) -> float:
    fraction = number(value, name)
    if not 0 <= fraction < math.inf:
        raise ArgumentError(
            f"{name}: {fraction:g}; it is a fraction of the mean diagonal of H, finite and >= 0"
        )
    return fraction


@dataclass(frozen=True, kw_only=True)
class LayerOptions(Options):
    """What may be chosen for a layer, as :func:`lobs_native.prune_weight` explains it.

    Each option is checked by itself: :class:`LayerSettings` are those that fit together.
    """

    sparsity: float | None = option(
        None, check=_sparsity, help="share of the weights to remove, 0 to 1"
    )
    threshold: float | None = option(
        None,
        check=_not_negative,
        help="the paper's epsilon on sqrt(L_q), for single weights under method lobs",
    )
    max_error: float | None = option(
        None, check=_not_negative, help="largest error of a layer's output"
    )
    method: str = option(
        AUTO,
        choices=(AUTO, *METHODS),
        help=f"default: %(default)s, which is exact up to {NARROW} inputs, and admm beyond",
    )
    pattern: Pattern | str = option(
        "unstructured",
        check=_pattern,
        help='"N:M", "1xB", "columns", "B columns" or (default) %(default)s',
    )
    scope: str = option("layer", choices=SCOPES, help="default: %(default)s")
    damping: float = option(0.01, check=_damping, help="default: %(default)s")
    prune_bias: bool = option(False, check=checks.flag, help="biases may be removed, too")
    refine: str | None = option(
        None, choices=REFINES, help="repair the kept weights further; default: none"
    )


@dataclass(frozen=True)
class Target:
    """How far to go: one of the three, or none of them where only a mask decides."""

    sparsity: float | None = None
    threshold: float | None = None
    max_error: float | None = None

    @property
    def label(self) -> str:
        """As people write it: "sparsity 0.5"."""
        set_ = (f"{k} {v:g}" for k, v in vars(self).items() if v is not None)
        return next(set_, "mask")


LAYER_OPTIONS = tuple(field.name for field in dataclasses.fields(LayerOptions))
TARGETS = tuple(field.name for field in dataclasses.fields(Target))


@dataclass(frozen=True, kw_only=True)
class LayerSettings(LayerOptions):
    """How one layer is pruned: options that fit together, numbers as floats.

    Raises
    ------
    ArgumentError, DtypeError, PatternError
        An option is not acceptable, or two of them contradict each other; the message names them.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (*TARGETS, "damping"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(value))
        _ = self.target  # raises if the targets do not fit
        if self.resolved_pattern.whole_inputs and self.method not in (AUTO, *COLUMNS):
            raise PatternError(
                f"pattern: {self.resolved_pattern.name!r} works with the methods "
                f"{', '.join(map(repr, COLUMNS))}, not {self.method!r}"
            )
        if self.refine == "exchange" and not self.resolved_pattern.exchanges:
            raise PatternError(
                f"refine: 'exchange' swaps single weights, pattern is "
                f"{self.resolved_pattern.name!r}; use 'solve'"
            )

    @classmethod
    def of(cls, options: LayerOptions, **changes: Any) -> LayerSettings:
        """The settings that these options make, with some of them changed."""
        chosen = {name: getattr(options, name) for name in LAYER_OPTIONS}
        return cls(**{**chosen, **changes})

    def for_order(self, order: int) -> LayerSettings:
        """The same for a second moment of this order: with a method in the place of "auto"."""
        if self.method != AUTO:
            return self
        exact = order <= NARROW or self.resolved_pattern.whole_inputs
        return dataclasses.replace(self, method="exact" if exact else "admm")

    @cached_property
    def resolved_pattern(self) -> Pattern:
        """``pattern`` as an object."""
        return pattern_of(self.pattern)

    @cached_property
    def target(self) -> Target:
        """How far to go. An N:M pattern decides that by itself; without a pattern and without a
        target, only a mask can."""
        pattern = self.resolved_pattern
        chosen = {k: v for k in TARGETS if (v := getattr(self, k)) is not None}
        listed = ", ".join(f"{k}={v:g}" for k, v in chosen.items())
        if pattern.sparsity is not None:
            share = chosen.pop("sparsity", pattern.sparsity)
            if chosen or not math.isclose(share, pattern.sparsity, abs_tol=1e-9):
                raise ArgumentError(
                    f"{listed}: pattern {pattern.name!r} removes {pattern.sparsity:g} of the "
                    "weights; leave sparsity, threshold and max_error out"
                )
            return Target(sparsity=pattern.sparsity)
        if len(chosen) > 1:
            raise ArgumentError(
                f"sparsity, threshold, max_error: give exactly one of them, not {listed}"
            )
        thresholds = self.method != AUTO and TABLE[self.method].thresholds
        if self.threshold is not None and not thresholds:
            raise ArgumentError(
                f"threshold: it bounds the paper's sqrt(L_q), which method {self.method!r} does "
                "not have; use sparsity"
            )
        if self.threshold is not None and not pattern.is_unstructured:
            raise ArgumentError(f"threshold: it removes single weights; pattern is {pattern.name}")
        return Target(**chosen)

    def check_target(self, *, masked: bool = False) -> None:
        """ArgumentError if neither a target nor a pattern nor a mask decides how far to go."""
        if self.target == Target() and not masked:
            raise ArgumentError(
                "sparsity, threshold, max_error: give exactly one of them, not none"
            )


def merged(overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The changes that entries of ``overrides`` make to one layer together, later ones winning.

    A target, or a pattern that implies one, replaces every target from before. ArgumentError for a
    name that is not an option of a layer.
    """
    changes: dict[str, Any] = {}
    for where, entry in overrides.items():
        if unknown := set(entry) - set(LAYER_OPTIONS):
            raise ArgumentError(
                f"overrides[{where!r}]: {sorted(unknown)} unknown; known: "
                f"{', '.join(LAYER_OPTIONS)}"
            )
        grouped = "pattern" in entry and pattern_of(entry["pattern"]).is_grouped
        if grouped or any(name in entry for name in TARGETS):
            changes.update(dict.fromkeys(TARGETS))
        changes.update(entry)
    return changes
