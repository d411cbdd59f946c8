"""The functions of llm-compressor's SparseGPTModifier against those that ``patch`` puts there.

    pip install llmcompressor
    python bench/hosts/sparsegpt_functions.py [--out FILE]

CPU seconds with one thread, the least of five interleaved rounds: for adding 2048 tokens to a
second moment, and for pruning a layer by it. The masks of both sides are compared.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lobs_native.compat import llmcompressor as ours

SHAPES = [(512, 512), (1024, 1024), (2048, 2048), (1024, 4096)]
TOKENS, ROUNDS = 2048, 5
TARGETS = {"50%": (0.5, 0, 0), "2:4": (0.5, 2, 4)}


def least(*functions: Callable[[], Any]) -> list[float]:
    best = [float("inf")] * len(functions)
    for _ in range(ROUNDS):
        for i, function in enumerate(functions):
            begun = time.process_time()
            function()
            best[i] = min(best[i], time.process_time() - begun)
    return best


def measure(host: Any, rows: int, columns: int) -> list[dict[str, Any]]:
    """The rows of the table for one layer; ``host`` is llm-compressor's module."""
    layer = nn.Linear(columns, rows, bias=False)
    mix = torch.randn(columns, columns) / columns**0.5 + torch.eye(columns) / 2
    x = (torch.randn(TOKENS, columns) @ mix)[None]
    empty = {
        f: f.accumulate_hessian(x, layer, f.make_empty_hessian(layer), 0) for f in (host, ours)
    }
    shape = f"{rows} x {columns}"
    times = least(*(lambda f=f: f.accumulate_hessian(x, layer, empty[f][0], 1) for f in empty))
    table = [{"layer": shape, "what": "2048 tokens", "host": times[0], "ours": times[1]}]
    H, _ = host.accumulate_hessian(x, layer, host.make_empty_hessian(layer), 0)
    for target, (share, n, m) in TARGETS.items():
        weights: dict[Any, torch.Tensor] = {}

        def prune(f: Any, share: float = share, n: int = n, m: int = m) -> None:
            held = {layer: H.clone()}
            _, weights[f] = f.sparsify_weight(layer, held, share, n, m, 128, 0.01, False)  # noqa: B023

        times = least(lambda: prune(host), lambda: prune(ours))
        apart = int(((weights[host] == 0) != (weights[ours] == 0)).sum())
        row = {"layer": shape, "what": f"pruning, {target}", "host": times[0], "ours": times[1]}
        table.append({**row, "mask entries that differ": apart, "of": H.shape[0] * rows})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    try:
        from llmcompressor import __version__ as host_version
        from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify as host
    except ImportError as error:
        raise SystemExit(f"{error}; pip install llmcompressor") from error
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = [row for shape in SHAPES for row in measure(host, *shape)]
    for row in rows:
        print(
            f"{row['layer']:12} {row['what']:14} host {row['host']:.4f} s, ours {row['ours']:.4f} "
            f"s, {row['host'] / row['ours']:.1f} times"
            + (f", {row['mask entries that differ']} of {row['of']} differ" if "of" in row else "")
        )
    if arguments.out is not None:
        versions = {"torch": str(torch.__version__), "llmcompressor": host_version}
        arguments.out.write_text(json.dumps({**versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
