"""Reading Markdown pages: fenced blocks, tables, and what they name."""

from __future__ import annotations

import re


def blocks(page: str, language: str) -> list[str]:
    """The code of all fenced blocks in this language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def rows_of_table(page: str, first: str) -> list[list[str]]:
    """The cells of the table whose heading begins with ``first``, without the heading."""
    lines = page.splitlines()
    (begin,) = [i for i, line in enumerate(lines) if line.startswith(first)]
    rows = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows
