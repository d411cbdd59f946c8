"""In which order the units of each family can be removed, and what that costs: measured on the
original network, before anything is removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from lobs_native import ops
from lobs_native.calibration.moments import Moments, calibrate
from lobs_native.calibration.session import Session
from lobs_native.errors import NonFiniteError, NotPositiveDefiniteError
from lobs_native.layers import Layer, layers_of
from lobs_native.network.shrinking.units import Family, columns_of
from lobs_native.solvers.joint import Reader, Removal, cheapest_first, joint_removal
from lobs_native.solvers.measurement import energy
from lobs_native.solvers.problem import Problem
from lobs_native.solvers.workspace import Workspace

__all__ = ["removals_of"]

_AT_ONCE = 1 << 30  # bytes of second moments that are accumulated in one pass, unless told


def removals_of(
    families: Sequence[Family],
    session: Session,
    *,
    method: str,
    damping: float,
    memory: int | None = None,
) -> list[Removal]:
    """The order of removal of each family; inside :meth:`Session.evaluating`.

    With method "exact" costs are the errors that are left after repair, otherwise the squares of
    the method's scores, of each reader relative to its outputs ``tr(W H W^T)``, so that readers and
    families can be compared. (Errors times the sensitivity of the network's output, which compare
    single weights, do worse here: ``docs/results/shrinking.md``.) Takes a pass over the data for so
    many second moments as fit into half of ``memory`` bytes.
    """
    layers = {layer.name: layer for layer in layers_of(session.model)}
    removals = []
    for piece in _pieces(families, layers, _AT_ONCE if memory is None else memory // 2):
        some = [layers[name] for family in piece for name in family.readers]
        moments = calibrate(some, session, f"costs of units, {len(piece)} families")
        for family in piece:
            readers = [
                _reader(layers[name], family, moments.pop(name), method, damping)
                for name in family.readers
            ]
            parts = [s.units for s in family.slots if s.name.endswith(".weight") and not s.read]
            if method == "exact":
                removals.append(joint_removal(readers, family.units, parts))
            else:
                scores = [_scores(reader, method) for reader in readers]
                removals.append(cheapest_first(readers, family.units, parts, scores))
    return removals


def _pieces(
    families: Sequence[Family], layers: Mapping[str, Layer], most: int
) -> Iterator[list[Family]]:
    """The families in order, divided so that the second moments of each part take ``most`` bytes,
    or are of one family."""
    piece: list[Family] = []
    held = 0
    for family in families:
        size = sum(8 * (layers[name].width + 1) ** 2 for name in family.readers)
        if piece and held + size > most:
            yield piece
            piece, held = [], 0
        piece.append(family)
        held += size
    yield piece


def _reader(
    layer: Layer,
    family: Family,
    moments: Moments,
    method: str,
    damping: float,
) -> Reader:
    weight = layer.weight()
    try:
        problem = Problem.of(
            weight,
            layer.bias(),
            moments.matrices(),
            damping=damping,
            inverted=method == "exact",
            prune_bias=False,
            mask=None,
            workspace=Workspace(ops.select_backend(None, weight.device), None),
        )
    except (NonFiniteError, NotPositiveDefiniteError) as error:
        raise type(error)(f"layer {layer.name!r}: {error}") from error
    columns = columns_of(layer, family.read_at(layer.name)).to(weight.device)
    return Reader(problem, columns, 1 / (energy(problem) or 1.0))


def _scores(reader: Reader, method: str) -> Tensor:
    """The squares of a method's scores, summed over the rows, (C,) float64."""
    problem = reader.problem
    squares = problem.before[0, :, : problem.in_features].double().square().sum(0)
    if method == "wanda":
        squares *= problem.moments[0].diagonal()[: problem.in_features]
    return squares * reader.importance
