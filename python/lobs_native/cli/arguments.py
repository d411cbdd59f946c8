"""The arguments of the prune command, derived from the fields of :class:`NetworkSettings`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lobs_native.errors import ArgumentError
from lobs_native.huggingface.text import GENERATE
from lobs_native.network.settings import NetworkSettings
from lobs_native.solvers.options import option_of
from lobs_native.solvers.settings import LAYER_OPTIONS, TARGETS

__all__ = [
    "TEXT",
    "add_options",
    "add_prune",
    "add_text",
    "by_option",
    "flag",
    "settings_of",
    "with_flags",
]

# For a folder's text and files.
TEXT = ("prompts", "lines", "tokens", "min_words", "length", "batch_size", "shard_size")

_PRUNE = """Prune a network and write it into a new folder.

MODEL is a folder in the style of Hugging Face (config.json, *.safetensors, tokenizer), which needs
pip install "lobs-native[hf]" and --calibration; or a GGUF file of a causal language model, which
needs pip install gguf accelerate, and is written as such a folder in float32; or module:function,
where the function returns (model, batches) or (model, batches, forward) and modules of the current
folder can be imported.
The new folder holds the weights, dense with zeros in them, in the dtype they had; of a folder also
everything else in it; and report.json and report.html. It is written atomically. Nothing is
downloaded. For a folder, the layer that makes the logits is left alone unless --include names it.
"""


def add_prune(commands: Any) -> argparse.ArgumentParser:
    """The ``prune`` command with its options."""
    command: argparse.ArgumentParser = commands.add_parser(
        "prune",
        help="prune a network in a folder, or one that a function returns",
        description=_PRUNE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="a folder, a GGUF file, or module:function")
    add("--out", type=Path, metavar="DIR", help="the folder to write; needed unless --plan")
    add("--overwrite", action="store_true", help="replace DIR if it holds an earlier result")
    add("--masks", action="store_true", help="write masks.safetensors too (True = kept)")
    add("--mask-bits", action="store_true", help="the same with one bit per weight, not a byte")
    add("--plan", action="store_true", help="say what would be pruned, with memory, and stop")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--no-progress", action="store_true", help="no progress bars (only on a terminal anyway)")

    help_ = "under torchrun: seconds that a process waits for another one before it ends; "
    help_ += "default: %(default)s"
    add("--rank-timeout", type=float, default=1800.0, metavar="X", help=help_)

    help_ = "put plain layers in the place of those that standardize or scale their weight in each "
    help_ += "call first; for module:function; see lobs_native.fold_weights"
    add("--fold-weights", action="store_true", help=help_)

    far = command.add_argument_group("how far (one of them, or an N:M pattern)")
    target = far.add_mutually_exclusive_group()
    how = command.add_argument_group("how (see lobs_native.prune)")
    names = [field.name for field in _offered()]
    add_options(target, [name for name in names if name in TARGETS])
    add_options(how, [name for name in names if name not in TARGETS])
    how.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="GLOB:NAME=VALUE,...",
        help="other settings for the layers of this name, for example '*.fc1:sparsity=0.3'; may be "
        f"repeated, and the last that matches wins; NAME is one of {', '.join(LAYER_OPTIONS)}",
    )

    add_text(command)
    return command


def add_options(group: argparse._ActionsContainer, names: Sequence[str]) -> None:
    """The options that stand for these fields of :class:`NetworkSettings`, in their order there."""
    kinds = get_type_hints(NetworkSettings)
    for field in _offered():
        if field.name in names:
            reading = _reading(field, kinds[field.name])
            group.add_argument(flag(field.name), **reading, help=option_of(field).help)


def add_text(command: argparse.ArgumentParser) -> None:
    """The options for a folder's text and files."""
    add = command.add_argument_group("for folders").add_argument
    help_ = (
        "UTF-8 text to calibrate on; or the word generate: what a causal language model writes. "
    )
    help_ += "May be repeated: all of them, with the limits below for each"
    add("--calibration", action="append", type=_calibration, metavar="FILE", help=help_)
    help_ = "with generate: UTF-8 text whose lines begin the sequences; default: nothing does"
    add("--prompts", type=Path, metavar="FILE", help=help_)
    add("--lines", type=int, metavar="N", help="lines of it at most; default 600, or --tokens")
    add("--tokens", type=int, metavar="N", help="tokens of it at most, instead of lines")
    add("--min-words", type=int, metavar="N", help="shorter lines are left out; default 20")
    help_ = "tokens per line, or per block for causal language models; default 128"
    add("--length", type=int, metavar="N", help=help_)
    add("--batch-size", type=int, metavar="N", help="default 8")
    add("--shard-size", type=_size, metavar="SIZE", help="largest weight file; default 5GB")


