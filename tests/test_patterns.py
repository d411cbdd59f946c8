"""Pattern names."""

from __future__ import annotations

import pytest

from lobs_native.errors import DtypeError, PatternError
from lobs_native.patterns import PATTERNS, Unstructured, pattern_of


def test_a_pattern_is_known_by_name_and_by_object():
    for pattern in PATTERNS:
        assert pattern_of(pattern()) == pattern_of(pattern().name) == pattern()
    assert Unstructured() in {p() for p in PATTERNS}


@pytest.mark.parametrize("name", ["2:4", "4:8", "1x4"])
def test_grouped_patterns_are_refused_by_name(name):
    with pytest.raises(PatternError, match=r"not available in this release"):
        pattern_of(name)


def test_anything_else_is_refused():
    with pytest.raises(PatternError, match="'banded'"):
        pattern_of("banded")
    with pytest.raises(DtypeError, match="int"):
        pattern_of(3)
