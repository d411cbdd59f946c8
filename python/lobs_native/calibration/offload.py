"""Parameters that lie in files, and in memory only while the part of the network that they belong
to is used.

Their tensors are mapped: at one address, so that everything that recognises them by their memory
still does, they show the bytes of a file, and take memory only where they are read. A part's memory
is given back as soon as another part is run. A pruned parameter is written to a file and shown from
there; its original stays where it was, so that going back to it copies nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lobs_native.calibration.watch import span
from lobs_native.errors import CheckpointError
from lobs_native.files.atomic import need_space
from lobs_native.files.mapped import Mapped, Scratch, Slot, is_shown
from lobs_native.files.shelf import Place, state_if_equal

__all__ = ["Offload", "Spilled", "forgotten", "put_away", "showing_originals", "units"]

_LEAST = 1 << 12  # bytes of a parameter; smaller ones, of less than a page, stay in memory


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"offload: {folder}: {error}") from error


def _make_room(folder: Path, size: int) -> None:
    """Make the folder if it is not there; it must have room for so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    need_space(folder, size)


def _spill(scratch: Scratch, value: Tensor) -> tuple[Tensor, Slot]:
    """A contiguous tensor on the CPU, from a file now, and its place there."""
    slot = scratch.room(0, value.nbytes)
    scratch.write(slot, value)
    return Mapped(slot, value.shape, value.dtype).tensor if value.numel() else value, slot


class Spilled:
    """Values that come one at a time, and of which each is in a file from then on. The folder is
    made if it is not there; it must have room for ``size`` bytes.

    Raises CheckpointError where it has not, or cannot be written to.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        with _writing(folder):
            _make_room(folder, size)
            self._scratch = Scratch(folder)

    def put(self, value: Tensor) -> tuple[Tensor, Place]:
        """The same value, from a file, and its place there. This object must be kept for as long as
        the place is used."""
        with _writing(self.folder):
            return _spill(self._scratch, value)


@dataclass
class _Part:
    """A parameter, where its original bytes lie, and where its present ones do."""

    mapped: Mapped
    original: Place
    pruned: Slot | None = None

    @property
    def size(self) -> int:
        return self.mapped.tensor.numel() * self.mapped.tensor.element_size()


class Offload:
    """The parameters of a model on the CPU, mapped from files; small ones, and those that share
    memory, stay as they are. Their values do not change.

    Parameters
    ----------
    model : nn.Module
    folder : Path
        Where files without names are made, for pruned parameters and for those that lie in no file.
        It is made if it is not there.
    places : {name: Place}
        Where parameters lie in files, as far as known; such a file must stay as it is.

    Raises
    ------
    CheckpointError
        The folder cannot be written to, or has too little room.
    """

    def __init__(self, model: nn.Module, folder: Path, places: Mapping[str, Place]) -> None:
        self.folder = folder
        self._parts: dict[Tensor, _Part] = {}
        self._current: Collection[nn.Parameter] = ()
        chosen = _mappable(model)
        self.rest = sum(p.numel() * p.element_size() for p in model.parameters())
        contiguous = {n: (p.detach(), places[n]) for n, p in chosen.items() if n in places}
        shown = is_shown(contiguous)
        shown |= {n for n in contiguous.keys() - shown if state_if_equal(*contiguous[n])}
        size = sum(p.numel() * p.element_size() for p in chosen.values())
        spilled = sum(p.numel() * p.element_size() for n, p in chosen.items() if n not in shown)
        with _writing(folder):
            _make_room(folder, size + spilled)
            self._originals, self._pruned = Scratch(folder), Scratch(folder)
            for name, p in chosen.items():
                bytes_ = p.numel() * p.element_size()
                place = places.get(name)
                if name not in shown or place is None:
                    place = self._originals.room(p.data_ptr() % 64, bytes_)
                    self._originals.write(place, p)
                mapped = Mapped(place, p.shape, p.dtype)
                p.data = mapped.tensor
                self._parts[p] = _Part(mapped, place)
                self.rest -= bytes_
        named = model.named_parameters(remove_duplicate=False)
        self.places = {n: self._parts[p].original for n, p in named if p in self._parts}
        parts = units(model)
        self.largest = max((sum(self._size(p) for p in of) for of in parts.values()), default=0)
        self._hooks = [
            unit.register_forward_pre_hook(self._entering(parameters))
            for unit, parameters in parts.items()
        ]

    def _size(self, p: nn.Parameter) -> int:
        return self._parts[p].size if p in self._parts else 0

    def __contains__(self, p: nn.Parameter) -> bool:
        return p in self._parts

    def close(self) -> None:
        """Give back the memory, and no longer care for it: parameters keep their values, in memory
        as far as they are used from now on."""
        self.drop(self._parts)
        for hook in self._hooks:
            hook.remove()

    def _entering(self, parameters: Collection[nn.Parameter]) -> Any:
        def hook(*_: Any) -> None:
            if self._current is not parameters:
                self.drop(self._current)
                self._current = parameters

        return hook

    def drop(self, values: Iterable[Tensor]) -> None:
        """Give back the memory of the parameters among ``values``, which were not written to since
        they were read or kept."""
        for x in values:
            if x in self._parts:
                self._parts[x].mapped.drop()

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Write the present values of parameters to a file, and show them from there."""
        with _writing(self.folder):
            for part in (self._parts[p] for p in parameters if p in self._parts):
                if part.pruned is None:
                    part.pruned = self._pruned.room(part.mapped.offset, part.size)
                self._pruned.write(part.pruned, part.mapped.tensor)
                part.mapped.show(part.pruned)

    def stored(self, value: Tensor) -> Tensor:
        """A copy of a tensor on the CPU that lies in a file as well, and in memory where it is
        read."""
        with _writing(self.folder):
            return _spill(self._pruned, value.contiguous())[0]

    def show_originals(self, parameters: Iterable[nn.Parameter]) -> None:
        """Show the original values of parameters of which :meth:`keep` has others."""
        for part in (self._parts[p] for p in parameters if p in self._parts):
            part.mapped.show(part.original)

    def show_present(self, parameters: Iterable[nn.Parameter]) -> None:
        """Show what :meth:`keep` was called with last, again."""
        for part in (self._parts[p] for p in parameters if p in self._parts):
            if part.pruned is not None:
                part.mapped.show(part.pruned)

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Go back to the original values of parameters, and forget the others."""
        for part in (self._parts[p] for p in parameters if p in self._parts):
            part.pruned = None
            part.mapped.show(part.original)


def _mappable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that can be mapped, by their first name."""
    found, spans = {}, []
    for name, p in model.named_parameters():
        if is_lazy(p) or p.is_meta:
            continue
        spans.append((*span(p), name))
        plain = p.device.type == "cpu" and p.layout == torch.strided and p.is_contiguous()
        if plain and p.numel() * p.element_size() >= _LEAST and not p.is_inference():
            found[name] = p
    spans += [(*span(b), "") for b in model.buffers() if not b.is_meta]
    reached, before = 0, ""
    for begin, end, name in sorted(spans):
        if begin < reached and end:
            found.pop(name, None)
            found.pop(before, None)
        if end > reached:
            reached, before = end, name
    return found


