"""A network of a billion weights, pruned within a limit on memory: seconds by kind of layer, peak.

    pip install transformers
    python bench/stress/wide_network.py [--blocks 2] [--memory 12] [--tokens 4096]
        [--dtype float32 ...] [--method admm] [--rows 8] [--out FILE]

It has Llama's blocks, 2048 wide and 8192 in between, and 16 of them would be 973 million weights.
``--blocks`` of them are made, with random weights, and pruned to one half, each on the outputs of
the pruned ones before it. The times per block are extrapolated to 16. The calibration data are
random tokens, 512 to a sequence. (They change what is removed, and hardly how long that takes.)
``--memory`` is in GB.

For each kind of layer, the table has the mean seconds of calibration and of pruning, the highest
memory beyond the model and its data, and the seconds of method "exact": those of ``--rows`` rows,
times all rows of a layer, without inverses and repairs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lobs_native as lobs
from lobs_native import ops

BLOCKS, WIDTH, LENGTH = 16, 2048, 512
VOCABULARY = 4096


def network(blocks: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """Blocks of 60.8 million random weights each."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def exact_seconds(columns: int, rows: int) -> float:
    """Seconds per row of exact removal of one half, which do not depend on the numbers."""
    factor = torch.randn(columns, 64)
    inverse = (factor @ factor.T).div_(64)
    inverse.diagonal().add_(1.0)
    weights = torch.randn(rows, columns)
    begun = time.perf_counter()
    ops.exact_trace(weights, inverse, limit=columns // 2)
    return (time.perf_counter() - begun) / rows


def pruned(arguments: argparse.Namespace, dtype: str, exact: dict[int, float]) -> dict[str, Any]:
    """Prune a network with weights of this type; all that the table says of it."""
    model = network(arguments.blocks, getattr(torch, dtype))
    tokens = torch.randint(VOCABULARY, (max(1, arguments.tokens // LENGTH), 1, LENGTH))
    report = lobs.prune(
        model,
        list(tokens),
        sparsity=0.5,
        method=arguments.method,
        inputs="pruned",
        exclude="lm_head",
        memory=round(arguments.memory * 1e9),
        progress=False,
    )
    kinds: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(layer.name.rpartition(".")[2] for layer in report.layers):
        layers = [x for x in report.layers if x.name.endswith(f".{name}")]
        rows, columns = layers[0].shape
        kinds[name] = {
            "shape": f"{rows} x {columns}",
            "calibrating": statistics.mean(x.seconds_calibrating for x in layers),
            "pruning": statistics.mean(x.seconds_pruning for x in layers),
            "peak": max(x.peak_memory or 0 for x in layers),
            "error": statistics.mean(x.relative_error for x in layers),
            "exact": rows * exact[columns],
        }
    stages = ("calibrating", "pruning", "exact")
    block = {stage: sum(kind[stage] for kind in kinds.values()) for stage in stages}
    weights = arguments.blocks * sum(p.numel() for p in model.model.layers[0].parameters())
    return {
        "dtype": dtype,
        "kinds": kinds,
        "block": block,
        "whole": {stage: BLOCKS * seconds for stage, seconds in block.items()},
        "seconds": report.seconds,
        "planned seconds": report.settings["plan"]["seconds"],
        "peak": report.settings["peak memory"],
        "planned peak": report.settings["plan"]["memory"],
        "weights": weights,
        "sparsity": report.sparsity,
        "notes": sorted({note for layer in report.layers for note in layer.notes}),
    }


def show(run: dict[str, Any], blocks: int, method: str) -> None:
    """Print one network's table."""
    print(f"\n{run['dtype']}: {blocks} blocks, {run['weights']:,} weights, half of them removed\n")
    columns = ("calibrating, s", f"{method}, s", "peak, MB", "relative error", "exact, s")
    print(f"{'layer':12}{'shape':>14}" + "".join(f"{head:>16}" for head in columns))
    for name, kind in run["kinds"].items():
        print(
            f"{name:12}{kind['shape']:>14}{kind['calibrating']:16.1f}{kind['pruning']:16.1f}"
            f"{kind['peak'] / 1e6:16,.0f}{kind['error']:16.4f}{kind['exact']:16,.0f}"
        )
    for label, sums in (("one block", run["block"]), (f"{BLOCKS} blocks", run["whole"])):
        print(
            f"{label:26}{sums['calibrating']:16.1f}{sums['pruning']:16.1f}{'':32}"
            f"{sums['exact']:16,.0f}"
        )
    print(f"in all {run['seconds']:.0f} s, planned {run['planned seconds']:.0f} s", end="; ")
    print(f"peak {run['peak'] / 1e6:,.0f} MB, planned {run['planned peak'] / 1e6:,.0f} MB")
    for note in run["notes"]:
        print(f"note: {note}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune a network of a billion weights.")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--memory", type=float, default=12.0, help="GB")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--method", default="admm")
    parser.add_argument("--rows", type=int, default=8, help="on which exact is timed")
    parser.add_argument("--out", type=Path, help="where to write the result, as JSON")
    arguments = parser.parse_args()
    about: dict[str, Any] = {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    print(f"torch {torch.__version__}, {about['threads']} threads on {about['cores']} cores")
    exact = {columns: exact_seconds(columns, arguments.rows) for columns in (WIDTH, 4 * WIDTH)}
    runs = []
    for dtype in arguments.dtype:
        runs.append(pruned(arguments, dtype, exact))
        show(runs[-1], arguments.blocks, arguments.method)
    if arguments.out:
        about["load at the end"] = os.getloadavg()
        arguments.out.write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
