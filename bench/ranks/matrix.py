"""The bits of 2, 3 and 4 ranks against those of one process: every method, scope and kind of
inputs, and other options, on four small networks.

    python bench/ranks/matrix.py [--networks llm,moe] [--cases 2:4] [--every] [--out FILE]

On each network, one case is compared on 4 ranks and the next on 2 and on 3, and the other way round
on the next network; ``--every`` compares all of them on all numbers of ranks, in twice the time.
Layers are shared by rows wherever that is possible, however small they are, and products are formed
in blocks of 16 rows, so that what is meant for large layers is compared as well. What one process
refuses (a scope that a method does not have), all ranks must refuse.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import distributed

import lobs_native as lobs
from lobs_native.network import divided, shared
from lobs_native.solvers import rows
from ranks.group import bits_of, joined, keep
from ranks.networks import SMALL
from stress.forks import Forks

SIZES = ((4,), (2, 3))  # by turns
LAST = 3  # the last rank
METHODS = ("exact", "admm", "sweep", "lobs", "magnitude", "wanda")
SCOPES, INPUTS = ("row", "layer", "model"), ("dense", "pruned", "corrected")
CASES: dict[str, dict[str, Any]] = {
    f"{method}, {scope}, {inputs}": {
        "sparsity": 0.5,
        "method": method,
        "scope": scope,
        "inputs": inputs,
    }
    for method in METHODS
    for scope in SCOPES
    for inputs in INPUTS
} | {
    "2:4 exact": {"pattern": "2:4", "method": "exact"},
    "2:4 admm": {"pattern": "2:4", "method": "admm"},
    "2:4 sweep": {"pattern": "2:4", "method": "sweep", "inputs": "pruned"},
    "1x4": {"pattern": "1x4", "sparsity": 0.5, "method": "admm"},
    "columns": {"pattern": "columns", "sparsity": 0.25},
    "solve": {"sparsity": 0.5, "method": "wanda", "refine": "solve"},
    "exchange": {"sparsity": 0.5, "scope": "row", "refine": "exchange"},
    "max_error": {"max_error": 0.01, "method": "exact", "inputs": "pruned"},
    "threshold": {"threshold": 0.01, "method": "lobs"},
    "tokens": {"sparsity": 0.5, "token_weights": "output"},
    "held back": {"sparsity": 0.5, "held_back": 0.3},
    "sensitivity": {"sparsity": 0.5, "sensitivity": "output", "scope": "model"},
    "search": {"sparsity": 0.5, "scope": "model", "search": 2, "held_back": 0.3},
    "tune blocks": {"sparsity": 0.5, "tune": "blocks", "inputs": "pruned"},
    "tune network": {"sparsity": 0.5, "tune": "network", "tune_passes": 1},
}


def pruned(network: str, case: str, group: Any) -> str:
    """The bits of the pruned network; the class of the error, if the case is refused."""
    model, data = SMALL[network]()
    try:
        report = lobs.prune(model, data, progress=False, group=group, **CASES[case])
    except (lobs.ArgumentError, lobs.PatternError) as error:
        return type(error).__name__
    return bits_of(model, report)


def sizes_of(network: str, case: str, every: bool) -> list[int]:
    """On how many ranks a case is compared."""
    turn = list(SMALL).index(network) + list(CASES).index(case)
    return sorted(n for i, some in enumerate(SIZES) for n in some if every or turn % 2 == i)


def child(folder: Path, rank: int, network: str, cases: list[str], every: bool) -> None:
    """One rank: every case on the numbers of ranks that it is among."""
    torch.set_num_threads(1)
    rows._BLOCK, divided._WORTH, divided._GAIN = 16, 0.0, 1.0
    choose, by_rows = divided.divided, 0

    def counted(jobs: Any, size: int) -> Any:
        nonlocal by_rows
        some = choose(jobs, size)
        by_rows += len(some)
        return some

    shared.divided = counted
    joined(folder / "together", rank, LAST + 1, 1200.0)
    groups = {n: distributed.new_group(list(range(n))) for n in (2, 3, 4)}
    found: dict[str, dict[str, str]] = {}
    for case in cases:
        sizes = [n for n in sizes_of(network, case, every) if rank < n]
        found[case] = {str(n): pruned(network, case, groups[n]) for n in sizes}
        if rank == LAST:  # which has the least to do
            found[case]["alone"] = pruned(network, case, None)
    (folder / f"{rank}.json").write_text(json.dumps({"found": found, "by rows": by_rows}))
    distributed.destroy_process_group()


def compared(forks: Forks, network: str, cases: list[str], every: bool) -> dict[str, Any]:
    """What all ranks found, against one process."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        arguments = [__file__, "--child", place, network, json.dumps(cases), str(int(every))]
        running = [forks.start([*arguments, str(rank)]) for rank in range(LAST + 1)]
        if any(process.wait() for process in running):
            raise RuntimeError(f"{network}: a process has failed")
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(LAST + 1)]
    alone = {case: found.pop("alone") for case, found in ranks[LAST]["found"].items()}
    different = [
        f"{case}, rank {rank} of {n}"
        for rank, of_rank in enumerate(ranks)
        for case, found in of_rank["found"].items()
        for n, bits in found.items()
        if bits != alone[case]
    ]
    refused = [case for case, bits in alone.items() if len(bits) != 64]
    tried = [case for case in cases if case not in refused]
    sizes = [n for case in tried for n in sizes_of(network, case, every)]
    return {
        "cases": len(tried),
        "cases by number of ranks": {str(n): sizes.count(n) for n in sorted(set(sizes))},
        "networks compared": sum(sizes),
        "different": different,
        "refused by one process and by all": refused,
        "layers shared by rows": ranks[0]["by rows"],
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        folder, network, cases, every, rank = sys.argv[2:]
        child(Path(folder), int(rank), network, json.loads(cases), every == "1")
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join(SMALL))
    parser.add_argument("--cases", help="those whose names contain this", default="")
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cases = [case for case in CASES if arguments.cases in case]
    found = {}
    with Forks() as forks:
        forks.preload("transformers", "transformers.models.llama.modeling_llama")
        for network in arguments.networks.split(","):
            found[network] = compared(forks, network, cases, arguments.every)
            print(network, json.dumps(found[network], indent=1), flush=True)
            if arguments.out:
                keep(arguments.out, "matrix", found)
    if any(of_network["different"] for of_network in found.values()):
        sys.exit("some bits are different")


if __name__ == "__main__":
    main()
