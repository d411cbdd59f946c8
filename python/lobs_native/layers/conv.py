"""nn.Conv2d: a filter is a row, a patch is an input row, in the order (C_in / groups, kh, kw) on
both sides.

Patches are never materialised for a whole batch: a strided view of the padded images is cut into
pieces of at most ``PATCH_BYTES`` (on a device sixteen times that, for fewer launches) before
anything is copied.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

from lobs_native.errors import ShapeError
from lobs_native.layers.base import Layer

__all__ = ["PATCH_BYTES", "Conv2d"]

PATCH_BYTES = 16 << 20


class Conv2d(Layer):
    """weight (groups * R, C_in / groups, kh, kw) as (groups, R, C); inputs (B, C_in, h, w) or
    (C_in, h, w)."""

    module_type = nn.Conv2d
    module: nn.Conv2d

    def __init__(self, name: str, module: nn.Conv2d) -> None:
        super().__init__(name, module)
        kh, kw = module.kernel_size
        self.groups = module.groups
        self.rows = module.out_channels // module.groups
        self.width = module.in_channels // module.groups * kh * kw

    def columns(self, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        images = inputs if inputs.ndim == 4 else inputs[None]  # (B, C_in, h, w)
        if images.ndim != 4 or images.shape[1] != self.module.in_channels:
            raise ShapeError(
                f"layer {self.name!r}: input {tuple(inputs.shape)}, expected (B, "
                f"{self.module.in_channels}, h, w)"
            )
        windows_per_image = self._windows(images[:1]).shape[1:3]  # (oh, ow)
        row_bytes = windows_per_image[1] * self.width * self.groups * inputs.element_size()
        limit = PATCH_BYTES if images.device.type == "cpu" else 16 * PATCH_BYTES
        lines = max(1, limit // max(1, row_bytes))  # output lines that fit
        batch = max(1, lines // max(1, windows_per_image[0]))
        for piece in images.split(batch):
            windows = self._windows(piece)  # (b, oh, ow, C_in, kh, kw), a view
            for part in windows.split(lines, dim=1):
                for g, channels in enumerate(part.chunk(self.groups, dim=3)):
                    yield g, channels.reshape(-1, self.width)  # (b * lines * ow, C), copied here

    def _windows(self, images: Tensor) -> Tensor:
        """Every patch of (b, C_in, h, w) as a view (b, oh, ow, C_in, kh, kw) of the padded
        images."""
        module = self.module
        padded = functional.pad(images, self._padding(), mode=_pad_mode(module.padding_mode))
        b, c, h, w = padded.shape
        (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
        oh = (h - dh * (kh - 1) - 1) // sh + 1
        ow = (w - dw * (kw - 1) - 1) // sw + 1
        sb, sc, line, pixel = padded.stride()
        return padded.as_strided(
            (b, oh, ow, c, kh, kw), (sb, line * sh, pixel * sw, sc, line * dh, pixel * dw)
        )

    def _padding(self) -> tuple[int, int, int, int]:
        """(left, right, top, bottom)."""
        padding = self.module.padding
        if padding == "valid":
            return 0, 0, 0, 0
        if padding == "same":  # torch puts the odd one at the end
            (kh, kw), (dh, dw) = self.module.kernel_size, self.module.dilation
            v, h = dh * (kh - 1), dw * (kw - 1)
            return h // 2, h - h // 2, v // 2, v - v // 2
        top, left = (int(p) for p in padding)
        return left, left, top, top


def _pad_mode(padding_mode: str) -> str:
    return "constant" if padding_mode == "zeros" else padding_mode
