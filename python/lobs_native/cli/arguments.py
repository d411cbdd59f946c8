"""Arguments of the prune command."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from lobs_native.network.pruner import INPUTS
from lobs_native.rundir.ledger import RESUMES
from lobs_native.solvers.settings import METHODS, REFINES, SCOPES

# Options of "prune" that lobs_native.prune takes, and those that concern a folder's text and files.
ARGUMENTS = (
    *("sparsity", "threshold", "max_error", "method", "pattern", "scope", "damping", "prune_bias"),
    *("spread", "sensitivity", "budget", "refine", "include", "exclude", "inputs", "blocks"),
    *("token_mask", "device", "memory", "backend", "run_dir", "resume", "seed"),
)


TEXT = ("lines", "min_words", "length", "batch_size", "shard_size")

_PRUNE = """Prune a network and write it into a new folder.

MODEL is a folder in the style of Hugging Face (config.json, *.safetensors, tokenizer), which needs
pip install "lobs-native[hf]" and --calibration; or module:function, where the function returns
(model, batches) or (model, batches, forward) and modules of the current folder can be imported.
The new folder holds the weights, dense with zeros in them, in the dtype they had; of a folder also
everything else in it; and report.json and report.html. It is there whole or not at all. Nothing is
downloaded. For a folder the layer that makes the logits is left alone unless --include names it.
"""


def add_prune(commands: Any) -> argparse.ArgumentParser:
    """The ``prune`` command with its options."""
    command: argparse.ArgumentParser = commands.add_parser(
        "prune",
        help="prune a network in a folder, or one that a function returns",
        description=_PRUNE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="a folder, or module:function")
    add("--out", type=Path, metavar="DIR", help="the folder to write; needed unless --plan")
    add("--overwrite", action="store_true", help="replace DIR if it holds an earlier result")
    add("--masks", action="store_true", help="write masks.safetensors too (True = kept)")
    add("--plan", action="store_true", help="say what would be pruned, with memory, and stop")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--no-progress", action="store_true", help="no progress bars (only on a terminal anyway)")

    group = command.add_argument_group("how far (one of them, or an N:M pattern)")
    target = group.add_mutually_exclusive_group()
    said = "share of the weights to remove, 0 to 1"
    target.add_argument("--sparsity", type=float, metavar="X", help=said)
    said = "the paper's epsilon on sqrt(L_q)"
    target.add_argument("--threshold", type=float, metavar="X", help=said)
    said = "largest error of a layer's output"
    target.add_argument("--max-error", type=float, metavar="X", help=said)

    add = command.add_argument_group("how (see lobs_native.prune)").add_argument
    add("--method", choices=METHODS, default="exact", help="default: %(default)s")
    add("--pattern", default="unstructured", help='"N:M", "1xB" or (default) %(default)s')
    add("--scope", choices=(*SCOPES, "model"), default="layer", help="default: %(default)s")
    said = "scope model: how far a layer may be from --sparsity (1: any); default: %(default)s"
    add("--spread", type=float, default=0.2, metavar="X", help=said)
    said = "weigh rows and layers by how much the output depends on them; auto: with scope model"
    add("--sensitivity", type=_choice, default="auto", metavar="auto|output|bound|none", help=said)
    said = "with scope model, what --sparsity is a share of; default: %(default)s"
    add("--budget", choices=("weights", "flops"), default="weights", help=said)
    add("--refine", choices=REFINES, help="repair the kept weights further; default: not")
    add("--inputs", choices=INPUTS, default="pruned", help="default: %(default)s")
    said = "run stacks of blocks block by block, or the whole model for every layer"
    add("--blocks", type=_choice, default="auto", metavar="auto|none", help=said)
    said = "leave out what the batches' attention_mask leaves out, or count it"
    add("--token-mask", type=_choice, default="auto", metavar="auto|none", help=said)
    said = "glob on layer names; may be repeated; default: all linear and convolution layers"
    add("--include", action="append", metavar="GLOB", help=said)
    add("--exclude", action="append", metavar="GLOB", help="likewise, to leave layers out")
    add("--damping", type=float, default=0.01, metavar="X", help="default: %(default)s")
    add("--prune-bias", action="store_true", help="biases may be removed, too")
    add("--device", help="move the model and each batch there, for example cuda")
    said = "limit on what pruning takes besides the model and its forward pass, for example 4GB"
    add("--memory", type=_size, metavar="SIZE", help=said)
    add("--backend", help="a name from lobs-native doctor; default: the fastest")
    said = "keep every finished layer there; the same command goes on after any end"
    add("--run-dir", type=Path, metavar="DIR", help=said)
    said = "where --run-dir holds a run: go on if it is this one (auto, the default), or anyway"
    add("--resume", choices=RESUMES, default="auto", help=said)
    add("--seed", type=int, default=0, help="default: %(default)s")

    add = command.add_argument_group("for folders").add_argument
    add("--calibration", type=Path, metavar="FILE", help="UTF-8 text to calibrate on")
    add("--lines", type=int, metavar="N", help="lines of it at most; default 600")
    add("--min-words", type=int, metavar="N", help="shorter lines are left out; default 20")
    said = "tokens per line, or per block for causal language models; default 128"
    add("--length", type=int, metavar="N", help=said)
    add("--batch-size", type=int, metavar="N", help="default 8")
    add("--shard-size", type=_size, metavar="SIZE", help="largest weight file; default 5GB")
    return command


def _choice(text: str) -> str | None:
    """An argument of prune that may be None."""
    return None if text == "none" else text


def _size(text: str) -> int:
    """Bytes from "4000000000", "4GB" or "4GiB"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kMGT])(i?)B?|B)?", text, re.IGNORECASE)
    size = 0
    if found:
        number, prefix, binary = found.groups()
        power = " kmgt".index(prefix.lower()) if prefix else 0
        size = int(float(number) * (1024 if binary else 1000) ** power)
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size in bytes; write for example 4000000000, 4GB or 4GiB"
        )
    return size