def _calibration(text: str) -> Path | str:
    return GENERATE if text == GENERATE else Path(text)


def settings_of(options: argparse.Namespace) -> NetworkSettings:
    """The settings that the parsed options of the ``prune`` command make."""
    chosen = {field.name: getattr(options, field.name) for field in _offered()}
    overrides: dict[str, dict[str, Any]] = {}
    for text in options.override:
        glob, changes = _override(text)
        overrides[glob] = overrides.pop(glob, {}) | changes
    return NetworkSettings(
        **chosen,
        overrides=overrides or None,
        progress=not (options.plan or options.no_progress),
    )


def _override(text: str) -> tuple[str, dict[str, Any]]:
    """A glob and its settings from "GLOB:NAME=VALUE,...". ArgumentError if it is none."""
    glob, _, rest = text.partition(":")
    changes = {}
    for part in rest.split(","):
        name, equals, value = part.partition("=")
        name = name.replace("-", "_")
        if not glob or not equals:
            raise ArgumentError(
                f"--override: {text!r} is not of the form GLOB:NAME=VALUE,...; write for example "
                "'*.fc1:sparsity=0.3,method=sweep'"
            )
        if name not in LAYER_OPTIONS:
            raise ArgumentError(
                f"--override: {text!r}: a layer has no {name}; it has {', '.join(LAYER_OPTIONS)}"
            )
        changes[name] = _value(name, value, text)
    return glob, changes


def _value(name: str, value: str, text: str) -> Any:
    """The value of a layer's setting, as it is written in an override."""
    kind = get_type_hints(NetworkSettings)[name]
    kinds = set(get_args(kind)) or {kind}
    if value == "none":
        return None
    if bool in kinds:
        if value not in ("true", "false"):
            raise ArgumentError(f"--override: {text!r}: {name} is true or false, not {value!r}")
        return value == "true"
    if float not in kinds:
        return value
    try:
        return float(value)
    except ValueError:
        raise ArgumentError(f"--override: {text!r}: {value!r} is not a number") from None


def by_option(message: str) -> str:
    """An error's message that begins with an argument of Python, with the option in its place."""
    name, colon, rest = message.partition(": ")
    if name.startswith("overrides"):
        return f"--override{name.removeprefix('overrides')}{colon}{rest}"
    names = ("out", *(field.name for field in _offered()))
    return with_flags(message, {name: flag(name) for name in names})


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """An error's message that begins with a key of ``flags``, with its value in that place."""
    name, colon, rest = message.partition(": ")
    return f"{flags.get(name, name)}{colon}{rest}"


def flag(name: str) -> str:
    """The option that stands for an argument of Python."""
    return f"--{name.replace('_', '-')}"


def _offered() -> list[dataclasses.Field[Any]]:
    """The settings that the command line offers."""
    return [field for field in dataclasses.fields(NetworkSettings) if option_of(field).help]


def _reading(field: dataclasses.Field[Any], kind: Any) -> dict[str, Any]:
    """How argparse reads a setting of this type."""
    option, kinds = option_of(field), set(get_args(kind)) or {kind}
    if bool in kinds:
        return {"action": "store_true", "default": field.default}
    if Sequence[str] in kinds:
        return {"action": "append", "metavar": "GLOB"}
    reading: dict[str, Any] = {"default": field.default}
    if option.choices and option.optional and field.default is not None:
        metavar = "|".join((*option.choices, "none"))
        return {**reading, "type": _choice_or_none, "metavar": metavar}
    if option.choices:
        return {**reading, "choices": option.choices}
    if option.in_bytes:
        return {**reading, "type": _size, "metavar": "SIZE"}
    if float in kinds:
        return {**reading, "type": float, "metavar": "X"}
    if int in kinds:
        return {**reading, "type": int}
    if os.PathLike[str] in kinds:
        return {**reading, "type": Path, "metavar": "DIR"}
    return reading


def _choice_or_none(text: str) -> str | None:
    return None if text == "none" else text


def _size(text: str) -> int:
    """Bytes from "4000000000", "4GB" or "4GiB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kMGT])(i?)B?|B)?", text, re.IGNORECASE)
    size = 0
    if match:
        number, prefix, binary = match.groups()
        power = " kmgt".index(prefix.lower()) if prefix else 0
        size = int(float(number) * (1024 if binary else 1000) ** power)
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size in bytes; write for example 4000000000, 4GB or 4GiB"
        )
    return size
