"""Pruning to an error instead of to a share: of every layer, or of the whole network."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError
from paper.networks import Case, percent_wrong

RELATIVE = (0.001, 0.01, 0.05)  # errors of layers
LIMITS = (("measured", 0.1), ("measured", 0.2), ("spectral", 0.5))  # changes of outputs
HALVINGS = 10  # of the range of sparsities: to a thousandth


Pair = tuple[nn.Module, lobs.Report]


@dataclass(frozen=True)
class Bounded:
    """A pruned copy, and the bound or the measurement of its whole output's change."""

    model: nn.Module
    report: lobs.Report
    value: float


@dataclass(frozen=True)
class Budgeted:
    """A network pruned to an error. ``asked`` and ``incurred`` are relative to the outputs."""

    network: str
    what: str
    asked: float
    incurred: float
    kept: dict[str, float]
    kept_all: float
    dense: float  # error in percent on the test images of the first split
    pruned: float


def budgets_of(case: Case, halvings: int = HALVINGS) -> Iterator[Budgeted]:
    """Every layer to each of ``RELATIVE``, and the whole network to each of ``LIMITS``.

    The bound only where Theorem 3.2 covers the network.
    """
    split = case.splits[0]
    batches = split.calibration.batches()
    dense = percent_wrong(case.model, split.test)

    def row(what: str, asked: float, incurred: float, pair: Pair) -> Budgeted:
        model, report = pair
        kept = {layer.name: 1 - layer.sparsity for layer in report.layers}
        error = percent_wrong(model, split.test)
        return Budgeted(case.name, what, asked, incurred, kept, 1 - report.sparsity, dense, error)

    for relative in RELATIVE:
        pair = prune_layers_to(case.model, batches, relative, list(case.shape.once))
        worst = max(layer.relative_error for layer in pair[1].layers)
        yield row("error of each layer", relative, worst, pair)
        covered = pair[1].error_bound.covered
    tried: dict[float, Pair] = {}
    for measure, limit in LIMITS:
        if measure == "measured" or covered:
            bounded = prune_network_to(case.model, batches, limit, measure, halvings, tried)
            pair = (bounded.model, bounded.report)
            yield row(f"change of the output, {measure}", limit, bounded.value, pair)


def prune_layers_to(
    model: nn.Module, batches: Sequence[Tensor], relative: float, layers: Sequence[str]
) -> Pair:
    """Prune a copy so that every layer's output error is at most ``relative`` of its output.

    Both are mean squares. Each layer is pruned on the inputs of the original network
    (``max_error``).
    """
    seen = lobs.prune(
        copy.deepcopy(model), batches, sparsity=0.5, method="magnitude", inputs="dense",
        include=list(layers), progress=False,
    )  # fmt: skip
    energy = {layer.name: layer.error / layer.relative_error for layer in seen.layers}
    pruned = copy.deepcopy(model)
    overrides = {name: {"max_error": relative * value} for name, value in energy.items()}
    report = lobs.prune(
        pruned, batches, sparsity=0.5, method="exact", inputs="dense", include=list(layers),
        overrides=overrides, progress=False,
    )  # fmt: skip
    return pruned, report


def prune_network_to(
    model: nn.Module,
    batches: Sequence[Tensor],
    limit: float,
    measure: str,
    halvings: int = HALVINGS,
    tried: dict[float, Pair] | None = None,
) -> Bounded:
    """A copy with as few weights as keep the change of the network's output within a limit.

    One budget for the model (scope "model"), whose size is found by bisection over the sparsity.

    Parameters
    ----------
    model : nn.Module
        Not modified.
    batches : sequence of tensors
        Calibration inputs.
    limit : float
        Above 0: the root mean square change of the output over that of the output itself.
    measure : "spectral" or "measured"
        What must stay within it: the bound of Theorem 3.2 with spectral norms, which holds for
        networks that the theorem covers and on the calibration inputs; or the change measured on
        them.
    halvings : int
        Of the range of sparsities, 0 to 1: so many networks are pruned.
    tried : dict, optional
        Sparsity -> what it led to. Sparsities that are in it are not pruned to again; others are
        added. For several limits of one network.

    Raises
    ------
    ArgumentError
        The theorem does not cover the network, or no sparsity that was tried is within the limit.
    """
    tried = {} if tried is None else tried
    low, high = 0.0, 1.0  # sparsities: within the limit, beyond it
    best: Bounded | None = None
    for _ in range(halvings):
        sparsity = (low + high) / 2
        if sparsity not in tried:
            pruned = copy.deepcopy(model)
            report = lobs.prune(
                pruned, batches, sparsity=sparsity, method="exact", scope="model", inputs="dense",
                progress=False,
            )  # fmt: skip
            tried[sparsity] = pruned, report
        pruned, report = tried[sparsity]
        bound = report.error_bound
        value = bound.spectral if measure == "spectral" else bound.measured
        if value is None or bound.output_norm is None:
            raise ArgumentError(
                f"measure: {measure!r} is not known of this network: {bound.reason}"
            )
        relative = value / bound.output_norm
        if relative <= limit:
            low, best = sparsity, Bounded(pruned, report, relative)
        else:
            high = sparsity
    if best is None:
        raise ArgumentError(
            f"limit: {limit:g}; not even {low + 2**-halvings:.4f} of the weights can go"
        )
    return best
