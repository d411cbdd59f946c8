"""The picture at the top of the README, ``docs/quality.svg``, from two files of ``bench/results``.

    python docs/figures/quality.py

Left: ``encoder.json``, every linear layer of the encoder pruned by itself. Right:
``whole_encoder.json``, the same encoder pruned as a whole. Nothing here is typed in by hand.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

DOCS = Path(__file__).resolve().parents[1]
RESULTS = DOCS.parent / "bench" / "results"
GREY, SAND, BLUE, ORANGE, GREEN = "#8a8f98", "#b8860b", "#0072b2", "#d55e00", "#00795c"
INK, FAINT = "#1f2328", "#d7dbe0"

LAYERS = {"magnitude": ("magnitude", GREY), "wanda": ("Wanda", SAND), "exact": ("exact", ORANGE)}
NETWORK = {  # (method, scope, inputs): label, color
    ("exact", "model", "corrected"): ("exact, one budget, corrected", GREEN),
    ("exact", "layer", "dense"): ("exact", ORANGE),
    ("sweep", "layer", "dense"): ("SparseGPT (sweep)", BLUE),
    ("wanda", "row", "dense"): ("Wanda", SAND),
    ("magnitude", "layer", "dense"): ("magnitude", GREY),
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lobs_native",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def draw_layers(axes: Axes) -> None:
    """One dot per layer: its error over SparseGPT's for the same layer and setting."""
    measured = read("encoder.json")
    settings = list(measured["summary"])
    jitter = random.Random(0)
    for k, (method, (label, color)) in enumerate(LAYERS.items()):
        for place, setting in enumerate(settings):
            rows = [r["results"] for r in measured["rows"] if r["setting"] == setting]
            ratios = [r[method]["relative_error"] / r["sweep"]["relative_error"] for r in rows]
            center = place + 0.25 * (k - 1)
            across = [center + jitter.uniform(-0.09, 0.09) for _ in ratios]
            axes.scatter(across, ratios, s=11, color=color, alpha=0.75, linewidths=0)
            if place == len(settings) - 1:
                at = sorted(ratios)[len(ratios) // 2]
                axes.text(3.5, at, label, color=color, va="center", fontweight="bold")
    axes.plot([-0.5, 3.42], [1, 1], color=BLUE, linewidth=1.5, zorder=0)
    axes.text(3.5, 1, "SparseGPT", color=BLUE, va="center", fontweight="bold")
    axes.set_yscale("log")
    ticks = [0.5, 1, 2, 4]
    axes.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_xticks(range(len(settings)), settings)
    axes.set_xlim(-0.5, 4.3)
    axes.set_xlabel("sparsity")
    axes.set_title("Error of a layer's output, relative to SparseGPT's\n(one dot per layer)")
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def draw_network(axes: Axes) -> None:
    """Lines over sparsity: how near the pruned network's embeddings are to the original ones."""
    rows = read("whole_encoder.json")["rows"]
    for key, (label, color) in NETWORK.items():
        found = {
            float(row["target"]): row["cosine"]
            for row in rows
            if (row["method"], row["scope"], row["inputs"]) == key and ":" not in row["target"]
        }
        shares = sorted(found)
        cosines = [found[share] for share in shares]
        axes.plot([100 * x for x in shares], cosines, color=color, marker="o", linewidth=2)
        axes.text(81.2, cosines[-1], label, color=color, va="center", fontweight="bold")
    axes.set_xticks([50, 60, 70, 80], ["50%", "60%", "70%", "80%"])
    axes.set_xlim(48, 104)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("sparsity")
    axes.set_title("Sentence embeddings of the pruned network:\nmean cosine with the original ones")
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def main() -> None:
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.9), width_ratios=(1, 1))
        draw_layers(left)
        draw_network(right)
        figure.tight_layout(w_pad=2)
        figure.savefig(DOCS / "quality.svg", metadata={"Date": None}, facecolor="white")
        plt.close(figure)


if __name__ == "__main__":
    main()
