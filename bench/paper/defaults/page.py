"""The page of the defaults experiment: errors against rows and damping, and the cost of each
damping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paper.markdown import table

__all__ = ["Row", "Whole", "best_damping", "defaults_page", "regrets"]

_NEAR = 1.1


@dataclass(frozen=True)
class Row:
    """One network, pruned with one damping by one method and calibrated on some rows.

    Errors are relative: geometric means over the layers.
    """

    subject: str
    rows: float
    method: str
    damping: float
    used: float  # the most that was used, where Cholesky failed with what was asked
    calibration: float  # error on the rows that were calibrated on
    heldout: float  # on others
    layers: Mapping[str, float]  # on others, by layer
    network: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Whole:
    """One network pruned as a whole by ``lobs.prune`` with method "exact"."""

    subject: str
    rows: int
    inputs: str  # "dense", "pruned" or "corrected"
    damping: float
    network: Mapping[str, float]
    seconds: float


def regrets(rows: Sequence[Row], of: str = "heldout") -> dict[tuple[str, float, str], list[float]]:
    """(network, rows, method) -> error of each damping over the error of the best one.

    In the order of the dampings. ``of`` is "heldout" (layers) or "output" (the network's).
    """

    def error(row: Row) -> float:
        return row.heldout if of == "heldout" else row.network["output"]

    groups: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.subject, row.rows, row.method), []).append(row)
    costs = {}
    for key, group in groups.items():
        if len(group) > 1:
            errors = [error(row) for row in sorted(group, key=lambda row: row.damping)]
            costs[key] = [e / min(errors) for e in errors]
    return costs


def best_damping(rows: Sequence[Row], of: str = "heldout") -> float:
    """The damping that costs least compared with the best one.

    Costs are geometric means over networks, methods and numbers of rows.
    """
    dampings = _swept(rows)
    each = list(regrets(rows, of).values())
    costs = [_mean([regret[k] for regret in each]) for k in range(len(dampings))]
    return dampings[min(range(len(costs)), key=costs.__getitem__)]


def defaults_page(
    descriptions: Mapping[str, str], rows: Sequence[Row], whole: Sequence[Whole], default: float
) -> str:
    """Everything that has been measured, as Markdown."""
    parts = [
        "# Calibration rows and damping\n",
        "Made by `python bench/paper defaults --data DIR --encoder DIR --text FILE`.\n",
        "Layers are calibrated on the original network's inputs and pruned each by itself, bias "
        "updated, without retraining. Errors of layers are `tr(dW H dW^T) / tr(W H W^T)` with H of "
        "data that were **held out**, geometric means over the layers; in brackets on the data "
        "that were calibrated on. output: distance of the network's output from the original "
        "one, relative to that, on held-out data.\n",
    ]
    for name, text in descriptions.items():
        own = [row for row in rows if row.subject == name]
        if own:
            parts += [f"## {name}\n", f"{text[0].upper()}{text[1:]}.\n", *_network(own, default)]
        parts += _whole([row for row in whole if row.subject == name])
    if len(_swept(rows)) > 1:
        parts += ["## What a damping costs\n", _costs(rows, default)]
    return "\n".join(parts)


def _network(rows: Sequence[Row], default: float) -> list[str]:
    methods = list(dict.fromkeys(row.method for row in rows))
    more = [name for name in rows[0].network if name != "output"]
    header = ["rows", *(f"{m}: layers" for m in methods)]
    header += [f"{m}: {name}" for m in methods for name in ("output", *more)]
    at_default = [row for row in rows if row.damping == default]
    lines = []
    for count in dict.fromkeys(row.rows for row in at_default):
        by_method = {row.method: row for row in at_default if row.rows == count}
        lines.append(
            [
                f"{count:,.0f}",
                *(_layers(by_method[m]) for m in methods),
                *(_number(by_method[m].network[n]) for m in methods for n in ("output", *more)),
            ]
        )
    enough = ", ".join(
        f"{m} from {_enough([row for row in at_default if row.method == m]):,.0f} rows"
        for m in methods
    )
    parts = [
        f"### Rows, at damping {default:g}\n",
        table(header, lines),
        f"Layers within {_NEAR - 1:.0%} of the lowest error of their column: {enough}.\n",
    ]
    swept = [count for count in dict.fromkeys(r.rows for r in rows) if _dampings(rows, count) > 1]
    header = ["damping", *header[1:]]
    for count in swept:
        lines = []
        for damping in _swept(rows):
            by_method = {r.method: r for r in rows if r.rows == count and r.damping == damping}
            lines.append(
                [
                    f"{damping:g}{_raised(by_method.values())}",
                    *(_layers(by_method[m]) for m in methods),
                    *(_number(by_method[m].network[n]) for m in methods for n in ("output", *more)),
                ]
            )
        parts += [f"### Damping, at {count:,.0f} rows\n", table(header, lines)]
    return parts


def _enough(rows: Sequence[Row]) -> float:
    """The fewest rows with a held-out error near the lowest."""
    most = _NEAR * min(row.heldout for row in rows)
    return min(row.rows for row in rows if row.heldout <= most)


def _whole(rows: Sequence[Whole]) -> list[str]:
    if not rows:
        return []
    dampings = sorted({row.damping for row in rows})
    header = ["rows", "inputs", "on held-out data", *(f"{d:g}" for d in dampings)]
    lines = []
    for count, inputs in dict.fromkeys((row.rows, row.inputs) for row in rows):
        by_damping = {r.damping: r.network for r in rows if (r.rows, r.inputs) == (count, inputs)}
        for name in rows[0].network:
            values = [by_damping[d][name] for d in dampings]
            best = min(values)
            cells = (f"**{_number(v)}**" if v == best else _number(v) for v in values)
            lines.append([f"{count:,}", inputs, name, *cells])
    return [
        "### The network as a whole, exact, by damping\n",
        "`lobs.prune` with the same shares; inputs of the already pruned network, or of that with "
        "the original's outputs as the aim (bold: the best of its line).\n",
        table(header, lines),
    ]


def _costs(rows: Sequence[Row], default: float) -> str:
    dampings = _swept(rows)
    text = (
        "Error over that of the best damping for the same network, method and rows (1 is the "
        "best): layers on held-out data, and the network's output.\n\n"
    )
    header = ["network", "rows", "method", *(f"{d:g}" for d in dampings)]
    for of, title in (("heldout", "layers"), ("output", "output")):
        groups = regrets(rows, of)
        lines = [
            [name, f"{count:,.0f}", method, *(f"{r:.2f}" for r in regret)]
            for (name, count, method), regret in groups.items()
        ]
        for method in dict.fromkeys(key[2] for key in groups):
            own = [regret for key, regret in groups.items() if key[2] == method]
            lines.append(_line("mean", method, dampings, own))
        each = list(groups.values())
        lines.append(_line("mean", "all", dampings, each))
        worst = [max(regret[k] for regret in each) for k in range(len(dampings))]
        lines.append(["worst", "", "all", *(f"**{w:.2f}**" for w in worst)])
        text += f"### {title}\n\n" + table(header, lines) + "\n"
    layers, output = (best_damping(rows, of) for of in ("heldout", "output"))
    return text + (
        f"The damping that costs least on average: {layers:g} for layers, {output:g} for the "
        f"output; the default is {default:g}.\n"
    )


def _line(
    name: str, method: str, dampings: Sequence[float], each: Sequence[Sequence[float]]
) -> list[str]:
    means = (_mean([regret[k] for regret in each]) for k in range(len(dampings)))
    return [name, "", method, *(f"**{m:.2f}**" for m in means)]


def _swept(rows: Sequence[Row]) -> list[float]:
    return sorted({row.damping for row in rows})


def _dampings(rows: Sequence[Row], count: float) -> int:
    return len({row.damping for row in rows if row.rows == count})


def _layers(row: Row) -> str:
    return f"{_number(row.heldout)} ({_number(row.calibration)})"


def _raised(rows: object) -> str:
    raised = sorted({r.used for r in rows if r.used > r.damping})  # type: ignore[attr-defined]
    return f" (raised to {raised[-1]:g})" if raised else ""


def _number(value: float) -> str:
    return f"{value:.3g}"


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
