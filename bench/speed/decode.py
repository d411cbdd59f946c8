"""Tokens per second of a language model at batch 1, pruned and sparse against dense.

    python bench/speed/decode.py [--folder FOLDER] [--threads N] [--pairs N] [--tokens N]
                                 [--json FILE]

The model is SmolLM2 (see ``quality/llm/material.py``), pruned by magnitude within each linear
layer, which makes no difference to speed. Both sides are the same network with a cache of keys and
values. Theirs is dense, ours has ``to_sparse`` applied. Each pair is two generations back to back.
With one thread the time is that of the processor, so that other programs matter less; with more it
is that of the clock. Tokens must be equal in float32.
"""

from __future__ import annotations

import argparse
import json
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
from quality.llm import material
from speed import paired

SPARSITIES = (0.5, 0.7, 0.9)
PROMPT = 16  # tokens


def prune_by_magnitude(model: nn.Module, sparsity: float) -> None:
    """Set the smallest weights of each linear layer but the head to zero."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            size = module.weight.detach().abs().reshape(-1)
            cut = size.kthvalue(max(1, round(sparsity * len(size)))).values
            with torch.no_grad():
                module.weight.masked_fill_(module.weight.abs() <= cut, 0)


@torch.inference_mode()
def generate(model: Any, prompt: Tensor, tokens: int, clock: Callable[[], float]) -> Any:
    """Greedy tokens after the prompt, and the seconds that they took without the prompt."""
    out = model(prompt, use_cache=True)
    chosen = [out.logits[:, -1:].argmax(-1)]
    begun = clock()
    for _ in range(tokens):
        out = model(chosen[-1], past_key_values=out.past_key_values, use_cache=True)
        chosen.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(chosen, 1), clock() - begun


def measure(
    folder: Path, sparsity: float, dtype: torch.dtype, pairs: int, tokens: int
) -> dict[str, Any]:
    """Rates of both sides and their ratio, for one sparsity and dtype."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    sides = [material.loaded(folder) for _ in range(2)]
    for side in sides:
        prune_by_magnitude(side, sparsity)
        side.to(dtype)
    replaced = lobs.to_sparse(sides[1], sparsity=0.3).replaced
    prompt = torch.arange(100, 100 + PROMPT)[None]
    found = [generate(side, prompt, tokens, clock)[0] for side in sides]
    if dtype == torch.float32 and not torch.equal(*found):
        raise SystemExit(f"{sparsity:.0%}: the two sides chose different tokens")
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for i in (0, 1) if pair % 2 == 0 else (1, 0):
            seconds[i].append(generate(sides[i], prompt, tokens, clock)[1])
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    return {
        "sparsity": sparsity,
        "dtype": str(dtype).removeprefix("torch."),
        "layers": len(replaced),
        "dense_tokens_per_second": tokens / statistics.median(seconds[0]),
        "sparse_tokens_per_second": tokens / statistics.median(seconds[1]),
        "ratio": statistics.median(ratios),
        "interval": paired.bootstrap_interval(ratios),
        "pairs": pairs,
    }


def main() -> None:
    """Measure all sparsities in both dtypes and print a line for each."""
    parser = argparse.ArgumentParser(description="Tokens per second, sparse against dense.")
    parser.add_argument("--folder", type=Path, help="where the model is, or is written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        if not (folder / "config.json").is_file():
            material.make_folder(folder)
        for dtype in (torch.float32, torch.bfloat16):
            for sparsity in SPARSITIES:
                row = measure(folder, sparsity, dtype, arguments.pairs, arguments.tokens)
                low, high = row["interval"]
                print(
                    f"{row['dtype']}, {sparsity:.0%} zeros, {row['layers']} layers: dense "
                    f"{row['dense_tokens_per_second']:.1f}, sparse "
                    f"{row['sparse_tokens_per_second']:.1f} tokens/s, ratio {row['ratio']:.2f} "
                    f"[{low:.2f}, {high:.2f}]",
                    flush=True,
                )
                rows.append(row)
    if arguments.json:
        result = {"machine": paired.machine(), "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
