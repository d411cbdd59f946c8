"""The directive ``runtimes-table``: where a sparsity runs faster, from the report's own data."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lobs_native.report import runtimes


class RuntimesTable(SphinxDirective):
    """A sentence with the date, and the table."""

    def run(self) -> list[nodes.Node]:
        text = f"As of {runtimes.as_of()}:\n\n{runtimes.markdown()}"
        container = nodes.container()
        self.state.nested_parse(StringList(text.splitlines(), "runtimes.json"), 0, container)
        return container.children


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("runtimes-table", RuntimesTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
