"""Work of one run that several ranks share: layers that one rank each prunes, and a run directory
that rank 0 writes."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.calibration.ranks import Ranks, check_alike
from lobs_native.layers import Layer
from lobs_native.network.divided import SharedRows, divided, owners
from lobs_native.network.selection import LayerJob
from lobs_native.network.settings import NetworkSettings
from lobs_native.report.records import LayerReport, plain, report_of_layer
from lobs_native.rundir.ledger import Ledger
from lobs_native.solvers.rows import WHOLE, Rows
from lobs_native.solvers.weight import PrunedWeight
from lobs_native.version import versions

__all__ = [
    "Clock",
    "Done",
    "SharedLedger",
    "check_ranks",
    "shared_out",
]


class Done(NamedTuple):
    """A layer that was pruned: its report, weight (G, R, C), bias (G, R) and mask (G, R, C)."""

    report: LayerReport
    weight: Tensor
    bias: Tensor | None
    mask: Tensor

    @classmethod
    def of(cls, report: LayerReport, out: PrunedWeight) -> Done:
        """What was made of a layer."""
        return cls(report, out.weight, out.bias, out.mask)

    def told(self, ranks: Ranks, name: str, source: int) -> None:
        """Tell the other ranks."""
        tensors = {"weight": self.weight, "mask": self.mask}
        if self.bias is not None:
            tensors["bias"] = self.bias
        ranks.from_one(f"layer {name}", plain(dataclasses.asdict(self.report)), tensors, source)

    @classmethod
    def heard(cls, ranks: Ranks, layer: Layer, source: int) -> Done:
        """What another rank tells of a layer, on the layer's device."""
        report, tensors = ranks.from_one(f"layer {layer.name}", None, None, source)
        x = {name: value.to(layer.weight().device) for name, value in tensors.items()}
        return cls(report_of_layer(report), x["weight"], x.get("bias"), x["mask"])


def shared_out(
    ranks: Ranks,
    jobs: Sequence[LayerJob],
    prune: Callable[[LayerJob, Rows], Done],
    forget: Callable[[LayerJob], object] = lambda job: None,
) -> Iterator[tuple[LayerJob, Done]]:
    """The jobs in order, each pruned by one rank, or by all, which share its rows; all ranks get
    what comes of them. ``forget`` is called for those that another rank prunes."""
    if ranks.size == 1:
        for job in jobs:
            yield job, prune(job, WHOLE)
        return
    together = divided(jobs, ranks.size)
    done = {job.layer.name: prune(job, SharedRows(ranks)) for job in together}
    rest = [job for job in jobs if job.layer.name not in done]
    owner = owners(ranks, rest)
    for job in rest:
        name = job.layer.name
        if owner[name] == ranks.rank:
            done[name] = prune(job, WHOLE)
        else:
            forget(job)
    for job in jobs:
        name = job.layer.name
        if name not in done:
            yield job, Done.heard(ranks, job.layer, owner[name])
            continue
        if name in owner:
            done[name].told(ranks, name, ranks.rank)
        yield job, done.pop(name)


