"""Calibration batches from a text file and a folder's tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native import checks
from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.huggingface.checkpoint import (
    _VOCABULARIES,
    Checkpoint,
    _line,
    _quiet,
    _transformers,
)

__all__ = ["Text", "text_batches"]


@dataclass(frozen=True)
class Text:
    """Calibration inputs from a text file. No batch is padded: a batch holds lines of one length,
    so no padding gets into the statistics."""

    batches: list[dict[str, Tensor]]  # input_ids and attention_mask, (batch, tokens) int64
    settings: dict[str, Any]  # what was chosen, for the report


def text_batches(
    checkpoint: Checkpoint,
    model: nn.Module,
    file: Path,
    *,
    lines: int = 600,
    min_words: int = 20,
    length: int = 128,
    batch_size: int = 8,
) -> Text:
    """Calibration inputs from the first lines of running text in a file.

    Parameters
    ----------
    checkpoint, model
        The folder with the tokenizer, and its network.
    file : Path
        UTF-8 text.
    lines : int
        At most so many lines are taken. Left out are those with fewer than ``min_words`` words and
        headings, which begin with "=".
    min_words : int
    length : int
        In tokens. For a causal language model the lines are joined, with line breaks, and cut into
        blocks of so many; what is left over is dropped. For others a line is one sequence, with the
        tokenizer's special tokens, cut off there.
    batch_size : int
        Sequences in a batch at most; sequences of different lengths are never in the same one.

    Raises
    ------
    ArgumentError, CheckpointError
        The file is missing or not text, it holds too little, there is no tokenizer, or tokens and
        network do not fit.
    """
    for name, value in (
        ("--lines", lines),
        ("--min-words", min_words),
        ("--length", length),
        ("--batch-size", batch_size),
    ):
        checks.positive_int(value, name)
    config: Any = model.config
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest:
        raise ArgumentError(f"--length: {length}; the network takes at most {longest} tokens")
    found = _running_text(file, lines, min_words)
    tokenizer = _tokenizer(checkpoint.folder)
    name = type(model).__name__
    blocks = name.endswith(("ForCausalLM", "LMHeadModel")) or getattr(config, "is_decoder", False)
    if blocks:
        ids = tokenizer("\n".join(found))["input_ids"]
        rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        if not rows:
            raise ArgumentError(
                f"--calibration: {file}: its {len(found)} lines make {len(ids)} tokens, less than "
                f"one block of {length}; give more text or a smaller --length"
            )
    else:
        rows = tokenizer(found, truncation=True, max_length=length)["input_ids"]
        rows = [row for row in rows if row]
    unknown = _check_tokens(rows, tokenizer, config)
    settings = {
        "text": str(file),
        "text as": f"blocks of {length} tokens" if blocks else f"lines of at most {length} tokens",
        "lines": len(found),
        "min words": min_words,
        "batch size": batch_size,
        "tokens": sum(map(len, rows)),
        "unknown tokens": unknown,
    }
    return Text(list(_batches(rows, batch_size)), settings)


def _running_text(file: Path, lines: int, min_words: int) -> list[str]:
    if not file.is_file():
        raise ArgumentError(f"--calibration: there is no file {file}; give a text file")
    found: list[str] = []
    seen = 0
    try:
        with file.open(encoding="utf-8") as text:
            for line in text:
                seen += 1
                line = line.strip()
                if len(line.split()) >= min_words and not line.startswith("="):
                    found.append(line)
                    if len(found) == lines:
                        break
    except (OSError, UnicodeError) as error:
        raise CheckpointError(f"--calibration: {file} is no UTF-8 text: {error}") from error
    if not found:
        raise ArgumentError(
            f"--calibration: {file}: none of its {seen} lines has {min_words} words or more; give "
            "running text or a smaller --min-words"
        )
    return found


def _tokenizer(folder: Path) -> Any:
    transformers = _transformers()
    # Without files, transformers may make one up that knows no word.
    if not any(p.is_file() for glob in _VOCABULARIES for p in folder.glob(glob)):
        raise ArgumentError(
            f"MODEL: {folder} has no tokenizer ({', '.join(_VOCABULARIES)}); copy its files there, "
            "or give a function as module:function"
        )
    try:
        with _quiet(transformers):
            return transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # whatever files of someone else's make it raise
        raise CheckpointError(
            f"MODEL: transformers cannot load the tokenizer in {folder}: {_line(error)}"
        ) from error


def _check_tokens(rows: Sequence[Sequence[int]], tokenizer: Any, config: Any) -> int:
    """Refuse tokens that do not belong to the network or mostly mean nothing to it; the number of
    those that mean nothing."""
    tokens = [token for row in rows for token in row]
    if not tokens:
        raise ArgumentError("--calibration: the tokenizer makes no tokens of this text")
    known = getattr(config, "vocab_size", None)
    if isinstance(known, int) and max(tokens) >= known:
        raise CheckpointError(
            f"MODEL: its tokenizer gives token {max(tokens)}, but the network knows {known}; they "
            "do not belong together"
        )
    unknown = tokens.count(tokenizer.unk_token_id)
    if 2 * unknown > len(tokens):
        raise ArgumentError(
            f"--calibration: {100 * unknown / len(tokens):.0f} % of its tokens are unknown to the "
            "tokenizer; give a text in a language that it knows"
        )
    return unknown


def _batches(rows: Sequence[Sequence[int]], size: int) -> Iterator[dict[str, Tensor]]:
    by_length: dict[int, list[Sequence[int]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    for _, alike in sorted(by_length.items()):
        for first in range(0, len(alike), size):
            ids = torch.tensor(alike[first : first + size])
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
