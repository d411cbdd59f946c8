"""The methods that are compared, and one call for all of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import lobs_native as lobs
from paper.data import Images
from paper.small.rivals import obd_masks, random_masks

# Layers see the inputs of the original network, as in the paper, unless it says otherwise.
WAYS: dict[str, dict[str, Any]] = {
    "random": {},
    "magnitude": {"method": "magnitude", "inputs": "dense"},
    "Wanda": {"method": "wanda", "scope": "row", "inputs": "dense"},
    "OBD": {},
    # The authors' ridge (alpha = 1e6) in units of a mean diagonal of about 0.1; biases are ranked.
    "L-OBS as printed": {
        "method": "lobs", "inputs": "dense", "damping": 1e-5, "prune_bias": True,
    },
    "L-OBS": {"method": "lobs", "inputs": "dense"},
    "sweep": {"method": "sweep", "inputs": "dense"},
    "exact": {"method": "exact", "inputs": "dense"},
    "exact, model, corrected": {"method": "exact", "scope": "model", "inputs": "corrected"},
}  # fmt: skip
ITERATED = tuple(way for way in WAYS if way != "L-OBS as printed")  # biases come back in training


@dataclass(frozen=True)
class Pruned:
    """A pruned copy, its masks (True = kept), and the seconds it took."""

    model: nn.Sequential
    masks: dict[str, Tensor]
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def kept(self) -> dict[str, float]:
        """Share of kept weights, of every layer."""
        return {name: float(mask.float().mean()) for name, mask in self.masks.items()}

    @property
    def kept_all(self) -> float:
        """The same of all layers together."""
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        return kept / sum(mask.numel() for mask in self.masks.values())


def prune_by(
    way: str, model: nn.Sequential, kept: Mapping[str, float], calibration: Images, seed: int
) -> Pruned:
    """Prune a copy to the given shares of kept weights.

    With scope "model": to their total, each layer within 0.2 of its own share and with at least
    half of it. Layers that ``kept`` does not name are left alone.
    """
    begun = time.perf_counter()
    pruned = copy.deepcopy(model)
    if way in ("random", "OBD"):
        if way == "random":
            masks = random_masks(pruned, kept, seed)
        else:
            masks = obd_masks(pruned, calibration.x, kept, seed)
        lobs.apply_masks(pruned, masks)
        return Pruned(pruned, masks, time.perf_counter() - begun)
    report = lobs.prune(
        pruned,
        calibration.batches(),
        sparsity=0.5,
        include=list(kept),
        overrides={name: {"sparsity": 1 - share} for name, share in kept.items()},
        progress=False,
        seed=seed,
        **WAYS[way],
    )
    return _done(pruned, report, begun)


def _done(model: nn.Sequential, report: lobs.Report, begun: float) -> Pruned:
    notes = [f"{layer.name}: {note}" for layer in report.layers for note in layer.notes]
    return Pruned(model, report.masks, time.perf_counter() - begun, notes)
