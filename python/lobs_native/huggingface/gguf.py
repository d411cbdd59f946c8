"""Networks in GGUF files, which transformers reads as dense floating-point weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lobs_native.errors import CheckpointError, LobsError
from lobs_native.huggingface.library import one_line, quiet, transformers_library

__all__ = ["check", "load", "tokenizer"]


def check(file: Path) -> None:
    """Refuse a file that is no GGUF, or that cannot be read here: CheckpointError, LobsError."""
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise CheckpointError(f"MODEL: {file} is not a GGUF file; copy it again")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise LobsError(
            "MODEL: transformers reads GGUF files with the packages gguf and accelerate; pip "
            f"install {' '.join(missing)}"
        )


def load(file: Path) -> nn.Module:
    """The causal language model in a file, in float32, without what marks it as quantised: a model
    that was read from a GGUF file cannot be written.

    Raises CheckpointError if transformers cannot read it.
    """
    transformers = transformers_library()
    read = _read(file, transformers.AutoModelForCausalLM, dtype=torch.float32)
    settings = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    with quiet(transformers):
        model: nn.Module = type(read)(type(read.config)(**settings))
    model.load_state_dict(read.state_dict())
    return model.eval()


def tokenizer(file: Path) -> Any:
    """The tokenizer in a file. Raises CheckpointError if transformers cannot read it."""
    return _read(file, transformers_library().AutoTokenizer)


def _read(file: Path, kind: Any, **more: Any) -> Any:
    transformers = transformers_library()
    try:
        with quiet(transformers):
            return kind.from_pretrained(
                str(file.parent), gguf_file=file.name, local_files_only=True, **more
            )
    except Exception as error:  # a foreign file may make it raise anything
        raise CheckpointError(
            f"MODEL: transformers cannot load {file}: {one_line(error)}"
        ) from error
