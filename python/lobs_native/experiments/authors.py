"""The authors' LeNet-300-100 and MNIST, from a folder that the user names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lobs_native.errors import ArgumentError
from lobs_native.experiments.data import Images, has_idx, idx_images

__all__ = ["CALIBRATION", "Authors"]

CALIBRATION = 5000
_LAYERS = (1, 2, 3)


class Authors:
    """``folder`` holds ``mnist/`` (IDX files) and ``lenet300-100/`` (the released weights,
    w_layer1.npy ...). Calibration is on the training images and tests on all test images; without
    training images, calibration is on the first 5,000 test images and tests are on the others.

    Raises ArgumentError, with the name, where a file is missing.
    """

    def __init__(self, folder: Path) -> None:
        mnist = folder / "mnist"
        self.whole = has_idx(mnist, "train")  # whether there are training images
        tested = _flat(idx_images(mnist, "t10k"))
        seen = _flat(idx_images(mnist, "train")) if self.whole else tested.part(0, CALIBRATION)
        self.calibration: Tensor = seen.x  # (N, 784) in [0, 1]
        self.tested = tested if self.whole else tested.part(CALIBRATION)
        self._arrays = [
            _array(folder / "lenet300-100" / f"{kind}_layer{i}.npy")
            for i in _LAYERS
            for kind in ("w", "b")
        ]

    def network(self) -> nn.Sequential:
        """A new copy, in float32; its layers are called 0, 2 and 4."""
        steps: list[nn.Module] = []
        for weight, bias in zip(self._arrays[::2], self._arrays[1::2], strict=True):
            layer = nn.Linear(*weight.shape)
            with torch.no_grad():
                layer.weight.copy_(weight.T)
                layer.bias.copy_(bias)
            steps += [layer, nn.ReLU()]
        return nn.Sequential(*steps[:-1])

    @torch.no_grad()
    def percent_wrong(self, model: nn.Module) -> float:
        """Error on the images to test on."""
        wrong = model(self.tested.x).argmax(1) != self.tested.y
        return 100 * float(wrong.double().mean())


def _flat(images: Images) -> Images:
    return Images(images.x.reshape(len(images), -1), images.y)


def _array(path: Path) -> Tensor:
    if not path.is_file():
        raise ArgumentError(f"data: there is no {path}; name the folder that holds lenet300-100/")
    return torch.from_numpy(np.load(path))
