"""Running the user's model on the data: for statistics, and for the change of its output."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lobs_native.errors import ArgumentError, DtypeError, NonFiniteError
from lobs_native.hessian import Hessian
from lobs_native.layers import Layer, Matrix, Watch
from lobs_native.weight import few_rows

__all__ = [
    "Forward",
    "Moments",
    "Run",
    "Source",
    "batches_of",
    "calibrate",
    "hooked",
    "measure_change",
]

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


class Source(Protocol):
    """Something that can be run on batches: the model on the user's, or a part of it."""

    @property
    def model(self) -> nn.Module: ...

    def each(self, what: str) -> Iterator[Any]:
        """The batches of one pass."""

    def call(self, model: nn.Module, batch: Any) -> Any:
        """Run it on a batch."""

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

    def each(self, what: str) -> Iterator[Any]:
        """The batches of one pass, seeded, with a progress bar."""
        torch.manual_seed(self.seed)
        bar = tqdm(
            self.batches,
            desc=what,
            unit="batch",
            leave=False,
            disable=None if self.progress else True,
        )
        yield from bar

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode, no gradients, the caller's random state kept; all of it undone at the end."""
        training = [module for module in self.model.modules() if module.training]
        cuda = sorted(
            {p.device.index or 0 for p in self.model.parameters() if p.device.type == "cuda"}
        )
        try:
            self.model.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=cuda):
                yield
        finally:
            for module in training:
                module.training = True


See = Callable[[Layer, Tensor, Iterable[tuple[int, Tensor]]], Any]


@contextlib.contextmanager
def hooked(layers: Sequence[Layer], see: See) -> Iterator[None]:
    """Call ``see(layer, inputs, pieces)`` whenever the model gives inputs to a layer; ``pieces``
    yields them as (group, X)."""

    def hook_for(layer: Layer, site: Layer) -> Callable[..., None]:
        signature = inspect.signature(type(site.module).forward)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _, *given = signature.bind(module, *args, **kwargs).args
            if not given or not isinstance(given[0], Tensor):
                what = type(given[0]).__name__ if given else "no argument"
                raise DtypeError(f"layer {site.name!r}: called with {what} instead of a tensor")
            see(layer, given[0], site.columns(*given))

        return hook

    def seen(layer: Layer, group: int, x: Tensor) -> None:
        see(layer, x, [(group, x)])

    with contextlib.ExitStack() as scope:
        # torch's fused attention would hide the inputs of its output projection
        scope.callback(torch.backends.mha.set_fastpath_enabled, _fast_path())
        torch.backends.mha.set_fastpath_enabled(False)
        for layer in layers:
            scope.enter_context(layer.running())
            for site in layer.sites if not layer.watched else ():
                hook = hook_for(layer, site)
                handle = site.module.register_forward_pre_hook(hook, with_kwargs=True)
                scope.callback(handle.remove)
        if watched := [layer for layer in layers if isinstance(layer, Matrix)]:
            scope.enter_context(Watch(watched, seen))
        yield


def _fast_path() -> bool:
    return bool(torch.backends.mha.get_fastpath_enabled())


class Moments(list[Hessian]):
    """The second moments of a layer's groups, and what there is to say about them."""

    def __init__(self, layer: Layer) -> None:
        bias, device = layer.bias() is not None, layer.weight().device
        super().__init__(
            Hessian(layer.width, bias=bias, device=device) for _ in range(layer.groups)
        )
        self.layer = layer
        self.padding = 0  # rows left out
        self.unmasked = False  # whether a mask did not fit

    @property
    def rows(self) -> float:
        """Rows that the layer saw; of all experts together."""
        return sum(h.rows for h in self) if self.layer.routed else self[0].rows

    def matrices(self) -> list[Tensor]:
        """The second moments. An expert that saw no row gets the mean one without correlations:
        removing by magnitude."""
        seen = [h for h in self if h.rows > 0]
        if len(seen) == len(self) or not seen or not self.layer.routed:
            return [h.matrix() for h in self]
        found = {id(h): h.matrix() for h in seen}
        C = self.layer.width
        size = sum(float(H.diagonal()[:C].mean()) for H in found.values()) / len(found)
        unseen = torch.ones(next(iter(found.values())).shape[0], dtype=torch.float64)
        unseen[:C] = size or 1.0
        return [found.get(id(h), torch.diag(unseen).to(h.device)) for h in self]

    def notes(self) -> list[str]:
        """What a report should say."""
        notes = []
        C, few = self.layer.width, [h.rows for h in self if h.rows < self.layer.width]
        unseen = [str(g) for g, h in enumerate(self) if h.rows == 0]
        if few and not self.layer.routed:
            notes.append(few_rows(min(few), C))
        elif few:
            if unseen:
                notes.append(
                    f"{len(unseen)} of {len(self)} experts saw no row and were pruned by "
                    f"magnitude: {', '.join(unseen)}"
                )
            if some := [n for n in few if n > 0]:
                notes.append(f"{len(some)} of {len(self)} experts: {few_rows(min(some), C)}")
        if self.padding:
            notes.append(f"{self.padding} rows were padding (attention_mask) and were left out")
        if self.unmasked:
            notes.append(
                "padding was counted: the inputs are not (batch, length, width) as attention_mask "
                "has them"
            )
        return notes


def calibrate(layers: Sequence[Layer], run: Source, what: str) -> dict[str, Moments]:
    """One pass over the data: name -> a Hessian for every group."""
    moments = {layer.name: Moments(layer) for layer in layers}
    mask: Tensor | None = None

    def see(layer: Layer, x: Tensor, pieces: Iterable[tuple[int, Tensor]]) -> None:
        mine, weights = moments[layer.name], None
        if mask is not None and layer.token_rows and x.shape[:-1] == mask.shape:
            weights = mask.reshape(-1).to(device=x.device, dtype=torch.float64)
            mine.padding += int((weights == 0).sum())
        elif mask is not None:
            mine.unmasked = True
        try:
            for group, rows in pieces:
                mine[group].update(rows, weights)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"layer {layer.name!r}: its input on the calibration data: {error}"
            ) from error

    with hooked(layers, see):
        for batch in run.each(what):
            mask = run.mask(batch)
            run.call(run.model, batch)
    return moments


@contextlib.contextmanager
def _holding(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters with other values for a while. They are copied in and out: swapping the tensors
    themselves (torch.func.functional_call) goes wrong where a module has two names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept = {name: parameters[name].detach().clone() for name in values}
    try:
        for name, value in values.items():
            parameters[name].copy_(value)
        yield
    finally:
        for name, value in kept.items():
            parameters[name].copy_(value)


@torch.no_grad()
def measure_change(run: Run, originals: Mapping[str, Tensor]) -> tuple[float, float, float] | None:
    """(||output - original||_F^2, ||original||_F^2, rows) over the data; None if outputs are not
    floating-point tensors."""
    difference = size = rows = 0.0
    for batch in run.each("measure"):
        now = run.call(run.model, batch)
        if not isinstance(now, Tensor) or not now.is_floating_point() or now.ndim == 0:
            return None
        with _holding(run.model, originals):
            before = run.call(run.model, batch)
        difference += float((now.double() - before.double()).square().sum())
        size += float(before.double().square().sum())
        rows += now.numel() / now.shape[-1]
    return difference, size, rows
