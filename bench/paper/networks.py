"""The paper's three small networks: shapes, training from seeds, and the released weights."""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lobs_native.errors import ArgumentError
from paper.data import Images, has_idx, idx_images, standardised

HELD_BACK = 5000  # training images that retraining is stopped by, as in the paper's 55,000 + 5,000
CALIBRATION = 5000
_AT_ONCE, _RATE, _MOMENTUM, _DECAY = 128, 0.1, 0.9, 5e-4


def lenet300() -> nn.Sequential:
    """LeNet-300-100: 266,200 weights."""
    return _named(
        flat=nn.Flatten(), fc1=nn.Linear(784, 300), relu1=nn.ReLU(), fc2=nn.Linear(300, 100),
        relu2=nn.ReLU(), fc3=nn.Linear(100, 10),
    )  # fmt: skip


def lenet5() -> nn.Sequential:
    """LeNet-5 in Caffe's shape: 430,500 weights."""
    return _named(
        conv1=nn.Conv2d(1, 20, 5), pool1=nn.MaxPool2d(2), conv2=nn.Conv2d(20, 50, 5),
        pool2=nn.MaxPool2d(2), flat=nn.Flatten(), fc1=nn.Linear(800, 500), relu=nn.ReLU(),
        fc2=nn.Linear(500, 10),
    )  # fmt: skip


def cifarnet() -> nn.Sequential:
    """CIFAR-Net: three convolutions with batch normalisation, two linear layers with dropout.

    The paper describes it so without its sizes: 65,440 weights here, for images of 28 x 28 with one
    channel.
    """
    return _named(
        conv1=nn.Conv2d(1, 32, 3, padding=1), norm1=nn.BatchNorm2d(32), pool1=nn.MaxPool2d(2),
        relu1=nn.ReLU(), conv2=nn.Conv2d(32, 32, 3, padding=1), norm2=nn.BatchNorm2d(32),
        relu2=nn.ReLU(), pool2=nn.MaxPool2d(2), conv3=nn.Conv2d(32, 64, 3, padding=1),
        norm3=nn.BatchNorm2d(64), relu3=nn.ReLU(), pool3=nn.MaxPool2d(2), flat=nn.Flatten(),
        drop=nn.Dropout(0.3), fc1=nn.Linear(576, 64), relu4=nn.ReLU(), fc2=nn.Linear(64, 10),
    )  # fmt: skip


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


@dataclass(frozen=True)
class Shape:
    """How to build and train a network, and the shares of kept weights to prune it to."""

    title: str
    make: Callable[[], nn.Sequential]
    epochs: int
    rate: float
    once: Mapping[str, float]  # kept, of every layer: table 1
    stages: tuple[Mapping[str, float], ...] = ()  # tables 3 and 4
    every: int = 50  # iterations of a retraining between two looks at the validation error


LENET300 = Shape(
    "LeNet-300-100", lenet300, 10, 0.05,
    {"fc1": 0.067, "fc2": 0.20, "fc3": 0.65},
    ({"fc1": 0.07, "fc2": 0.20, "fc3": 0.70}, {"fc1": 0.01, "fc2": 0.04, "fc3": 0.54}),
    every=20,
)  # fmt: skip
LENET5 = Shape(
    "LeNet-5", lenet5, 3, 0.1,
    {"conv1": 0.54, "conv2": 0.43, "fc1": 0.06, "fc2": 0.25},
    (
        {"conv1": 0.60, "conv2": 0.60, "fc1": 0.06, "fc2": 0.30},
        {"conv1": 0.20, "conv2": 0.01, "fc1": 0.009, "fc2": 0.08},
    ),
)  # fmt: skip
CIFARNET = Shape(  # the paper prints 9% of all; the shares of the layers are ours
    "CIFAR-Net", cifarnet, 3, 0.1,
    {"conv1": 0.50, "conv2": 0.20, "conv3": 0.10, "fc1": 0.05, "fc2": 0.40},
)  # fmt: skip
SHAPES = {"lenet300": LENET300, "lenet5": LENET5, "cifarnet": CIFARNET}


@dataclass(frozen=True)
class Split:
    """The images with which one network is pruned, retrained, stopped and measured.

    Disjoint, except that calibration (without labels) and training may share images.
    """

    calibration: Images
    training: Images
    validation: Images
    test: Images


@dataclass(frozen=True)
class Case:
    """One dense network and its images. With two splits, errors are the mean of both."""

    shape: Shape
    data: str
    seed: int
    model: nn.Sequential
    splits: tuple[Split, ...]

    @property
    def name(self) -> str:
        """For tables and keys."""
        return f"{self.shape.title}, {self.data}"

    @property
    def dense(self) -> float:
        """Error before pruning, in percent."""
        return mean_error(self.model, self.splits)


@torch.no_grad()
def percent_wrong(model: nn.Module, images: Images) -> float:
    """Error in percent. The model is left in eval mode."""
    model.eval()
    wrong = 0
    for x, y in zip(images.x.split(500), images.y.split(500), strict=True):
        wrong += int((model(x).argmax(1) != y).sum())
    return 100 * wrong / len(images)


