"""What a situation is, with its neighbours; and what must be right in every one of them."""

from __future__ import annotations

import argparse
import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lobs_native as lobs
from lobs_native.layers import stored_weights

Check = Callable[..., None]
_TARGETS = {"pattern", "sparsity", "max_error", "threshold"}
INPUTS = ("corrected", "pruned", "dense")


@dataclass(frozen=True)
class Situation:
    """What is right, and the settings of its neighbours: all combinations of the values."""

    expected: str
    check: Check
    values: dict[str, tuple[Any, ...]]

    def neighbours(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*self.values.values()):
            yield dict(zip(self.values, values, strict=True))


SITUATIONS: dict[str, Situation] = {}


def situation(expected: str, **values: tuple[Any, ...]) -> Callable[[Check], Check]:
    """Enter a check under the name of its function."""

    def enter(check: Check) -> Check:
        SITUATIONS[check.__name__.replace("_", " ")] = Situation(expected, check, values)
        return check

    return enter


def prune(model: nn.Module, data: list[Any], **options: Any) -> lobs.Report:
    """The report; AssertionError if something is wrong that is always to be right."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = lobs.prune(model, data, **{"sparsity": 0.5, "progress": False, **options})
    weights = stored_weights(model)
    for layer in report.layers:
        mask, weight = report.masks[layer.name], weights[layer.name]
        assert torch.equal(mask, weight != 0), f"{layer.name}: the mask is not where zeros are"
        removed = int((~mask).sum())
        assert layer.sparsity == removed / mask.numel(), f"{layer.name}: {layer.sparsity} said"
        if options.get("scope", "layer") == "layer" and options.keys().isdisjoint(_TARGETS):
            half = (mask.numel() - 1) / 2, (mask.numel() + 1) / 2
            assert half[0] <= removed <= half[1], f"{layer.name}: {removed} of {mask.numel()} gone"
        assert bool(torch.isfinite(weight).all()), f"{layer.name}: not finite"
    coverage = report.coverage
    assert coverage is not None
    assert coverage.removed == report.removed
    allowed = {n for layer in report.layers for n in before if n.startswith(layer.name)}
    allowed |= {n for n in before if "in_proj" in n or "parametrizations" in n}
    allowed |= {n for n in before if n.endswith(("weight_g", "weight_v")) or "rnn.bias" in n}
    for name, value in model.state_dict().items():
        assert name in allowed or torch.equal(value, before[name]), f"{name} changed"
    return report


def close(seen: float, right: float, what: str, tolerance: float = 1e-4) -> None:
    """AssertionError unless two errors are equal up to rounding."""
    assert abs(seen - right) <= tolerance * abs(right) + 1e-9, f"{what}: {seen}, {right} expected"


def tried(each: Situation, neighbour: dict[str, Any]) -> str:
    """What is wrong with one neighbour; "" if nothing is."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            each.check(**neighbour)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(description: str) -> None:
    """Print the table of all situations that have been entered, as it goes."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("words", nargs="*", metavar="WORD", help="situations with it in their name")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what was seen as JSON")
    options = parser.parse_args()
    print("| situation | expected | neighbours | wrong |\n| --- | --- | --- | --- |")
    found = {}
    for name, each in SITUATIONS.items():
        if options.words and not any(word in name for word in options.words):
            continue
        seen = {str(n): tried(each, n) for n in each.neighbours()}
        wrong = {n: what for n, what in seen.items() if what}
        print(f"| {name} | {each.expected} | {len(seen)} | {len(wrong)} |", flush=True)
        found[name] = {"expected": each.expected, "neighbours": len(seen), "wrong": wrong}
    if options.out is not None:
        about = {"torch": str(torch.__version__), "lobs_native": lobs.__version__}
        options.out.write_text(json.dumps({"about": about, "situations": found}, indent=1) + "\n")
    total = sum(x["neighbours"] for x in found.values())
    print(f"{total} neighbours, {sum(len(x['wrong']) for x in found.values())} wrong")
