"""The user's model together with the calibration data: running it as it is, and as it was before
pruning."""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from lobs_native.calibration.hooks import unfused_attention, without_caches
from lobs_native.calibration.offload import Offload, forgotten, showing_originals
from lobs_native.calibration.padding import Padding, attended, tokens_of
from lobs_native.calibration.ranks import ALONE, Ranks
from lobs_native.calibration.seeding import seeded
from lobs_native.calibration.token_weights import TokenWeights
from lobs_native.calibration.unchanged import Unchanged
from lobs_native.errors import ArgumentError, DtypeError
from lobs_native.files.shelf import Shelf
from lobs_native.layers import Layer, overwrite

__all__ = ["Forward", "Session", "Source", "batches_of"]

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

    def each(
        self, label: str, start: int = 0, among: Container[int] | None = None
    ) -> Iterator[Any]:
        """The batches of one pass, without the first ``start``; only the numbers ``among`` some."""

    def each_held_back(self, label: str, among: Container[int] | None = None) -> Iterator[Any]:
        """The batches that nothing is calibrated on, likewise."""

    @property
    def ranks(self) -> Ranks:
        """The processes that share the work."""

    @property
    def batches(self) -> Sequence[Any]:
        """The batches of a whole pass."""

    def call(self, model: nn.Module, batch: Any) -> Any:
        """Run it on a batch."""

    def call_original(self, batch: Any) -> Any:
        """Run it, as it was before pruning, on a batch; :meth:`call` on the batch comes next."""

    def mask(self, batch: Any) -> Tensor | None:
        """(B, T) bool, True = counts; None if everything counts."""

    @property
    def told_by(self) -> str:
        """The kind of mask that :meth:`mask` last read."""

    def tokens(self, layer: Layer) -> Tensor | None:
        """Like :meth:`mask`, for the inputs of a layer in the call in progress, as the modules of
        torch around it were told; shaped as the leading dimensions of these inputs."""

    def token_weights(self, layers: Sequence[Layer], call: int) -> Tensor | None:
        """How much each row (n,) counts of what these layers read in this call of the first of
        them on the batch at hand; None if all rows count the same."""


