"""The paper's small networks: pruned once and iteratively, with and without light retraining."""

from __future__ import annotations

import argparse

NAME = "small"
SAID = "LeNet-300-100, LeNet-5 and CIFAR-Net (tables 1, 3 and 4, figures 2 to 5)"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of this experiment, besides the common ones."""
    command.add_argument("--fashion", help="folder of Fashion-MNIST")


def run(options: argparse.Namespace) -> int:
    """Carry the experiment out; returns the exit code."""
    return 0
