"""Inspection of a run directory from outside: its state, repair, command and report."""

from __future__ import annotations

import math
import os
from typing import Any, cast

from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.report.records import Coverage, ErrorBound, coverage_of, plain, report_of_layer
from lobs_native.report.report import Report
from lobs_native.rundir.directory import RunDirectory

__all__ = ["command_of", "inspect", "repair", "report_of"]

_COMMANDS = ("prune", "shrink")  # of the command line, that can begin a run


def _header(run: RunDirectory) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Names of the layers, config and versions from the header of a run."""
    header = run.header
    names, config, versions = (header.get(key) for key in ("layers", "config", "versions"))
    readable = {
        "layers": isinstance(names, list) and all(isinstance(name, str) for name in names),
        "config": isinstance(config, dict),
        "versions": isinstance(versions, dict),
    }
    # A wrong entry is more informative than a missing one.
    for key in sorted(readable, key=lambda key: key not in header):
        if not readable[key]:
            raise CheckpointError(f"{run.path}: its header has no {key} that can be read")
    return cast(list[str], names), cast(dict[str, Any], config), cast(dict[str, Any], versions)


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state of a run, finished or not, as plain JSON values: its config, its committed layers
    with their errors, the missing layers, and problems with its files. Changes nothing.

    Raises CheckpointError if there is no run, or its header or list of records is damaged.
    """
    with RunDirectory.open(path, write=False) as run:
        names, config, versions = _header(run)
        layers = [report_of_layer(record.info) for record in run.records if record.kind == "layer"]
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
    """Drop the damaged records of a run and all that follow them. Returns a line for each.

    Raises CheckpointError if there is no run, its header is damaged, or it is in use.
    """
    with RunDirectory.open(path, write=True, repair=True) as run:
        return run.messages


def command_of(path: str | os.PathLike[str]) -> list[str]:
    """The command that began a run in the current folder: its name and its arguments.

    Other folders are refused because the paths of the command may be relative, and because modules
    must not be imported from a folder that a file names.

    Raises
    ------
    ArgumentError
        The run was begun by a call of ``prune`` or ``shrink``, or in another folder.
    CheckpointError
        There is no run, or it is damaged.
    """
    with RunDirectory.open(path, write=False) as run:
        command = run.header.get("command")
    if command is None:
        raise ArgumentError(
            f"RUN_DIR: {os.fspath(path)} was not begun by this command; call prune or shrink "
            "with run_dir and the same arguments again"
        )
    known = command if isinstance(command, dict) else {}
    folder, arguments = known.get("folder"), known.get("arguments")
    name = known.get("name", "prune")  # which alone had run directories once
    if not (
        isinstance(folder, str)
        and name in _COMMANDS
        and isinstance(arguments, list)
        and all(isinstance(x, str) for x in arguments)
    ):
        raise CheckpointError(f"{os.fspath(path)}: it holds no command that can be run again")
    if os.path.realpath(folder) != os.path.realpath(os.curdir):
        raise ArgumentError(f"RUN_DIR: {os.fspath(path)} was begun in {folder}; change to it first")
    return [name, *arguments]


def report_of(path: str | os.PathLike[str]) -> Report:
    """A report of the committed layers of a run. Raises as :func:`inspect` does."""
    with RunDirectory.open(path, write=False) as run:
        names, config, versions = _header(run)
        left = {"pruned": 0, "skipped": []}  # of an older run: unknown
        skipped, pruned = coverage_of(run.header.get("coverage", left))
        layers = tuple(
            report_of_layer(record.info) for record in run.records if record.kind == "layer"
        )
    sizes = [math.prod(layer.shape) for layer in layers]
    removed = sum(round(x.sparsity * n) for x, n in zip(layers, sizes, strict=True))
    committed = {layer.name for layer in layers}
    missing = tuple(name for name in names if name not in committed)
    done = f"{len(layers)} of {len(names)} layers"
    if missing:
        done = f"unfinished: {done}"
    return Report(
        layers=layers,
        skipped=skipped,
        error_bound=ErrorBound(covered=False, reason=f"read from a run directory: {done}"),
        sparsity=removed / sum(sizes) if sizes else 0.0,
        removed=removed,
        weights=sum(sizes),
        seconds=sum(x.seconds_calibrating + x.seconds_pruning for x in layers),
        settings={**config, "run_dir": str(run.path), "done": done},
        versions=versions,
        missing=missing,
        coverage=Coverage.of(pruned, skipped, removed) if pruned else None,
    )
