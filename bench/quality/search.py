"""Divisions of one budget that are found by pruning with them, against the one by costs.

    python bench/quality/search.py [--networks N ...] [--sparsities S ...] [--evaluations N ...]
        [--spread X] [--lines N] [--blocks N] [--windows N] [--folder DIR] [--text FILE]
        [--method METHOD] [--inputs INPUTS] [--out FILE]

Networks: the authors' LeNet-300-100 on MNIST, as in `lenet.py`; the sentence encoder
all-MiniLM-L6-v2 on WikiText-2, as in `whole_encoder.py`, with fewer lines to calibrate on; and the
first blocks of SmolLM2-135M-Instruct on WikiText-2, as in `llm`. A fifth of the calibration batches
is held back (of SmolLM2's, a quarter), also where nothing is searched (0 evaluations). The table
has how far the output is from the original network's on test data that pruning never sees (the
change relative to its size, or the Kullback-Leibler divergence of a token, in nats); what users
look at there (the error in percent, the mean cosine of the embeddings, the loss above the original
network's, in nats); the change relative to the size on the batches held back; and CPU seconds.
With a search, what it minimizes on the batches held back is in the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

import lobs_native as lobs
from paper.networks import percent_wrong
from quality import lenet
from quality.calibration_texts import distances, hidden
from quality.encoder import TEXT
from quality.llm.material import WINDOW, Windows, make_folder
from quality.llm.material import loaded as language_model
from quality.whole_encoder import AT_ONCE, encoder_folder, lines, loaded, means, tokenised

HELD_BACK = 0.2
LINES = 200  # to calibrate on, with those held back
TESTED = slice(600, 750)  # lines
HELD_BACK_WINDOWS, TESTED_WINDOWS = 0.25, 12  # of SmolLM2


@dataclass(frozen=True)
class Case:
    """A network, its calibration batches, its outputs on test data, and what is measured there."""

    make: Callable[[], nn.Module]
    batches: Sequence[Any]
    outputs: Callable[[Any], Any]
    measured: Callable[[Any, Any], dict[str, Any]]  # pruned model, original outputs -> the row
    settings: dict[str, Any]


def change(before: Tensor, after: Tensor) -> float:
    """Relative to the size."""
    return float((after - before).norm() / before.norm())


def lenet_case(arguments: argparse.Namespace) -> Case:
    """The first 5,000 images to calibrate on; error in percent on the others."""
    images = lenet.mnist()
    tested = images.part(lenet.CALIBRATION)

    @torch.no_grad()
    def outputs(model: nn.Module) -> Tensor:
        return torch.cat([model(x) for x in tested.batches()])

    def measured(model: nn.Module, before: Tensor) -> dict[str, Any]:
        return {"test": change(before, outputs(model)), "score": percent_wrong(model, tested)}

    batches = list(images.part(0, lenet.CALIBRATION).batches())
    return Case(lenet.network, batches, outputs, measured, {"measure": "all"})


def encoder_case(arguments: argparse.Namespace) -> Case:
    """Lines of text; mean cosine of the embeddings on others."""
    folder, some = encoder_folder(), lines()
    tested = tokenised(folder, some[TESTED], AT_ONCE)

    @torch.no_grad()
    def outputs(model: Any) -> Tensor:
        return torch.cat([means(model(**batch), batch) for batch in tested])

    def measured(model: nn.Module, before: Tensor) -> dict[str, Any]:
        after = outputs(model)
        cosine = float(nn.functional.cosine_similarity(before, after).mean())
        return {"test": change(before, after), "score": cosine}

    return Case(
        lambda: loaded(folder),
        tokenised(folder, some[: arguments.lines], 10),
        outputs,
        measured,
        {
            "include": "encoder.layer.*",
            "forward": lambda m, b: m(**b).last_hidden_state,
            "measure": "all",
        },
    )


def llm_case(arguments: argparse.Namespace) -> Case:
    """Windows of tokens; the divergence and the loss on others, of other articles."""
    folder = arguments.folder
    if folder is None:
        raise SystemExit("llm: pass --folder, where the model's folder is, or is to be kept")
    if not (folder / "config.json").is_file():
        make_folder(folder)
    windows = Windows.of(folder, arguments.text, arguments.windows * WINDOW, TESTED_WINDOWS)

    def measured(model: nn.Module, before: list[Tensor]) -> dict[str, Any]:
        divergences, above = distances(model, windows.measured, before)
        row = {"test": statistics.fmean(divergences), "score": statistics.fmean(above)}
        return {**row, "divergences": divergences, "above": above}

    return Case(
        lambda: language_model(folder),
        list(windows.calibration.split(1)),
        lambda model: hidden(model, windows.measured),
        measured,
        {
            "include": [f"model.layers.{block}.*" for block in range(arguments.blocks)],
            "held_back": HELD_BACK_WINDOWS,
        },
    )


CASES = {"lenet": lenet_case, "encoder": encoder_case, "llm": llm_case}


def pruned(case: Case, sparsity: float, evaluations: int, settings: Any) -> dict[str, Any]:
    """Prune; what a row of the table shows."""
    model = case.make()
    before = case.outputs(model)
    begun = time.process_time()
    report = lobs.prune(
        model,
        case.batches,
        sparsity=sparsity,
        scope="model",
        search=evaluations,
        progress=False,
        **{"held_back": HELD_BACK, **case.settings, **settings},
    )
    seconds = time.process_time() - begun
    return {
        "held back": report.error_bound.held_back,
        **case.measured(model, before),
        "removed": report.removed,
        "layers": {x.name: x.sparsity for x in report.layers},
        "search": report.settings["search for a division"],
        "cpu seconds": seconds,
    }


def _told(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that a result depends on."""
    return {k: v for k, v in vars(arguments).items() if k not in ("out", "folder", "text")}


