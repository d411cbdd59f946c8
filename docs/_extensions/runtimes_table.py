"""The directives ``runtimes-table``, where a sparsity runs faster, and ``quantizers-table``, what
keeps zeros: from the report's own data."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lobs_native.report import quantizers, runtimes


class _Parsed(SphinxDirective):
    def parsed(self, text: str, source: str) -> list[nodes.Node]:
        container = nodes.container()
        self.state.nested_parse(StringList(text.splitlines(), source), 0, container)
        return container.children


class RuntimesTable(_Parsed):
    """A sentence with the date, and the table."""

    def run(self) -> list[nodes.Node]:
        text = f"As of {runtimes.as_of()}:\n\n{runtimes.markdown()}"
        return self.parsed(text, "runtimes.json")


class QuantizersTable(_Parsed):
    """The table."""

    def run(self) -> list[nodes.Node]:
        return self.parsed(quantizers.markdown(), "quantizers.json")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("runtimes-table", RuntimesTable)
    app.add_directive("quantizers-table", QuantizersTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