def units(model: nn.Module) -> dict[nn.Module, list[nn.Parameter]]:
    """The parts of a model that take memory one at a time, with their parameters: the members of
    its outermost lists and sequences of modules, and the modules beside these."""
    found: dict[nn.Module, list[nn.Parameter]] = {}

    def visit(module: nn.Module) -> None:
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            for child in module.children():
                found.setdefault(child, list(child.parameters()))
        elif not any(isinstance(m, (nn.ModuleList, nn.Sequential)) for m in module.modules()):
            found.setdefault(module, list(module.parameters()))
        else:
            if own := list(module.parameters(recurse=False)):
                found.setdefault(module, own)
            for child in module.children():
                visit(child)

    visit(model)
    return {unit: parameters for unit, parameters in found.items() if parameters}


@contextlib.contextmanager
def showing_originals(
    offload: Offload | None, parameters: Mapping[str, nn.Parameter]
) -> Iterator[list[str]]:
    """Show the original values of those that are offloaded; yields the names of the others."""
    mapped = [p for p in parameters.values() if offload is not None and p in offload]
    try:
        if offload is not None:
            offload.show_originals(mapped)
        yield [name for name, p in parameters.items() if offload is None or p not in offload]
    finally:
        if offload is not None:
            offload.show_present(mapped)


def put_away(offload: Offload | None, value: Tensor) -> Tensor:
    """A tensor that is kept for long: where parameters are offloaded, it is as well."""
    return value if offload is None else offload.stored(value)


def forgotten(offload: Offload | None, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Go back to the original values of those that are offloaded; the names of the others."""
    if offload is None:
        return list(parameters)
    offload.forget(parameters.values())
    return [name for name, p in parameters.items() if p not in offload]
