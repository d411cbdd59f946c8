"""Divisions of one budget that are found by pruning with them, against the one by costs.

    python bench/quality/search.py [--networks N ...] [--sparsities S ...] [--evaluations N ...]
        [--spread X] [--lines N] [--out FILE]

Networks: the authors' LeNet-300-100 on MNIST, as in `lenet.py`; and the sentence encoder
all-MiniLM-L6-v2 on WikiText-2, as in `whole_encoder.py`, with fewer lines to calibrate on. A fifth
of the calibration batches is held back, also where nothing is searched (0 evaluations). The table
has the change of the output, relative to its size, on the batches held back and on test data that
pruning never sees; what users look at on the latter (the error in percent, the mean cosine of the
embeddings); and CPU seconds.
"""

from __future__ import annotations

import argparse
import json
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
from quality.whole_encoder import AT_ONCE, encoder_folder, lines, loaded, means, tokenised

HELD_BACK = 0.2
LINES = 200  # to calibrate on, with those held back
TESTED = slice(600, 750)  # lines


@dataclass(frozen=True)
class Case:
    """A network, its calibration batches, its outputs on test data, and what users look at."""

    make: Callable[[], nn.Module]
    batches: Sequence[Any]
    outputs: Callable[[Any], Tensor]  # (n, ...)
    score: Callable[[Any, Tensor, Tensor], float]  # model, original outputs, outputs
    settings: dict[str, Any]


def lenet_case(arguments: argparse.Namespace) -> Case:
    """The first 5,000 images to calibrate on; error in percent on the others."""
    images = lenet.mnist()
    tested = images.part(lenet.CALIBRATION)

    @torch.no_grad()
    def outputs(model: nn.Module) -> Tensor:
        return torch.cat([model(x) for x in tested.batches()])

    batches = list(images.part(0, lenet.CALIBRATION).batches())
    return Case(
        lenet.network, batches, outputs, lambda model, _, __: percent_wrong(model, tested), {}
    )


def encoder_case(arguments: argparse.Namespace) -> Case:
    """Lines of text; mean cosine of the embeddings on others."""
    folder, some = encoder_folder(), lines()
    tested = tokenised(folder, some[TESTED], AT_ONCE)

    @torch.no_grad()
    def outputs(model: Any) -> Tensor:
        return torch.cat([means(model(**batch), batch) for batch in tested])

    def cosine(model: nn.Module, before: Tensor, after: Tensor) -> float:
        return float(nn.functional.cosine_similarity(before, after).mean())

    return Case(
        lambda: loaded(folder),
        tokenised(folder, some[: arguments.lines], 10),
        outputs,
        cosine,
        {"include": "encoder.layer.*", "forward": lambda m, b: m(**b).last_hidden_state},
    )


CASES = {"lenet": lenet_case, "encoder": encoder_case}


def pruned(case: Case, sparsity: float, evaluations: int, spread: float) -> dict[str, Any]:
    """Prune; what a row of the table shows."""
    model = case.make()
    before = case.outputs(model)
    begun = time.process_time()
    report = lobs.prune(
        model,
        case.batches,
        sparsity=sparsity,
        scope="model",
        spread=spread,
        held_back=HELD_BACK,
        search=evaluations,
        progress=False,
        measure="all",
        **case.settings,
    )
    seconds = time.process_time() - begun
    after = case.outputs(model)
    return {
        "held back": report.error_bound.held_back,
        "test": float((after - before).norm() / before.norm()),
        "score": case.score(model, before, after),
        "removed": report.removed,
        "layers": {x.name: x.sparsity for x in report.layers},
        "search": report.settings["search for a division"],
        "cpu seconds": seconds,
    }


def main() -> None:
    """Prune with and without a search, and print the table as it goes."""
    parser = argparse.ArgumentParser(description="Divisions of a budget, found by pruning.")
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.7, 0.8])
    parser.add_argument("--evaluations", nargs="+", type=int, default=[0, 16])
    parser.add_argument("--spread", type=float, default=0.2)
    parser.add_argument("--lines", type=int, default=LINES, help="for the encoder")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    heads = ["network", "sparsity", "evaluations", "held back", "test", "score", "CPU s"]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads), flush=True)
    rows = []
    for name in arguments.networks:
        case = CASES[name](arguments)
        for sparsity in arguments.sparsities:
            for evaluations in arguments.evaluations:
                row = pruned(case, sparsity, evaluations, arguments.spread)
                about = {"network": name, "sparsity": sparsity, "evaluations": evaluations}
                rows.append({**about, **row})
                cells = [name, f"{sparsity:g}", str(evaluations)]
                cells += [f"{row[k]:.4f}" for k in ("held back", "test", "score")]
                print("| " + " | ".join([*cells, f"{row['cpu seconds']:.0f}"]) + " |", flush=True)
                if arguments.out:
                    about = {"torch": torch.__version__, "lobs_native": lobs.__version__}
                    about["settings"] = {k: v for k, v in vars(arguments).items() if k != "out"}
                    text = json.dumps({"about": about, "rows": rows}, indent=1)
                    arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
