"""Several processes of one run, and what one of them does for ``tests/network/test_ranks.py``:

    python -m helpers.on_ranks FOLDER RANK SIZE TASK

It joins the others through a file in FOLDER and writes what it found to FOLDER/RANK.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers.experts import Experts, routed
from helpers.stacks import batches, made
from ranks.group import joined
from torch import Tensor, distributed, nn

import lobs_native as lobs
from lobs_native.network import divided, shared
from lobs_native.solvers import rows
from stress.forks import Forks

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


class Noisy(nn.Module):
    """Convolutions and a head, with random numbers on the way, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.nn.functional.dropout(x, 0.1, training=True)
        return self.head(self.second(x).mean((2, 3)))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


def images(count: int) -> list[Tensor]:
    return [
        torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(count)
    ]


def padded(count: int) -> list[dict[str, Tensor]]:
    masks = [torch.ones(2, 5) for _ in range(count)]
    masks[-1][0, 3:] = 0  # of the last chunk, which rank 0 has not
    rows = [torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    return [{"x": x, "attention_mask": mask} for x, mask in zip(rows, masks, strict=True)]


def sent(count: int) -> list[tuple[Tensor, Tensor]]:
    x, chosen = routed([40, 60, 30, 10])
    return list(zip(x.split(140 // count), chosen.split(140 // count), strict=True))


def one() -> nn.Module:
    return made(blocks=1)


def wide() -> nn.Module:
    return made(blocks=1, width=48)


def two() -> nn.Module:
    return made(blocks=2)


def other() -> nn.Module:
    """A network that :func:`one` may have been before."""
    model = one()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p *= 1 + 0.1 * torch.randn(p.shape, generator=generator)
    return model


Case = tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, Any]]

# More batches than chunks, as many as ranks, fewer; every way of calibrating and of choosing.
CASES: dict[str, Case] = {
    "corrected": (two, lambda: batches(19), {"held_back": 0.15}),
    "model": (one, lambda: batches(5), {"scope": "model", "inputs": "dense"}),
    "tokens": (one, lambda: batches(3), {"token_weights": "output", "inputs": "pruned"}),
    "2:4": (one, lambda: batches(4), {"pattern": "2:4", "sparsity": None, "method": "admm"}),
    "row": (one, lambda: batches(2), {"scope": "row", "refine": "exchange", "method": "admm"}),
    "noisy": (Noisy, lambda: images(18), {"sensitivity": "output"}),
    "sweep": (Noisy, lambda: images(3), {"method": "sweep", "inputs": "dense"}),
    "padded": (Padded, lambda: padded(17), {"max_error": 0.01, "sparsity": None}),
    "experts": (lambda: Experts(True), lambda: sent(14), {"method": "lobs"}),
    "tuned": (two, lambda: batches(5), {"tune": "blocks", "inputs": "pruned"}),
    "tuned whole": (one, lambda: batches(4), {"tune": "network", "tune_passes": 1}),
    "again": (one, lambda: batches(5), {"tune": "network", "classes": 4, "original": other()}),
    "searched": (two, lambda: batches(6), {"search": 3, "held_back": 0.3, "scope": "model"}),
    "wanda": (two, lambda: iter(batches(17)), {"method": "wanda", "inputs": "pruned"}),
    "offload": (wide, lambda: batches(5), {"offload": tempfile.gettempdir()}),
}


# Layers whose rows are shared; those of one process as well are in blocks of 16.
ROWS: dict[str, Case] = {
    "admm": (wide, lambda: batches(4), {"method": "admm", "held_back": 0.25}),
    "exact": (wide, lambda: batches(3), {"method": "exact", "inputs": "pruned"}),
    "lobs": (wide, lambda: batches(3), {"method": "lobs", "scope": "row"}),
    "exchange": (wide, lambda: batches(3), {"pattern": "2:4", "refine": "exchange"}),
}


def pruned(case: Case, **more: Any) -> tuple[nn.Module, lobs.Report]:
    make, data, options = case
    model = make()
    return model, lobs.prune(model, data(), progress=False, **{"sparsity": 0.5, **options, **more})


def seen(model: nn.Module, report: lobs.Report | None) -> list[Any]:
    """All bits of a network, and what a report says of the layers and the output."""
    bits = [hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in model.state_dict().values()]
    if report is None:
        return bits
    layers = report.to_dict()["layers"]
    for layer in layers:
        for name in ("seconds_calibrating", "seconds_pruning", "peak_memory"):
            del layer[name]
    masks = [f"{name} {int(mask.sum())}" for name, mask in report.masks.items()]
    return [bits, layers, masks, repr(report.error_bound)]


def groups(size: int) -> dict[int, Any]:
    """The first ranks, so many of them."""
    return {n: distributed.new_group(list(range(n))) for n in range(1, size + 1)}


def equal(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Every case on one process, and on groups of 1 to ``size``."""
    found: dict[str, Any] = {}
    of_size = groups(size)
    for i, (name, case) in enumerate(CASES.items()):
        if rank == 0:
            found[f"{name} alone"] = seen(*pruned(case))
        for n in of_size if i == 0 else (2 + i % (size - 1),):
            if rank < n:
                model, report = pruned(case, group=of_size[n])
                found[f"{name} on {n}"] = seen(model, report)
                found["ranks"] = report.settings.get("ranks", found.get("ranks"))
    return found


def by_rows(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Every case of ROWS on one process and on all, and how many layers they shared by rows."""
    rows._BLOCK, divided._WORTH, divided._GAIN = 16, 0.0, 1.0
    choose, chosen = divided.divided, list[int]()

    def watched(jobs: Any, size: int) -> Any:
        some = choose(jobs, size)
        chosen.append(len(some))
        return some

    shared.divided = watched
    found: dict[str, Any] = {}
    for name, case in ROWS.items():
        if rank == 0:
            found[f"{name} alone"] = seen(*pruned(case))
        chosen.clear()
        found[name] = seen(*pruned(case, group=distributed.group.WORLD))
        found[f"{name} divided"] = sum(chosen)
    return found


def raised(run: Callable[[], Any]) -> list[Any]:
    try:
        run()
    except Exception as error:
        return [type(error).__name__, str(error), getattr(error, "rank", None)]
    return []


def failing(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Errors that all ranks must get."""
    group, found = distributed.group.WORLD, dict[str, Any]()

    def attempt(name: str, data: Any, **options: Any) -> None:
        model = made()
        before = seen(model, None)
        options = {"sparsity": 0.5, "progress": False, "group": group, **options}
        found[name] = raised(lambda: lobs.prune(model, data, **options))
        found[f"{name}: restored"] = seen(model, None) == before

    other = batches(4)
    if rank == 1:
        other[2] += 1
    attempt("other data", other)
    attempt("other arguments", batches(4), damping=0.01 + rank)
    attempt("other classes", batches(4), tune="network", classes=4 if rank else None)
    attempt("another original network", batches(4), original=made() if rank else None)
    broken = batches(4)
    broken[3][0, 0, 0] = float("nan")  # which rank 1 reads
    attempt("not finite", broken, inputs="pruned")

    def forward(model: nn.Module, batch: Tensor) -> Any:
        if rank == 1 and torch.equal(batch, broken[1]):
            raise ValueError("a model's own error")
        return model(batch)

    attempt("of the model", batches(4), forward=forward)
    return found


def deadly(model: nn.Module, batch: Tensor) -> Any:
    """Runs the model; the process that has CALLS in its environment is killed at so many."""
    global calls
    calls += 1
    if calls == int(os.environ.get("CALLS", "0")) and distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return model(batch)


calls = 0


def kept(folder: Path) -> tuple[nn.Module, lobs.Report]:
    group = distributed.group.WORLD
    return pruned(CASES["wanda"], forward=deadly, run_dir=folder / "run", group=group, blocks=None)


def killed(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Rank 1 is killed in the middle of a run with a run directory."""
    return {"error": raised(lambda: kept(folder))}


def resuming(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """The same run goes on."""
    model, report = kept(folder)
    return {"seen": seen(model, report)[0], "resumed": report.settings["resumed layers"]}


def started(forks: Forks, folder: Path, size: int, task: str, **environment: str) -> list[Any]:
    """What each of ``size`` processes found, None for one that was killed. The task is one of this
    file, or "module:task"."""
    module, _, name = task.rpartition(":")
    arguments = ["-m", module or "helpers.on_ranks", folder]
    for found in folder.glob("*.json"):
        found.unlink()
    running = [
        forks.start([*arguments, rank, size, name], env={**ENVIRONMENT, **environment})
        for rank in range(size)
    ]
    codes = [process.wait(300) for process in running]
    assert set(codes) <= {0, -9}
    return [
        json.loads((folder / f"{rank}.json").read_text()) if code == 0 else None
        for rank, code in enumerate(codes)
    ]


def main(*tasks: Callable[[int, int, Path], dict[str, Any]]) -> None:
    """Carry out one of the tasks."""
    folder, rank, size, task = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    joined(folder / f"{task}.together", rank, size, 60.0)
    found = {f.__name__: f for f in tasks}[task](rank, size, folder)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(equal, by_rows, failing, killed, resuming)
