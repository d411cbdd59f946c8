"""Situations from bug reports: the first and the last of each one's neighbours."""

from __future__ import annotations

import pytest

from quality import (
    situation,
    situations,
    situations_of_folders,  # noqa: F401  (enters some)
    situations_of_types,  # noqa: F401
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Python's own, from packages that transformers imports.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]
ELSEWHERE = {"adapters": "peft", "names and dtypes of a folder": "transformers"}


@pytest.mark.parametrize("name", situation.SITUATIONS)
@pytest.mark.parametrize("which", [0, -1])
def test_what_is_right_is_so_in_the_first_and_the_last_neighbour(name, which):
    if name in ELSEWHERE:
        pytest.importorskip(ELSEWHERE[name])
    each = situation.SITUATIONS[name]
    assert situation.tried(each, list(each.neighbours())[which]) == ""


def test_what_is_wrong_is_found():
    wrong = situation.Situation("", situations.rare_experts, {"few": (0,), "method": ("?",)})
    (neighbour,) = wrong.neighbours()
    assert situation.tried(wrong, {**neighbour, "scope": "layer"}).startswith("ArgumentError: ")
