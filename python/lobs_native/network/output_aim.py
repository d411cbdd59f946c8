"""What a whole network should return: what the original one did.

Logits over a language model's tokens, or over classes, are compared by the Kullback-Leibler
divergence, as in distillation (Hinton, Vinyals & Dean 2015), and everything else by the squared
distance. Padding does not count. No labels are needed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lobs_native.calibration.distance import PIECE, Distance
from lobs_native.calibration.finished import with_forward
from lobs_native.calibration.outputs import (
    compared,
    floating_tensors,
    keep_output,
    vocabulary_of,
)
from lobs_native.calibration.sensitivity import requiring_gradients
from lobs_native.calibration.session import Session
from lobs_native.errors import ArgumentError
from lobs_native.files.shelf import Shelf

__all__ = ["OutputAim", "aiming_bytes", "check_differentiable", "recomputing"]

_WAY_OUT = "; use 'blocks' or None"


class OutputAim:
    """The outputs of the original network for all batches, in ``targets``, and how far the present
    network is from them. The batches are in memory from then on."""

    def __init__(self, session: Session, targets: Shelf) -> None:
        self.session = session
        self.targets = targets
        self.batches: list[Any] = []
        vocabulary = vocabulary_of(session)
        self.width = None  # of logits
        with torch.no_grad(), session.original():
            for batch in session.each("targets"):
                output = session.call(session.model, batch)
                keep_output(targets, len(self.batches), output, session, batch)
                if any(x.shape[-1] == vocabulary for x in floating_tensors(output)):
                    self.width = vocabulary
                self.batches.append(batch)

    @property
    def measure(self) -> str:
        """What errors are."""
        if self.width is None:
            return "change of the output relative to its size"
        return "Kullback-Leibler divergence of a row of logits, in nats"

    def loss(self, number: int) -> Tensor:
        """The distance on a batch, with gradients: of all its rows, so that long batches count
        more than short ones."""
        distance = Distance(self.width is not None)
        with torch.enable_grad():
            parts = [distance.differentiable(*of) for of in self._compared(number)]
            return torch.stack(parts).sum() * distance.scale

    def error(self, numbers: Iterable[int]) -> float:
        """The mean divergence of a row of logits, or the relative change, on some batches."""
        distance = Distance(self.width is not None)
        with torch.no_grad():
            for number in numbers:
                for x, original, counts, width in self._compared(number):
                    distance.add(x.reshape(-1), original, counts, width)
        return distance.relative

    def _compared(
        self, number: int
    ) -> Iterator[tuple[Tensor, Iterator[Tensor], Tensor | None, int]]:
        """For the tensors of the present output for a batch that are compared: pieces of the
        original one, which rows count, and the entries of a row."""
        batch = self.batches[number]
        mask = self.session.output_mask(batch)
        now = list(floating_tensors(self.session.call(self.session.model, batch)))
        keys = [(number, i, x.shape) for i, x in enumerate(now)]
        if any(key not in self.targets for key in keys):
            raise ArgumentError(
                "tune: the pruned model returns tensors of other shapes than the original one, "
                f"which cannot be compared{_WAY_OUT}"
            )
        yield from compared(now, self.targets, number, mask, self.width)


def aiming_bytes(output: int) -> int:
    """Bytes that comparing an output of so many bytes takes: its gradient, and pieces."""
    return output + 6 * 8 * min(PIECE, output)


def check_differentiable(session: Session, parameters: Sequence[nn.Parameter]) -> None:
    """Raise ArgumentError if the model's output for the first batch cannot be differentiated with
    respect to any of these."""
    model = session.model
    with (
        requiring_gradients(model.parameters(), False),
        requiring_gradients(parameters, True),
        torch.enable_grad(),
    ):
        output = session.call(model, next(iter(session.batches)))
        parts = [x.float().sum() for x in floating_tensors(output) if x.requires_grad]
        if not parts:
            raise ArgumentError(
                "tune: the model returns no floating-point tensor that can be differentiated with "
                f"respect to what is tuned{_WAY_OUT}"
            )
        try:
            torch.autograd.grad(torch.stack(parts).sum(), parameters, allow_unused=True)
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise ArgumentError(
                f"tune: the model's output cannot be differentiated: {text}{_WAY_OUT}"
            ) from error


@contextlib.contextmanager
def recomputing(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """For a while, blocks keep nothing of a forward pass for the backward pass but their inputs,
    and run once more then (Chen et al. 2016). Gradients are the same."""
    with contextlib.ExitStack() as scope:
        for block in blocks:
            again = functools.partial(checkpoint, block.forward, use_reentrant=False)
            scope.enter_context(with_forward(block, again))
        yield