class SharedLedger:
    """A ledger that rank 0 has, as all ranks see it. What it loads, all ranks get; only rank 0
    keeps anything. Unfinished work between two layers is not saved: each rank has a part of it.

    It stands in for :class:`lobs_native.rundir.ledger.Ledger`, whose methods it has.
    """

    states = None

    def __init__(self, ranks: Ranks, own: Ledger | None, path: Any) -> None:
        self.ranks, self.own, self.path = ranks, own, Path(path)
        self._layers: Collection[str] = self._of_kind("layer")
        self._tuned: Collection[str] = self._of_kind("tuned")

    def _of_kind(self, kind: str) -> set[str]:
        """The names of what the run directory has of this kind."""
        records = [] if self.own is None else self.own.run.records
        mine = [record.name for record in records if record.kind == kind]
        return set(self.ranks.value(f"what the run directory has of the kind {kind}", mine))

    def summary(self) -> dict[str, Any]:
        """See :meth:`Ledger.summary`."""
        if self.own is None:
            return {"run_dir": str(self.path), "resumed layers": len(self._layers)}
        return self.own.summary()

    def __enter__(self) -> SharedLedger:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.own is not None:
            self.own.__exit__()

    def kept(self, total: int) -> str:
        """See :meth:`Ledger.kept`."""
        return "finished layers" if self.own is None else self.own.kept(total)

    def __contains__(self, layer: Layer) -> bool:
        return layer.name in self._layers

    def check_space(self, layers: Sequence[Layer]) -> None:
        """See :meth:`Ledger.check_space`."""
        if self.own is not None:
            self.own.check_space(layers)

    def keep(self, layer: Layer, report: LayerReport, *tensors: Tensor | None) -> None:
        """See :meth:`Ledger.keep`."""
        if self.own is not None:
            self.own.keep(layer, report, *tensors)  # type: ignore[arg-type]

    def load(self, layer: Layer) -> tuple[LayerReport, Tensor, Tensor | None, Tensor]:
        """See :meth:`Ledger.load`."""
        if self.own is None:
            return Done.heard(self.ranks, layer, 0)
        done = Done(*self.own.load(layer))
        done.told(self.ranks, layer.name, 0)
        return done

    def has_tuned(self, name: str) -> bool:
        """See :meth:`Ledger.has_tuned`."""
        return name in self._tuned

    def load_tuned(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See :meth:`Ledger.load_tuned`."""
        info, tensors = ({}, {}) if self.own is None else self.own.load_tuned(name)
        return self.ranks.from_one(f"tuned {name}", info, tensors, 0)

    def keep_tuned(self, name: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """See :meth:`Ledger.keep_tuned`."""
        if self.own is not None:
            self.own.keep_tuned(name, tensors, info)

    def evaluations(self) -> list[tuple[float, float]]:
        """See :meth:`Ledger.evaluations`."""
        mine = None if self.own is None else self.own.evaluations()
        found: list[tuple[float, float]] = self.ranks.value("evaluations", mine)
        return found

    def keep_evaluation(self, loss: float, seconds: float) -> None:
        """See :meth:`Ledger.keep_evaluation`."""
        if self.own is not None:
            self.own.keep_evaluation(loss, seconds)

    def keep_sensitivity(self, *tensors: Mapping[str, Tensor] | None) -> None:
        """See :meth:`Ledger.keep_sensitivity`."""
        if self.own is not None:
            self.own.keep_sensitivity(*tensors)

    def sensitivity(self) -> tuple[dict[str, Tensor] | None] | None:
        """See :meth:`Ledger.sensitivity`."""
        known = None if self.own is None else self.own.sensitivity()
        measured = None if known is None else known[0]
        form = [known is not None, measured is not None]
        (kept, some), tensors = self.ranks.from_one("sensitivities", form, measured, 0)
        return (tensors if some else None,) if kept else None

    def token_weights(self) -> dict[str, Tensor]:
        """See :meth:`Ledger.token_weights`."""
        mine = None if self.own is None else self.own.token_weights()
        return self.ranks.tensors("weights of tokens", mine)

    def keep_shares(self, shares: Mapping[str, float]) -> None:
        """See :meth:`Ledger.keep_shares`."""
        if self.own is not None:
            self.own.keep_shares(shares)

    def shares(self) -> dict[str, float] | None:
        """See :meth:`Ledger.shares`."""
        found: dict[str, float] | None = self.ranks.value(
            "shares of the budget", None if self.own is None else self.own.shares()
        )
        return found


class Clock:
    """What a run takes of this process, from now on."""

    def __init__(self) -> None:
        self._begun, self._cpu = time.perf_counter(), time.process_time()

    def of_all(self, ranks: Ranks) -> list[dict[str, float]] | None:
        """For the report: seconds and bytes of every rank; None for one process alone."""
        if ranks.size == 1:
            return None
        own = {
            "seconds": time.perf_counter() - self._begun,
            "CPU seconds": time.process_time() - self._cpu,
            "seconds waiting": ranks.waited,
            "seconds exchanging": ranks.exchanging,
            "bytes sent": ranks.sent,
        }
        return ranks.all_values("work of the ranks", own)


def check_ranks(
    ranks: Ranks, settings: NetworkSettings, prints: Callable[[], Mapping[str, Any]]
) -> None:
    """Raise ArgumentError if the ranks are about to do different things. ``prints`` are the
    fingerprints of the model and the data."""
    if ranks.size == 1:
        return
    header = {f"argument {k}": v for k, v in plain(settings.arguments()).items()}
    header["argument run_dir"] = settings.run_dir is not None
    header |= {f"version of {k}": v for k, v in versions().items()}
    header |= {"code of lobs_native": _code(), "threads": ops.threads()}
    header["processor level"] = torch.backends.cpu.get_cpu_capability()
    header["backends"] = [detail for _, _, detail in ops.backends()]
    check_alike(ranks, header | dict(prints()))


def _code() -> str:
    """sha256 of this package's files."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for path in sorted(p for kind in ("*.py", "*.so") for p in root.rglob(kind)):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
