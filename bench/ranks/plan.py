"""What a run on many ranks takes, by arithmetic: time, bytes and memory, for a network of which
only config.json is there.

    python bench/ranks/plan.py [CONFIG] --ranks 8 --nodes 1 --products 4e13 --link 1e10
    python bench/ranks/plan.py [CONFIG] --ranks 32 --nodes 4 --slow 0.5
    python bench/ranks/plan.py --all bench/results/ranks.json [--out FILE]

``--products`` is how many operations of float32 products a rank carries out in a second, ``--link``
the bytes that leave a node in a second, ``--local`` those that leave a rank within one, ``--slow``
the speed of the last rank against the others. Nothing runs on a GPU here: rates of one are given,
not measured. The network is made on the meta device; without CONFIG, in the sizes of Llama-3-70B;
what reads one tensor is known by the names of its layers. With ``--all``, bytes and shares of the
work are compared with those that bench/ranks/scaling.py measured, at the rate of its run on one
process, and then three machines are planned.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn

import lobs_native as lobs
from lobs_native.calibration.differences import Gap
from lobs_native.calibration.ranks import Ranks
from lobs_native.calibration.tree import CHUNKS, ranks_of_chunks
from lobs_native.layers import layers_of
from lobs_native.network.divided import Work, divided, owners
from lobs_native.network.selection import LayerJob
from lobs_native.solvers.methods import method_of

TOGETHER = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # they read one tensor
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
SUMMED = {"o_proj", "down_proj"}  # their outputs go straight into a sum
UNTIL_KNOWN = 0.6  # of a block, that is run until the inputs of one of its layers are known
ROWS = 64  # of a lower triangle, that are sent together


@dataclass(frozen=True)
class Machine:
    """Rates of the ranks and of what connects them, per second."""

    ranks: int
    nodes: int
    products: float  # operations of one rank
    link: float  # bytes that leave a node
    local: float  # bytes that leave a rank within its node
    slow: float = 1.0  # speed of the last rank against the others

    @property
    def speeds(self) -> list[float]:
        return [1.0] * (self.ranks - 1) + [self.slow]

    def moving(self, each: float) -> float:
        """Seconds in which every rank sends so many bytes, spread evenly over the others."""
        if self.ranks == 1:
            return 0.0
        inside = self.ranks // self.nodes
        away = each * (self.ranks - inside) / (self.ranks - 1)
        return max((each - away) / self.local, away * inside / self.link)


def jobs_of(model: nn.Module, settings: lobs.NetworkSettings, skip: str) -> list[LayerJob]:
    """The layers of a network without values, but for one, with what they are pruned to."""
    jobs = []
    for layer in layers_of(model):
        if layer.name != skip and isinstance(layer.module, nn.Linear):
            own, shared = settings.for_layer(layer.name)
            order = layer.width + (layer.module.bias is not None)
            jobs.append(LayerJob(layer, own.for_order(order), shared))
    return jobs


def groups_of(jobs: Sequence[LayerJob]) -> Iterator[list[LayerJob]]:
    """Layers that read one tensor."""
    group: list[LayerJob] = []

    def key(job: LayerJob) -> tuple[str, int]:
        parent, _, name = job.layer.name.rpartition(".")
        alike = [i for i, names in enumerate(TOGETHER) if name in names]
        return parent, alike[0] if alike else -1 - jobs.index(job)

    for job in jobs:
        if group and key(group[0]) != key(job):
            yield group
            group = []
        group.append(job)
    yield group


def lower(order: int) -> int:
    """Entries of a lower triangle that are sent."""
    return sum(
        min(ROWS, order - first) * min(first + ROWS, order) for first in range(0, order, ROWS)
    )


def sums_bytes(group: Sequence[LayerJob], corrected: bool, *, whole: bool = False) -> int:
    """Bytes of all sums of the pass that calibrates a group, in float64, as they are sent; or in
    memory, where triangles are ``whole`` squares."""
    D, C = group[0].extent.order, group[0].layer.width
    entries, apart = (D * D, C * C) if whole else (lower(D), lower(C))
    if not corrected:
        return 8 * entries
    layers = [job.layer for job in group]
    if group[0].layer.name.rpartition(".")[2] not in SUMMED and Gap.pays(layers):
        return 8 * (2 * entries + apart + D * C)
    return 8 * (entries + sum(D * job.layer.rows for job in group))


def sent(
    group: Sequence[LayerJob], corrected: bool, chunks: int, ranks: int
) -> tuple[float, float]:
    """Bytes that all ranks together send of the sums for a group, and of its layers: float32, and a
    byte of the mask for each weight, which goes to every other rank but is counted once."""
    if ranks == 1:
        return 0.0, 0.0
    times = chunks * (ranks - 1) / ranks + ranks - 1
    return sums_bytes(group, corrected) * times, sum(5.0 * job.extent.weights for job in group)


@dataclass
class Part:
    """Seconds of each rank."""

    passes: list[float]
    removal: list[float]


def of_group(
    group: Sequence[LayerJob],
    tokens: float,
    corrected: bool,
    chunks: int,
    machine: Machine,
    loads_so_far: Ranks,
) -> Part:
    """Calibrating and pruning a group: its part of the passes through its block, and its sums."""
    N, speeds = machine.ranks, machine.speeds
    of_chunks = ranks_of_chunks(chunks, N)
    counts = [of_chunks.count(rank) for rank in range(N)]
    forward = 2.0 * tokens * sum(job.extent.weights for job in group)
    products = (2 if corrected else 1) * forward * (1 + 4 * UNTIL_KNOWN)
    products += tokens * group[0].extent.squares * (1 + 3 * corrected)
    each = products / chunks / machine.products
    passes = [each * n / s for n, s in zip(counts, speeds, strict=True)]
    shared = divided(group, N) if N > 1 else []
    loads = [sum(Work.of(job, N).shared for job in shared)] * N
    whole = [job for job in group if job not in shared]
    for name, owner in owners(loads_so_far, whole).items():
        loads[owner] += next(Work.of(job, N).whole for job in whole if job.layer.name == name)
    return Part(passes, [x / machine.products / s for x, s in zip(loads, speeds, strict=True)])


def plan(
    jobs: Sequence[LayerJob], tokens: float, batches: int, corrected: bool, machine: Machine
) -> dict[str, Any]:
    """Seconds, bytes and shares of a run."""
    chunks, N = min(CHUNKS, batches), machine.ranks
    calibrating = removing = exchanging = bytes_sent = 0.0
    work, loads = [0.0] * N, Ranks()
    loads.size, loads._load = N, [0.0] * N
    for group in groups_of(jobs):
        part = of_group(group, tokens, corrected, chunks, machine, loads)
        calibrating += max(part.passes)
        removing += max(part.removal)
        work = [w + a + b for w, a, b in zip(work, part.passes, part.removal, strict=True)]
        sums, layers = sent(group, corrected, chunks, N)
        exchanging += machine.moving((sums + layers * (N - 1)) / N)
        bytes_sent += sums + layers
    total = calibrating + removing + exchanging
    return {
        "calibrating, s": calibrating,
        "removing weights, s": removing,
        "exchanging, s": exchanging,
        "all, s": total,
        "bytes sent by all": bytes_sent,
        "work of each rank, s": work,
        "busy": sum(work) / N / total,
    }


def memory(jobs: Sequence[LayerJob], model: nn.Module, corrected: bool) -> dict[str, float]:
    """Bytes of a rank: weights with and without offload, sums, and the largest layer."""
    size = next(model.parameters()).element_size()
    every = sum(p.numel() for p in model.parameters()) * size
    blocks: dict[str, int] = {}
    for name, p in model.named_parameters():
        block = ".".join(name.split(".")[:3])
        blocks[block] = blocks.get(block, 0) + p.numel() * size
    largest = max(
        method_of(j.settings.method, j.settings.resolved_pattern).memory(j.extent).total
        for j in jobs
    )
    sums = 2 * max(sums_bytes(group, corrected, whole=True) for group in groups_of(jobs))
    return {
        "network": every,
        "network at a time, with offload": max(blocks.values()),
        "two sets of sums": sums,
        "removal from the largest layer": largest,
    }


def llama(config: dict[str, Any]) -> tuple[nn.Module, lobs.NetworkSettings]:
    """The network that a config.json describes, on the meta device."""
    import transformers

    kind = getattr(transformers, config["architectures"][0])
    known = transformers.AutoConfig.for_model(**config)
    dtype = getattr(torch, str(config.get("torch_dtype", config.get("dtype", "float32"))))
    with torch.device("meta"):
        model = kind(known).to(dtype)
    return model, lobs.NetworkSettings(sparsity=0.5)


def check(path: Path) -> list[dict[str, Any]]:
    """Arithmetic against what was measured of the language model, with the rate of one process."""
    from ranks.networks import NETWORKS

    model, data = NETWORKS["llm"]()
    jobs = jobs_of(model, lobs.NetworkSettings(sparsity=0.5), "")
    tokens = float(sum(batch["input_ids"].numel() for batch in data))
    rows = []
    for measured in json.loads(path.read_text())["scaling"]["found"]:
        if (measured["network"], measured["options"]) != ("llm", "default"):
            continue
        one = plan(jobs, tokens, len(data), True, Machine(1, 1, 1.0, 1.0, 1.0))
        rate = one["all, s"] / measured["CPU seconds alone"]
        for ranks in (int(key) for key in measured if key.isdigit()):
            found = plan(jobs, tokens, len(data), True, Machine(ranks, 1, rate, 1e12, 1e12))
            of, work = measured[str(ranks)], found["work of each rank, s"]
            rows.append(
                {
                    "ranks": ranks,
                    "bytes, planned": found["bytes sent by all"],
                    "bytes, measured": sum(of["bytes sent"]),
                    "busiest against mean, planned": max(work) * ranks / sum(work),
                    "busiest against mean, measured": of["largest against mean"],
                    "CPU seconds of all, planned": sum(work),
                    "CPU seconds of all, measured": sum(of["CPU seconds"]),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("--all", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--products", type=float, default=4e13)
    parser.add_argument("--link", type=float, default=1e10)
    parser.add_argument("--local", type=float, default=1e10)
    parser.add_argument("--slow", type=float, default=1.0)
    parser.add_argument("--tokens", type=float, default=128 * 2048)
    parser.add_argument("--batches", type=int, default=128)
    parser.add_argument("--inputs", choices=("corrected", "pruned"), default="corrected")
    arguments = parser.parse_args()
    config = LLAMA_70B if arguments.config is None else json.loads(arguments.config.read_text())
    model, settings = llama(config)
    corrected = arguments.inputs == "corrected"
    jobs = jobs_of(model, dataclasses.replace(settings, inputs=arguments.inputs), "lm_head")
    names = ("ranks", "nodes", "products", "link", "local", "slow")
    machine = Machine(**{name: getattr(arguments, name) for name in names})
    machines = [machine]
    if arguments.all is not None:
        machines = [dataclasses.replace(machine, ranks=8, nodes=1)]
        machines += [dataclasses.replace(machine, ranks=32, nodes=4, slow=x) for x in (1.0, 0.5)]
    how = (arguments.tokens, arguments.batches, corrected)
    one = plan(jobs, *how, dataclasses.replace(machine, ranks=1, nodes=1, slow=1.0))
    found: dict[str, Any] = {"config": config, "memory": memory(jobs, model, corrected), "runs": []}
    for each in machines:
        planned = plan(jobs, *how, each)
        times = one["all, s"] / planned["all, s"]
        found["runs"].append({**dataclasses.asdict(each), **planned, "against one rank": times})
    if arguments.all is not None:
        found["measured"] = check(arguments.all)
    print(json.dumps(found, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