def main() -> None:
    """Prune with and without a search, and print the table as it goes."""
    parser = argparse.ArgumentParser(description="Divisions of a budget, found by pruning.")
    parser.add_argument("--networks", nargs="+", choices=CASES, default=["lenet", "encoder"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.7, 0.8])
    parser.add_argument("--evaluations", nargs="+", type=int, default=[0, 16])
    parser.add_argument("--spread", type=float, default=0.2)
    parser.add_argument("--lines", type=int, default=LINES, help="for the encoder")
    parser.add_argument("--blocks", type=int, default=8, help="of SmolLM2")
    parser.add_argument("--windows", type=int, default=16, help="of SmolLM2, of 256 tokens")
    parser.add_argument("--folder", type=Path, help="SmolLM2's, where it is or is to be kept")
    parser.add_argument("--text", type=Path, default=TEXT, help="for SmolLM2")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--inputs", default="corrected")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    settings = {key: vars(arguments)[key] for key in ("spread", "method", "inputs")}
    heads = ["network", "sparsity", "evaluations", "held back", "test", "score", "CPU s"]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads), flush=True)
    rows = []
    for name in arguments.networks:
        case = CASES[name](arguments)
        for sparsity in arguments.sparsities:
            for evaluations in arguments.evaluations:
                row = pruned(case, sparsity, evaluations, settings)
                about = {"network": name, "sparsity": sparsity, "evaluations": evaluations}
                rows.append({**about, **row})
                cells = [name, f"{sparsity:g}", str(evaluations)]
                cells += [f"{row[k]:.4f}" for k in ("held back", "test", "score")]
                print("| " + " | ".join([*cells, f"{row['cpu seconds']:.0f}"]) + " |", flush=True)
                if arguments.out:
                    about = {"torch": torch.__version__, "lobs_native": lobs.__version__}
                    about["settings"] = _told(arguments)
                    text = json.dumps({"about": about, "rows": rows}, indent=1)
                    arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
