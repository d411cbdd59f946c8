"""The transformers library: imported on demand, offline, and without its progress bars."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from lobs_native.errors import LobsError

__all__ = ["OLDEST", "one_line", "quiet", "some_of", "transformers_library"]

OLDEST = (4, 56)  # the oldest version of transformers, see pyproject.toml


def transformers_library() -> Any:
    """The module ``transformers``. Raises LobsError if it is missing or too old."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise LobsError(
            'a Hugging Face folder needs transformers: pip install "lobs-native[hf]"'
        ) from error
    version = tuple(int(x) for x in transformers.__version__.split(".")[:2])
    if version < OLDEST:
        raise LobsError(
            f"transformers {transformers.__version__} is too old: pip install "
            f'"transformers>={OLDEST[0]}.{OLDEST[1]}"'
        )
    return transformers


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Suppress progress bars and warnings of transformers: this package makes the checks."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """The type and message of an error on one line, at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def some_of(names: Sequence[str]) -> str:
    """The first names of a list, for an error."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
