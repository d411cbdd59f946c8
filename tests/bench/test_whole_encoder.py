"""Which lines a whole encoder is calibrated on."""

from __future__ import annotations

import pytest

from quality import whole_encoder as data

WORDS = " word" * data.SHORTEST_WORDS


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Articles a to e of three lines that are long enough, with sections and short lines."""
    parts = []
    for name in "abcde":
        parts += [f" = Article {name} = ", "", f" {name}0{WORDS}", " = = Section = = ", " short"]
        parts += [f" {name}1{WORDS}", f" {name}2{WORDS}", ""]
    file = tmp_path / "text.txt"
    file.write_text("\n".join(parts), encoding="utf-8")
    monkeypatch.setattr(data, "TEXT", file)


def names(lines):
    return [line.split()[0] for line in lines]


@pytest.mark.usefixtures("text")
@pytest.mark.parametrize(
    ("first", "measured", "whole"),
    [(6, 3, "abde"), (5, 3, "ade"), (6, 4, "abe"), (4, 9, "a")],
)
def test_lines_beyond_the_measured_are_of_other_articles(first, measured, whole):
    every = names(data.lines())
    assert len(every) == 15
    chosen = names(data.beyond(first, measured))
    assert chosen == [f"{article}{i}" for article in whole for i in range(3)]
    assert not {x[0] for x in chosen} & {x[0] for x in every[first : first + measured]}
