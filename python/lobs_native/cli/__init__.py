"""The command line, ``lobs-native`` and ``python -m lobs_native``."""

from lobs_native.cli.commands import main

__all__ = ["main"]
