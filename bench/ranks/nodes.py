"""One run on two nodes, which are two network namespaces of this computer: equal bits, and what
goes from one to the other.

    sudo python bench/ranks/nodes.py [--network encoder] [--processes 2] [--rate 200mbit]

Each namespace has one end of a virtual cable and nothing else, so that no traffic leaves this
computer; ``tc`` limits its rate in both directions (and adds ``--delay``, where the system has
netem). In each, torchrun starts the command. The namespaces are taken away at the end, however it
ends. Needs Linux, root, and the programs ip and tc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

BENCH = Path(__file__).resolve().parents[1]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
SETTINGS = ["--sparsity", "0.5", "--no-progress"]


def called(*words: str) -> None:
    """Run a program. RuntimeError with what it says if it fails."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")


@contextlib.contextmanager
def two_nodes(rate: str, delay: str | None) -> Iterator[list[tuple[str, str, str]]]:
    """(namespace, device, address) of two nodes with a cable between them."""
    ends = [(f"lobs{os.getpid()}{x}", f"lb{os.getpid()}{x}") for x in "ab"]
    nodes = [(*end, address) for end, address in zip(ends, ADDRESSES, strict=True)]
    with contextlib.ExitStack() as scope:
        for space, _ in ends:
            called("ip", "netns", "add", space)
            scope.callback(called, "ip", "netns", "del", space)  # and the cable with it
        called("ip", "link", "add", ends[0][1], "type", "veth", "peer", "name", ends[1][1])
        for space, device, address in nodes:
            called("ip", "link", "set", device, "netns", space)
            inside = ("ip", "netns", "exec", space)
            called(*inside, "ip", "addr", "add", f"{address}/24", "dev", device)
            called(*inside, "ip", "link", "set", device, "up")
            called(*inside, "ip", "link", "set", "lo", "up")
            limit = ["tbf", "rate", rate, "burst", "256kb", "latency", "1000ms"]
            if delay is not None:
                limit = ["netem", "rate", rate, "delay", delay]
            called(*inside, "tc", "qdisc", "add", "dev", device, "root", *limit)
        yield nodes


def sent(space: str, device: str) -> int:
    """Bytes that a device has sent, headers included."""
    words = ["ip", "netns", "exec", space, "ip", "-s", "-j", "link", "show", device]
    found = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    return int(found[0]["stats64"]["tx"]["bytes"])


def command(network: str, out: Path) -> list[str]:
    return ["-m", "lobs_native", "prune", f"ranks.networks:{network}", "--out", str(out), *SETTINGS]


def on_nodes(
    nodes: list[tuple[str, str, str]], network: str, processes: int, out: Path
) -> list[int]:
    """The exit codes of torchrun on each node."""
    running = []
    for space, device, address in nodes:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        torchrun += ["--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
        torchrun += ["--rdzv-endpoint", f"{ADDRESSES[0]}:29500", "--rdzv-id", "nodes"]
        # Both nodes have one hostname, by which torchrun cannot tell which of them is the first.
        first = int(address == ADDRESSES[0])
        torchrun += ["--local-addr", address, "--rdzv-conf", f"is_host={first}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": device}
        words = ["ip", "netns", "exec", space, *torchrun, *command(network, out)]
        output: Any = subprocess.DEVNULL
        running.append(subprocess.Popen(words, cwd=BENCH, env=environment, stdout=output))
    return [process.wait() for process in running]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", default="encoder")
    parser.add_argument("--processes", type=int, default=2, help="on each node")
    parser.add_argument("--rate", default="200mbit")
    parser.add_argument("--delay")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        one = [sys.executable, *command(arguments.network, folder / "one")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(one, cwd=BENCH, env=environment, stdout=subprocess.DEVNULL, check=True)
        with two_nodes(arguments.rate, arguments.delay) as nodes:
            begun = time.perf_counter()
            codes = on_nodes(nodes, arguments.network, arguments.processes, folder / "two")
            seconds = time.perf_counter() - begun
            between = [sent(space, device) for space, device, _ in nodes]
        if any(codes):
            raise RuntimeError(f"torchrun ended with {codes}")
        right, found = weights(folder / "one"), weights(folder / "two")
        report = json.loads((folder / "two" / "report.json").read_text())
    same = right.keys() == found.keys()
    row = {
        "network": arguments.network,
        "nodes": 2,
        "processes on each": arguments.processes,
        "rate": arguments.rate,
        "delay": arguments.delay,
        "equal": same and all(right[k].equal(x) for k, x in found.items()),
        "bytes between nodes": between,
        "bytes sent by ranks": [rank["bytes sent"] for rank in report["settings"]["ranks"]],
        "seconds exchanging": [
            round(rank["seconds exchanging"], 2) for rank in report["settings"]["ranks"]
        ],
        "seconds": round(seconds, 1),
    }
    print(json.dumps(row, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
