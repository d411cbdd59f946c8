"""Networks whose parameters lie in pieces on several ranks, as FSDP2 leaves them (DTensor): whole
and plain for one run.

A plain parameter stands in its module for each that is in pieces, with ``offload`` in a file. The
network then runs on each rank by itself, without what ``torch.distributed`` does around forward
passes. In the end each rank copies its part of the result into its piece, which is back in its
module, the same object as before. Until then no piece is written to.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lobs_native.calibration.offload import Spilled, units
from lobs_native.calibration.ranks import Ranks, check_alike
from lobs_native.calibration.session import Session, batches_of
from lobs_native.errors import ArgumentError
from lobs_native.files.mapped import check_system
from lobs_native.files.shelf import Place
from lobs_native.layers import overwrite
from lobs_native.network.settings import NetworkSettings
from lobs_native.network.whole_modules import (
    in_pieces,
    is_tensor_parallel,
    reshard,
    whole_modules,
)

__all__ = ["Gathered", "gathered"]


@dataclass(frozen=True)
class Gathered:
    """What was gathered: how many parameters and buffers, and their bytes, those of this rank's
    ``pieces``, and how many hooks of ``torch.distributed`` were set aside; ``places``: where they
    lie in files; ``calibration``: the data, as batches if an iterator was used up."""

    calibration: Any
    parameters: int = 0
    bytes: int = 0
    pieces: int = 0
    hooks: int = 0
    places: Mapping[str, Place] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """For the report; nothing if nothing was gathered."""
        names = ("parameters", "bytes", "pieces", "hooks")
        return {"gathered": {n: getattr(self, n) for n in names}} if self.parameters else {}


@contextlib.contextmanager
def gathered(
    model: Any, calibration: Any, settings: NetworkSettings, ranks: Ranks
) -> Iterator[Gathered]:
    """Gather what lies in pieces, for as long as the context lasts. Collective, if any does.

    The results are copied into the pieces when it ends, unless by an error, on any rank. Where
    modules do more than FSDP2's to their inputs and outputs, the network runs the first batch in
    pieces and whole, and must return the same.

    Raises
    ------
    ArgumentError
        A parameter cannot be gathered, or not be handed back, the ranks have not the same ones, or
        the whole network returns something else.
    MemoryError
        The whole parameters do not fit into the memory that is free.
    CheckpointError
        The folder ``offload`` cannot be written to, or has too little room.
    """
    if not isinstance(model, nn.Module):
        yield Gathered(calibration)
        return
    reshard(model)
    pieces = in_pieces(model)
    if not pieces:
        yield Gathered(calibration)
        return
    _check(model, pieces, settings, ranks)
    checking = None
    if is_tensor_parallel(model):
        calibration = batches_of(calibration)
        session = Session(model, calibration, settings.forward, None, settings.seed, False)
        checking = session, _first_output(session)
        reshard(model)
    total, spilled = sum(map(_bytes, pieces.values())), None
    if settings.offload is not None:
        spilled = Spilled(Path(settings.offload), total)
    with contextlib.ExitStack() as scope:
        hooks = scope.enter_context(whole_modules(model))
        held = _holders(model, pieces)
        scope.callback(_hold, held, {id(x): x for x in pieces.values()})
        whole: dict[int, Tensor] = {}
        places: dict[str, Place] = {}
        for name, piece in pieces.items():
            value = ranks.gathered(f"the pieces of {name}", piece).detach().contiguous()
            _check_the_way_back(name, value, piece)
            if spilled is not None:
                value, places[name] = spilled.put(value)
            elif value.data_ptr() == piece.to_local().data_ptr():
                value = value.clone()
            whole[id(piece)] = value
            if isinstance(piece, nn.Parameter):
                whole[id(piece)] = nn.Parameter(value, requires_grad=piece.requires_grad)
        _hold(held, whole)
        if checking is not None:
            _check_output(*checking)
        yield Gathered(
            calibration,
            parameters=len(pieces),
            bytes=total,
            pieces=sum(_bytes(x.to_local()) for x in pieces.values()),
            hooks=hooks,
            places=places,
        )
        _hand_back(pieces.values(), whole, ranks)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


# ---- whether it is possible ----------------------------------------------------------------------


def _check(
    model: nn.Module, pieces: Mapping[str, Any], settings: NetworkSettings, ranks: Ranks
) -> None:
    """Raise, on all ranks, unless all of them can gather these."""
    if settings.device is not None:
        raise ArgumentError(
            f"device: parameters such as {next(iter(pieces))!r} are DTensors, whose pieces stay "
            f"where they are, and device is {str(settings.device)!r}; leave it out"
        )
    members = ranks.members()
    for name, piece in pieces.items():
        if (why := _why_not(piece, members, settings)) is not None:
            raise ArgumentError(f"model: parameter {name!r} is a DTensor {why}")
    check_alike(ranks, {f"parameter {n}": [*x.shape, str(x.dtype)] for n, x in pieces.items()})
    if settings.offload is not None:
        check_system("offload")
    _check_memory(model, pieces, settings, ranks)


def _why_not(piece: Any, members: Sequence[int], settings: NetworkSettings) -> str | None:
    """Why it cannot be gathered, and the way out; None if it can."""
    mesh, there = piece.device_mesh, sorted(piece.device_mesh.mesh.flatten().tolist())
    if not set(there) <= set(members):
        return (
            f"with pieces on the ranks {there}, and not all of them prune (only {list(members)}); "
            "pass group, such as torch.distributed.group.WORLD, and call prune on all ranks"
        )
    if mesh.get_coordinate() is None:
        return f"of which this rank has no piece (only {there} have); prune on those alone"
    if any(p.is_partial() for p in piece.placements):
        return f"that is a sum over ranks ({piece.placements}); redistribute it first"
    local = piece.to_local()
    if local.is_meta:
        return "without values (on the device meta); load them first"
    if type(local) not in (Tensor, nn.Parameter):
        return f"whose pieces are of the type {type(local).__name__}, not plain tensors; gather it"
    if local.device.type != mesh.device_type:
        return (
            f"on {local.device.type} for a mesh on {mesh.device_type}, as by CPUOffloadPolicy; "
            "shard the network without that"
        )
    if settings.offload is not None and local.device.type != "cpu":
        return f"on {local.device.type}, and offload is for the CPU alone; leave offload out"
    return None


def _check_the_way_back(name: str, value: Tensor, piece: Any) -> None:
    if not _equal(_piece_of(value, piece), piece.to_local()):
        raise ArgumentError(
            f"model: parameter {name!r} is a DTensor with the placements {piece.placements}, to "
            "which its whole value cannot be handed back; gather the model, so that every rank has "
            "all of it"
        )


def _check_memory(
    model: nn.Module, pieces: Mapping[str, Any], settings: NetworkSettings, ranks: Ranks
) -> None:
    """Raise MemoryError, on all ranks, unless each computer has room for what its ranks gather: all
    of it, or a block at a time with ``offload``; and one parameter that is on its way."""
    sizes = {id(x): _bytes(x) for x in pieces.values()}
    at_a_time = [sum(sizes.get(id(p), 0) for p in of) for of in units(model).values()]
    taken = sum(sizes.values()) if settings.offload is None else max(at_a_time, default=0)
    where = next(iter(pieces.values())).to_local().device
    own = [f"{platform.node()}, {where}", taken + max(sizes.values()), _free(where)]
    every = ranks.all_values("memory for whole parameters", own)
    for place, _, free in every:
        needs = [need for there, need, _ in every if there == place]
        if free is not None and sum(needs) > free:
            what, way_out = "a block at a time", "use fewer ranks for each computer"
            if settings.offload is None:
                what, way_out = "all at a time", f"pass offload=DIR, or {way_out}"
            raise MemoryError(
                f"model: its parameters lie in pieces (DTensor) and are gathered, {what}, which "
                f"takes {sum(needs):,} bytes on {place} ({len(needs)} ranks), and {free:,} are "
                f"free; {way_out}"
            )


def _free(device: torch.device) -> int | None:
    """Bytes of memory that are free, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


