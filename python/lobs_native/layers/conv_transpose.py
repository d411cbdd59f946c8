"""nn.ConvTranspose1d, 2d and 3d, as a correlation of the dilated input with the flipped kernel.

With ``stride - 1`` zeros between neighbouring inputs and ``dilation * (kernel - 1) - padding``
zeros around them, every output is the product of a filter and one patch. The rest is as in
``conv.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn import functional

from lobs_native.layers.conv import Conv, margins

__all__ = ["ConvTranspose"]


class ConvTranspose(Conv):
    """Weight (C_in, R, *kernel) as (groups, R, C); inputs (B, C_in, *sizes) or (C_in, *sizes)."""

    module_type = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    def pack(self, stored: Tensor) -> Tensor:
        filters = stored.reshape(self.groups, self.neighbours, self.rows, -1).flip(3)
        return filters.permute(0, 2, 3, 1).reshape(self.groups, self.rows, self.width)

    def unpack(self, packed: Tensor) -> Tensor:
        filters = packed.reshape(self.groups, self.rows, -1, self.neighbours)
        return filters.permute(0, 3, 1, 2).flip(3).reshape(self.shape)

    def columns(
        self, inputs: Tensor, output_size: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        images, call = self._batched(inputs), self.call
        spread = [
            (n - 1) * s + 1 for n, s in zip(images.shape[2:], call.stride, strict=True)
        ]  # sizes with the zeros between inputs
        around = []
        for i, (n, k) in enumerate(zip(spread, self.kernel, strict=True)):
            reach, pad = call.dilation[i] * (k - 1), int(call.padding[i])
            extra = call.output_padding[i]
            if output_size is not None:
                extra = output_size[i - len(spread)] - (n - 2 * pad + reach)
            around.append((reach - pad, reach - pad + extra))
        sizes = [n + a + b for n, (a, b) in zip(spread, around, strict=True)]
        once = [1] * len(spread)
        every = (..., *(slice(None, None, s) for s in call.stride))
        for piece in images.split(self._images_at_once(sizes, once, images)):
            zeros = piece.new_zeros((*piece.shape[:2], *spread))
            zeros[every] = piece
            yield from self._patches(functional.pad(zeros, margins(around)), once)
