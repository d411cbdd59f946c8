"""What is pruned of the networks of transformers and timm, what is not, and are the errors right?

    pip install ".[hf]" timm
    python bench/quality/zoo.py [WORD ...] [--library transformers|timm] [--from TYPE]
                                [--seconds N] [--out FILE]

A small network of every type of transformers for which one can be made from its default
configuration (see ``small_models.py``), or of every family of timm (``small_timm.py``), with random
weights. Nothing is downloaded. WORD selects by name; each type runs in a process of its own with a
limit on the time of its processor. Every network is pruned as users would call it,
``lobs_native.prune(model, batches, sparsity=0.5)``, with method "sweep", and every third with the
default method as well. Of every third, the errors of up to eight layers are computed again in
float64 from the inputs that hooks see, with inputs "dense".

The table has a line for each network: layers, the share of the weights to be pruned that were
pruned, the share of all that was left out on purpose, and why others were not understood. FILE
keeps one line for each network; rows that are there already and were not run again stay.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import json
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch.nn import functional

import lobs_native as lobs
from lobs_native.layers import stored_weights
from quality import small_models, small_timm

__all__ = ["LIBRARIES", "checked", "kept", "pruned", "run", "summary"]

LIBRARIES: dict[str, Any] = {"transformers": small_models, "timm": small_timm}
FIRST = {"transformers": ("bert", "llama", "vit"), "timm": ()}
CHECKED = 8  # layers of a network whose errors are computed again
_WAITING = 20  # times the limit, by the clock
Row = dict[str, Any]
OfType = Callable[[str, str, int], Row]  # (library, type, its number) -> what became of it


def pruned(model: nn.Module, batches: list[Any], **options: Any) -> lobs.Report:
    """Prune a network to one half."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lobs_native")
        return lobs.prune(model, batches, sparsity=0.5, progress=False, **options)


def _row(library: str, name: str, number: int) -> Row:
    """What became of a type: "not made", "refused", "raised", "wrong" or "ok"."""
    try:
        model, batches = LIBRARIES[library].made(name)
    except small_models.NotMadeError as error:
        return {"outcome": "not made", "said": str(error)[:150]}
    inputs = sorted(batches[0]) if isinstance(batches[0], dict) else ["pixel_values"]
    row: Row = {"inputs": inputs, "mixture": _has_experts(model)}
    if network := getattr(model, "default_cfg", {}).get("architecture"):
        row["network"] = network
    for method in ("sweep", "auto") if number % 3 == 0 else ("sweep",):
        tried = copy.deepcopy(model)
        try:
            report = pruned(tried, batches, method=method)
        except lobs.LobsError as error:
            return row | {"outcome": "refused", "method": method, "said": str(error)[:500]}
        except Exception as error:
            said = f"{type(error).__name__}: {error}"[:500]
            return row | {"outcome": "raised", "method": method, "said": said}
        if wrong := _wrong(tried, report):
            return row | {"outcome": "wrong", "method": method, "said": wrong}
        row.setdefault("methods", []).append(method)
        if method == "sweep":
            row |= _covered(report, model)
    if number % 3 == 1:
        differences = checked(model, batches)
        row |= {"checked": len(differences), "difference": max(differences, default=None)}
    return row | {"outcome": "ok"}


def _has_experts(model: nn.Module) -> bool:
    return any("experts" in name for name, _ in model.named_modules())


def _wrong(model: nn.Module, report: lobs.Report) -> str:
    """What is wrong with a pruned network; "" if nothing is."""
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        return "weights are not finite"
    for layer in report.layers:
        size = report.masks[layer.name].numel()
        more = any("already has more zeros" in note for note in layer.notes)
        if abs(layer.sparsity - 0.5) * size > 1 and not more:
            return f"{layer.name}: sparsity {layer.sparsity:.4f}"
        if bool((stored_weights(model)[layer.name][~report.masks[layer.name]] != 0).any()):
            return f"{layer.name}: removed weights are not zero"
    return ""


def _covered(report: lobs.Report, model: nn.Module) -> Row:
    coverage = report.coverage
    assert coverage is not None
    reasons: dict[str, int] = {}
    for skipped in report.skipped:
        if skipped.weights and not skipped.on_purpose:
            reasons[skipped.reason] = reasons.get(skipped.reason, 0) + skipped.weights
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    return {
        "layers": len(report.layers),
        "pruned": coverage.pruned,
        "on purpose": coverage.on_purpose,
        "not understood": coverage.not_understood,
        "weights": weights,
        "reasons": reasons,
        "blocks": bool(report.settings["blocks"]),
    }