# ---- whether it is the same network --------------------------------------------------------------


def _first_output(session: Session) -> list[Tensor]:
    """What the network returns for the first batch, on the CPU, as whole tensors."""
    with session.evaluating():
        for batch in session.each("look"):
            output = session.call(session.model, batch)
            break
    output = dict(output) if isinstance(output, Mapping) else output
    tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    return [getattr(x, "full_tensor", lambda x=x: x)().cpu().double() for x in tensors]


def _check_output(session: Session, returned: Sequence[Tensor]) -> None:
    """Raise ArgumentError unless the whole network returns, up to rounding, what it did in
    pieces."""
    why = "it returns something else"
    try:
        now = _first_output(session)
    except (RuntimeError, TypeError, ValueError) as error:
        now, why = [], f"it fails: {' '.join(str(error).split())[:200]}"
    shapes = [x.shape for x in returned]
    alike = bool(shapes) and [x.shape for x in now] == shapes
    for a, b in zip(now, returned, strict=True) if alike else ():
        alike = alike and bool((a - b).norm() <= _CLOSE * b.norm())
    if not alike:
        raise ArgumentError(
            "model: it is tensor parallel, and with whole parameters, without hooks of "
            f"torch.distributed, {why}; its modules may count on pieces, such as their share of "
            "the heads: prune a model that is not parallelized, and load the result"
        )


# ---- there and back ------------------------------------------------------------------------------

_CLOSE = 0.05  # of its norm by which an output may differ: rounding, by up to 8 bits of mantissa
_Held = list[tuple[dict[str, Any], str, int]]


def _holders(model: nn.Module, pieces: Mapping[str, Any]) -> _Held:
    """Where modules hold what lies in pieces: (their parameters or buffers, name, id of it)."""
    known = {id(x) for x in pieces.values()}
    return [
        (held, name, id(x))
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for name, x in held.items()
        if id(x) in known
    ]


def _hold(held: _Held, values: Mapping[int, Tensor]) -> None:
    for holder, name, key in held:
        holder[name] = values[key]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one type and shape have the same bits."""
    x, y = (v.detach().contiguous().view(-1).view(torch.uint8) for v in (a, b))
    return torch.equal(x, y)


def _piece_of(whole: Tensor, like: Any) -> Tensor:
    """This rank's piece of a whole tensor, laid out as another is. Nothing is exchanged."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    there = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    piece: Tensor = there.redistribute(placements=like.placements).to_local()
    return piece


@torch.no_grad()
def _hand_back(pieces: Iterable[Any], whole: Mapping[int, Tensor], ranks: Ranks) -> None:
    """Copy what has changed into this rank's pieces; all of it on all ranks, or nothing."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for piece in pieces:
            local, new = piece.to_local(), _piece_of(whole[id(piece)].detach(), piece)
            if not _equal(local, new):
                before.append((local, local.clone()))
                overwrite(local, new)
        ranks.all_values("results are handed back", None)  # or a rank has failed
    except BaseException:
        for local, value in before:
            overwrite(local, value)
        raise
