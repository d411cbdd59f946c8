"""Calibration batches: from text files and a folder's tokenizer, or written by the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native import checks
from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.huggingface import gguf
from lobs_native.huggingface.checkpoint import Checkpoint
from lobs_native.huggingface.library import one_line, quiet, transformers_library

__all__ = ["GENERATE", "Text", "generated_batches", "joined", "text_batches"]

GENERATE = "generate"  # in place of a file: what the network itself writes
_WRITTEN = 16_384  # tokens, by default
_AT_ONCE = 64  # sequences that are written together
_PROMPT = 4  # tokens of a line that begin a sequence

_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class Text:
    """Calibration inputs from a text file. The sequences of a batch have the same length, so that
    no padding enters the statistics."""

    batches: list[dict[str, Tensor]]  # input_ids and attention_mask, (batch, tokens) int64
    settings: dict[str, Any]  # for the report
    held_back: list[dict[str, Tensor]]  # of a causal language model: blocks of the lines after them


def joined(texts: Sequence[Text]) -> Text:
    """Several texts as one: their batches one after another, with the settings of each."""
    if len(texts) == 1:
        return texts[0]
    totals = {
        name: sum(text.settings.get(name, 0) for text in texts)
        for name in ("tokens", "tokens held back")
    }
    return Text(
        [batch for text in texts for batch in text.batches],
        {"texts": [text.settings for text in texts], **{k: n for k, n in totals.items() if n}},
        [batch for text in texts for batch in text.held_back],
    )


def text_batches(
    checkpoint: Checkpoint,
    model: nn.Module,
    file: Path,
    *,
    lines: int | None = None,
    tokens: int | None = None,
    min_words: int = 20,
    length: int = 128,
    batch_size: int = 8,
) -> Text:
    """Calibration inputs from the first lines of running text in a file.

    Parameters
    ----------
    checkpoint, model : Checkpoint, nn.Module
        The folder with the tokenizer, and its network.
    file : Path
        UTF-8 text.
    lines : int, optional
        The largest number of lines: 600 unless ``tokens`` is given. Lines of fewer than
        ``min_words`` words, and headings, which begin with "=", are left out.
    tokens : int, optional
        The largest number of tokens, in whole sequences.
    min_words : int
    length : int
        The number of tokens in a sequence. For a causal language model, the lines are joined with
        line breaks and divided into blocks of this length; a remainder is dropped. For other
        networks, each line is a sequence with the tokenizer's special tokens, truncated to this
        length. A decoder beside an encoder reads the same line, from its start token on.
    batch_size : int
        The largest number of sequences in a batch. All sequences of a batch have the same length.

    Raises
    ------
    ArgumentError, CheckpointError
        The file is missing, is not text or has too little of it; there is no tokenizer; or the
        tokens do not fit the network.
    """
    for name, value in (
        ("--lines", 600 if lines is None else lines),
        ("--tokens", length if tokens is None else tokens),
        ("--min-words", min_words),
        ("--length", length),
        ("--batch-size", batch_size),
    ):
        checks.positive_int(value, name)
    config: Any = model.config
    _check_length(config, length)
    if lines is None and tokens is None:
        lines = 600
    chosen, following = _running_text(
        file, lines, min_words, words=tokens if lines is None else None
    )
    tokenizer = _tokenizer_of(checkpoint)
    blocks, start = _is_causal(model), _start_of_decoder(model)
    if blocks and tokens is not None and tokens < length:
        raise ArgumentError(f"--tokens: {tokens}; one block has {length}; pass more or a --length")
    held_back: list[Sequence[int]] = []
    if blocks:
        ids, more = (tokenizer("\n".join(part))["input_ids"] for part in (chosen, following))
        rows, held_back = _blocks(ids, length), _blocks(more, length)
        if not rows:
            raise ArgumentError(
                f"--calibration: {file}: its {len(chosen)} lines make {len(ids)} tokens, less than "
                f"one block of {length}; pass more text or a smaller --length"
            )
    else:
        rows = tokenizer(chosen, truncation=True, max_length=length)["input_ids"]
        rows = [row for row in rows if row]
    if tokens is not None:
        rows = _within(rows, tokens)
    unknown = _check_tokens(rows, tokenizer, config)
    settings: dict[str, Any] = {
        "text": str(file),
        "text as": f"blocks of {length} tokens" if blocks else f"lines of at most {length} tokens",
        "lines": len(chosen),
        "min words": min_words,
        "batch size": batch_size,
        "tokens": sum(map(len, rows)),
        "unknown tokens": unknown,
    }
    if start is not None:
        settings["text as"] += ", which the decoder reads as well"
    if held_back:
        settings["tokens held back"] = sum(map(len, held_back))
    batches = list(_batches(rows, batch_size, start))
    return Text(batches, settings, list(_batches(held_back, batch_size, start)))


def generated_batches(
    checkpoint: Checkpoint,
    model: nn.Module,
    *,
    prompts: Path | None = None,
    seed: int = 0,
    lines: int | None = None,
    tokens: int | None = None,
    min_words: int = 20,
    length: int = 128,
    batch_size: int = 8,
) -> Text:
    """Calibration inputs that a causal language model writes itself, token by token, each drawn
    with the probability that the network gives it; it does not end a text before its length.

    Parameters
    ----------
    checkpoint, model : Checkpoint, nn.Module
        The folder with the tokenizer, and its network, which is left as it was.
    prompts : Path, optional
        UTF-8 text: sequences begin with the first 4 tokens of its lines of ``min_words`` words or
        more, one line for each, in order and again from the first. Without it, all begin with the
        tokenizer's token for that.
    seed : int
        Of what is drawn. The same seed, versions and threads give the same tokens; the caller's
        generators are kept.
    lines : int, optional
        Of ``prompts``, the largest number that is used; by default all that are needed.
    tokens : int
        How many, in whole sequences; by default 16,384.
    length, batch_size : int
        Tokens in a sequence, with those that begin it, and sequences in a batch.

    Raises
    ------
    ArgumentError, CheckpointError
        The network is no causal language model; the file is missing, is not text or has too little
        of it; there is no tokenizer, or none that begins a text.
    """
    tokens = _WRITTEN if tokens is None else tokens
    for name, value in (("--tokens", tokens), ("--min-words", min_words), ("--length", length)):
        checks.positive_int(value, name)
    checks.positive_int(batch_size, "--batch-size")
    config: Any = model.config
    if not _is_causal(model):
        raise ArgumentError(
            f"--calibration: {GENERATE!r} needs a causal language model, and {type(model).__name__}"
            " is none; give a text file"
        )
    _check_length(config, length)
    if length <= _PROMPT or tokens < length:
        raise ArgumentError(
            f"--tokens: {tokens} in sequences of {length} (--length); a sequence has more than "
            f"{_PROMPT} tokens, and there must be one"
        )
    count = tokens // length
    tokenizer = _tokenizer_of(checkpoint)
    if prompts is not None:
        first = count if lines is None else checks.positive_int(lines, "--lines")
        chosen, _ = _running_text(prompts, first, min_words, option="--prompts")
        begun = [ids[:_PROMPT] for ids in tokenizer(chosen)["input_ids"]]
        begun = [ids for ids in begun if len(ids) == _PROMPT]
    else:
        begun = [[x] for x in (tokenizer.bos_token_id,) if x is not None]
    if not begun:
        raise ArgumentError(
            "--prompts: the tokenizer has no token that begins a text; give a file whose lines do"
            if prompts is None
            else f"--prompts: no line of {prompts} has {_PROMPT} tokens; give running text"
        )
    starts = torch.tensor([begun[i % len(begun)] for i in range(count)])
    rows = _written(model, starts, length, seed)
    _check_tokens(rows, tokenizer, config)
    settings = {
        "text": f"written by the network, seed {seed}",
        "text as": f"blocks of {length} tokens",
        "prompts": None if prompts is None else str(prompts),
        "batch size": batch_size,
        "tokens": count * length,
    }
    return Text(list(_batches(rows, batch_size)), settings, [])


@torch.no_grad()
def _written(model: Any, starts: Tensor, length: int, seed: int) -> list[list[int]]:
    """Sequences of ``length`` tokens that begin with the rows of ``starts`` (n, P)."""
    rows: list[list[int]] = []
    more = length - starts.shape[1]
    padding = model.config.pad_token_id
    with torch.random.fork_rng(), quiet(transformers_library()):
        torch.manual_seed(seed)
        for some in starts.to(model.device).split(_AT_ONCE):
            written = model.generate(
                some,
                attention_mask=torch.ones_like(some),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                max_new_tokens=more,
                min_new_tokens=more,
                pad_token_id=0 if padding is None else padding,
            )
            rows += written.tolist()
    return rows


def _is_causal(model: nn.Module) -> bool:
    """Whether it is a causal language model, which reads blocks of running text."""
    named = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return named or bool(getattr(model.config, "is_decoder", False))


def _start_of_decoder(model: nn.Module) -> int | None:
    """The token with which the decoder of an encoder-decoder begins; None for other networks."""
    config: Any = model.config
    if not getattr(config, "is_encoder_decoder", False):
        return None
    for name in ("decoder_start_token_id", "bos_token_id"):
        if isinstance(token := getattr(config, name, None), int):
            return token
    raise ArgumentError(
        "MODEL: config.json has no decoder_start_token_id, with which its decoder begins; add it"
    )


def _check_length(config: Any, length: int) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest:
        raise ArgumentError(f"--length: {length}; the network takes at most {longest} tokens")


def _blocks(ids: Sequence[int], length: int) -> list[Sequence[int]]:
    """Tokens divided into blocks; a remainder is dropped."""
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def _within(rows: Sequence[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    """The first rows, as many as have so many tokens together."""
    total, kept = 0, []
    for row in rows:
        total += len(row)
        if total > tokens:
            break
        kept.append(row)
    if not kept:
        raise ArgumentError(
            f"--tokens: {tokens}; the first sequence has {len(rows[0])} tokens, and none would be "
            "left; pass more, or a smaller --length"
        )
    return kept


def _running_text(
    file: Path,
    lines: int | None,
    min_words: int,
    *,
    words: int | None = None,
    option: str = "--calibration",
) -> tuple[list[str], list[str]]:
    """The first lines of running text: so many, or until they have so many words, each of which is
    a token at least; and a quarter as many lines after them, as far as there are any."""
    if not file.is_file():
        raise ArgumentError(f"{option}: there is no file {file}; name a text file")
    chosen: list[str] = []
    following: list[str] = []
    count = found = 0
    try:
        with file.open(encoding="utf-8") as text:
            for line in text:
                count += 1
                line = line.strip()
                if len(line.split()) < min_words or line.startswith("="):
                    continue
                if len(chosen) == lines or (words is not None and found > words):
                    following.append(line)
                    if 4 * len(following) >= len(chosen):
                        break
                    continue
                chosen.append(line)
                found += len(line.split())
    except (OSError, UnicodeError) as error:
        raise CheckpointError(f"{option}: {file} is not UTF-8 text: {error}") from error
    if not chosen:
        raise ArgumentError(
            f"{option}: {file}: none of its {count} lines has {min_words} words or more; pass "
            "running text or a smaller --min-words"
        )
    return chosen, following


def _tokenizer_of(checkpoint: Checkpoint) -> Any:
    if checkpoint.gguf is not None:
        return gguf.tokenizer(checkpoint.gguf)
    return _tokenizer(checkpoint.folder)


def _tokenizer(folder: Path) -> Any:
    transformers = transformers_library()
    # Without files, transformers may construct a tokenizer with an empty vocabulary.
    if not any(p.is_file() for glob in _VOCABULARIES for p in folder.glob(glob)):
        raise ArgumentError(
            f"MODEL: {folder} has no tokenizer ({', '.join(_VOCABULARIES)}); copy its files there, "
            "or pass a function as module:function"
        )
    try:
        with quiet(transformers):
            return transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # foreign files may make it raise anything
        raise CheckpointError(
            f"MODEL: transformers cannot load the tokenizer in {folder}: {one_line(error)}"
        ) from error


def _check_tokens(rows: Sequence[Sequence[int]], tokenizer: Any, config: Any) -> int:
    """Refuse tokens that are outside the network's vocabulary or mostly unknown. Returns the number
    of unknown ones."""
    tokens = [token for row in rows for token in row]
    if not tokens:
        raise ArgumentError("--calibration: the tokenizer returns no tokens for this text")
    vocabulary = getattr(config, "vocab_size", None)
    if isinstance(vocabulary, int) and max(tokens) >= vocabulary:
        raise CheckpointError(
            f"MODEL: its tokenizer returns token {max(tokens)}, but the network knows {vocabulary} "
            "tokens; they do not belong together"
        )
    unknown = tokens.count(tokenizer.unk_token_id)
    if 2 * unknown > len(tokens):
        raise ArgumentError(
            f"--calibration: {100 * unknown / len(tokens):.0f} % of its tokens are unknown to the "
            "tokenizer; pass a text in a language that it knows"
        )
    return unknown


def _batches(
    rows: Sequence[Sequence[int]], size: int, start: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Sequences of one length together; with ``start``, a decoder reads them from that on."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    for _, same_length in sorted(by_length.items()):
        for first in range(0, len(same_length), size):
            ids = torch.tensor(same_length[first : first + size])
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if start is not None:
                begin = torch.full_like(ids[:, :1], start)
                batch["decoder_input_ids"] = torch.cat([begin, ids[:, :-1]], 1)
            yield batch
