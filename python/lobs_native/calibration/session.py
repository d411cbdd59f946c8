"""The user's model together with the calibration data: running it as it is, and as it was before
pruning."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from lobs_native.errors import ArgumentError, DtypeError
from lobs_native.files.shelf import Shelf

__all__ = ["Forward", "Session", "Source", "batches_of", "measure_change"]

Forward = Callable[[nn.Module, Any], Any]


def batches_of(calibration: Any) -> Sequence[Any]:
    """The batches as a sequence that can be iterated repeatedly and has a length."""
    if isinstance(calibration, (Tensor, str, bytes, Mapping)) or not isinstance(
        calibration, Iterable
    ):
        raise DtypeError(
            f"calibration: expected an iterable of batches, got {type(calibration).__name__}; "
            "wrap a single batch in a list"
        )
    repeatable = not isinstance(calibration, Iterator)
    if repeatable and hasattr(calibration, "__len__"):
        batches: Any = calibration
    else:
        batches = list(calibration)
    if len(batches) == 0:
        raise ArgumentError("calibration: empty; pass at least one batch")
    return batches  # type: ignore[no-any-return]


def _to(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: _to(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to(v, device) for v in value]
    return value


def _numel(batch: Any) -> int:
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return sum(x.numel() for x in tree_leaves(batch) if isinstance(x, Tensor))


class Source(Protocol):
    """Something that can be run on batches: the whole model, or a part of it."""

    @property
    def model(self) -> nn.Module: ...

    def each(self, label: str, start: int = 0) -> Iterator[Any]:
        """The batches of one pass, without the first ``start``."""

    @property
    def batches(self) -> Sequence[Any]:
        """The batches of a whole pass."""

    def call(self, model: nn.Module, batch: Any) -> Any:
        """Run it on a batch."""

    def call_original(self, batch: Any) -> Any:
        """Run it, as it was before pruning, on a batch; :meth:`call` on the batch comes next."""

    def mask(self, batch: Any) -> Tensor | None:
        """(B, T) bool, True = counts; None if everything counts."""


@dataclass
class Session:
    """The model, the data, and how to run the one on the other."""

    model: nn.Module
    batches: Sequence[Any]
    forward: Forward | None
    device: torch.device | str | None
    seed: int
    progress: bool
    token_mask: bool = False  # leave out positions where a batch's attention_mask is 0
    padded: bool = field(default=False, init=False)  # whether any were left out
    originals: Shelf = field(
        default_factory=Shelf, init=False
    )  # parameters before pruning, by name
    changed: set[str] = field(default_factory=set, init=False)  # names of the parameters pruned
    swapped_limit: int | None = field(default=None, init=False)  # bytes of swapped ones in memory

    def call(self, model: nn.Module, batch: Any) -> Any:
        if self.device is not None:
            batch = _to(batch, self.device)
        if self.forward is not None:
            return self.forward(model, batch)
        if isinstance(batch, Tensor):
            return model(batch)
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, (list, tuple)):
            return model(*batch)
        raise DtypeError(
            f"calibration: a batch is a {type(batch).__name__}; pass tensors, tuples or dicts, "
            "or pass forward="
        )

    def size(self) -> float:
        """The size of the data, in units of its first batch."""
        if not isinstance(self.batches, list):
            return float(len(self.batches))
        first = _numel(self.batches[0])
        return sum(map(_numel, self.batches)) / first if first else float(len(self.batches))

    def pass_seconds(self) -> float:
        """An estimate of the duration of one pass over the data.

        It is measured on the largest batch of a list, since small batches take longer than their
        share, or else on the first batch.
        """
        batch = next(iter(self.batches))
        times = float(len(self.batches))
        if isinstance(self.batches, list) and _numel(batch):
            batch = max(self.batches, key=_numel)
            times = sum(map(_numel, self.batches)) / _numel(batch)
        torch.manual_seed(self.seed)
        begun = time.perf_counter()
        self.call(self.model, batch)
        return times * (time.perf_counter() - begun)

    def call_original(self, batch: Any) -> Any:
        """Run the original network, leaving the random state as it was."""
        with self.original():
            return self.call(self.model, batch)

    @contextlib.contextmanager
    def original(self, part: nn.Module | None = None) -> Iterator[None]:
        """Make the model, or the ``part`` of it that is to be run, the original network for a
        while. The random state is restored afterwards."""
        names = sorted(self.changed)
        if part is not None:
            inside = {id(p) for p in part.parameters()}
            names = [name for name in names if id(self._named[name]) in inside]
        with torch.random.fork_rng(devices=self._devices()), self._holding_originals(names):
            yield

    @contextlib.contextmanager
    def _holding_originals(self, names: Iterable[str]) -> Iterator[None]:
        """Copy original values in, and the present ones back at the end. Swapping the tensors
        (torch.func.functional_call) fails if a module has two names. Copies are no uses of a weight
        that is watched; one parameter may hold a pruned and a watched layer (attention)."""
        with Shelf(self.swapped_limit) as present:
            try:
                with _disable_current_modes():
                    for name in names:
                        present.put(name, self._named[name].detach().clone())
                        self._named[name].copy_(self.originals[name])
                yield
            finally:
                with _disable_current_modes():
                    for name, value in present.items():
                        self._named[name].copy_(value)

    @functools.cached_property
    def _named(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def mask(self, batch: Any) -> Tensor | None:
        """(B, T) bool, False at padding; None if the batch has none or does not mark it.

        An encoder-decoder model's mask is ignored, since it could be of either side.
        """
        if not self.token_mask or not isinstance(batch, Mapping):
            return None
        attention_mask = batch.get("attention_mask")
        two_sides = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or two_sides:
            return None
        mask = attention_mask != 0
        if bool(mask.all()) or bool((mask & (attention_mask != 1)).any()):
            return None
        self.padded = True
        return mask

    def each(self, label: str, start: int = 0) -> Iterator[Any]:
        """The batches of one pass without the first ``start``, seeded, with a progress bar."""
        torch.manual_seed(self.seed)
        bar = tqdm(
            self.batches,
            desc=label,
            unit="batch",
            leave=False,
            disable=None if self.progress else True,
        )
        yield from itertools.islice(bar, start, None)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode and no gradients. Modes and the random state are restored at the end."""
        training = [module for module in self.model.modules() if module.training]
        try:
            self.model.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=self._devices()):
                yield
        finally:
            for module in training:
                module.training = True

    def _devices(self) -> list[int]:
        return sorted(
            {p.device.index or 0 for p in self.model.parameters() if p.device.type == "cuda"}
        )


@torch.no_grad()
def measure_change(session: Session) -> tuple[float, float, float] | None:
    """(||output - original||_F^2, ||original||_F^2, rows) over the data; None unless outputs are
    floating-point tensors."""
    difference = size = rows = 0.0
    for batch in session.each("measure"):
        session.mask(batch)  # records whether there is padding, even if no layer was calibrated
        before = session.call_original(batch)
        now = session.call(session.model, batch)
        if not isinstance(now, Tensor) or not now.is_floating_point() or now.ndim == 0:
            return None
        difference += float((now.double() - before.double()).square().sum())
        size += float(before.double().square().sum())
        rows += now.numel() / now.shape[-1]
    return difference, size, rows
