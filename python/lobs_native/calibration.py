"""Running the user's model on the data: for statistics, and for the change of its output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lobs_native.errors import ArgumentError, DtypeError, NonFiniteError
from lobs_native.hessian import Hessian
from lobs_native.layers import Layer

__all__ = ["Forward", "Run", "batches_of", "calibrate", "hooked", "measure_change"]

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


@dataclass
class Run:
    """The model and the data, and how to bring them together."""

    model: nn.Module
    batches: Sequence[Any]
    forward: Forward | None
    device: torch.device | str | None
    seed: int
    progress: bool

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


@contextlib.contextmanager
def hooked(layers: Iterable[Layer], see: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """Call ``see(layer, input)`` at every forward of every layer."""

    def hook_for(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            if not isinstance(x, Tensor):
                raise DtypeError(
                    f"layer {layer.name!r}: called with a {type(x).__name__} instead of a tensor"
                )
            see(layer, x)

        return hook

    handles = [
        layer.module.register_forward_pre_hook(hook_for(layer), with_kwargs=True)
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def calibrate(layers: Sequence[Layer], run: Run, what: str) -> dict[str, list[Hessian]]:
    """One pass over the data: name -> a Hessian for every group."""
    moments = {
        layer.name: [
            Hessian(layer.width, bias=layer.bias() is not None, device=layer.weight().device)
            for _ in range(layer.groups)
        ]
        for layer in layers
    }

    def see(layer: Layer, x: Tensor) -> None:
        try:
            for group, rows in layer.columns(x):
                moments[layer.name][group].update(rows)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"layer {layer.name!r}: its input on the calibration data: {error}"
            ) from error

    with hooked(layers, see):
        for batch in run.each(what):
            run.call(run.model, batch)
    return moments


class _Caller(nn.Module):
    """The user's way of calling the model, as a module, so that functional_call can swap weights
    under it."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, batch: Any) -> Any:
        return self.call(self.model, batch)


def measure_change(run: Run, originals: Mapping[str, Tensor]) -> tuple[float, float, float] | None:
    """(||output - original||_F^2, ||original||_F^2, rows) over the data; None if outputs are not
    floating-point tensors."""
    caller = _Caller(run.model, run.call)
    dense = {f"model.{name}": value for name, value in originals.items()}
    difference = size = rows = 0.0
    for batch in run.each("measure"):
        now = run.call(run.model, batch)
        if not isinstance(now, Tensor) or not now.is_floating_point() or now.ndim == 0:
            return None
        before = torch.func.functional_call(caller, dense, (batch,))
        difference += float((now.double() - before.double()).square().sum())
        size += float(before.double().square().sum())
        rows += now.numel() / now.shape[-1]
    return difference, size, rows
