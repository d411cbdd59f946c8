"""Pruning on 1 to 4 ranks: equal bits, CPU seconds, shares of the work, bytes.

    python bench/ranks/scaling.py [--networks llm,moe] [--ranks 2,4] [--all-options] [--out FILE]

Every rank is a process with one thread, on this computer, with gloo. CPU seconds are those of
``prune`` itself, without imports. With fewer cores than ranks they stand for the time. With
``--all-options``, each of ``OPTIONS`` is compared in bits; otherwise the defaults alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import lobs_native as lobs
from ranks.group import bits_of, joined, keep
from ranks.networks import NETWORKS
from stress.forks import Forks

# What torch imports, with sympy, when some models first run.
LATE = "torch.fx.experimental.symbolic_shapes"

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {"sparsity": 0.5},
    "pruned": {"sparsity": 0.5, "inputs": "pruned", "method": "exact"},
    "dense": {"sparsity": 0.5, "inputs": "dense", "scope": "row"},
    "model": {"sparsity": 0.5, "scope": "model", "inputs": "pruned", "held_back": 0.1},
    "2:4": {"pattern": "2:4"},
    "tokens": {"sparsity": 0.5, "token_weights": "output", "method": "admm"},
    "sweep": {"sparsity": 0.5, "method": "sweep"},
    "lobs": {"sparsity": 0.5, "method": "lobs"},
    "wanda": {"sparsity": 0.5, "method": "wanda", "inputs": "pruned"},
    "magnitude": {"sparsity": 0.5, "method": "magnitude", "inputs": "pruned"},
    "exchange": {"sparsity": 0.5, "scope": "row", "refine": "exchange", "inputs": "dense"},
    "max_error": {"max_error": 0.01, "inputs": "pruned", "method": "exact"},
}


def pruned(network: str, options: str, group: Any) -> dict[str, Any]:
    """The bits of the pruned network, and what it took."""
    model, data = NETWORKS[network]()
    begun = time.process_time()
    report = lobs.prune(model, data, progress=False, group=group, **OPTIONS[options])
    alone = [{"CPU seconds": time.process_time() - begun}]
    return {"bits": bits_of(model, report), "ranks": report.settings.get("ranks", alone)}


def child(folder: Path, rank: int, size: int, network: str, options: str) -> None:
    """One rank; the first writes what came of it."""
    torch.set_num_threads(1)
    group = joined(folder / "together", rank, size, 1200.0) if size > 1 else None
    found = pruned(network, options, group)
    (folder / f"{rank}.json").write_text(json.dumps(found))


def on_ranks(forks: Forks, network: str, options: str, size: int) -> dict[str, Any]:
    """What came of it on so many ranks. RuntimeError if they do not agree."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [__file__, "--child", folder]
        running = [
            forks.start([*arguments, str(rank), str(size), network, options])
            for rank in range(size)
        ]
        if any(process.wait() for process in running):
            raise RuntimeError(f"{network}, {options}, {size} ranks: a process has failed")
        every = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(size)]
    if any(found["bits"] != every[0]["bits"] for found in every):
        raise RuntimeError(f"{network}, {options}: the ranks have different networks")
    return every[0]


def compared(forks: Forks, network: str, options: str, sizes: list[int]) -> dict[str, Any]:
    """One process against several."""
    one = on_ranks(forks, network, options, 1)
    alone = one["ranks"][0]["CPU seconds"]
    row: dict[str, Any] = {"network": network, "options": options, "CPU seconds alone": alone}
    for size in sizes:
        found = on_ranks(forks, network, options, size)
        each = [rank["CPU seconds"] for rank in found["ranks"]]
        row[str(size)] = {
            "equal": found["bits"] == one["bits"],
            "CPU seconds": each,
            "sum against one": sum(each) / alone,
            "largest against mean": max(each) * size / sum(each),
            "largest against one": max(each) / alone,
            "bytes sent": [rank["bytes sent"] for rank in found["ranks"]],
        }
    return row


def merged(file: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, and those that the file has of other networks and options."""
    known = {(row["network"], row["options"]) for row in rows}
    before = json.loads(file.read_text()) if file.exists() else {}
    kept = before.get("scaling", {"found": []})["found"]
    return [row for row in kept if (row["network"], row["options"]) not in known] + rows


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        folder, rank, size, network, options = sys.argv[2:]
        child(Path(folder), int(rank), int(size), network, options)
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--ranks", default="2,3,4")
    parser.add_argument("--all-options", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.ranks.split(",")]
    rows = []
    with Forks() as forks:
        forks.preload("transformers.models.llama.modeling_llama", LATE)
        for network in arguments.networks.split(","):
            for options in OPTIONS if arguments.all_options else ["default"]:
                rows.append(compared(forks, network, options, sizes))
                row = rows[-1]
                print(f"{network:8} {options:10} alone {row['CPU seconds alone']:7.2f} s", end="")
                for size in sizes:
                    of_size = row[str(size)]
                    equal = "equal" if of_size["equal"] else "DIFFERENT"
                    print(
                        f" | {size}: {equal}, {of_size['sum against one']:.2f}x, largest "
                        f"{of_size['largest against mean']:.2f}, "
                        f"{sum(of_size['bytes sent']) / 1e6:.1f} MB",
                        end="",
                    )
                print(flush=True)
    if arguments.out:
        keep(arguments.out, "scaling", merged(arguments.out, rows))


if __name__ == "__main__":
    main()
