"""What SparseGPT's script for Llama does, with its own class, on the tokens of a text file.

    python bench/hosts/sparsegpt_script.py --folder FOLDER MODEL TEXT OUT [--blocks N] [--windows N]

FOLDER holds a clone of IST-DASLab/sparsegpt as FOLDER/sparsegpt, whose class SparseGPT runs
unmodified. The script itself does not run with today's transformers, whose blocks are called
otherwise, and reads its data from the network. Its steps: load the checkpoint; catch the inputs of
the first block, one sequence at a time; then, block by block, run all sequences with second moments
of every linear layer, prune them, and run all sequences again; save. It ends after the last block
that it prunes, and measures no perplexity. See `sparsegpt_job.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BLOCKS, WINDOWS, WINDOW = 5, 32, 256


def loaded(folder: Path) -> Any:
    """The model of a folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True).eval()


def sequences(folder: Path, text: Path, windows: int) -> list[Tensor]:
    """The first tokens of a text as sequences (1, T)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    lines = text.read_text(encoding="utf-8").splitlines()
    numbers = tokenizer("\n".join(lines))["input_ids"][: windows * WINDOW]
    return list(torch.tensor(numbers).view(windows, 1, WINDOW))


class CaughtError(Exception):
    """The inputs of the first block are known."""


@torch.no_grad()
def prune_block_by_block(
    model: Any,
    data: Sequence[Tensor],
    kind: Callable[[nn.Module], Any],
    remove: Callable[[Any], None],
    blocks: int,
) -> None:
    """Prune the linear layers of the first blocks in place: ``kind`` makes an object for a layer
    that sees its inputs (``add_batch``), and from which ``remove`` removes weights."""
    model.config.use_cache = False
    layers = model.model.layers
    hidden = torch.zeros(len(data), WINDOW, model.config.hidden_size)
    arguments: dict[str, Any] = {}
    count = 0

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        hidden[count] = args[0] if args else kwargs.pop("hidden_states")
        arguments.update(kwargs)
        count += 1
        raise CaughtError

    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for sequence in data:
        with contextlib.suppress(CaughtError):
            model(sequence)
    handle.remove()
    after = torch.zeros_like(hidden)

    def run(layer: nn.Module) -> None:
        for j in range(len(data)):
            after[j] = layer(hidden[j].unsqueeze(0), **arguments)[0]

    for layer in layers[:blocks]:
        linear = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
        pruners = {name: kind(module) for name, module in linear.items()}

        def add(name: str, pruners: dict[str, Any] = pruners) -> Any:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                pruners[name].add_batch(inputs[0].data, output.data)

            return hook

        handles = [module.register_forward_hook(add(name)) for name, module in linear.items()]
        run(layer)
        for handle in handles:
            handle.remove()
        for pruner in pruners.values():
            remove(pruner)
            pruner.free()
        run(layer)
        hidden, after = after, hidden


def main() -> None:
    """Prune and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the host's clone is")
    for name in ("model", "text", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda device=None: None
    sys.path.insert(0, str(arguments.folder / "sparsegpt"))
    kind = importlib.import_module("sparsegpt").SparseGPT
    model = loaded(arguments.model)
    data = sequences(arguments.model, arguments.text, arguments.windows)
    with contextlib.redirect_stdout(io.StringIO()):
        prune_block_by_block(
            model,
            data,
            kind,
            lambda pruner: pruner.fasterprune(0.5, percdamp=0.01, blocksize=128),
            arguments.blocks,
        )
    model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
