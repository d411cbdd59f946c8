"""Our classes under the hosts' names against the hosts' own files, in interleaved pairs.

    python bench/hosts/host_sparsegpt.py --folder FOLDER [--only GROUP] [--quick] [...]

FOLDER holds a clone of IST-DASLab/sparsegpt as FOLDER/sparsegpt, which runs unmodified. It waits
for CUDA on any machine; without CUDA that wait is left out. Both sides prune copies of one layer
from copies of one H. Answers are compared before anything is timed: masks may differ in one entry
of 100,000 (scores that tie up to rounding; the table says in how many), and in rows of equal masks
weights may differ by 1e-4 of the largest. See ``paired.py`` for how times are taken.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded, as in paired.py

import contextlib
import copy
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from hosts import host_runs
from lobs_native.compat.hosts import Difference
from lobs_native.compat.sparsegpt import SparseGPT
from speed import shapes
from speed.case import Case, Side
from speed.paired import PAIRS, QUICK_PAIRS

SEQUENCES = 16
TOKENS = 2048
TIES = 1e-5  # share of a mask that may fall either way


def _quietly(run: Callable[..., Any]) -> Callable[..., Any]:
    def quiet(*arguments: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return run(*arguments)

    return quiet


def _distance(x: Tensor, expected: Tensor) -> float:
    return float((x.double() - expected.double()).abs().max() / expected.double().abs().max())


def _calibration(shape: shapes.LayerShape, dtype: torch.dtype, tokens: int) -> list[Tensor]:
    """Sequences (1, T, C), as a hook sees them."""
    x = shapes.relu_features(SEQUENCES * tokens, shape.columns).to(dtype)
    return list(x.view(SEQUENCES, 1, tokens, shape.columns).unbind(0))


def _layer(shape: shapes.LayerShape) -> nn.Linear:
    layer = nn.Linear(shape.columns, shape.rows, bias=False)
    layer.weight.data = shapes.weights(shape)
    return layer


def collect_case(theirs: type, shape: shapes.LayerShape, tokens: int, dtype: torch.dtype) -> Case:
    """``add_batch`` of all sequences, one after another, and a look at H."""
    batches = _calibration(shape, dtype, tokens)
    layer = _layer(shape)
    expected = sum(2 / SEQUENCES * (x[0].double().T @ x[0].double()) for x in batches)
    assert isinstance(expected, Tensor)

    def run(kind: type) -> Tensor:
        gpt = kind(layer)
        for x in batches:
            gpt.add_batch(x, None)
        return gpt.H

    def side(name: str, kind: type) -> Side:
        return Side(name, lambda: run(kind))

    kept = str(dtype).removeprefix("torch.")
    return Case(
        inputs=(),
        name=f"SparseGPT.add_batch, {SEQUENCES} x {tokens} x {shape.columns} {kept}",
        work=float(SEQUENCES * tokens) * shape.columns**2,
        unit="GFLOP/s",
        error=lambda H: _distance(H, expected),
        tolerance=1e-4,
        ours=side("lobs_native", SparseGPT),
        rivals={"host": side("the host's own", theirs)},
    )


def prune_case(theirs: type, shape: shapes.LayerShape, H: Tensor, **target: Any) -> Case:
    """``fasterprune`` from H."""
    layer = _layer(shape)

    def fresh(kind: type) -> tuple[Any]:
        gpt = kind(copy.deepcopy(layer))
        gpt.H, gpt.nsamples = H.clone(), SEQUENCES
        return (gpt,)

    @_quietly
    def run(gpt: Any) -> Tensor:
        gpt.fasterprune(**target)
        return gpt.layer.weight.data

    def side(name: str, kind: type) -> Side:
        return Side(name, run, prepare=lambda: fresh(kind))

    expected = run(*fresh(theirs))

    def error(pruned: Tensor) -> float:
        apart = Difference.between(pruned, expected)
        return apart.values if apart.mask <= TIES * apart.entries else float("inf")

    ties = Difference.between(run(*fresh(SparseGPT)), expected).mask

    pattern = "2:4" if target.get("prunen") else f"{target['sparsity']:.0%}"
    return Case(
        inputs=(),
        name=f"SparseGPT.fasterprune, {shape.rows} x {shape.columns}, {pattern}",
        work=float(shape.rows) * shape.columns**2,
        unit="GFLOP/s",
        error=error,
        tolerance=1e-4,
        ours=side("lobs_native", SparseGPT),
        rivals={
            "host": replace(side("the host's own", theirs), note=f"masks differ in {ties} entries")
        },
    )


def _of_sparsegpt(folder: Path) -> type:
    sys.path.insert(0, str(folder / "sparsegpt"))
    original: type = importlib.import_module("sparsegpt").SparseGPT
    return original


def _sizes(quick: bool) -> tuple[shapes.LayerShape, int]:
    shape = shapes.LAYERS["opt-1.3b.attention"]
    return (shape.small(), TOKENS // 16) if quick else (shape, TOKENS)


def collect_cases(folder: Path, quick: bool) -> Iterator[Case]:
    """``add_batch`` in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        yield collect_case(_of_sparsegpt(folder), *_sizes(quick), dtype)


def prune_cases(folder: Path, quick: bool) -> Iterator[Case]:
    """``fasterprune`` at half, and 2:4."""
    theirs = _of_sparsegpt(folder)
    shape, tokens = _sizes(quick)
    gpt = SparseGPT(_layer(shape))
    for x in _calibration(shape, torch.float32, tokens):
        gpt.add_batch(x)
    H = gpt.peek()
    yield prune_case(theirs, shape, H, sparsity=0.5)
    yield prune_case(theirs, shape, H, sparsity=0.0, prunen=2, prunem=4)


GROUPS = {"sparsegpt collect": collect_cases, "sparsegpt prune": prune_cases}


def main() -> None:
    """Compare; without CUDA, nothing waits for it."""
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda device=None: None
    host_runs.run(__doc__, GROUPS, pairs=PAIRS, quick_pairs=QUICK_PAIRS)


if __name__ == "__main__":
    main()
