"""The settings of ``LOBSModifier`` in the terms of ``lobs_native.prune``, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lobs_native.errors import ArgumentError
from lobs_native.solvers.settings import LayerOptions, LayerSettings

__all__ = ["check_settings", "damping_of", "pattern_text"]


def damping_of(damping: float | None, dampening_frac: float | None) -> float:
    """The damping, which has two names. Raises ArgumentError if they contradict each other."""
    if damping is not None and dampening_frac is not None and damping != dampening_frac:
        raise ArgumentError(
            f"damping: {damping:g}, but dampening_frac is {dampening_frac:g}; they are two names "
            "for one fraction, so pass one of them"
        )
    if damping is not None:
        return damping
    return LayerOptions.damping if dampening_frac is None else dampening_frac


def pattern_text(pattern: str | None, mask_structure: str | None) -> str:
    """The pattern as text, from ``pattern`` or from llm-compressor's ``mask_structure``.

    ``pattern`` counts the kept weights of a group, ``mask_structure`` the zeros. Raises
    ArgumentError if both are given, or for text that is not n:m.
    """
    if mask_structure is None:
        return "unstructured" if pattern is None else pattern
    if pattern is not None:
        raise ArgumentError(
            f"pattern: {pattern!r}, but mask_structure is {mask_structure!r}; pass one of them "
            "(pattern counts the kept weights, mask_structure the zeros)"
        )
    zeros, _, size = mask_structure.partition(":")
    if not (zeros.isdecimal() and size.isdecimal() and int(zeros) <= int(size)):
        raise ArgumentError(
            f"mask_structure: {mask_structure!r}; write 'n:m' for n zeros in every m weights, or "
            "'0:0' for no pattern"
        )
    return f"{int(size) - int(zeros)}:{int(size)}" if int(zeros) else "unstructured"


def check_settings(settings: Mapping[str, Any], report: str | None) -> None:
    """Raise an error of this package for settings that do not exist or do not fit each other."""
    if settings["scope"] == "model":
        raise ArgumentError(
            "scope: 'model' needs the whole network at once, but llm-compressor shows it part by "
            "part; use 'layer' or 'row', or lobs_native.prune"
        )
    LayerSettings(**settings).check_target()
    if report is not None and Path(report).suffix not in (".json", ".html"):
        raise ArgumentError(f"report: {report!r} must end in .json or .html")
