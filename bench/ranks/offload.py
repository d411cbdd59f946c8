"""The memory of a network of a billion parameters: in one process, with its weights in files, and
with that on four ranks; and whether the written tensors are the same.

    python bench/ranks/offload.py [--layers 22] [--ranks 4] [--include GLOB] [--out FILE]

A folder with random weights (float32, as Llama's, width 2048) is pruned by the command. Memory is
what the system reports of each process, read every 50 ms: all that is resident, and of this what is
anonymous, which the system cannot take back without swapping. The rest are pages of files, mostly
weights, which it takes back where memory is short; with ranks on one computer, each counts those
that it shares with others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folders bench and tests
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from safetensors import safe_open

METHOD = ["--sparsity", "0.5", "--inputs", "pruned", "--method", "wanda"]
TEXT = ["--length", "32", "--batch-size", "1", "--tokens", "128"]


def make(folder: Path, layers: int) -> int:
    """Write the network, and a text for four batches; its parameters."""
    import torch
    from helpers import hf_folders
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4}
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        max_position_embeddings=512,
        **heads,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model", max_shard_size="1GB")
    hf_folders.save_tokenizer(folder / "model")
    (folder / "text.txt").write_text(hf_folders.text(lines=8))
    return sum(p.numel() for p in model.parameters())


def memory_of(process: int) -> dict[str, int]:
    """Bytes of a process: resident, the most of it, and what is anonymous."""
    text = Path(f"/proc/{process}/status").read_text()
    names = {"VmHWM": "resident", "RssAnon": "anonymous"}
    found = {names[k]: re.search(rf"^{k}:\s+(\d+) kB", text, re.M) for k in names}
    return {name: int(match[1]) * 1024 for name, match in found.items() if match}


def run(folder: Path, name: str, ranks: int, *more: str) -> dict[str, Any]:
    """Prune in so many processes: the peak memory of each, and CPU seconds of all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = ["--calibration", "text.txt", *TEXT, *METHOD, "--out", name, *more]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    shared = shared if ranks > 1 else {"OMP_NUM_THREADS": "1"}
    before = os.times()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "lobs_native", "prune", "model", *given],
            cwd=folder,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    peaks: list[dict[str, int]] = [{} for _ in running]
    while any(process.poll() is None for process in running):
        for peak, process in zip(peaks, running, strict=True):
            if process.poll() is None:
                for kind, size in memory_of(process.pid).items():
                    peak[kind] = max(peak.get(kind, 0), size)
        time.sleep(0.05)
    if any(process.returncode for process in running):
        raise RuntimeError(f"{name}: {[process.returncode for process in running]}")
    after = os.times()
    spent = (after[2] + after[3]) - (before[2] + before[3])
    return {"peaks": peaks, "CPU seconds": round(spent, 1)}


def equal(a: Path, b: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    places = [
        {name: path for path in folder.glob("*.safetensors") for name in _names(path)}
        for folder in (a, b)
    ]
    if places[0].keys() != places[1].keys():
        return False
    for name in places[0]:
        x, y = (_tensor(found[name], name) for found in places)
        if x.tobytes() != y.tobytes():
            return False
    return True


def _names(path: Path) -> list[str]:
    with safe_open(path, "np") as file:
        return list(file.keys())


def _tensor(path: Path, name: str) -> Any:
    with safe_open(path, "np") as file:
        return file.get_tensor(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--include", action="append", default=[], help="prune these layers alone")
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        code = "import sys; from ranks.offload import make; from pathlib import Path; "
        code += "print(make(Path(sys.argv[1]), int(sys.argv[2])))"
        paths = os.pathsep.join([*sys.path[:1], sys.path[-1], os.environ.get("PYTHONPATH", "")])
        made = subprocess.run(  # in a process of its own, whose memory is then free again
            [sys.executable, "-c", code, place, str(arguments.layers)],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            check=True,
        )
        found: dict[str, Any] = {"parameters": int(made.stdout.split()[-1])}
        found |= {"include": arguments.include, "runs": {}}
        runs: dict[str, tuple[int, list[str]]] = {
            "usual": (1, []),
            "ranks": (arguments.ranks, ["--offload", "off"]),
            "offloaded": (1, ["--offload", "off"]),
        }
        for name, (ranks, more) in runs.items():
            more += [word for glob in arguments.include for word in ("--include", glob)]
            found["runs"][name] = run(folder, name, ranks, *more)
            if name != "usual":
                found["runs"][name]["equal"] = equal(folder / "usual", folder / name)
            usual = found["runs"]["usual"]["peaks"][0]
            for kind in usual:
                largest = max(peak[kind] for peak in found["runs"][name]["peaks"])
                found["runs"][name][f"{kind} against usual"] = round(largest / usual[kind], 3)
            print(name, json.dumps(found["runs"][name]), flush=True)
    print(json.dumps(found, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
