"""The sensitivity of the network's output to the output of each layer.

For an output unit of a layer it is the mean square, over calibration rows and random directions v,
of the gradient of ``v . output``: the diagonal of the Gauss-Newton matrix of the squared change of
the output. A removal that costs ``e`` in a row of the layer changes the network's output by about
``e`` times the row's sensitivity, which makes rows and layers comparable. The same gradients tell
how much each token counts: see :mod:`lobs_native.calibration.token_weights`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.calibration.hooks import attached
from lobs_native.calibration.outputs import floating_tensors, tokens_in
from lobs_native.calibration.partial import States, resumable
from lobs_native.calibration.session import Session
from lobs_native.calibration.token_weights import TokenWeights
from lobs_native.calibration.tree import Summing
from lobs_native.errors import ArgumentError, NonFiniteError
from lobs_native.layers import Layer

__all__ = ["requiring_gradients", "sensitivities"]

_WAY_OUT = "; pass sensitivity=None"
_AT_ONCE = 256  # rows of gradients converted to float64, which stay in the cache
_LARGEST = 2.0**12  # what the largest float16 gradient is scaled to at most
_ATTEMPTS = 6  # backward passes for one batch at most


def sensitivities(
    session: Session,
    layers: Sequence[Layer],
    states: States | None = None,
    tokens: TokenWeights | None = None,
) -> dict[str, Tensor]:
    """Measure sensitivities in one pass over the data, with a backward pass for each batch.

    It needs no labels, and weights get no gradients. The sums are saved in ``states`` along the
    way. ``tokens`` is filled with the weights of all rows of these layers' inputs.

    Returns
    -------
    {name: (G, R) float64}
        For the layers that the output depends on and whose output is the output of a module (that
        of attention projections and experts is not). Float16 gradients are kept in range by a
        scale; a layer where all of them are too small nevertheless is missing.

    Raises
    ------
    ArgumentError
        The output cannot be differentiated.
    NonFiniteError
        A gradient is NaN or infinite.
    """
    state = (*session.model.parameters(), *session.model.buffers())
    if any(tensor.is_inference() for tensor in state):
        raise ArgumentError(
            "sensitivity: the model was made or loaded inside torch.inference_mode(), so that "
            f"nothing can be differentiated; make it outside{_WAY_OUT}"
        )
    meters = [_Meter(layer, tokens) for layer in layers if not layer.watched]
    sums = _Meters(meters, tokens)
    half = any(tensor.dtype == torch.float16 for tensor in state)
    with requiring_gradients(session.model.parameters(), False), torch.enable_grad():
        names = [meter.layer.name for meter in meters]
        for batch in resumable(session, "sensitivity", "sensitivity", names, sums, states):
            mask = session.mask(batch)
            with attached([handle for meter in meters for handle in meter.handles(session, mask)]):
                output = session.call(session.model, batch)
            projected = _projected(output, session.output_mask(batch))
            try:
                _backward(projected, meters, session.number, again=half)
            except RuntimeError as error:
                text = " ".join(str(error).split())
                raise ArgumentError(
                    f"sensitivity: the model's output cannot be differentiated: {text}{_WAY_OUT}"
                ) from error
    result = {}
    for meter in meters:
        if not meter.seen or (meter.half and not bool(meter.sum.any())):
            continue  # not reached; or below the range of float16
        value = meter.sum / max(1, meter.rows)
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"layer {meter.layer.name!r}: NaN or infinity in the gradient of the output"
                f"{_WAY_OUT}"
            )
        result[meter.layer.name] = value.reshape(meter.layer.groups, meter.layer.rows)
    return result


def _backward(projected: Tensor, meters: Sequence[_Meter], batch: int, *, again: bool) -> None:
    """Add the squared gradients of ``projected`` for a batch to the meters. Float16 gradients are
    computed ``again``, multiplied by a power of two, if the largest is not well within the range.
    """
    scale = 1.0
    for _ in range(_ATTEMPTS if again else 1):
        for meter in meters:
            meter.begin()
        projected.backward(torch.full_like(projected, scale), retain_graph=again)
        largest = max((meter.largest for meter in meters), default=0.0)
        if math.isinf(largest):
            scale /= 2**10
        elif 0 < largest < _LARGEST / 16:
            scale *= 2.0 ** math.floor(math.log2(_LARGEST / largest))
        else:
            break
    for meter in meters:
        meter.add(scale, batch)


@contextlib.contextmanager
def requiring_gradients(parameters: Iterable[nn.Parameter], wanted: bool) -> Iterator[None]:
    """Parameters require gradients, or none does, for a while."""
    others = [p for p in parameters if p.requires_grad != wanted]
    try:
        for p in others:
            p.requires_grad_(wanted)
        yield
    finally:
        for p in others:
            p.requires_grad_(not wanted)


def _projected(output: Any, mask: Tensor | None) -> Tensor:
    """The inner product of all that the model returns, except padding, with a random vector."""
    total: Tensor | None = None
    for x in floating_tensors(output):
        if not x.requires_grad:
            continue
        v = torch.randn(x.shape, dtype=torch.float32).to(device=x.device, dtype=x.dtype)
        if (tokens := tokens_in(x, mask)) is not None:
            v *= tokens
        part = (x * v).sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        total = part if total is None else total + part
    if total is None:
        raise ArgumentError(
            f"sensitivity: the model returns no tensor that can be differentiated{_WAY_OUT}"
        )
    return total


class _Meter:
    """The sum of the squared gradients at a layer's outputs; with ``tokens``, also their mean for
    each row."""

    def __init__(self, layer: Layer, tokens: TokenWeights | None) -> None:
        self.layer = layer
        self.tokens = tokens
        device = layer.weight().device
        self.sum = torch.zeros(layer.groups * layer.rows, dtype=torch.float64, device=device)
        self.latest = torch.zeros_like(self.sum)  # of one backward pass
        self.largest = 0.0  # size of a gradient in it; infinite if one is not finite
        self.probe = torch.zeros((), device=device, requires_grad=True)
        self.rows = 0
        self.seen = False
        self.half = layer.weight().dtype == torch.float16
        self._counted: list[tuple[Tensor | None, int]] = []  # by call: which rows, how many
        self._squares: dict[int, Tensor] = {}  # by call, of one backward pass

    def begin(self) -> None:
        """Forget the last backward pass."""
        self.latest.zero_()
        self.largest = 0.0
        self._squares.clear()

    def add(self, scale: float, batch: int) -> None:
        """Count the last backward pass, whose gradients were multiplied by ``scale``."""
        self.sum += self.latest / scale**2
        if self.tokens is not None:
            for call, squares in self._squares.items():
                counted, rows = self._counted[call]
                if counted is not None:
                    squares = torch.where(counted.reshape(-1), squares, 0)
                self.tokens.add(self.layer.name, batch, call, squares / scale**2, rows)

    def handles(self, session: Session, mask: Tensor | None) -> list[Any]:
        """Hooks for one forward."""
        self._counted = []

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            usable = isinstance(output, Tensor) and not output.is_nested
            units = self.layer.units(output) if usable else None
            call = len(self._counted)
            self._counted.append((None, 0))
            if units is None:
                return output
            # Adding the zero probe makes the output require grad, whatever the input does.
            probed = output + self.probe.to(output.dtype)
            if not probed.requires_grad:  # under the model's own no_grad
                return output
            tokens = session.tokens(self.layer)
            counted = mask if tokens is None else tokens
            if counted is not None and output.shape[:-1] != counted.shape:
                counted = None
            rows = len(units) if counted is None else int(counted.sum())
            self._counted[call] = (counted, rows)
            self.rows += rows
            probed.register_hook(functools.partial(self._add, call))
            return probed

        return [site.caller.register_forward_hook(leave) for site in self.layer.sites]

    def _add(self, call: int, gradient: Tensor) -> None:
        units = self.layer.units(gradient)
        assert units is not None
        self.seen = True
        if units.dtype == torch.float16:
            largest = float(units.abs().amax()) if units.numel() else 0.0
            self.largest = max(self.largest, largest if math.isfinite(largest) else math.inf)
        each = []
        for part in units.split(_AT_ONCE):
            squares = part.to(torch.float64, copy=True).square_()
            self.latest += squares.sum(0)
            if self.tokens is not None:
                each.append(squares.mean(1))
        if each:
            self._squares[call] = torch.cat(each)


class _Meters(Summing):
    """Meters as sums over the data."""

    def __init__(self, meters: Sequence[_Meter], tokens: TokenWeights | None) -> None:
        self.meters = meters
        self.tokens = tokens

    def tensors(self) -> dict[str, Tensor]:
        return {meter.layer.name: meter.sum for meter in self.meters}

    def values(self) -> dict[str, Any]:
        return {meter.layer.name: [meter.rows, meter.seen] for meter in self.meters}

    def set_values(self, values: Mapping[str, Any]) -> None:
        for meter in self.meters:
            rows, seen = values[meter.layer.name]
            meter.rows, meter.seen = int(rows), bool(seen)

    @property
    def keeps_batches(self) -> bool:
        return self.tokens is not None

    def of_batches(self) -> Mapping[str, Tensor]:
        return {} if self.tokens is None else self.tokens.kept()

    def bytes_of_batches(self) -> int:
        return 0 if self.tokens is None else self.tokens.size

    def add_of_batches(self, tensors: Mapping[str, Tensor]) -> None:
        if self.tokens is not None:
            self.tokens.restore(tensors)
