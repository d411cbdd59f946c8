"""Attributes of dataclasses, taken from the comments beside their fields.

A result of this package is a frozen dataclass whose fields have their meaning in a comment at the
end of the line, or in the lines above. The API pages show these, so that they are written once.
Docstrings that have an ``Attributes`` section of their own are left alone.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from typing import Any

from sphinx.application import Sphinx


def comments_of(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments by line number: those at the end of a line of code, and those on a line alone."""
    beside: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("#: ").rstrip()
            (alone if token.line.lstrip().startswith("#") else beside)[token.start[0]] = text
    return beside, alone


def attributes_of(cls: type) -> list[str]:
    """The lines of a numpydoc section about the fields of a dataclass."""
    source = textwrap.dedent(inspect.getsource(cls))
    beside, alone = comments_of(source)
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    lines: list[str] = []
    for node in body.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above = []
        line = node.lineno - 1
        while line in alone:
            above.insert(0, alone[line])
            line -= 1
        ends = node.end_lineno or node.lineno
        said = [beside[n] for n in range(node.lineno, ends + 1) if n in beside]
        lines += [f"{node.target.id} : {ast.unparse(node.annotation)}"]
        lines += [f"    {text}" for text in (above or []) + said]
    return ["", "Attributes", "----------", *lines, ""] if lines else []


def add_fields(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what == "class" and dataclasses.is_dataclass(obj) and "Attributes" not in lines:
        assert isinstance(obj, type)
        lines += attributes_of(obj)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", add_fields, priority=400)  # before numpydoc
    return {"parallel_read_safe": True, "parallel_write_safe": True}
