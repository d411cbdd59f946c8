"""The ledger of a pruning run in its run directory, from which an interrupted run resumes.

A layer is committed after it was pruned and before its weights are replaced in the model. A resumed
run first checks that model, data, arguments, versions and threads are the same. It then writes the
committed layers into the model, and calibrates and prunes only the others. On the same machine with
the same number of threads, the network gets the same bits as from an uninterrupted run.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.files.atomic import need_space
from lobs_native.layers import Layer
from lobs_native.report.records import LayerReport, plain, report_of_layer
from lobs_native.rundir.directory import RunDirectory
from lobs_native.rundir.underway import StoppedError, UnderWay, stop

__all__ = ["RESUMES", "AnotherRunError", "Ledger", "command"]

RESUMES = ("auto", "never", "anyway")
_BUDGET = "budget"  # the kind of a record about all layers together

# The command that begins a run, recorded so that it can be run again: see command_of. A resumed run
# is not compared with it.
command: ContextVar[Mapping[str, Any] | None] = ContextVar("command", default=None)


class AnotherRunError(CheckpointError, ArgumentError):
    """The folder holds a run with another model, data, arguments, versions or threads."""


class Ledger:
    """The layers of one call of ``prune`` that are committed in a run directory."""

    def __init__(self, run: RunDirectory, differences: list[str]) -> None:
        self.run = run
        self.differences = differences  # those that resume="anyway" accepted
        self.states = UnderWay(run, trusted=not differences)
        self.resumed = len([r for r in run.records if r.kind == "layer"])

    @classmethod
    def open(cls, path: Any, header: Mapping[str, Any], resume: str) -> Ledger:
        """Begin a run at ``path``, or resume the one that is there.

        Raises
        ------
        ArgumentError
            There is a run and ``resume`` is "never", or something else is there.
        AnotherRunError
            The run differs from ``header``; the message lists all differences.
        CheckpointError
            The run is damaged, or is being written to by another process.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise ArgumentError(f"run_dir: expected a path, got {type(path).__name__}")
        if not (Path(path) / "run.json").exists():
            recorded = command.get()
            full = header if recorded is None else {**header, "command": recorded}
            return cls(RunDirectory.create(path, full), [])
        if resume == "never":
            raise ArgumentError(
                f"run_dir: {os.fspath(path)} holds a run, and resume is 'never'; name another "
                "folder, or pass resume='auto'"
            )
        run = RunDirectory.open(path, write=True)
        try:
            same = {k: v for k, v in run.header.items() if k == "command"}
            differences = run.differences({**header, **same})
            if differences and resume != "anyway":
                raise AnotherRunError(
                    f"{os.fspath(path)}: this is another run: {'; '.join(differences)}. Name "
                    "another folder, or pass resume='anyway' to resume it in spite of that"
                )
            return cls(run, differences)
        except BaseException:
            run.close()
            raise

    @property
    def path(self) -> Path:
        """The folder."""
        return self.run.path

    def summary(self) -> dict[str, Any]:
        """The entries for ``report.settings``."""
        entries = {"run_dir": str(self.path), "resumed layers": self.resumed}
        entries |= self.states.summary()
        return {**entries, "resumed despite": self.differences} if self.differences else entries

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: Any) -> None:
        self.run.close()

    def __len__(self) -> int:
        """The number of committed layers."""
        return len([r for r in self.run.records if r.kind == "layer"])

    def kept(self, total: int) -> str:
        """How many layers of a run are committed, in words."""
        return f"{len(self)} of {total} layers"

    def check_space(self, layers: Iterable[Layer]) -> None:
        """Raise CheckpointError if the disk has too little space for the uncommitted layers."""
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
        """Commit a pruned layer."""
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
        return report_of_layer(record.info), tensors["weight"], tensors.get("bias"), tensors["mask"]

    # ---- what was tuned --------------------------------------------------------------------------

    def keep_tuned(self, name: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Commit a block that was tuned, or the network: its parameters by name, and what became of
        it."""
        self.run.commit(name, tensors, info, kind="tuned")
        if stop.is_set():
            raise StoppedError

    def has_tuned(self, name: str) -> bool:
        """Whether a part that was tuned is there."""
        return self.run.find(name, kind="tuned") is not None

    def load_tuned(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What became of a part that is there, and its parameters by name."""
        record = self.run.find(name, kind="tuned")
        assert record is not None
        return dict(record.info), self.run.load(record)

    # ---- the budget ------------------------------------------------------------------------------

    def keep_sensitivity(
        self,
        sensitivity: Mapping[str, Tensor] | None,
        token_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Commit the sensitivities of the layers' rows, and the weights of tokens before them; None
        if nothing was measured."""
        if token_weights is not None and self.run.find("token weights", kind=_BUDGET) is None:
            self.run.commit("token weights", token_weights, {}, kind=_BUDGET)
        info = {"measured": sensitivity is not None}
        self.run.commit("sensitivity", dict(sensitivity or {}), info, kind=_BUDGET)
        self.states.clear()

    def sensitivity(self) -> tuple[dict[str, Tensor] | None] | None:
        """The argument of :meth:`keep_sensitivity` in a tuple; None if nothing was committed."""
        record = self.run.find("sensitivity", kind=_BUDGET)
        if record is None:
            return None
        return (self.run.load(record) if record.info.get("measured") is True else None,)

    def token_weights(self) -> dict[str, Tensor]:
        """The weights of tokens that were committed with the sensitivities."""
        record = self.run.find("token weights", kind=_BUDGET)
        if record is None:
            raise CheckpointError(
                f"{self.run.path}: weights of tokens are missing; begin a new run"
            )
        return self.run.load(record)

    def keep_evaluation(self, loss: float, seconds: float) -> None:
        """Commit one evaluation of a search for a division."""
        number = len(self.evaluations())
        info = plain({"loss": loss, "seconds": seconds})
        self.run.commit(f"evaluation {number}", {}, info, kind=_BUDGET)
        if stop.is_set():
            raise StoppedError

    def evaluations(self) -> list[tuple[float, float]]:
        """The arguments of :meth:`keep_evaluation`, in order."""
        found: list[tuple[float, float]] = []
        while (record := self.run.find(f"evaluation {len(found)}", kind=_BUDGET)) is not None:
            try:
                found.append((float(record.info["loss"]), float(record.info["seconds"])))
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{self.run.path}: an evaluation cannot be read: {error}; begin a new run"
                ) from error
        return found

    def keep_shares(self, shares: Mapping[str, float]) -> None:
        """Commit the division of a common budget: name -> sparsity."""
        self.run.commit("shares", {}, {"shares": dict(shares)}, kind=_BUDGET)
        self.states.clear()

    def shares(self) -> dict[str, float] | None:
        """The argument of :meth:`keep_shares`; None if nothing was committed."""
        record = self.run.find("shares", kind=_BUDGET)
        if record is None:
            return None
        shares = record.info.get("shares")
        if not isinstance(shares, dict) or not all(
            type(share) in (int, float) and 0 <= share <= 1 for share in shares.values()
        ):
            raise CheckpointError(f"{self.run.path}: the budget cannot be read; begin a new run")
        return shares
