"""The paper's large networks, AlexNet, VGG-16 and ResNet-50, for images of 224 x 224.

Parameters and buffers have the names and shapes of torchvision's networks, so that the weights
published for those load by name. That makes two differences from the paper's networks: this AlexNet
is that of Krizhevsky 2014 without groups (64, 192, 384, 256 and 256 channels), and this
ResNet-50 has its strides in the 3 x 3 convolutions.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lobs_native.errors import ArgumentError

__all__ = ["CLASSES", "NETWORKS", "alexnet", "load_weights", "random_weights", "resnet50", "vgg16"]

CLASSES = 1000


class Chain(nn.Module):
    """Convolutions, pooling to a fixed size, and linear layers, as AlexNet and VGG have them."""

    def __init__(self, features: nn.Sequential, size: int, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(size)
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, 1000) logits."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))  # type: ignore[no-any-return]


def alexnet() -> Chain:
    """AlexNet: 61.1 million parameters."""

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, stride=2)

    features = nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), pool()),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), pool()),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), pool()),
    )
    classifier = nn.Sequential(
        *(nn.Dropout(), nn.Linear(256 * 6 * 6, 4096), nn.ReLU()),
        *(nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU()),
        nn.Linear(4096, CLASSES),
    )
    return Chain(features, 6, classifier)


def vgg16() -> Chain:
    """VGG-16 without batch normalisation (configuration D): 138.4 million parameters."""
    steps: list[nn.Module] = []
    before = 3
    for channels, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convolutions):
            steps += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
            before = channels
        steps.append(nn.MaxPool2d(2, stride=2))
    classifier = nn.Sequential(
        *(nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()),
        nn.Linear(4096, CLASSES),
    )
    return Chain(nn.Sequential(*steps), 7, classifier)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1, each with batch normalisation, beside a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.downsample: nn.Module | None = None
        if stride != 1 or before != after:
            shortcut = nn.Conv2d(before, after, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) -> (B, 4 * width, H / stride, W / stride)."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


def resnet50() -> nn.Sequential:
    """ResNet-50: 25.6 million parameters."""
    steps: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)),
        ("bn1", nn.BatchNorm2d(64)),
        ("relu", nn.ReLU()),
        ("maxpool", nn.MaxPool2d(3, stride=2, padding=1)),
    ]
    before = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        parts = []
        for block in range(blocks):
            parts.append(Bottleneck(before, width, stride=2 if stage > 1 and block == 0 else 1))
            before = 4 * width
        steps.append((f"layer{stage}", nn.Sequential(*parts)))
    steps += [
        ("avgpool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("fc", nn.Linear(before, CLASSES)),
    ]
    return nn.Sequential(OrderedDict(steps))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "alexnet": alexnet,
    "vgg16": vgg16,
    "resnet50": resnet50,
}


@torch.no_grad()
def random_weights(model: nn.Module, seed: int = 0) -> None:
    """He initialisation in place, with which activations keep their size from layer to layer;
    biases are small. Batch normalisation keeps its own initial values."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            inputs = module.weight[0].numel()
            module.weight.normal_(0.0, (2 / inputs) ** 0.5, generator=generator)
            if module.bias is not None:
                module.bias.normal_(0.0, 0.05, generator=generator)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a safetensors file into a network, by name.

    Raises
    ------
    ArgumentError
        There is no such file, it is not a safetensors file, or its names or shapes are not the
        network's. In the last case the network may have been written to.
    """
    file = Path(path)
    if not file.is_file():
        raise ArgumentError(f"weights: there is no file {file}")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ArgumentError(
            f"weights: {file} is not a safetensors file ({error}); docs/paper/paper-large.md says "
            "how to convert a published .pth file"
        ) from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        problems = _shortened(str(error).splitlines()[1:])
        raise ArgumentError(f"weights: {file} does not fit this network: {problems}") from error


def _shortened(lines: Sequence[str], most: int = 300) -> str:
    text = "; ".join(line.strip() for line in lines)
    return text if len(text) <= most else f"{text[:most]} ..."
