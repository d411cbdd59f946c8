"""Which networks of transformers and timm get smaller, by name.

    pip install ".[hf]" timm
    python bench/quality/shrink_zoo.py [WORD ...] [--library transformers|timm] [--from TYPE]
                                       [--seconds N] [--out FILE]

The networks are those of ``zoo.py``. Each is shrunk to half of its units, in multiples of 4, chosen
by magnitude on the inputs of the original network: which units belong together does not depend on
how they are chosen, and this takes the least time. What a network's configuration can express is
removed first; such a network is saved, loaded by its own class, and must return the same. If
nothing can be removed so, ``configured=False``.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn

import lobs_native as lobs
from lobs_native.calibration.outputs import floating_tensors
from quality import small_models, zoo
from quality.zoo import Row

__all__ = ["shrunk", "summary"]

OUTCOMES = {
    "loads": "smaller, and its own class loads it",
    "smaller": "smaller, saved only as a whole",
    "left": "left, with the reason",
}


def shrunk(model: nn.Module, batches: list[Any]) -> Row:
    """What became of a network, which is shrunk: "loads", "smaller", "left", or what is wrong."""
    row: Row = {}
    finite = _finite(model, batches[0])
    for configured in (True, False):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="lobs_native")
                report = lobs.shrink(
                    model,
                    batches,
                    keep=0.5,
                    multiple=4,
                    method="magnitude",
                    inputs="dense",
                    configured=configured,
                    pairs=0,
                    progress=False,
                )
        except lobs.LobsError as error:
            row = {"outcome": "left", "said": str(error)[:1000]}
            continue
        except Exception as error:
            return {"outcome": "raised", "said": f"{type(error).__name__}: {error}"[:500]}
        row = {
            "outcome": "smaller",
            "kinds": sorted({family.kind for family in report.layers}),
            "families": len(report.layers),
            "parameters": report.parameters,
            "notes": [note[:300] for note in report.notes],
        }
        if report.configured:
            row["outcome"] = _loaded(model, batches[0])
        elif _finite(model, batches[0]) != finite:
            row["outcome"] = "not finite"
        return row
    return row


def _outputs(model: nn.Module, batch: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)  # for networks that draw numbers
    with torch.no_grad(), small_models.without_caches(model):
        output = model(**batch) if isinstance(batch, dict) else model(batch)
    return list(floating_tensors(output))


def _finite(model: nn.Module, batch: Any) -> list[bool]:
    """Of each tensor in the output; some networks return infinities."""
    return [bool(x.isfinite().all()) for x in _outputs(model, batch)]


def _loaded(model: nn.Module, batch: Any) -> str:
    """Save the network, load it by its class, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        loaded = type(model).from_pretrained(folder).eval()  # type: ignore[attr-defined]
    before, after = _outputs(model.eval(), batch), _outputs(loaded, batch)
    same = len(before) == len(after) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b in zip(before, after, strict=True)
    )
    return "loads" if same else "loads as another network"


def _row(library: str, name: str, number: int) -> Row:
    try:
        model, batches = zoo.LIBRARIES[library].made(name)
    except small_models.NotMadeError as error:
        return {"outcome": "not made", "said": str(error)[:150]}
    return shrunk(model, batches)


def summary(found: list[Row]) -> Row:
    """How many have each outcome, and how many lose each kind of units."""
    tried = [row for row in found if row["outcome"] != "not made"]
    kinds = sorted({kind for row in tried for kind in row.get("kinds", ())})
    outcomes = dict.fromkeys([*OUTCOMES, *(row["outcome"] for row in tried)])
    return {
        "types": len(found),
        "made": len(tried),
        **{key: sum(row["outcome"] == key for row in tried) for key in outcomes},
        **{f"of them {kind}": sum(kind in row.get("kinds", ()) for row in tried) for kind in kinds},
    }


def _line(row: Row) -> str:
    said = ", ".join(row["kinds"]) if "kinds" in row else row.get("said", "")[:200]
    return f"{row['type']:28} {OUTCOMES.get(row['outcome'], row['outcome'])}: {said}"


if __name__ == "__main__":
    zoo.run(__doc__ or "", _row, _line, summary)
