"""The directive ``command-help``: what a command of this package prints with ``--help``."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

MODULES = {
    "lobs-native": ["-m", "lobs_native"],
    "python -m lobs_native.run": ["-m", "lobs_native.run"],
}


class CommandHelp(SphinxDirective):
    """A heading with the command, and its help."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        command = self.arguments[0]
        program = max((name for name in MODULES if command.startswith(name)), key=len)
        rest = command.removeprefix(program).split()
        shown = subprocess.run(
            [sys.executable, *MODULES[program], *rest, "--help"],
            env={**os.environ, "COLUMNS": "88", "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        section = nodes.section(
            ids=[nodes.make_id(command)], names=[nodes.fully_normalize_name(command)]
        )
        section += nodes.title("", "", nodes.literal(text=command))
        section += nodes.literal_block(shown, shown, language="none")
        return [section]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
