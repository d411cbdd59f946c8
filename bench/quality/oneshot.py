"""llm-compressor's oneshot with its own pruning modifiers and with ours: perplexity and time.

    pip install llmcompressor
    python bench/quality/oneshot.py [--model FOLDER] [--steps N] [--repeats N] [--out FILE]

A byte-level Llama of 0.7 million parameters is trained on the first nine tenths of WikiText-2's
validation text and saved in FOLDER, unless one is there already. Its 21 linear layers are pruned on
128 pieces of 128 bytes of that part; the head is left alone. The table shows the perplexity per
byte on the last tenth, the mean Kullback-Leibler divergence of the pruned network's predictions
from the original's there, and CPU seconds with one thread: those of the whole oneshot, and those of
the modifiers themselves (second moments, pruning), the shortest of N runs. "SparseGPTModifier,
patched" is the host's modifier under ``lobs_native.compat.patch("llmcompressor")``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor, nn
from torch.nn import functional

import lobs_native as lobs
from lobs_native import compat

NEEDED = ("datasets", "llmcompressor", "loguru", "tokenizers", "transformers")
TEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext2" / "valid.txt"
PIECE, CALIBRATION, BATCH = 128, 128, 16
IGNORED = ["re:.*lm_head"]
TARGETS: dict[str, dict[str, Any]] = {
    "50%": {"sparsity": 0.5},
    "70%": {"sparsity": 0.7},
    "2:4": {"sparsity": 0.5, "mask_structure": "2:4"},
}
MODIFIERS: dict[str, dict[str, Any]] = {  # and their settings
    "WandaPruningModifier": {},
    "SparseGPTModifier": {},
    "SparseGPTModifier, patched": {},
    "LOBSModifier, sweep": {"method": "sweep"},
    "LOBSModifier, admm": {"method": "admm"},
    "LOBSModifier, exact": {"method": "exact"},
    "LOBSModifier, exact, exchange": {"method": "exact", "refine": "exchange"},
}


def modifier_class(name: str) -> type:
    """The class of a row: ours or the host's."""
    from llmcompressor.modifiers import pruning

    from lobs_native.compat.llmcompressor import LOBSModifier

    kind = name.partition(",")[0]
    return LOBSModifier if kind == "LOBSModifier" else getattr(pruning, kind)


def counted() -> list[tuple[Any, str, str]]:
    """What the modifiers do for each module: owner, function, and what that is."""
    from llmcompressor.modifiers.pruning.sparsegpt import base as sparsegpt
    from llmcompressor.modifiers.pruning.wanda import base as wanda

    from lobs_native.compat.llmcompressor import LOBSModifier, modifier

    return [
        (sparsegpt, "accumulate_hessian", "moments"),
        (sparsegpt, "sparsify_weight", "pruning"),
        (wanda, "accumulate_row_scalars", "moments"),
        (wanda, "sparsify_weight", "pruning"),
        (LOBSModifier, "_see", "moments"),
        (modifier, "prune_layer", "pruning"),
    ]


