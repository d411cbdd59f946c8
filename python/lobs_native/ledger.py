"""What a run directory keeps of pruning a network, so that it can go on after any end.

A layer is committed when it has wholly succeeded and before its weights are replaced. Going on, the
committed layers are written into the model as they were, and only the others are calibrated and
pruned: the network has the same bits in the end, on the same machine with the same number of
threads. That model, data, arguments, versions and threads are the same is checked first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.files import need_space
from lobs_native.layers import Layer
from lobs_native.report import ErrorBound, LayerReport, Report, plain
from lobs_native.rundir import RunDirectory
from lobs_native.underway import StoppedError, UnderWay, stop
from lobs_native.weight import check_choice

__all__ = [
    "RESUMES",
    "AnotherRunError",
    "Ledger",
    "check_resume",
    "command",
    "command_of",
    "fingerprints",
    "inspect",
    "repair",
    "report_of",
]

_LARGEST = (1 << 63) - 1  # of counts and sizes in a report
RESUMES = ("auto", "never", "anyway")
_BUDGET = "budget"  # the kind of what is decided for all layers together

# What is kept beside a new run, for whoever goes on with it: see command_of. Not compared.
command: ContextVar[Mapping[str, Any] | None] = ContextVar("command", default=None)


class AnotherRunError(CheckpointError, ArgumentError):
    """The folder holds a run of another model, data, arguments, versions or threads."""


class Ledger:
    """The layers of one call of ``prune`` that are committed in a run directory."""

    def __init__(self, run: RunDirectory, differences: list[str]) -> None:
        self.run = run
        self.differences = differences  # that were gone over because of resume="anyway"
        self.states = UnderWay(run, trusted=not differences)
        self.found = len([r for r in run.records if r.kind == "layer"])

    @classmethod
    def open(cls, path: Any, header: Mapping[str, Any], resume: str) -> Ledger:
        """Begin a run at ``path``, or go on with the one that is there.

        Raises
        ------
        ArgumentError
            There is a run and ``resume`` is "never", or something else is there.
        AnotherRunError
            The run is another one than ``header`` says; all differences are listed.
        CheckpointError
            The run is damaged, or is being written to by another process.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise ArgumentError(f"run_dir: expected a path, got {type(path).__name__}")
        if not (Path(path) / "run.json").exists():
            told = command.get()
            whole = header if told is None else {**header, "command": told}
            return cls(RunDirectory.create(path, whole), [])
        if resume == "never":
            raise ArgumentError(
                f"run_dir: {os.fspath(path)} holds a run, and resume is 'never'; name another "
                "folder, or pass resume='auto'"
            )
        run = RunDirectory.open(path, write=True)
        try:
            before = {k: v for k, v in run.header.items() if k == "command"}
            differences = run.differences({**header, **before})
            if differences and resume != "anyway":
                raise AnotherRunError(
                    f"{os.fspath(path)}: this is another run: {'; '.join(differences)}. Name "
                    "another folder, or pass resume='anyway' to go on nevertheless"
                )
            return cls(run, differences)
        except BaseException:
            run.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: Any) -> None:
        self.run.close()

    def __len__(self) -> int:
        """Layers that are committed."""
        return len([r for r in self.run.records if r.kind == "layer"])

    def check_space(self, layers: Iterable[Layer]) -> None:
        """CheckpointError if the disk has no room for the layers that are not committed yet."""
        needed = 0
        for layer in layers:
            if self.run.find(layer.name) is None:
                values = layer.weight().numel()
                needed += values + sum(
                    p.numel() * p.element_size() for p in layer.parameters.values()
                )
        need_space(self.run.path, needed)
        self.states.reserved = needed

    # ---- layers ----------------------------------------------------------------------------------

    def __contains__(self, layer: Layer) -> bool:
        return self.run.find(layer.name) is not None

    def keep(
        self, layer: Layer, report: LayerReport, weight: Tensor, bias: Tensor | None, mask: Tensor
    ) -> None:
        """Commit a layer that has been pruned."""
        tensors = {"weight": weight, "mask": mask}
        if bias is not None:
            tensors["bias"] = bias
        begun = time.monotonic()
        self.run.commit(layer.name, tensors, plain(dataclasses.asdict(report)))
        self.states.seconds += time.monotonic() - begun
        if stop.is_set():
            raise StoppedError

    def load(self, layer: Layer) -> tuple[LayerReport, Tensor, Tensor | None, Tensor]:
        """Report, weight (G, R, C), bias (G, R) and mask of a committed layer, on its device."""
        record = self.run.find(layer.name)
        assert record is not None
        W, b = layer.weight(), layer.bias()
        expected = {"weight": (tuple(W.shape), W.dtype), "mask": (tuple(W.shape), torch.bool)}
        if b is not None:
            expected["bias"] = (tuple(b.shape), b.dtype)
        tensors = {name: x.to(W.device) for name, x in self.run.load(record, expected).items()}
        return _report(record.info), tensors["weight"], tensors.get("bias"), tensors["mask"]

    # ---- the budget ------------------------------------------------------------------------------

    def keep_sensitivity(self, sensitivity: Mapping[str, Tensor] | None) -> None:
        """Commit how much the output depends on layers; None where nothing was measured."""
        info = {"measured": sensitivity is not None}
        self.run.commit("sensitivity", dict(sensitivity or {}), info, kind=_BUDGET)
        self.states.clear()

    def sensitivity(self) -> tuple[dict[str, Tensor] | None] | None:
        """What :meth:`keep_sensitivity` was given, in a tuple, if it was."""
        record = self.run.find("sensitivity", kind=_BUDGET)
        if record is None:
            return None
        return (self.run.load(record) if record.info.get("measured") is True else None,)

    def keep_shares(self, shares: Mapping[str, float]) -> None:
        """Commit how a common budget is shared out."""
        self.run.commit("shares", {}, {"shares": dict(shares)}, kind=_BUDGET)
        self.states.clear()

    def shares(self) -> dict[str, float] | None:
        """What :meth:`keep_shares` was given, if it was."""
        record = self.run.find("shares", kind=_BUDGET)
        if record is None:
            return None
        shares = record.info.get("shares")
        if not isinstance(shares, dict) or not all(
            type(share) in (int, float) and 0 <= share <= 1 for share in shares.values()
        ):
            raise CheckpointError(f"{self.run.path}: the budget cannot be read; begin a new run")
        return shares


