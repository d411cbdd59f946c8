"""One case, in a process of its own: prune, measure, print a line of JSON.

python bench/quality/llm/job.py FOLDER CASE [--rivals FOLDER] [--text FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

import lobs_native as lobs
from hosts.sparsegpt_script import prune_block_by_block
from lobs_native.network.peak import Peak
from quality.encoder import TEXT
from quality.llm.material import TARGETS, Windows, loaded
from quality.llm.rivals import PRODUCT, RIVALS, by_product

AT_ONCE = 4  # windows in a batch of ours; where the network is tuned, one, which is a step
ROWS = 512  # of logits whose logarithms are in memory at a time
# Settings of lobs.prune; the others of METHODS are rivals.
OURS: dict[str, dict[str, Any]] = {
    "default": {},
    "sweep": {"method": "sweep"},
    "exact": {"method": "exact"},
    "admm": {"method": "admm"},
    "default, pruned inputs": {"inputs": "pruned"},
    "sweep, pruned inputs": {"method": "sweep", "inputs": "pruned"},
    "exact, pruned inputs": {"method": "exact", "inputs": "pruned"},
    "admm, pruned inputs": {"method": "admm", "inputs": "pruned"},
    "admm, dense inputs": {"method": "admm", "inputs": "dense"},
    "exact, dense inputs": {"method": "exact", "inputs": "dense"},
    "model": {"scope": "model"},
    "tuned": {"tune": "network"},
    "tuned, pruned inputs": {"tune": "network", "inputs": "pruned"},
    "sweep, tuned, pruned inputs": {"method": "sweep", "tune": "network", "inputs": "pruned"},
    "wanda": {"method": "wanda", "inputs": "pruned"},
    "magnitude": {"method": "magnitude", "inputs": "pruned"},
}
METHODS = ("dense", *OURS, *RIVALS, PRODUCT)


def prune(model: Any, windows: Tensor, case: dict[str, Any], rivals: Path | None) -> None:
    """Prune the first blocks in place."""
    method, target, blocks = case["method"], case["target"], case["blocks"]
    if method in OURS:
        lobs.prune(
            model,
            list(windows.split(1 if "tune" in OURS[method] else AT_ONCE)),
            include=[f"model.layers.{block}.*" for block in range(blocks)],
            progress=False,
            **{**TARGETS[target], **OURS[method]},
        )
    elif method == PRODUCT:
        with contextlib.redirect_stdout(io.StringIO()):
            by_product(model, windows, target, blocks)
    elif method in RIVALS:
        assert rivals is not None
        if not torch.cuda.is_available():
            torch.cuda.synchronize = lambda device=None: None
        with contextlib.redirect_stdout(io.StringIO()):
            kind, remove = RIVALS[method](rivals)
            prune_block_by_block(
                model,
                [window[None] for window in windows],
                kind,
                lambda pruner: remove(pruner, target),
                blocks,
            )


@torch.no_grad()
def losses(model: Any, windows: Tensor) -> list[float]:
    """Nats for each token but the first, of every window."""
    found = []
    for window in windows:
        hidden = model.model(window[None]).last_hidden_state[0, :-1]
        parts = zip(hidden.split(ROWS), window[1:].split(ROWS), strict=True)
        total = sum(
            float(nn.functional.cross_entropy(model.lm_head(a), b, reduction="sum"))
            for a, b in parts
        )
        found.append(total / (len(window) - 1))
    return found


def zeros(model: Any, blocks: int) -> float:
    """The share of zeros in the linear layers of the first blocks."""
    weights = [
        m.weight
        for block in model.model.layers[:blocks]
        for m in block.modules()
        if isinstance(m, nn.Linear)
    ]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def main() -> None:
    """Run the case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("case", type=json.loads)
    parser.add_argument("--rivals", type=Path)
    parser.add_argument("--text", type=Path, default=TEXT)
    arguments = parser.parse_args()
    case = arguments.case
    windows = Windows.of(arguments.folder, arguments.text, case["tokens"], case["measured"])
    model = loaded(arguments.folder)
    begun = time.process_time()
    with Peak().measuring() as peak:
        prune(model, windows.calibration, case, arguments.rivals)
        peak_bytes = peak.bytes()
    result = {
        "cpu seconds": time.process_time() - begun,
        "peak bytes": peak_bytes,
        "zeros": zeros(model, case["blocks"]),
        "nats": losses(model, windows.measured),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
