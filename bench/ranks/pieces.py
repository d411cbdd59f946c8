"""The memory of each of several ranks that prune a network of FSDP2, whose parameters lie in
pieces: gathered in memory, and with ``offload``; and whether the bits are those of one process.

    python bench/ranks/pieces.py [--layers 6] [--width 1024] [--ranks 2] [--out FILE]

The network is a Llama of transformers with random weights in float32, made block by block on each
rank. Memory is what the system says of each process from when the network lies in pieces: the most
that was resident (VmHWM), and the most of it that was anonymous, which the system cannot take back
without swapping, read every 20 ms.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, distributed, nn

import lobs_native as lobs
from ranks.group import bits_of, joined, keep
from ranks.offload import memory_of

HOW = lobs.NetworkSettings(sparsity=0.5, method="wanda", inputs="pruned", progress=False)


def network(layers: int, width: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
    )
    return LlamaForCausalLM(config).eval()


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(2048, (1, 32), generator=generator)} for _ in range(4)]


class Peak:
    """The most memory of this process, from when it is entered."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins with what is resident now
        self.anonymous, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.before = memory_of(os.getpid())
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.anonymous = max(self.anonymous, memory_of(os.getpid())["anonymous"])

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        self.resident = memory_of(os.getpid())["resident"]


def pruned(arguments: argparse.Namespace, offload: Path | None) -> dict[str, Any]:
    """What one rank finds."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    model = network(arguments.layers, arguments.width)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    cpu = time.process_time()
    with Peak() as peak:
        how = dataclasses.replace(HOW, offload=offload)
        report = lobs.prune(model, batches(), settings=how, group=distributed.group.WORLD)
    found: dict[str, Any] = {
        "before": peak.before,
        "resident": peak.resident,
        "anonymous": peak.anonymous,
        "CPU seconds": round(time.process_time() - cpu, 1),
        "gathered": report.settings["gathered"],
        "network at a time": report.settings["plan"]["network"],
    }
    state = {name: value.full_tensor() for name, value in model.state_dict().items()}
    del model
    plain = network(arguments.layers, arguments.width)
    plain.load_state_dict(state)
    return found | {"bits": bits_of(plain, report)}


def rank_of(arguments: argparse.Namespace, name: str) -> None:
    """One process: rank 0 to N - 1, or one alone, with plain parameters."""
    torch.set_num_threads(1)
    folder, rank = Path(arguments.folder), arguments.rank
    if name == "alone":
        model = network(arguments.layers, arguments.width)
        with Peak() as peak:
            report = lobs.prune(model, batches(), settings=HOW)
        found: dict[str, Any] = {"bits": bits_of(model, report), "before": peak.before}
        found |= {"resident": peak.resident, "anonymous": peak.anonymous}
    else:
        joined(folder / f"{name}.together", rank, arguments.ranks, 600.0)
        found = pruned(arguments, folder / "scratch" if name == "offload" else None)
        distributed.destroy_process_group()
    (folder / f"{name} {rank}.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", help="for the files; default: a temporary one")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.name:
        rank_of(arguments, arguments.name)
        return
    found, alone = dict[str, Any](), ""
    given = [f"--{k}={getattr(arguments, k)}" for k in ("layers", "width", "ranks")]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        for name, ranks in (("alone", 1), ("whole", arguments.ranks), ("offload", arguments.ranks)):
            command = [sys.executable, __file__, *given, "--folder", place, "--name", name]
            running = [
                subprocess.Popen(
                    [*command, "--rank", str(rank)],
                    env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
                )
                for rank in range(ranks)
            ]
            codes = [process.wait() for process in running]
            if any(codes):
                raise RuntimeError(f"{name}: a rank has failed")
            texts = [(Path(place) / f"{name} {rank}.json").read_text() for rank in range(ranks)]
            found[name] = [json.loads(text) for text in texts]
            alone = alone or found[name][0]["bits"]
            for of_rank in found[name]:
                of_rank["equal"] = of_rank.pop("bits") == alone
            print(name, json.dumps(found[name]), flush=True)
    if arguments.out:
        sizes = {k: getattr(arguments, k) for k in ("layers", "width", "ranks")}
        keep(arguments.out, "memory", {**sizes, "runs": found})


if __name__ == "__main__":
    main()
