"""Measured times of layers at sizes that they may get, and what a network of such sizes takes."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lobs_native import ops
from lobs_native.calibration.hooks import attached, first_argument
from lobs_native.calibration.session import Session
from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.files.atomic import write_file
from lobs_native.files.strict_json import parse_json
from lobs_native.network.shrinking.units import inputs_axis

__all__ = ["LatencyTable", "inputs_of", "least_seconds", "table_of"]

_SECONDS = 0.03  # each size is run for so long, at least _RUNS times; the least time counts
_RUNS = 10
_FORMAT = "lobs-native latency table"


class LatencyTable:
    """Seconds of layers by (outputs, inputs). Sizes that are asked for are measured once, on this
    machine; :meth:`save` and :meth:`load` keep them.

    A layer goes by what its time depends on besides: its kind, what a convolution is called with,
    the shape of its input, dtype, device and the number of threads.
    """

    def __init__(self, times: Mapping[str, Mapping[tuple[int, int], float]] | None = None) -> None:
        self.times = {key: dict(of) for key, of in (times or {}).items()}

    def seconds(self, layer: nn.Module, shape: Sequence[int], weight: Sequence[int]) -> float:
        """Of a call on an input of ``shape``, if the layer's weight had the shape ``weight``.

        Nothing is interpolated: kernels are made for multiples of some number, and 20 channels can
        take three times as long as 16."""
        outputs, inputs = size = _sizes(layer, weight)
        of = self.times.setdefault(_key(layer, shape), {})
        if size not in of:
            small, x = _resized(layer, shape, outputs, inputs)
            of[size] = least_seconds(lambda: small(x), x.device)
        return of[size]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        times = {key: [[*size, t] for size, t in of.items()] for key, of in self.times.items()}
        write_file(Path(path), json.dumps({"format": _FORMAT, "times": times}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read what :meth:`save` wrote. ArgumentError if it is not that."""
        try:
            content = parse_json(Path(path).read_bytes(), "latency_table")
            if content["format"] != _FORMAT:
                raise ValueError(content["format"])
            return cls(
                {
                    str(key): {(int(r), int(c)): float(t) for r, c, t in of}
                    for key, of in content["times"].items()
                }
            )
        except (OSError, CheckpointError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(
                f"latency_table: {os.fspath(path)!r} is no table of times ({error}); pass another "
                "name, and one is written there"
            ) from error


def table_of(path: str | os.PathLike[str] | None) -> LatencyTable:
    """The table in a file, if there is one."""
    return LatencyTable.load(path) if path is not None and Path(path).exists() else LatencyTable()


@torch.no_grad()
def least_seconds(run: Any, device: torch.device) -> float:
    """The least time of a call, of several. On one thread it is that of the processor: on a machine
    that is busy with other things, every call may be interrupted."""
    own = device.type == "cpu" and ops.threads() == 1
    now = time.thread_time if own else time.perf_counter
    times: list[float] = []
    run()
    while len(times) < _RUNS or sum(times) < _SECONDS:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = now()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(now() - begun)
    return min(times)


def inputs_of(
    layers: Iterable[nn.Module], session: Session, batch: Any
) -> dict[nn.Module, list[tuple[int, ...]]]:
    """The shapes of the inputs of these layers' calls on a batch; inside
    :meth:`Session.evaluating`."""
    shapes: dict[nn.Module, list[tuple[int, ...]]] = {}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(x := first_argument(args, kwargs), Tensor):
            shapes.setdefault(module, []).append(tuple(x.shape))

    with attached(layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers):
        session.call(session.model, batch)
    return shapes


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, _ConvNd) and layer.groups > 1


def _sizes(layer: nn.Module, weight: Sequence[int]) -> tuple[int, int]:
    """The outputs and inputs of a layer with a weight of this shape."""
    if _is_depthwise(layer):
        return weight[0], weight[0]
    inside = inputs_axis(layer)
    return weight[1 - inside], weight[inside]


def _features_axis(layer: nn.Module) -> int:
    """The dimension of a layer's inputs in its input."""
    return -len(layer.kernel_size) - 1 if isinstance(layer, _ConvNd) else -1


def _key(layer: nn.Module, shape: Sequence[int]) -> str:
    """What the time of a layer depends on besides its sizes."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    parts: list[Any] = [
        type(layer).__name__,
        str(weight.dtype).removeprefix("torch."),
        str(weight.device),
    ]
    rest = list(shape)
    rest[_features_axis(layer)] = -1
    if isinstance(layer, _ConvNd):
        parts += [layer.kernel_size, layer.stride, layer.padding, layer.dilation]
        parts.append("depthwise" if _is_depthwise(layer) else "whole")
    return " ".join(map(str, [*parts, tuple(rest), f"{ops.threads()} threads"]))


def _resized(
    layer: nn.Module, shape: Sequence[int], outputs: int, inputs: int
) -> tuple[nn.Module, Tensor]:
    """A layer of this kind with other sizes and random weights, and an input of it."""
    small, size = copy.deepcopy(layer), list(shape)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    size[_features_axis(layer)] = inputs
    sizes, inside = list(weight.shape), inputs_axis(layer)
    sizes[1 - inside], sizes[inside] = outputs, inputs
    if isinstance(small, _ConvNd):
        small.out_channels, small.in_channels = outputs, inputs
        if _is_depthwise(small):
            small.groups, sizes[:2] = outputs, (outputs, 1)
    elif not isinstance(small, nn.Linear):
        small.nf = outputs  # type: ignore[assignment]
    generator = torch.Generator(weight.device).manual_seed(0)  # the caller's stays as it is

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=weight.dtype, device=weight.device)

    small.weight = nn.Parameter(drawn(*sizes))
    if getattr(small, "bias", None) is not None:
        small.bias = nn.Parameter(drawn(outputs))
    return small.eval(), drawn(*size)
