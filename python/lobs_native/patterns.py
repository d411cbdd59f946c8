"""Which weights may go together: one frozen dataclass per sparsity pattern, and the list of them.

This release removes single weights anywhere. Grouped patterns are recognised by name so that asking
for one is an error and not a surprise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lobs_native.errors import DtypeError, PatternError

__all__ = ["PATTERNS", "Unstructured", "pattern_of"]


@dataclass(frozen=True)
class Unstructured:
    """Any weight may be removed, whatever its neighbours."""

    name: str = "unstructured"


PATTERNS: tuple[type[Unstructured], ...] = (Unstructured,)


def pattern_of(pattern: object) -> Unstructured:
    """The pattern that a user means by an object or a name. Raises PatternError for anything
    else."""
    if isinstance(pattern, Unstructured):
        return pattern
    if not isinstance(pattern, str):
        raise DtypeError(
            f"pattern: expected a name or a pattern object, got {type(pattern).__name__}"
        )
    if pattern == "unstructured":
        return Unstructured()
    if re.fullmatch(r"\d+[:x]\d+", pattern):
        raise PatternError(
            f"pattern: {pattern!r} is not available in this release; use 'unstructured'"
        )
    raise PatternError(f"pattern: {pattern!r} is not a pattern; use 'unstructured'")
