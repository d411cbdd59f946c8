"""Running the user's model on the data: as it is, as it was, and with an eye on what its layers
read."""

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
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from lobs_native.errors import ArgumentError, DtypeError
from lobs_native.files.shelf import Shelf

__all__ = ["Forward", "Run", "Source", "batches_of", "measure_change"]

Forward = Callable[[nn.Module, Any], Any]


def batches_of(calibration: Any) -> Sequence[Any]:
    """The batches as something that can be gone through again and has a length."""
    if isinstance(calibration, (Tensor, str, bytes, Mapping)) or not isinstance(
        calibration, Iterable
    ):
        raise DtypeError(
            f"calibration: expected an iterable of batches, got {type(calibration).__name__}; "
            "wrap a single batch in a list"
        )
    again = not isinstance(calibration, Iterator)
    if again and hasattr(calibration, "__len__"):
        batches: Any = calibration
    else:
        batches = list(calibration)
    if len(batches) == 0:
        raise ArgumentError("calibration: it is empty; give at least one batch")
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
    """Something that can be run on batches: the model on the user's, or a part of it."""

    @property
    def model(self) -> nn.Module: ...

    def each(self, what: str, start: int = 0) -> Iterator[Any]:
        """The batches of one pass, without the first ``start``."""

    @property
    def batches(self) -> Sequence[Any]:
        """Those of every pass."""

    def call(self, model: nn.Module, batch: Any) -> Any:
        """Run it on a batch."""

    def call_original(self, batch: Any) -> Any:
        """Run it on a batch as it was before anything was pruned; :meth:`call` comes after it."""

    def mask(self, batch: Any) -> Tensor | None:
        """(B, T) bool, True = counts; None where everything does."""


@dataclass
class Run:
    """The model and the data, and how to bring them together."""

    model: nn.Module
    batches: Sequence[Any]
    forward: Forward | None
    device: torch.device | str | None
    seed: int
    progress: bool
    token_mask: bool = False  # leave out what the batches' attention_mask leaves out
    padded: bool = field(default=False, init=False)  # whether it left anything out
    originals: Shelf = field(default_factory=Shelf, init=False)  # parameters from before, by name
    changed: set[str] = field(default_factory=set, init=False)  # those that are others now
    swapped_limit: int | None = field(default=None, init=False)  # bytes of those in memory

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
            f"calibration: a batch is a {type(batch).__name__}; give tensors, tuples or dicts, "
            "or pass forward="
        )

    def size(self) -> float:
        """How many batches there are, in units of the first one."""
        if not isinstance(self.batches, list):
            return float(len(self.batches))
        first = _numel(self.batches[0])
        return sum(map(_numel, self.batches)) / first if first else float(len(self.batches))

    def pass_seconds(self) -> float:
        """About how long one pass over the data takes, judged by the largest batch of a list, or
        else by the first one: small ones take longer than their share."""
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
        """Run the original network; the random state is left as it was."""
        with self.original():
            return self.call(self.model, batch)

    @contextlib.contextmanager
    def original(self, part: nn.Module | None = None) -> Iterator[None]:
        """The model, or the ``part`` of it that is run, is the original network for a while; its
        random numbers are not counted."""
        names = sorted(self.changed)
        if part is not None:
            inside = {id(p) for p in part.parameters()}
            names = [name for name in names if id(self._named[name]) in inside]
        with torch.random.fork_rng(devices=self._devices()), self._holding(names):
            yield

    @contextlib.contextmanager
    def _holding(self, names: Iterable[str]) -> Iterator[None]:
        """Copied in and out: swapping the tensors themselves (torch.func.functional_call) goes
        wrong where a module has two names."""
        with Shelf(self.swapped_limit) as kept:
            try:
                for name in names:
                    kept.put(name, self._named[name].detach().clone())
                    self._named[name].copy_(self.originals[name])
                yield
            finally:
                for name, value in kept.items():
                    self._named[name].copy_(value)

    @functools.cached_property
    def _named(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def mask(self, batch: Any) -> Tensor | None:
        """(B, T) bool, False at padding, if the batch says where that is."""
        if not self.token_mask or not isinstance(batch, Mapping):
            return None
        given = batch.get("attention_mask")
        two_sides = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        if not isinstance(given, Tensor) or given.ndim != 2 or two_sides:
            return None
        mask = given != 0
        if bool(mask.all()) or bool((mask & (given != 1)).any()):
            return None
        self.padded = True
        return mask

    def each(self, what: str, start: int = 0) -> Iterator[Any]:
        """The batches of one pass without the first ``start``, seeded, with a progress bar."""
        torch.manual_seed(self.seed)
        bar = tqdm(
            self.batches,
            desc=what,
            unit="batch",
            leave=False,
            disable=None if self.progress else True,
        )
        yield from itertools.islice(bar, start, None)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode, no gradients, the caller's random state kept; all of it undone at the end."""
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
def measure_change(run: Run) -> tuple[float, float, float] | None:
    """(||output - original||_F^2, ||original||_F^2, rows) over the data; None if outputs are not
    floating-point tensors."""
    difference = size = rows = 0.0
    for batch in run.each("measure"):
        run.mask(batch)  # notes whether there is padding, where no layer was calibrated
        before = run.call_original(batch)
        now = run.call(run.model, batch)
        if not isinstance(now, Tensor) or not now.is_floating_point() or now.ndim == 0:
            return None
        difference += float((now.double() - before.double()).square().sum())
        size += float(before.double().square().sum())
        rows += now.numel() / now.shape[-1]
    return difference, size, rows