def text() -> tuple[Tensor, Tensor]:
    """Bytes to train and calibrate on, and bytes to measure on, in pieces (n, PIECE)."""
    data = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    pieces = data[: len(data) // PIECE * PIECE].view(-1, PIECE)
    cut = len(pieces) * 9 // 10
    return pieces[:cut], pieces[cut:]


def train(folder: Path, pieces: Tensor, steps: int) -> None:
    """Train the Llama and save it with a tokenizer, which oneshot asks for."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=PIECE,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    stream = pieces.flatten()
    for step in range(steps):
        starts = torch.randint(len(stream) - PIECE, (BATCH,))
        ids = torch.stack([stream[s : s + PIECE] for s in starts])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"b{i}": i for i in range(256)}, unk_token="b0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="b0").save_pretrained(folder)


@torch.no_grad()
def predictions(model: nn.Module, pieces: Tensor) -> Tensor:
    """Log probabilities (n, PIECE, 256)."""
    parts = [model(input_ids=part).logits.log_softmax(-1) for part in pieces.split(32)]
    return torch.cat(parts)


def perplexity(logs: Tensor, pieces: Tensor) -> float:
    return math.exp(functional.nll_loss(logs[:, :-1].flatten(0, 1), pieces[:, 1:].flatten()))


@contextlib.contextmanager
def timed(clock: dict[str, float]) -> Iterator[None]:
    """Count the CPU seconds in what the modifiers do for each module."""
    before = [(owner, name, getattr(owner, name), key) for owner, name, key in counted()]

    def counting(function: Any, key: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                clock[key] = clock.get(key, 0.0) + time.process_time() - begun

        return call

    try:
        for owner, name, function, key in before:
            setattr(owner, name, counting(function, key))
        yield
    finally:
        for owner, name, function, _ in before:
            setattr(owner, name, function)


def run(folder: Path, name: str, target: dict[str, Any], data: Any) -> tuple[Any, dict[str, Any]]:
    """One oneshot on a Dataset: the pruned model, and what it took."""
    from llmcompressor import oneshot
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modifier = modifier_class(name)(**target, **MODIFIERS[name], ignore=IGNORED)
    patched = compat.patch("llmcompressor") if "patched" in name else contextlib.nullcontext()
    clock: dict[str, float] = {}
    begun = time.process_time()
    with patched, timed(clock):
        oneshot(
            model=model,
            dataset=data,
            recipe=[modifier],
            num_calibration_samples=CALIBRATION,
            shuffle_calibration_samples=False,
        )
    return model, {"seconds": time.process_time() - begun, **clock}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}; pip install llmcompressor")

    from datasets import Dataset
    from llmcompressor import __version__ as host_version
    from loguru import logger
    from transformers import LlamaForCausalLM

    logger.remove()
    torch.set_num_threads(1)  # CPU seconds can be compared, also on a busy machine
    training, measured = text()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or Path(scratch)
        if not (folder / "config.json").is_file():
            train(folder, training, arguments.steps)
        original = predictions(LlamaForCausalLM.from_pretrained(folder), measured)
        calibration = training[:: len(training) // CALIBRATION][:CALIBRATION]
        mask = torch.ones_like(calibration)
        data = Dataset.from_dict(
            {"input_ids": calibration.tolist(), "attention_mask": mask.tolist()}
        )
        result: dict[str, Any] = {
            "torch": str(torch.__version__),
            "llmcompressor": host_version,
            "lobs_native": lobs.__version__,
            "threads": torch.get_num_threads(),
            "steps": arguments.steps,
            "perplexity of the original": perplexity(original, measured),
            "rows": [],
        }
        print(f"original: perplexity {result['perplexity of the original']:.4f} per byte")
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        # Interleaved, so that whatever else the machine does affects all rows alike.
        for _ in range(arguments.repeats):
            for target, settings in TARGETS.items():
                for name in MODIFIERS:
                    model, took = run(folder, name, settings, data)
                    known = rows.get((target, name))
                    if known is not None:
                        known.update({k: min(v, known[k]) for k, v in took.items()})
                        continue
                    logs = predictions(model, measured)
                    gap = functional.kl_div(logs, original, log_target=True, reduction="sum")
                    weights = [m.weight for m in model.model.modules() if hasattr(m, "in_features")]
                    zeros = sum(int((w == 0).sum()) for w in weights)
                    rows[target, name] = {
                        "target": target,
                        "modifier": name,
                        "perplexity": perplexity(logs, measured),
                        "divergence": float(gap) / measured.numel(),
                        "sparsity": zeros / sum(w.numel() for w in weights),
                        **took,
                    }
        for row in rows.values():
            print(
                f"{row['target']:4} {row['modifier']:30} perplexity {row['perplexity']:.4f}, "
                f"divergence {row['divergence']:.4f} nats, sparsity {row['sparsity']:.5f}, "
                f"{row['seconds']:.2f} s, moments {row['moments']:.2f} s, "
                f"pruning {row['pruning']:.2f} s"
            )
        result["rows"] = list(rows.values())
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
