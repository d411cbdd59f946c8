"""The networks of the defaults experiment, with their calibration and held-out data."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lobs_native.errors import ArgumentError
from lobs_native.huggingface import checkpoint as hf
from lobs_native.huggingface.text import text_batches
from paper.authors import Authors
from paper.networks import CALIBRATION, LENET300

__all__ = ["Subject", "encoder", "lenet"]

Batch = Any  # a tensor, or what a transformers model is called with


@dataclass(frozen=True)
class Subject:
    """A network whose linear layers are pruned."""

    name: str
    model: nn.Module  # as it was trained; not to be changed
    kept: Mapping[str, float]  # of the layers that are pruned
    largest: int  # rows of calibration data that there are
    swept: tuple[int, ...]  # numbers of rows that every damping is tried with
    batches: Callable[[int], Iterator[Batch]]  # that many rows, the first ones first
    heldout: Sequence[Batch]
    measure: Callable[[nn.Module], dict[str, float]]  # on the held-out data
    forward: Callable[[nn.Module, Batch], Any]
    description: str

    def copy(self) -> nn.Module:
        """A copy of the network, to be pruned."""
        return copy.deepcopy(self.model)

    def layers(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The layers that are pruned."""
        layers = {name: module for name, module in model.named_modules() if name in self.kept}
        assert all(isinstance(module, nn.Linear) for module in layers.values())
        return layers


# ---- LeNet-300-100 -------------------------------------------------------------------------------

_SEEN = {
    True: "MNIST's training images; held out: its 10,000 test images",
    False: "images of the first 5,000 of MNIST's test images and, beyond 5,000, copies of these "
    "shifted by up to two pixels; held out: the other 5,000",
}


def lenet(folder: Path) -> Subject:
    """The authors' network with the paper's 6.7 / 20 / 65 % kept.

    Calibrated on MNIST's training images. Without these: on the first 5,000 test images and, for
    more rows, on copies of them shifted by a pixel or two.
    """
    authors = Authors(folder)
    model = authors.network()
    with torch.no_grad():
        original = model(authors.tested.x)

    @torch.no_grad()
    def measure(pruned: nn.Module) -> dict[str, float]:
        change = (pruned(authors.tested.x) - original).norm() / original.norm()
        return {"output": float(change), "error, %": authors.percent_wrong(pruned)}

    def batches(count: int) -> Iterator[Tensor]:
        done = copies = 0
        while done < count:
            images = authors.calibration if copies == 0 else _shifted(authors.calibration, copies)
            yield from images[: count - done].split(1000)
            done, copies = done + len(images), copies + 1

    return Subject(
        name="LeNet-300-100",
        model=model,
        kept=LENET300.once,
        largest=60_000,
        swept=(100, 1000, CALIBRATION),
        batches=batches,
        heldout=list(authors.tested.x.split(1000)),
        measure=measure,
        forward=lambda network, batch: network(batch),
        description=f"the authors' weights; 6.7 / 20 / 65 % kept; rows are {_SEEN[authors.whole]}",
    )


def _shifted(images: Tensor, seed: int) -> Tensor:
    """Each image (N, 784) shifted by -2 to 2 pixels in both directions, at random."""
    draw = torch.Generator().manual_seed(seed)
    padded = functional.pad(images.reshape(-1, 28, 28), (2, 2, 2, 2))
    down, right = torch.randint(0, 5, (2, len(images)), generator=draw)
    lines = down[:, None] + torch.arange(28)  # (N, 28)
    columns = right[:, None] + torch.arange(28)
    each = torch.arange(len(images))[:, None, None]
    return padded[each, lines[:, :, None], columns[:, None, :]].reshape(-1, 784)


# ---- an encoder ----------------------------------------------------------------------------------


_HELDOUT_ROWS = 15_000


def encoder(folder: Path, text: Path, blocks: Sequence[int], kept: float) -> Subject:
    """Linear layers of some blocks of a BERT-like encoder, on lines of a text.

    The encoder is a folder in the format of transformers. Lines have at most 128 tokens; rows are
    tokens.
    """
    checkpoint = hf.examine(folder)
    model = hf.load(checkpoint).eval()
    remaining = text_batches(checkpoint, model, text, lines=100_000).batches
    random.Random(0).shuffle(remaining)  # they come sorted by length
    heldout: list[dict[str, Tensor]] = []
    while remaining and _rows(heldout) < _HELDOUT_ROWS:
        heldout.append(remaining.pop())
    if not remaining:
        raise ArgumentError(
            f"text: {text} has {_rows(heldout):,} tokens in lines of 20 words or more; more than "
            f"{_HELDOUT_ROWS:,} are needed"
        )
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(f"encoder.layer.{block}." in f"{name}." for block in blocks)
    ]
    if not names:
        raise ArgumentError(f"blocks: no linear layer in encoder.layer.{list(blocks)} of {folder}")

    def batches(count: int) -> Iterator[dict[str, Tensor]]:
        left = count
        for batch in remaining:
            ids = batch["input_ids"]
            ids = ids[: max(1, left // ids.shape[1]), :left]
            left -= ids.numel()
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if left <= 0:
                return

    original = _sentences(model, heldout)

    def measure(pruned: nn.Module) -> dict[str, float]:
        now = _sentences(pruned, heldout)
        cosine = functional.cosine_similarity(now, original).mean()
        change = (now - original).norm() / original.norm()
        return {"output": float(change), "1 - cosine": 1 - float(cosine)}

    return Subject(
        name="encoder",
        model=model,
        kept=dict.fromkeys(names, kept),
        largest=_rows(remaining),
        swept=(100, 1000, 10_000),
        batches=batches,
        heldout=heldout,
        measure=measure,
        forward=lambda network, batch: network(**batch),
        description=(
            f"{len(names)} linear layers of blocks {', '.join(map(str, blocks))} of "
            f"{type(model).__name__} ({folder.parent.name}), {100 * kept:g} % kept; rows are "
            f"tokens of {text.name}; held out: {_rows(heldout):,} tokens of other lines; output: "
            "sentence vectors (mean of the tokens)"
        ),
    )


def _rows(batches: Sequence[Mapping[str, Tensor]]) -> int:
    return sum(batch["input_ids"].numel() for batch in batches)


@torch.no_grad()
def _sentences(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """(lines, width): the mean of each line's last hidden states; no batch is padded."""
    return torch.cat([model(**batch)[0].mean(1) for batch in batches]).double()
