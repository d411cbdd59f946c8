"""Theorem 3.2 of the paper for whole networks, where it holds.

For a feed-forward chain of linear layers with 1-Lipschitz activations (the paper: ReLU), with E_k
the error that pruning layer k incurred on its inputs,

    ||output - original||_F / sqrt(n)  <=  sum_k ( prod_{l > k} ||What_l|| ) sqrt(E_k)

with Frobenius norms as printed, or with spectral norms, which the same proof allows and which are
far smaller. Biases cancel. If layers were pruned on inputs from the already pruned network, the
sum telescopes in the other direction, and the bound holds with the norms of the ORIGINAL later
layers (our remark).
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from lobs_native.calibration.outputs import (
    SAMPLE,
    First,
    Sample,
    Samples,
    measure_change,
    sample_outputs,
)
from lobs_native.calibration.session import Session
from lobs_native.errors import ArgumentError
from lobs_native.files.shelf import Shelf
from lobs_native.layers import Layer
from lobs_native.layers.computed import value_of
from lobs_native.network.selection import LayerJob
from lobs_native.network.settings import NetworkSettings
from lobs_native.report.records import ErrorBound, LayerReport

__all__ = [
    "NotAChainError",
    "amplifications",
    "chain_of",
    "covered_weights",
    "norm_bytes",
    "norm_flops",
    "theorem_parts",
]


class NotAChainError(Exception):
    """The theorem does not cover the network; the message says why."""


_LIPSCHITZ_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.Softplus,
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.AlphaDropout,
)  # fmt: skip
_LIPSCHITZ_FUNCTIONS = {
    torch.relu, functional.relu, functional.relu6, functional.hardtanh,
    torch.tanh, torch.sigmoid, torch.flatten,
}  # fmt: skip
_LIPSCHITZ_METHODS = {
    "relu",
    "relu_",
    "tanh",
    "sigmoid",
    "flatten",
    "view",
    "reshape",
    "contiguous",
}
_SHAPE_METHODS = {"size", "dim"}


def chain_of(model: nn.Module, holding: Iterable[str] = ()) -> list[str]:
    """Names of the linear layers, first to last, if ``model`` is a chain of them, those of
    ``holding`` included.

    Raises NotAChainError with the reason if it is not.
    """
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:  # tracing runs the user's forward: anything can come out of it
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotAChainError(f"the model could not be traced: {first_line}") from error
    modules = dict(model.named_modules())
    names: list[str] = []
    current: fx.Node | None = None
    shapes: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if current is not None and node.users:
                raise NotAChainError(f"it has more than one input ({node.name})")
            current = current or node
        elif node.op == "output":
            if node.args[0] is not current:
                raise NotAChainError("its output is not the last layer's output alone")
        elif _is_shape(node, shapes):
            shapes.add(node)
        else:
            _check_step(node, current, modules, names)
            current = node
    if not names:
        raise NotAChainError("it has no linear layer")
    for name in holding:
        if name not in names:
            raise NotAChainError(f"layer {name} is not part of the chain")
    return names


def _is_shape(node: fx.Node, shapes: set[fx.Node]) -> bool:
    """Whether a node yields sizes, which carry no values of the network."""
    if node.op == "call_method" and node.target in _SHAPE_METHODS:
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return node.op == "call_function" and node.target is operator.getitem and node.args[0] in shapes


def _check_step(
    node: fx.Node, current: fx.Node | None, modules: Mapping[str, nn.Module], names: list[str]
) -> None:
    if not node.args or node.args[0] is not current:
        raise NotAChainError(f"{node.name} does not read the output of the step before it")
    what: Any = node.target
    if node.op == "call_module":
        module = modules[str(node.target)]
        if type(module) is nn.Linear:
            if str(node.target) in names:
                raise NotAChainError(f"layer {node.target} is used twice")
            names.append(str(node.target))
            return
        if isinstance(module, _LIPSCHITZ_MODULES):
            return
        if isinstance(module, nn.LeakyReLU) and abs(module.negative_slope) <= 1:
            return
        if isinstance(module, nn.ELU) and abs(module.alpha) <= 1:
            return
        what = type(module).__name__
    elif node.op == "call_function" and node.target is functional.dropout:
        if node.kwargs.get("training", True) is False:
            return
        what = "dropout that is always on"
    elif (node.op == "call_function" and node.target in _LIPSCHITZ_FUNCTIONS) or (
        node.op == "call_method" and node.target in _LIPSCHITZ_METHODS
    ):
        return
    raise NotAChainError(
        f"{getattr(what, '__name__', what)} ({node.name}) is not covered by the theorem"
    )


def theorem_parts(
    chain: Sequence[str],
    weight: Callable[[str], Tensor],
    errors: Mapping[str, tuple[float, float]],
    output_rows: float,
) -> dict[str, tuple[float, float]]:
    """name -> the contribution of each pruned layer to the (Frobenius, spectral) bound.

    chain : the layers' names, first to last.
    weight : name -> (R, C) of a layer: the pruned ones if layers were pruned on dense inputs, the
    original ones otherwise.
    errors : name -> (E_k, rows), for the pruned layers.
    output_rows : rows of the network's output; a layer that a flatten follows may see more.
    """
    parts = {}
    later_frobenius = later_spectral = 1.0
    for name in reversed(chain):
        if name in errors:
            error, count = errors[name]
            step = math.sqrt(error * count / output_rows)
            parts[name] = later_frobenius * step, later_spectral * step
        w = weight(name).detach().to(torch.float64)
        later_frobenius *= float(torch.linalg.matrix_norm(w))
        later_spectral *= float(torch.linalg.matrix_norm(w, ord=2))
    return parts


def amplifications(model: nn.Module, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """name -> (1, R) of the square of the spectral norms of the layers after it.

    The sum over the layers, each times its error, equals the square of the bound up to a factor,
    which is at most the number of layers. ArgumentError if the theorem does not cover the network.
    """
    try:
        chain = chain_of(model, [layer.name for layer in layers])
    except NotAChainError as why:
        raise ArgumentError(
            f"sensitivity: 'bound' needs a network that Theorem 3.2 covers: {why}; use 'output'"
        ) from why
    modules = dict(model.named_modules())
    later, squares = 1.0, {}
    for name in reversed(chain):
        squares[name] = later
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        later *= float(torch.linalg.matrix_norm(weight.detach().double(), ord=2)) ** 2
    return {
        layer.name: torch.full((layer.groups, layer.rows), squares[layer.name], dtype=torch.float64)
        for layer in layers
    }


def error_bound_of(
    session: Session,
    jobs: Sequence[LayerJob],
    done: Mapping[str, LayerReport],
    settings: NetworkSettings,
    limit: int | None,
    samples: Samples,
) -> ErrorBound:
    """The bound for a network that has been pruned, beside its measured error; or the reason why
    there is none. ``limit`` bounds the bytes that measuring keeps in memory.

    The error is measured on a sample of the data (one of ``samples``, if it is there), unless the
    settings ask for all of it, or the bound holds, which is that of all of it.
    """
    model, inputs = session.model, settings.inputs
    chain, reason = list[str](), ""
    try:
        chain = _chain_of_pruned(session, jobs)
        if session.weights is not None:
            raise NotAChainError("errors are weighted by token_weights, but not the output's")
        if settings.tune is not None:
            raise NotAChainError("errors are those before tuning")
        last = max(done, key=chain.index)
        if inputs == "corrected" and done[last].inherited is None:
            raise NotAChainError(f"layer {last}, the last one pruned, was not corrected")
    except NotAChainError as why:
        reason = str(why)
    everything = settings.measure == "all" or not reason
    if everything:
        measured = measure_change(session, limit)
    else:
        measured = measure_change(session, limit, SAMPLE, samples.calibrated)
    rows_held_back = None if settings.measure == "all" else SAMPLE
    held_back = _held_back(session, limit, rows_held_back, samples.held_back)
    root = norm = rows = None
    if measured is not None and measured.rows:
        root = (measured.difference / measured.rows) ** 0.5
        norm = (measured.size / measured.rows) ** 0.5
        rows = measured.rows
    if measured is None:
        reason = reason or "the output has no floating-point tensor"
    if measured is None or reason:
        return ErrorBound(
            covered=False,
            reason=reason,
            measured=root,
            output_norm=norm,
            rows=rows,
            batches=0 if measured is None else measured.batches,
            held_back=held_back,
        )
    modules = dict(model.named_modules())

    def weight(name: str) -> Tensor:
        now = modules[name].weight
        assert isinstance(now, Tensor)
        full = f"{name}.weight" if name else "weight"
        return now.detach() if inputs == "dense" else session.originals.get(full, now.detach())

    errors = {name: (report.error, report.rows) for name, report in done.items()}
    rule = "Theorem 3.2"
    if inputs == "pruned":
        rule = "Theorem 3.2 for pruned inputs: norms of the original later layers"
    elif inputs == "corrected":  # its error includes those of all layers before it
        errors = {last: errors[last]}
        rule = f"the measured error of {last}, times the norms of the layers after it"
    parts = theorem_parts(chain, weight, errors, measured.rows)
    frobenius, spectral = (sum(part[k] for part in parts.values()) for k in (0, 1))
    each = {name: part[1] for name, part in parts.items()}
    return ErrorBound(
        True,
        rule,
        frobenius,
        spectral,
        root,
        norm,
        each,
        rows=rows,
        batches=measured.batches,
        held_back=held_back,
    )


def covered_weights(session: Session, jobs: Sequence[LayerJob]) -> list[Tensor]:
    """The weights of the layers of a network that the theorem covers, as far as known before it is
    pruned; none if it does not."""
    try:
        names = _chain_of_pruned(session, jobs)
    except NotAChainError:
        return []
    modules = dict(session.model.named_modules())
    return [value_of(modules[name], "weight") for name in names]


def norm_bytes(weight: Tensor) -> int:
    """Bytes that the norms of a weight take, as measured: it is loaded, converted and copied."""
    return (weight.element_size() + 2 * 8) * weight.numel()


def norm_flops(weight: Tensor) -> float:
    """How many operations in float64 products of matrices would do in the time that the norms of a
    weight take, as measured."""
    return 2.0 * weight.numel() * min(weight.shape)


def samples_of(
    session: Session,
    settings: NetworkSettings,
    first: First,
    kept: contextlib.ExitStack,
    *,
    sampled: bool,
) -> Samples:
    """What the network, before it is pruned, returns for samples of the data: of what is calibrated
    on if ``sampled``, and of what is held back, until ``kept`` is closed. ``first`` holds what it
    returned for the first batch."""
    calibrated = held_back = None
    if sampled:
        calibrated = sample_outputs(session, first.outputs, SAMPLE, first=first.rows)
    else:
        first.outputs.close()
    if session.held_back and settings.measure != "all":
        shelf = kept.enter_context(Shelf(first.outputs.limit))
        held_back = sample_outputs(session, shelf, SAMPLE, held_back=True)
    return Samples(calibrated, held_back)


def _held_back(
    session: Session, limit: int | None, rows: int | None, sample: Sample | None
) -> float | None:
    """The change of the output relative to its size on the batches held back; None if there are
    none, or it cannot be measured."""
    if not session.held_back:
        return None
    change = measure_change(session, limit, rows, sample, held_back=True)
    return None if change is None or not change.size else (change.difference / change.size) ** 0.5


def _chain_of_pruned(session: Session, jobs: Sequence[LayerJob]) -> list[str]:
    """The layers of a network that the theorem covers. Raises NotAChainError."""
    if session.differing:
        raise NotAChainError("the original network is not the one that was passed to be pruned")
    if session.forward is not None:
        raise NotAChainError(
            "the model is run by a function (forward=), so its steps are not known"
        )
    if session.padded:
        raise NotAChainError("padding was left out, but the output has rows of it")
    return chain_of(session.model, [job.layer.name for job in jobs])
