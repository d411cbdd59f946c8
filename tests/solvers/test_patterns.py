"""Pattern names, pattern objects, and which rows they fit."""

from __future__ import annotations

import pytest
import torch

from lobs_native.errors import ArgumentError, DtypeError, PatternError
from lobs_native.ops import MAX_BLOCK
from lobs_native.solvers.patterns import (
    PATTERNS,
    Blocks,
    Columns,
    GroupsOf,
    Unstructured,
    pattern_of,
)

KNOWN = {
    "unstructured": Unstructured(),
    "2:4": GroupsOf(2, 4),
    "4:8": GroupsOf(4, 8),
    "0:2": GroupsOf(0, 2),
    "16:16": GroupsOf(16, 16),
    "1x1": Blocks(1),
    "1x4": Blocks(4),
    f"1x{MAX_BLOCK}": Blocks(MAX_BLOCK),
    "columns": Columns(),
    "64 columns": Columns(64),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_pattern_is_known_by_name_and_by_object(name):
    pattern = KNOWN[name]
    assert pattern_of(name) == pattern_of(pattern) == pattern
    assert pattern.name == name
    assert hash(pattern) == hash(pattern_of(name))


def test_every_pattern_has_a_name_above():
    assert {type(pattern) for pattern in KNOWN.values()} == set(PATTERNS)


def test_what_a_group_removes():
    assert GroupsOf(2, 4).sparsity == 0.5
    assert GroupsOf(1, 4).sparsity == 0.75
    assert GroupsOf(0, 3).sparsity == 1
    assert GroupsOf(3, 3).sparsity == 0


def test_patterns_do_not_change():
    for pattern in (GroupsOf(2, 4), Blocks(4)):
        with pytest.raises(AttributeError):
            pattern.size = 8


@pytest.mark.parametrize(
    "name",
    [
        *("banded", "", "Unstructured", "unstructured ", "2 : 4", "2:4 ", "-1:4", "2:-4", "2:4:8"),
        *("2/4", "4x1", "2x4", "1X4", "1x", "x4", ":4", "2:", "1x4x4", "2.0:4", "1x-4", "1:1e3"),
        *("2:4\n", "1x4\n", "1234567:12345678", "column", "x columns", "2  columns"),
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(PatternError, match=r"pattern: .* use 'unstructured'"):
        pattern_of(name)


@pytest.mark.parametrize("name", ["5:4", "1:0", "0:0", f"1x{MAX_BLOCK + 1}", "1x0", "0 columns"])
def test_an_impossible_pattern_name_is_refused(name):
    with pytest.raises(PatternError, match=f"pattern: '{name}'"):
        pattern_of(name)


def test_an_impossible_pattern_object_is_refused():
    for make in (
        lambda: GroupsOf(5, 4),
        lambda: GroupsOf(-1, 4),
        lambda: GroupsOf(0, 0),
        lambda: Blocks(0),
        lambda: Blocks(-4),
        lambda: Blocks(MAX_BLOCK + 1),
        lambda: Columns(0),
    ):
        with pytest.raises(PatternError, match="pattern"):
            make()


@pytest.mark.parametrize("value", [3, None, ("2", "4"), b"2:4", GroupsOf, object()])
def test_anything_else_is_refused(value):
    with pytest.raises(DtypeError, match="pattern: expected a name"):
        pattern_of(value)


def test_rows_must_be_whole_groups_or_blocks():
    Unstructured().check_fit(7, None, prune_bias=True)
    for pattern in (GroupsOf(2, 4), Blocks(4)):
        pattern.check_fit(12, None, prune_bias=False)
        for columns in (1, 3, 13, 14):
            with pytest.raises(PatternError, match=f"'{pattern.name}' .* {columns} weights"):
                pattern.check_fit(columns, None, prune_bias=False)
        with pytest.raises(ArgumentError, match="prune_bias"):
            pattern.check_fit(12, None, prune_bias=True)


def test_a_mask_must_fit_the_pattern():
    mask = torch.ones(2, 3, 12, dtype=torch.bool)
    mask[1, 2, 4:6] = False
    GroupsOf(2, 4).check_fit(12, mask, prune_bias=False)
    Blocks(2).check_fit(12, mask, prune_bias=False)
    with pytest.raises(ArgumentError, match="mask: it removes 2 of 4"):
        GroupsOf(3, 4).check_fit(12, mask, prune_bias=False)
    for size in (3, 4):
        with pytest.raises(ArgumentError, match=f"mask: .* whole 1x{size} blocks"):
            Blocks(size).check_fit(12, mask, prune_bias=False)
    Unstructured().check_fit(12, mask, prune_bias=False)
