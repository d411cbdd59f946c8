"""The demo's comparison of methods as a picture, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence

from lobs_native.report.charts import Curve

__all__ = ["png"]


def png(curves: Sequence[Curve], before: float) -> bytes:
    """Test error against sparsity as a PNG file. ``before`` is the test error before pruning."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")  # draws without a window
    axes = figure.add_subplot()
    for curve, style in zip(curves, ("o--", "s:", "D-.", "^--", "v-", "P-"), strict=True):
        sparsities, errors = zip(*curve.points, strict=True)
        percents = [100 * x for x in sparsities], [100 * y for y in errors]
        axes.plot(*percents, style, label=curve.name)
    axes.axhline(100 * before, color="0.5", linewidth=1, label="before pruning")
    axes.set_xlabel("sparsity of every layer (%)")
    axes.set_ylabel("test error (%)")
    axes.set_title("Pruned without retraining, handwritten digits")
    axes.grid(alpha=0.3)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