def _report(info: Mapping[str, Any]) -> LayerReport:
    try:
        kinds = {field.name: field.type for field in dataclasses.fields(LayerReport)}
        values = {name: _value(str(kinds[name]), name, value) for name, value in info.items()}
        report = LayerReport(**values)
        if len(report.curve_sparsity or ()) != len(report.curve_error or ()):
            raise TypeError("curve_error and curve_sparsity are not of one length")
        return report
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"run_dir: the report of a layer cannot be read: {error}") from error


def _value(kind: str, name: str, value: Any) -> Any:
    """What :func:`plain` made a JSON value of. TypeError if it is not of this kind."""
    if value is None and kind.endswith(" | None"):
        return None
    kind = kind.removesuffix(" | None")
    if kind.startswith("tuple[") and isinstance(value, list):
        inner = kind.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(_value(inner, name, part) for part in value)
    if kind == "float" and value in ("inf", "-inf", "nan"):
        return float(value)
    if type(value) is int and abs(value) > _LARGEST:
        raise TypeError(f"{name} is beyond 64 bits")
    if type(value).__name__ == kind or (kind == "float" and type(value) is int):
        return value
    raise TypeError(f"{name} is no {kind}")


def _told(run: RunDirectory) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Names of the layers, config and versions from the header of a run."""
    header = run.header
    names, config, versions = (header.get(key) for key in ("layers", "config", "versions"))
    right = {
        "layers": isinstance(names, list) and all(isinstance(name, str) for name in names),
        "config": isinstance(config, dict),
        "versions": isinstance(versions, dict),
    }
    # What is there and wrong says more than what is missing.
    for key in sorted(right, key=lambda key: key not in header):
        if not right[key]:
            raise CheckpointError(f"{run.path}: its header has no {key} that can be read")
    return cast(list[str], names), cast(dict[str, Any], config), cast(dict[str, Any], versions)


# ---- looking at a run ----------------------------------------------------------------------------


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state of a run, finished or not, as plain JSON values: what it is, the layers that are
    committed of all, their errors, and what is wrong with its files. Changes nothing.

    Raises CheckpointError if there is no run, or its header or list of records is damaged.
    """
    with RunDirectory.open(path, write=False) as run:
        names, config, versions = _told(run)
        layers = [_report(record.info) for record in run.records if record.kind == "layer"]
        return {
            "format": 1,
            "path": str(run.path),
            "layers": len(names),
            "done": [
                {"name": x.name, "sparsity": x.sparsity, "relative_error": plain(x.relative_error)}
                for x in layers
            ],
            "missing": [name for name in names if name not in {x.name for x in layers}],
            "config": config,
            "versions": versions,
            "problems": [str(problem) for problem in run.check()],
        }


