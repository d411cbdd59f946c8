"""The data and the network of the demo: handwritten digits, and a perceptron trained on them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

__all__ = ["Digits", "load", "test_error", "train"]

TEST_SAMPLES = 500


@dataclass(frozen=True)
class Digits:
    """Images as rows of pixels in [0, 1], and which digits they show."""

    train_x: Tensor  # (1297, 64) float32
    train_y: Tensor  # (1297,) int64
    test_x: Tensor  # (500, 64) float32
    test_y: Tensor  # (500,) int64


def load(seed: int) -> Digits:
    """scikit-learn's digits, divided at random into images to train on and images to test on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)  # (1797, 64) from 0 to 16, (1797,)
    parts = train_test_split(x / 16.0, y, test_size=TEST_SAMPLES, stratify=y, random_state=seed)
    train_x, test_x = (torch.from_numpy(part).float() for part in parts[:2])
    train_y, test_y = (torch.from_numpy(part).long() for part in parts[2:])
    return Digits(train_x, train_y, test_x, test_y)


def train(digits: Digits, *, epochs: int, seed: int, progress: bool) -> nn.Sequential:
    """The trained network, in evaluation mode. The caller's random state is left as it was.

    It is trained in float64 and rounded once at the end, so that the order in which a processor
    adds hardly shows in the result.
    """
    x = digits.train_x.double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[tuple[str, nn.Module]] = [
            ("fc1", nn.Linear(64, 300)),
            ("relu1", nn.ReLU()),
            ("fc2", nn.Linear(300, 100)),
            ("relu2", nn.ReLU()),
            ("fc3", nn.Linear(100, 10)),
        ]
        model = nn.Sequential(OrderedDict(layers)).double()
        optimizer = torch.optim.Adam(model.parameters())  # torch's defaults: nothing is tuned
        for _ in tqdm(range(epochs), "train", disable=None if progress else True):
            for batch in torch.split(torch.randperm(len(x)), 64):
                loss = functional.cross_entropy(model(x[batch]), digits.train_y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.float().eval()


def test_error(model: nn.Module, digits: Digits) -> float:
    """The fraction of the test images that the network gets wrong."""
    with torch.no_grad():
        wrong = model(digits.test_x).argmax(1) != digits.test_y
    return int(wrong.sum()) / len(wrong)
