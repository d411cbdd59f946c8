"""How much of a network is pruned, in words."""

from __future__ import annotations

from collections.abc import Sequence

from lobs_native.report.records import Coverage, Skipped
from lobs_native.report.review import FEW_MISSED, causes_of

__all__ = ["nothing_left", "uncovered"]

_NAMES = 3  # that are listed for each cause
_CAUSES = 5


def uncovered(coverage: Coverage, skipped: Sequence[Skipped]) -> str:
    """The weights that were to be pruned and are not, by cause, the largest first; "" if they are
    few."""
    if coverage.missed <= FEW_MISSED:
        return ""
    causes = [x for x in causes_of(skipped) if x.weights and not x.on_purpose]
    parts = []
    for cause in causes[:_CAUSES]:
        some = ", ".join(cause.names[:_NAMES]) + (", ..." if len(cause.names) > _NAMES else "")
        parts.append(f"{cause.weights:,} in {some}: {cause.reason}")
    if rest := causes[_CAUSES:]:
        weights = sum(cause.weights for cause in rest)
        parts.append(f"{weights:,} for {len(rest)} other reasons (see report.skipped)")
    prunable = coverage.pruned + coverage.not_understood
    return (
        f"{coverage.not_understood:,} of {prunable:,} weights ({100 * coverage.missed:.0f} %) that "
        f"were to be pruned are left as they are: {'; '.join(parts)}"
    )


def nothing_left(skipped: Sequence[Skipped]) -> str:
    """The message of the error that there is no layer to prune."""
    reasons = ""
    for cause in causes_of(skipped)[:_CAUSES]:
        some = ", ".join(map(repr, cause.names[:_NAMES]))
        more = ", ..." if len(cause.names) > _NAMES else ""
        reasons += f"; {some}{more} cannot: {cause.reason}"
    return (
        "model: no layer is left to prune (see include, exclude); linear and convolution layers, "
        "attention, experts, recurrent layers and parameters in matrix products can be pruned"
        f"{reasons}"
    )