@dataclass
class Session:
    """The model, the data, and how to run the one on the other."""

    model: nn.Module
    batches: Sequence[Any]
    forward: Forward | None
    device: torch.device | str | None
    seed: int
    progress: bool
    token_mask: bool = False  # leave out positions that masks declare to be padding
    held_back: Sequence[Any] = ()  # batches that nothing is calibrated on
    ranks: Ranks = ALONE
    offload: Offload | None = None  # where the parameters are, if not in memory
    classes: int | None = None  # how many classes logits are over, if that was said
    differing: frozenset[str] = frozenset()  # names of parameters that were never the original's
    padded: bool = field(default=False, init=False)  # whether any were left out
    told_by: str = field(default="attention_mask", init=False)  # the kind of mask of a batch
    originals: Shelf = field(
        default_factory=Shelf, init=False
    )  # parameters before pruning, by name
    before: Shelf | None = field(default=None, init=False)  # the same, if that is not the original
    changed: set[str] = field(default_factory=set, init=False)  # names of those unlike the original
    number: int = field(default=0, init=False)  # of the batch of a pass that was last begun
    weights: TokenWeights | None = field(default=None, init=False)
    swapped_limit: int | None = field(default=None, init=False)  # bytes of swapped ones in memory
    _unchanged: Unchanged = field(default_factory=Unchanged, init=False, repr=False)

    def call(self, model: nn.Module, batch: Any) -> Any:
        if self.device is not None:
            batch = _to(batch, self.device)
        with self._unchanged.given(batch) as given:
            return self._call(model, given)

    def _call(self, model: nn.Module, batch: Any) -> Any:
        if self.forward is not None:
            return self.forward(model, batch)
        if not isinstance(batch, (Tensor, Mapping, list, tuple)):
            raise DtypeError(
                f"calibration: a batch is a {type(batch).__name__}; pass tensors, tuples or dicts, "
                "or pass forward="
            )
        try:
            if isinstance(batch, Tensor):
                return model(batch)
            return model(**batch) if isinstance(batch, Mapping) else model(*batch)
        except TypeError as error:
            if (why := _misfit(model, batch)) is not None:
                raise ArgumentError(why) from error
            raise

    def size(self) -> float:
        """The size of the data, in units of its first batch."""
        if not isinstance(self.batches, list):
            return float(len(self.batches))
        first = _numel(self.batches[0])
        return sum(map(_numel, self.batches)) / first if first else float(len(self.batches))

    @property
    def first_is_largest(self) -> bool:
        """Whether the first batch stands for all in time and memory."""
        batches = self.batches
        return not isinstance(batches, list) or _numel(batches[0]) == max(map(_numel, batches))

    def timed_pass(self) -> tuple[float, Any]:
        """An estimate of the seconds of one pass over the data, and the output for one batch.

        It is the largest batch of a list, since small batches take longer than their share and have
        the smaller outputs, or else the first batch.
        """
        batch = next(iter(self.batches))
        times = float(len(self.batches))
        if isinstance(self.batches, list) and _numel(batch):
            batch = max(self.batches, key=_numel)
            times = sum(map(_numel, self.batches)) / _numel(batch)
        torch.manual_seed(self.seed)
        begun = time.perf_counter()
        output = self.call(self.model, batch)
        return times * (time.perf_counter() - begun), output

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
        named = {name: self._named[name] for name in names}
        with Shelf(self.swapped_limit) as present, showing_originals(self.offload, named) as copied:
            try:
                with _disable_current_modes():
                    for name in copied:
                        present.put(name, self._named[name].detach().clone())
                        overwrite(self._named[name], self.originals[name])
                yield
            finally:
                with _disable_current_modes():
                    for name, value in present.items():
                        overwrite(self._named[name], value)

    def unused(self, *values: Tensor) -> None:
        """Parameters among ``values`` are not needed for a while."""
        if self.offload is not None:
            self.offload.drop(values)

    def restore(self) -> None:
        """Give the pruned parameters the values that they had before."""
        before = self.originals if self.before is None else self.before
        named = {name: self._named[name] for name in self.changed if name in before}
        for name in forgotten(self.offload, named):
            overwrite(named[name], before[name])
        self.changed = set(self.differing)

    @functools.cached_property
    def _padding(self) -> Padding:
        return Padding(self.model)

    @functools.cached_property
    def _named(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def mask(self, batch: Any) -> Tensor | None:
        """(B, T) bool, False at padding; None if the batch has none or does not mark it.

        An encoder-decoder model's mask is ignored, since it could be of either side.
        """
        if not self.token_mask:
            return None
        given = self._arguments(batch)
        if "attention_mask" in given:
            two_sides = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
            tokens = None if two_sides else attended(given["attention_mask"])
            self.told_by = "attention_mask"
        elif "tgt_key_padding_mask" in given:  # two sides, see :meth:`tokens`
            return None
        else:
            tokens = self._in_rows(given.get("src_key_padding_mask"))
            self.told_by = "key_padding_mask"
        self.padded |= tokens is not None
        return tokens

    def output_mask(self, batch: Any) -> Tensor | None:
        """Like :meth:`mask`, for the model's output."""
        given = self._arguments(batch) if self.token_mask else {}
        if "tgt_key_padding_mask" not in given:
            return self.mask(batch)
        tokens = self._in_rows(given["tgt_key_padding_mask"])
        self.padded |= tokens is not None
        return tokens

    def tokens(self, layer: Layer) -> Tensor | None:
        """The rows of a layer's input that are tokens, as torch's attention was told; None if all
        are, or nothing is known."""
        return self._padding.tokens(layer)

    def token_weights(self, layers: Sequence[Layer], call: int) -> Tensor | None:
        """How much each row (n,) counts of what these layers read in this call of the first of
        them on the batch at hand; None if all rows count the same, or it is not known."""
        if self.weights is None:
            return None
        return self.weights.of([layer.name for layer in layers], self.number, call)

    def _arguments(self, batch: Any) -> Mapping[str, Any]:
        """What the model is called with, by name, as far as that is known."""
        if isinstance(batch, Mapping):
            return batch
        if self.forward is not None or not isinstance(batch, (list, tuple)):
            return {}
        try:
            return inspect.signature(self.model.forward).bind(*batch).arguments
        except (TypeError, ValueError):  # the call itself will tell what is wrong
            return {}

    def _in_rows(self, padding: Any) -> Tensor | None:
        """A key padding mask (B, T) as tokens, in the order of the model's rows."""
        tokens = tokens_of(padding)
        if tokens is None or tokens.ndim != 2:
            return tokens
        attention = [m for m in self.model.modules() if isinstance(m, nn.MultiheadAttention)]
        return tokens if all(m.batch_first for m in attention) else tokens.T

    def each(
        self, label: str, start: int = 0, among: Container[int] | None = None
    ) -> Iterator[Any]:
        """The batches of one pass without the first ``start``, with a progress bar; only the
        numbers ``among`` some. Each is seeded by its number, so that the random numbers on it do
        not depend on which others the model is run on."""
        return self._seeded(self.batches, label, start, among)

    def each_held_back(self, label: str, among: Container[int] | None = None) -> Iterator[Any]:
        """The batches that are held back, likewise."""
        return self._seeded(self.held_back, label, 0, among)

    def _seeded(
        self, batches: Sequence[Any], label: str, start: int, among: Container[int] | None
    ) -> Iterator[Any]:
        bar = tqdm(
            batches,
            desc=label,
            unit="batch",
            leave=False,
            disable=None if self.progress else True,
        )
        for number, batch in enumerate(seeded(bar, self.seed)):
            self.number = number
            if number >= start and (among is None or number in among):
                yield batch

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode, without gradients, caches of keys and values, and fused attention. All of it,
        and the random state, is restored at the end."""
        training = [module for module in self.model.modules() if module.training]
        try:
            self.model.eval()
            with contextlib.ExitStack() as scope:
                scope.enter_context(torch.inference_mode(False))
                scope.enter_context(torch.no_grad())
                scope.enter_context(torch.random.fork_rng(devices=self._devices()))
                scope.enter_context(unfused_attention())
                scope.enter_context(without_caches(self.model))
                if self.token_mask:
                    scope.enter_context(self._padding)
                yield
        finally:
            for module in training:
                module.training = True

    def _devices(self) -> list[int]:
        """The CUDA devices that hold parameters."""
        if not torch.cuda.is_initialized():  # a look at all parameters takes long, batch by batch
            return []
        return sorted(
            {p.device.index or 0 for p in self.model.parameters() if p.device.type == "cuda"}
        )


def _misfit(model: nn.Module, batch: Any) -> str | None:
    """Why the model cannot be called with a batch, and the way out; None if it can."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    if isinstance(batch, Mapping):
        given, args, kwargs = f"with the keys {', '.join(map(str, batch))}", (), batch
        way_out = "leave out what it does not take, such as labels"
    elif isinstance(batch, Tensor):
        given, args, kwargs = "that is one tensor", (batch,), {}
        way_out = "pass a tuple or dict"
    else:
        given, args, kwargs = f"of {len(batch)} parts", tuple(batch), {}
        way_out = "of (inputs, labels), pass the inputs only"
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        takes = ", ".join(signature.parameters)
        return (
            f"calibration: a batch {given} does not fit {type(model).__name__}.forward({takes}): "
            f"{error}; {way_out}, or say how to call it by forward=, for example "
            "forward=lambda model, batch: model(batch[0])"
        )
    return None
