"""The page of the small networks: tables beside the paper's, the aims, and the figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from paper.markdown import spread, table
from paper.networks import Case
from paper.small import printed
from paper.small.aims import aims_of
from paper.small.budgets import Budgeted
from paper.small.plots import ALONE, Picture
from paper.small.tables import BETWEEN, FEW, LIGHTLY, LONGER, TAUGHT_AT_ONCE, Row, Rows, Taught
from paper.small.ways import WAYS

_ONCE, _STAGES = "once", "stages"


def page(
    cases: Sequence[Case],
    rows: Rows,
    pictures: Sequence[Picture],
    budgeted: Sequence[Budgeted],
    facts: Mapping[str, str],
    missing: Sequence[str],
) -> tuple[str, dict[str, Any]]:
    """The page in Markdown, and all numbers as plain values.

    Parameters
    ----------
    cases : sequence of Case
        The first network of each kind.
    rows : Rows
        Of all networks.
    pictures : sequence of Picture
        Stand beside the page as ``<stem>.svg``.
    budgeted : sequence of Budgeted
    facts : mapping
        Versions, threads, seconds.
    missing : sequence of str
        What was left out, and why.
    """
    parts = [_HEAD, "".join(f"- {name}: {value}\n" for name, value in facts.items()), "\n"]
    parts += [f"- left out: {what}\n" for what in missing]
    parts += [_aims(rows, cases)]
    for case in cases:
        parts.append(f"\n## {case.name}\n\n{_setup(case)}\n")
        parts.append(_rows_table(case, _ONCE, rows))
        for which in (_STAGES, LIGHTLY.table, LONGER.table):
            if any(key[:2] == (which, case.name) for key in rows.rows):
                parts.append(_rows_table(case, which, rows))
    parts.append(_budgets(budgeted))
    parts += ["\n## Figures\n"]
    for picture in pictures:
        parts.append(f"\n![{picture.caption}]({picture.stem}.svg)\n\n{picture.caption}\n")
        parts.append(_numbers_table(picture))
    numbers = {
        "facts": dict(facts),
        "rows": [dataclasses.asdict(row) for row in rows.rows.values()],
        "figures": {picture.stem: picture.numbers for picture in pictures},
        "budgets": [dataclasses.asdict(b) for b in budgeted],
    }
    return "".join(parts), numbers


_HEAD = """# The paper's small networks

Made by `python bench/paper small`. Errors in percent; where several networks were
trained, the mean and, in brackets, the lowest and the highest. "kept": share of the weights that
stay. Calibration never sees labels. Retraining is Adam on the kept weights, its rate falling from
0.001 along half a cosine, in batches of 128 images with labels. It ends when the validation error,
looked at every 20 iterations (convolutions: 50), is back at that of the network before pruning; at
the limit it ends without that, with the best weights it had. "reached" says how often it got there.
Validation images are never trained on, and no run sees its test images. The recipes of the taught
runs were chosen by the validation images of the authors' network, seeds 0 and 1. Rows in italics
are printed in the paper, for MNIST, and for CIFAR-Net CIFAR-10, whatever the data here.

"""


def _setup(case: Case) -> str:
    split = case.splits[0]
    text = (
        f"{len(split.training)} images to retrain on, {len(split.validation)} to stop by, "
        f"{len(split.calibration)} to calibrate on, {len(split.test)} to measure on."
    )
    if len(case.splits) == 2:
        text += (
            " Only MNIST's 10,000 test images are at hand: each half (every second image) is "
            "measured with the network that was pruned and retrained on the other half, so that "
            "errors are over all of them "
            "and no image is measured by a network that has seen it. There is one network; the "
            "spread is that of the order of images in retraining."
        )
    return text + "\n"


# ---- tables --------------------------------------------------------------------------------------


def _rows_table(case: Case, which: str, rows: Rows) -> str:
    """All ways of one network, and the paper's rows."""
    header = ["way", "kept by layer, %", "kept, %", "before", "pruned", "retrained", "iterations",
              "reached", "s to prune"]  # fmt: skip
    lines = []
    for way in WAYS:
        cell = rows.of(which, case.name, way)
        if cell:
            lines.append(_line(way, cell))
    for row in printed.TABLE1:
        iterated = "iterative" in row.method
        if row.network == case.shape.title and iterated == (which != _ONCE):
            pruned = "-" if row.pruned is None else f"{row.pruned:.2f}"
            lines.append([
                f"*{row.method}, printed*", "-", f"{row.kept:g}", f"{row.original:.2f}", pruned,
                f"{row.retrained:.2f}", f"{row.iterations:,.0f}", "-", "-",
            ])  # fmt: skip
    title = {
        _ONCE: "Pruned once (table 1)",
        _STAGES: f"In two stages (tables 3 and 4), with at most {BETWEEN} iterations between them",
        **{how.table: _taught(how) for how in (LIGHTLY, LONGER)},
    }[which]
    return f"\n{title}:\n\n{table(header, lines)}"


def _taught(how: Taught) -> str:
    varied = "varied at random"
    if not how.vary:
        varied += f" where there are fewer than {FEW:,}"
    return (
        f"Beyond the paper: {how.stages} stages in equal ratios from the shares of the first to "
        f"those of the second, after each at most {how.between} iterations (the last: {how.last}) "
        f"in batches of {TAUGHT_AT_ONCE} towards the outputs of the network before pruning, "
        f"and towards the label where that network errs (softened by {how.temperature:g}; Adam, "
        f"rate {how.rate:g}; images {varied})"
    )


