"""The authors' LeNet-300-100 and MNIST, from one folder that the user names."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import Tensor, nn

from paper.data import Images, has_idx, idx_images
from paper.networks import CALIBRATION, percent_wrong, released_network

__all__ = ["Authors"]


class Authors:
    """The released network and the images to calibrate and to test on.

    ``folder`` holds ``mnist/`` (IDX files) and ``lenet300-100/`` (the released weights,
    w_layer1.npy ...). Calibration is on the training images, and tests are on all test images.
    Without training images, calibration is on the first 5,000 test images and tests are on the
    others.

    Raises ArgumentError, with its name, if a file is missing.
    """

    def __init__(self, folder: Path) -> None:
        mnist = folder / "mnist"
        self.whole = has_idx(mnist, "train")  # whether there are training images
        tested = _flat(idx_images(mnist, "t10k"))
        seen = _flat(idx_images(mnist, "train")) if self.whole else tested.part(0, CALIBRATION)
        self.calibration: Tensor = seen.x  # (N, 784) in [0, 1]
        self.tested = tested if self.whole else tested.part(CALIBRATION)
        self._model = released_network(folder / "lenet300-100")

    def network(self) -> nn.Sequential:
        """A new copy, in float32; its layers are called fc1, fc2 and fc3."""
        return copy.deepcopy(self._model)

    def percent_wrong(self, model: nn.Module) -> float:
        """Error on the test images."""
        return percent_wrong(model, self.tested)


def _flat(images: Images) -> Images:
    return Images(images.x.reshape(len(images), -1), images.y)