# ---- errors, computed again ----------------------------------------------------------------------


@torch.no_grad()
def checked(model: nn.Module, batches: list[Any]) -> list[float]:
    """The relative differences between reported errors and those computed here, in float64, from
    the inputs of linear and convolution layers in the original network."""
    after = copy.deepcopy(model)
    report = pruned(after, batches, method="sweep", inputs="dense")
    before, now = dict(model.named_modules()), dict(after.named_modules())
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d)
    named = [x for x in report.layers if type(before.get(x.name)) in plain]
    spread = named[:: max(1, len(named) // CHECKED)][:CHECKED]
    differences = []
    for layer in spread:
        seen: list[tuple[float, float, float]] = []
        call = _reading(before[layer.name], now[layer.name], seen)
        handle = before[layer.name].register_forward_pre_hook(call, with_kwargs=True)
        torch.manual_seed(0)  # as each pass of prune begins, for networks that draw numbers
        with small_models.without_caches(model):
            for batch in batches:
                model(**batch) if isinstance(batch, dict) else model(batch)
        handle.remove()
        rows = sum(n for _, _, n in seen)
        if not rows:  # its weight is used without a call
            continue
        error, energy = (sum(x[i] for x in seen) / rows for i in (0, 1))
        differences.append(abs(error - layer.error) / max(error, 1e-9 * energy, 1e-30))
    return differences


def _reading(
    before: nn.Module, now: nn.Module, seen: list[tuple[float, float, float]]
) -> Callable[..., None]:
    """A hook that adds (squared change of the output, squared output, rows) of a call."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        x: Tensor = (args[0] if args else next(iter(kwargs.values()))).double()
        old, new = _output(before, x), _output(now, x)
        linear = isinstance(module, nn.Linear)
        rows = new.numel() / (module.out_features if linear else module.out_channels)
        change = new - old
        seen.append((float(change.square().sum()), float(old.square().sum()), rows))

    return hook


def _output(module: nn.Module, x: Tensor) -> Tensor:
    weight, bias = module.weight.double(), module.bias  # type: ignore[union-attr, operator]
    added = None if bias is None else bias.double()  # type: ignore[operator]
    if isinstance(module, nn.Linear):
        return functional.linear(x, weight, added)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    return module._conv_forward(x, weight, added)


# ---- processes -----------------------------------------------------------------------------------


def _work(
    of_type: OfType, library: str, name: str, number: int, seconds: float, answer: Connection
) -> None:
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (round(seconds), round(seconds) + 5))
    warnings.simplefilter("ignore")  # of the libraries
    row = of_type(library, name, number)
    answer.send(json.dumps({**row, "cpu seconds": round(time.process_time(), 1)}, default=float))
    answer.close()


def _in_a_process(of_type: OfType, library: str, name: str, number: int, seconds: float) -> Row:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    fork = multiprocessing.get_context("fork")
    arguments = (of_type, library, name, number, seconds, theirs)
    process = fork.Process(target=_work, args=arguments)
    process.start()
    theirs.close()
    row: Row = {"outcome": "too slow"}
    with contextlib.suppress(EOFError):
        if ours.poll(_WAITING * seconds):  # by the clock; the limit of the process ends it before
            row = {"outcome": "died"}
            row = json.loads(ours.recv())
    if row["outcome"] == "died":
        process.join()
        slow = process.exitcode == -signal.SIGXCPU
        row = {"outcome": "too slow" if slow else "died", "said": f"exit code {process.exitcode}"}
    process.kill()
    process.join()
    return {"type": name, **row}


def rows(
    of_type: OfType, library: str, words: list[str], first: str, seconds: float
) -> Iterator[Row]:
    """A row for every type that the words select, from the first on."""
    for number, name in enumerate(LIBRARIES[library].types()):
        if name >= first and (not words or any(word in name for word in words)):
            yield _in_a_process(of_type, library, name, number, seconds)


def summary(found: list[Row]) -> Row:
    """The figures over all networks."""
    tried = [row for row in found if row["outcome"] != "not made"]
    good = [row for row in tried if row["outcome"] == "ok"]
    pruned_, left, missed = (
        sum(row[key] for row in good) for key in ("pruned", "on purpose", "not understood")
    )
    checked_ = [row for row in good if row.get("checked")]
    shares = [row["pruned"] / max(1, row["pruned"] + row["not understood"]) for row in good]
    named = [row for row in good if row["pruned"] + row["on purpose"] + row["not understood"]]
    return {
        "types": len(found),
        "made": len(tried),
        "work as called": len(good),
        "with the default method too": sum("auto" in row["methods"] for row in good),
        "images or videos": sum(any("pixel" in x for x in row["inputs"]) for row in good),
        "sound": sum(any("input_v" in x or "input_f" in x for x in row["inputs"]) for row in good),
        "images or sound beside text": sum(
            "input_ids" in row["inputs"] and len(row["inputs"]) > 1 for row in good
        ),
        "mixtures": sum(row["mixture"] for row in good),
        "coverage": pruned_ / max(1, pruned_ + missed),
        "coverage, mean of the networks": statistics.fmean(shares) if shares else None,
        "left out on purpose": left / max(1, pruned_ + missed + left),
        "covered or named": sum(
            min(row["weights"], row["pruned"] + row["on purpose"] + row["not understood"])
            for row in named
        )
        / max(1, sum(row["weights"] for row in named)),
        "run block by block": sum(row["blocks"] for row in good),
        "errors computed again": sum(row["checked"] for row in checked_),
        "largest difference": max((row["difference"] for row in checked_), default=None),
    }


def _line(row: Row) -> str:
    if row["outcome"] != "ok":
        return f"{row['type']:28} {row['outcome']}: {row.get('said', '')[:150]}"
    prunable = max(1, row["pruned"] + row["not understood"])
    total = prunable + row["on purpose"]
    text = (
        f"{row['type']:28} {row['layers']:3} layers, {100 * row['pruned'] / prunable:5.1f} % of "
        f"those to be pruned, {100 * row['on purpose'] / total:4.1f} % left out on purpose"
    )
    return "\n".join([text, *(f"{'':28} {n}: {why}" for why, n in row["reasons"].items())])


def kept(
    path: Path,
    library: str,
    about: Row,
    found: list[Row],
    summed: Callable[[list[Row]], Row] = summary,
) -> None:
    """Put rows into a file in the place of those of the same types; a line for each."""
    parts: dict[str, Row] = json.loads(path.read_text()) if path.exists() else {}
    old = parts[library]["rows"] if library in parts else []
    named = {row["type"]: row for row in [*old, *found]}
    inside = [named[name] for name in sorted(named)]
    parts[library] = {"about": about, "all": summed(inside), "rows": inside}
    texts = []
    for name, part in parts.items():
        lines = ",\n  ".join(json.dumps(row) for row in part["rows"])
        head = f'"about": {json.dumps(part["about"])},\n "all": {json.dumps(part["all"])}'
        texts.append(f'"{name}": {{\n {head},\n "rows": [\n  {lines}\n ]}}')
    path.write_text("{" + ",\n".join(texts) + "}\n")


def run(
    about: str,
    of_type: OfType,
    line: Callable[[Row], str],
    summed: Callable[[list[Row]], Row],
) -> None:
    """Print the table as it goes: ``line`` of what ``of_type`` says of each type, then ``summed``
    of all."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--library", choices=LIBRARIES, default="transformers")
    parser.add_argument("--from", default="", dest="first", metavar="TYPE", help="in their order")
    parser.add_argument("--seconds", type=float, default=120, help="of CPU time for each; 120")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as JSON")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    module = importlib.import_module(options.library)
    if options.library == "transformers":
        module.logging.set_verbosity_error()
    torch.set_num_threads(1)  # forked processes must not inherit a pool of threads
    pruned(nn.Sequential(nn.Linear(4, 4)), [torch.randn(8, 4)])  # what all of them would import
    for kind in FIRST[options.library]:
        LIBRARIES[options.library].made(kind)
    versions = {options.library: module.__version__, "torch": str(torch.__version__)}
    found = []
    for row in rows(of_type, options.library, options.words, options.first, options.seconds):
        found.append(row)
        print(line(row), flush=True)
        if options.out is not None:
            kept(options.out, options.library, versions, found, summed)
    print(json.dumps(summed(found), indent=1))


if __name__ == "__main__":
    run(__doc__ or "", _row, _line, summary)