def _line(way: str, cell: Sequence[Row]) -> list[str]:
    retrained = [error for row in cell for error in row.retrained]
    iterations = [count for row in cell for count in row.iterations]
    reached = [share for row in cell for share in row.reached]
    kept = cell[0].kept
    return [
        way,
        " / ".join(f"{100 * share:.3g}" for share in kept.values()),
        spread([100 * row.kept_all for row in cell[:1]]),
        spread([row.dense for row in cell]),
        spread([row.pruned for row in cell]),
        spread(retrained),
        spread(iterations, 0),
        f"{sum(reached):g} of {len(reached)}",
        spread([sum(row.seconds for row in cell) / len(cell)], 1),
    ]


def _aims(rows: Rows, cases: Sequence[Case]) -> str:
    """The aims, and whether they were reached."""
    header = ["network", "what", "measured", "aim", "reached", "the paper's L-OBS"]
    lines = [
        [a.network, a.what, a.measured, a.aim, "yes" if a.reached else "no", a.paper]
        for a in aims_of(rows, cases)
    ]
    return f"\n## Aims\n\n{table(header, lines)}"


# ---- budgets -------------------------------------------------------------------------------------

_BUDGETS = """Method exact, inputs of the original network, no retraining. A layer's error is that
of its output over the output, both mean squares (`max_error`); a network's is the root mean square
change of its output over that of the output, on the calibration images: measured, or bounded by
Theorem 3.2 with spectral norms (bisection over one budget for the model).
"""


def _budgets(budgeted: Sequence[Budgeted]) -> str:
    header = ["network", "at most", "incurred", "kept by layer, %", "kept, %", "before", "pruned"]
    lines = [
        [
            b.network, f"{b.what}: {b.asked:g}", f"{b.incurred:.4g}",
            " / ".join(f"{100 * share:.3g}" for share in b.kept.values()),
            f"{100 * b.kept_all:.2f}", f"{b.dense:.2f}", f"{b.pruned:.2f}",
        ]
        for b in budgeted
    ]  # fmt: skip
    return f"\n## Budgets of error instead of shares\n\n{_BUDGETS}\n{table(header, lines)}"


# ---- what figures say ----------------------------------------------------------------------------

_BEND = """The inflection point is the kept share k0 of the hinge that is nearest to the points,
`log error = log dense + slope * max(0, log(k0 / kept))`. The paper's text puts it at about 4% kept.
"""
_SHORT = "300: LeNet-300-100 (*: the authors' weights), L5: LeNet-5, C: CIFAR-Net.\n"


def _numbers_table(picture: Picture) -> str:
    """The numbers of a figure as a table, where it has some."""
    written = {
        "figure2-fc1": _first_layer,
        "figure-whole": _whole,
        "figure-layers": _layers,
        "figure3-sensitivity": _sensitivity,
    }.get(picture.stem)
    return "" if written is None else "\n" + written(picture.numbers)


def _first_layer(n: Mapping[str, Any]) -> str:
    curves = n["curves"]
    shares = [share for share, _ in next(iter(curves.values()))]
    header = ["kept of fc1, %", *(f"{100 * k:g}" for k in shares), "inflection point"]
    lines = [
        [way, *(f"{e:.2f}" for _, e in points), _percent(n["inflection"].get(way))]
        for way, points in curves.items()
    ]
    for name, points in printed.FIGURE2.items():
        bend = n["inflection"].get(f"{name}, printed")
        if bend is not None:
            at = {round(k, 1): f"{e:.2f}" for k, e in points}
            cells = [at.get(round(100 * share, 1), "-") for share in shares]
            lines.append([f"*{name}, printed*", *cells, _percent(bend)])
    return f"{_BEND}\n{table(header, lines)}"


def _whole(n: Mapping[str, Any]) -> str:
    shares = [share for share, _ in next(iter(n.values()))["points"]]
    header = ["kept, %", "before", *(f"{100 * k:g}" for k in shares), "inflection point"]
    lines = []
    for name, curve in n.items():
        errors = (f"{error:.2f}" for _, error in curve["points"])
        lines.append([name, f"{curve['dense']:.2f}", *errors, _percent(curve["inflection"])])
    return table(header, lines)


def _layers(n: Mapping[str, Any]) -> str:
    header = [f"rise at {100 * ALONE:g}% kept of one layer", *n["layers"]]
    lines = [[way, *(f"{v:.2f}" for v in values)] for way, values in n["rises"].items()]
    return f"{table(header, lines)}\n{_SHORT}"


def _sensitivity(n: Mapping[str, Any]) -> str:
    header = ["bin", *(str(k + 1) for k in range(len(n["counts"]))), "largest"]
    lines = [
        ["here", *(str(c) for c in n["counts"]), f"{n['largest']:.3g}"],
        ["*printed*", *(str(c) for c in printed.FIGURE3), "5.8e-3"],
    ]
    below = ", ".join(
        f"{share:g}%: {value:.3g} (printed {theirs:.3g})"
        for (share, theirs), value in zip(printed.FIGURE5.items(), n["below"], strict=True)
    )
    return (
        f"{table(header, lines)}\nFigure 5, the L_q that so many lie at or below: {below}. Below "
        f"0.001 lie {100 * n['share below 1e-3']:.1f}%; the paper's text says about 92%, its own "
        "histogram over 99%.\n"
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"