def mean_error(model: nn.Module, splits: tuple[Split, ...]) -> float:
    """Error in percent over the test images of all splits."""
    return sum(percent_wrong(model, s.test) for s in splits) / len(splits)


def released_network(folder: Path) -> nn.Sequential:
    """LeNet-300-100 with the weights that the paper's authors released.

    The files are ``w_layer1.npy`` (inputs, outputs) to ``b_layer3.npy``.

    Raises ArgumentError, with its name, if a file is missing or of another size.
    """
    model = lenet300()
    for i in (1, 2, 3):
        layer = model.get_submodule(f"fc{i}")
        for part, stem in (("weight", "w"), ("bias", "b")):
            path = folder / f"{stem}_layer{i}.npy"
            if not path.is_file():
                raise ArgumentError(f"there is no {path}; name the folder that has it")
            value = torch.from_numpy(np.ascontiguousarray(np.load(path).T))
            parameter: Tensor = getattr(layer, part)
            if value.shape != parameter.shape:
                raise ArgumentError(
                    f"{path}: {tuple(value.shape)} transposed, LeNet-300-100 has "
                    f"{tuple(parameter.shape)}"
                )
            parameter.data.copy_(value)
    return model.eval()


def released(weights: Path, mnist: Path) -> Case:
    """The authors' LeNet-300-100 and MNIST.

    With MNIST's training images, as in the paper: retrained on 55,000, stopped by 5,000, measured
    on all test images. Calibrated on the first 5,000 of the 55,000, without labels. The 5,000 are
    the first images: the network gets 1.44% of them wrong and none of the others, so it was trained
    on the others.

    Without training images, on the 10,000 test images: each half is measured with the network that
    was pruned (and retrained) on the other half. The halves are every second image, because the
    first 5,000 are harder than the last: 2.18% and 1.04% of them are wrong. Of the half that is not
    measured, retraining uses the labels of 4,000 images and is stopped by the other 1,000;
    calibration uses all 5,000, without labels.
    """
    model = released_network(weights)
    test = idx_images(mnist, "t10k")
    if has_idx(mnist, "train"):
        images = idx_images(mnist, "train")
        cut = _held_back(images)
        rest = images.part(cut)
        splits: tuple[Split, ...] = (
            Split(rest.part(0, CALIBRATION), rest, images.part(0, cut), test),
        )
    else:
        first, second = (Images(test.x[k::2], test.y[k::2]) for k in (0, 1))
        splits = (_halved(first, second), _halved(second, first))
    return Case(LENET300, "MNIST, the authors' weights", 0, model, splits)


def _held_back(images: Images) -> int:
    """5,000, or a tenth, if there are fewer than 50,000."""
    return min(HELD_BACK, len(images) // 10)


def _halved(seen: Images, test: Images) -> Split:
    cut = len(seen) * 4 // 5
    return Split(seen, seen.part(0, cut), seen.part(cut), test)


def trained(
    kind: str, folder: Path, data: str, seed: int, cache: str | None, epochs: int | None = None
) -> Case:
    """A network trained on all training images of a folder but the last 5,000.

    With fewer than 50,000 images a tenth is held back. Calibrated on the first 5,000. Read from
    ``<cache>-<kind>-<seed>.safetensors`` if that exists, and written to it if not.
    """
    shape = SHAPES[kind]
    images, test = _standardised(folder)
    cut = len(images) - _held_back(images)
    split = Split(
        images.part(0, min(CALIBRATION, cut)), images.part(0, cut), images.part(cut), test
    )
    model = shape.make()
    path = None if cache is None else Path(f"{cache}-{kind}-{seed}.safetensors")
    if path is not None and path.is_file():
        model.load_state_dict(load_file(path))
    else:
        begun = time.perf_counter()
        model = train(shape, split.training, seed, shape.epochs if epochs is None else epochs)
        seconds = time.perf_counter() - begun
        print(f"{shape.title}, {data}, seed {seed}: trained in {seconds:.0f} s", flush=True)
        if path is not None:
            save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path)
    return Case(shape, data, seed, _channels_last(model).eval(), (split,))


@functools.lru_cache(maxsize=1)
def _standardised(folder: Path) -> tuple[Images, Images]:
    """Training and test images; all networks of a folder share them."""
    images, test = idx_images(folder, "train"), idx_images(folder, "t10k")
    mean, std = float(images.x.mean()), float(images.x.std())
    return standardised(images, mean, std), standardised(test, mean, std)


def _channels_last(model: nn.Sequential) -> nn.Sequential:
    """In the layout in which convolutions are two to three times as fast (one thread of a Xeon)."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def train(shape: Shape, images: Images, seed: int, epochs: int) -> nn.Sequential:
    """Train from scratch with one cycle of the learning rate. The caller's random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _channels_last(shape.make()).train()
        optimiser = torch.optim.SGD(
            model.parameters(), shape.rate, _MOMENTUM, weight_decay=_DECAY, nesterov=True
        )
        steps = epochs * -(-len(images) // _AT_ONCE)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, shape.rate, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(_AT_ONCE):
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(images.x[rows]), images.y[rows]).backward()
                optimiser.step()
                rate.step()
    return model.eval()
