"""nn.Conv1d, Conv2d and Conv3d: a filter is a row of W, a patch is a row of X.

The columns of both are ordered by kernel position, then by input channel of the group, so that N:M
patterns group neighbouring input channels at one kernel position, as sparse hardware expects.
Patches are never copied for a whole batch, but for pieces of a strided view of the padded images:
of at most ``PATCH_BYTES`` on the CPU, and of sixteen times that on a device, for fewer launches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional

from lobs_native.errors import ShapeError
from lobs_native.layers.base import Layer

__all__ = ["PATCH_BYTES", "Conv", "ConvCall", "margins"]

PATCH_BYTES = 16 << 20


@dataclass(frozen=True)
class ConvCall:
    """The arguments of a convolution besides its tensors, under the names of nn.Conv2d."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    transposed: bool
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, weight: Tensor, arguments: Sequence[Any]) -> ConvCall:
        """From the weight (out, in / groups, *kernel), or (in, out / groups, *kernel) if
        transposed, and what follows the bias in a call of aten::convolution."""
        stride, padding, dilation, transposed, output_padding, groups = arguments
        first, second, *kernel = weight.shape

        def each(value: Sequence[int]) -> tuple[int, ...]:
            return tuple(value) * (len(kernel) if len(value) == 1 else 1)

        return cls(
            in_channels=first if transposed else second * groups,
            out_channels=second * groups if transposed else first,
            kernel_size=tuple(kernel),
            stride=each(stride),
            padding=each(padding),
            dilation=each(dilation),
            output_padding=each(output_padding),
            groups=groups,
            transposed=transposed,
        )


class Conv(Layer):
    """Weight (groups * R, C_in / groups, *kernel) as (groups, R, C); inputs (B, C_in, *sizes) or
    (C_in, *sizes)."""

    module_type: type[nn.Module] | tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def __init__(self, name: str, module: nn.Module, call: ConvCall | None = None) -> None:
        super().__init__(name, module)
        self.call = cast(ConvCall, module) if call is None else call
        # Models make them from tensors and NumPy's integers too.
        self.kernel = tuple(int(size) for size in self.call.kernel_size)
        self.groups = int(self.call.groups)
        self.rows = int(self.call.out_channels) // self.groups
        self.width = self.neighbours * math.prod(self.kernel)

    @property
    def neighbours(self) -> int:
        return int(self.call.in_channels) // self.groups

    def pack(self, stored: Tensor) -> Tensor:
        filters = stored.reshape(self.groups, self.rows, self.neighbours, -1)
        return filters.transpose(2, 3).reshape(self.groups, self.rows, self.width)

    def unpack(self, packed: Tensor) -> Tensor:
        filters = packed.reshape(self.groups, self.rows, -1, self.neighbours)
        return filters.transpose(2, 3).reshape(self.shape)

    def columns(self, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        images = self._batched(inputs)
        call = self.call
        if call.padding == "valid":
            around = [(0, 0)] * len(self.kernel)
        elif call.padding == "same":  # torch pads an odd total more at the end
            total = [d * (k - 1) for k, d in zip(self.kernel, call.dilation, strict=True)]
            around = [(t // 2, t - t // 2) for t in total]
        else:
            around = [(int(p), int(p)) for p in call.padding]
        mode = "constant" if call.padding_mode == "zeros" else call.padding_mode

        def padded(piece: Tensor) -> Tensor:
            return functional.pad(piece, margins(around), mode=mode)

        sizes = [n + a + b for n, (a, b) in zip(images.shape[2:], around, strict=True)]
        for piece in images.split(self._images_at_once(sizes, call.stride, images)):
            yield from self._patches(padded(piece), call.stride)

    def units(self, output: Tensor) -> Tensor:
        channels = output.ndim - len(self.kernel) - 1
        return output.movedim(channels, -1).reshape(-1, self.groups * self.rows)

    def _batched(self, inputs: Tensor) -> Tensor:
        dims = len(self.kernel) + 2
        images = inputs if inputs.ndim == dims else inputs[None]
        if images.ndim != dims or images.shape[1] != self.call.in_channels:
            sizes = ", ".join("dhw"[-len(self.kernel) :])
            raise ShapeError(
                f"layer {self.name!r}: input {tuple(inputs.shape)}, expected (B, "
                f"{self.call.in_channels}, {sizes})"
            )
        return images

    def _windows(self, sizes: Sequence[int], stride: Sequence[int]) -> list[int]:
        """The number of patches along each dimension of padded images."""
        return [
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(sizes, self.kernel, stride, self.call.dilation, strict=True)
        ]

    def _lines_at_once(self, out: Sequence[int], like: Tensor) -> int:
        """How many lines of patches (one index of the first dimension each) fit into the limit."""
        line = math.prod(out[1:]) * self.width * self.groups * like.element_size()
        limit = PATCH_BYTES if like.device.type == "cpu" else 16 * PATCH_BYTES
        return max(1, limit // max(1, line))

    def _images_at_once(self, sizes: Sequence[int], stride: Sequence[int], like: Tensor) -> int:
        out = self._windows(sizes, stride)
        return max(1, self._lines_at_once(out, like) // max(1, out[0]))

    def _patches(self, padded: Tensor, stride: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield (group, X) with X (n, C) for all patches of padded images (b, C_in, *sizes)."""
        images = padded.movedim(1, -1).contiguous()  # (b, *sizes, C_in), to copy whole pixels
        first, *steps, channel = images.stride()
        out = self._windows(images.shape[1:-1], stride)
        dilation = self.call.dilation
        windows = images.as_strided(
            (len(images), *out, *self.kernel, images.shape[-1]),
            (
                first,
                *(t * s for t, s in zip(steps, stride, strict=True)),
                *(t * d for t, d in zip(steps, dilation, strict=True)),
                channel,
            ),
        )
        for part in windows.split(self._lines_at_once(out, padded), dim=1):
            for g, channels in enumerate(part.chunk(self.groups, dim=-1)):
                yield g, channels.reshape(-1, self.width)  # copied here


def margins(around: Sequence[tuple[int, int]]) -> list[int]:
    """Paddings (before, after) of each dimension, in functional.pad's order: last dimension
    first."""
    return [n for pair in reversed(around) for n in pair]