def repair(path: str | os.PathLike[str]) -> list[str]:
    """Drop from a run what is damaged and all that follows it; what was done, one line each.

    Raises CheckpointError if there is no run, its header is damaged, or it is being written to.
    """
    with RunDirectory.open(path, write=True, repair=True) as run:
        return run.messages


def command_of(path: str | os.PathLike[str]) -> list[str]:
    """The arguments of the command that began a run, if it was begun in the current folder.

    Only there: its paths may be relative, and a folder that a file names is none to import from.

    Raises
    ------
    ArgumentError
        The run was begun by a call of ``prune``, or in another folder.
    CheckpointError
        There is no run, or it is damaged.
    """
    with RunDirectory.open(path, write=False) as run:
        told = run.header.get("command")
    if told is None:
        raise ArgumentError(
            f"RUN_DIR: {os.fspath(path)} was not begun by this command; call prune with run_dir "
            "and the same arguments again"
        )
    folder = told.get("folder") if isinstance(told, dict) else None
    arguments = told.get("arguments") if isinstance(told, dict) else None
    if not (
        isinstance(folder, str)
        and isinstance(arguments, list)
        and all(isinstance(x, str) for x in arguments)
    ):
        raise CheckpointError(f"{os.fspath(path)}: holds no command that could be run again")
    if os.path.realpath(folder) != os.path.realpath(os.curdir):
        raise ArgumentError(f"RUN_DIR: {os.fspath(path)} was begun in {folder}; change to it first")
    return arguments


def report_of(path: str | os.PathLike[str]) -> Report:
    """A report of the layers that a run has committed. Raises as :func:`inspect` does."""
    with RunDirectory.open(path, write=False) as run:
        names, config, versions = _told(run)
        layers = tuple(_report(record.info) for record in run.records if record.kind == "layer")
    sizes = [math.prod(layer.shape) for layer in layers]
    removed = sum(round(x.sparsity * n) for x, n in zip(layers, sizes, strict=True))
    committed = {layer.name for layer in layers}
    missing = tuple(name for name in names if name not in committed)
    done = f"{len(layers)} of {len(names)} layers"
    if missing:
        done = f"unfinished: {done}"
    return Report(
        layers=layers,
        skipped=(),
        error_bound=ErrorBound(covered=False, reason=f"read from a run directory: {done}"),
        sparsity=removed / sum(sizes) if sizes else 0.0,
        removed=removed,
        weights=sum(sizes),
        seconds=sum(x.seconds_calibrating + x.seconds_pruning for x in layers),
        settings={**config, "run_dir": str(run.path), "done": done},
        versions=versions,
        missing=missing,
    )


# ---- what the run is -----------------------------------------------------------------------------


def fingerprints(model: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
    """sha256 of the model's parameters and buffers (of those that are not saved as well, which
    the output may depend on) and of the calibration data, and how many batches there are."""
    state = hashlib.sha256()
    parameters = model.named_parameters(remove_duplicate=False)
    for name, value in (*parameters, *model.named_buffers(remove_duplicate=False)):
        _add(state, name, value)
    data, count = hashlib.sha256(), 0
    for batch in batches:
        count += 1
        for path, value in _leaves("", batch):
            if isinstance(value, Tensor):
                _add(data, path, value)
            else:
                told = value if isinstance(value, (bool, int, float, str)) else type(value).__name__
                data.update(f"{path} {told!r}\n".encode())
    return {"model": state.hexdigest(), "calibration": data.hexdigest(), "batches": count}


def _add(digest: Any, name: str, value: Tensor) -> None:
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(f"{path}.{key}", part)
    else:
        for i, part in enumerate(tree_leaves(value)):
            yield f"{path}.{i}", part


def check_resume(resume: Any) -> str:
    """``resume`` if it is one of RESUMES."""
    return check_choice(resume, "resume", RESUMES)
