"""The work of ``lobs-native prune``: find the network, prune it, and write a folder atomically."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import operator
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from lobs_native.calibration.offload import Offload
from lobs_native.calibration.ranks import Ranks
from lobs_native.calibration.session import Forward
from lobs_native.cli.arguments import flag
from lobs_native.errors import ArgumentError, CheckpointError, DtypeError, LobsError
from lobs_native.files import safefile
from lobs_native.files.atomic import new_folder, writing
from lobs_native.files.shelf import Place
from lobs_native.huggingface import checkpoint as hf
from lobs_native.huggingface.perplexity import perplexity
from lobs_native.huggingface.rewriting import rewrite
from lobs_native.huggingface.spelling import places_of, same_bits
from lobs_native.huggingface.text import GENERATE, generated_batches, joined, text_batches
from lobs_native.huggingface.verification import check_zeros
from lobs_native.network import carrying_out
from lobs_native.network.folding import fold_weights
from lobs_native.network.masks import pack_masks
from lobs_native.network.offloading import offloaded
from lobs_native.network.peak import keep_tight
from lobs_native.network.pruning import Pruning
from lobs_native.network.selection import candidates_of
from lobs_native.network.settings import NetworkSettings, globs_of
from lobs_native.network.stages import Stages
from lobs_native.network.uses import without_data
from lobs_native.report.records import Skipped
from lobs_native.report.report import Report
from lobs_native.solvers.methods import method_of

__all__ = ["Job", "find", "plan", "run"]

SHARD_BYTES = 5_000_000_000
HEAD = "it makes the logits, and is left alone unless include names it"
_MAPPED = 4 << 20  # bytes, see keep_tight; it holds for the whole process, which does nothing else
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Job:
    """A network, the data to run it on, and how to write it."""

    model: nn.Module
    batches: Any  # None if only planning
    forward: Forward | None
    head: str | None  # layer that is left alone unless it is included
    # (folder, masks, limit on memory, what offloads the network) -> entries of the report
    save: Callable[[Path, Mapping[str, Tensor], int | None, Offload | None], dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)  # for the report
    measure: Callable[[], float | None] | None = None  # the perplexity of the network
    places: Mapping[str, Place] = field(default_factory=dict)  # of its parameters, in files
    loading: float = 0.0  # seconds that it took to find the network and the data


# ---- the network ---------------------------------------------------------------------------------


def find(
    source: str,
    calibration: Sequence[Path | str] | None,
    text: Mapping[str, Any],
    *,
    planning: bool = False,
    seed: int = 0,
    fold: bool = False,
) -> Job:
    """The network that the command line names.

    Parameters
    ----------
    source : str
        A folder, a GGUF file, or ``module:function``, which is called without arguments and returns
        (model, batches) or (model, batches, forward).
    calibration : sequence of Path or "generate", optional
        For a folder: text files, or what the network writes; all are calibrated on.
    text : mapping
        Options of :func:`~lobs_native.huggingface.text.text_batches`, for each of them, and
        ``shard_size`` in bytes; for a folder.
    planning : bool
        Batches are not needed.
    seed : int
        Of what the network writes.
    fold : bool
        Call :func:`lobs_native.fold_weights` on the network of a function.

    Raises
    ------
    LobsError
        Of the kind that fits, with the way out.
    """
    begun = time.perf_counter()
    if Path(source).is_dir() or source.endswith(".gguf"):
        if fold:
            raise ArgumentError(
                "--fold-weights: the class that config.json names would compute the weights once "
                "more from those in the new folder; for a network of module:function, which can "
                "load it and is called again to use the result"
            )
        found = _folder(Path(source), calibration, dict(text), planning, seed)
    else:
        found = _of_function(source, calibration, text, fold)
    return dataclasses.replace(found, loading=time.perf_counter() - begun)


def _of_function(
    source: str, calibration: Sequence[Path | str] | None, text: Mapping[str, Any], fold: bool
) -> Job:
    if not _FUNCTION.fullmatch(source):
        raise ArgumentError(
            f"MODEL: {source!r} is not a folder or GGUF file here, and not of the form "
            "module:function"
        )
    options = {"calibration": calibration, **text}
    if extra := [name for name, value in options.items() if value is not None]:
        raise ArgumentError(
            f"{flag(extra[0])}: it is for folders; the function {source} brings its own batches"
        )
    model, batches, forward = _call(source)
    settings = {"folded weights": fold_weights(model)} if fold else {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise DtypeError(
                f"MODEL: {name!r} in the state of {source}'s model is a {type(value).__name__}; "
                "only tensors can be written"
            )
    return Job(model, batches, forward, None, functools.partial(_save_state, model), settings)


def _folder(
    folder: Path,
    calibration: Sequence[Path | str] | None,
    text: dict[str, Any],
    planning: bool,
    seed: int,
) -> Job:
    """The network in a folder, or in a GGUF file."""
    if not folder.exists():
        raise ArgumentError(f"MODEL: there is no file {folder}")
    shard_bytes = text.pop("shard_size", None) or SHARD_BYTES
    texts = list(calibration or ())
    if not texts and not planning:
        raise ArgumentError("--calibration: it is missing; give a text file to calibrate on")
    prompts = text.pop("prompts", None)
    if twice := [each for each in texts if texts.count(each) > 1]:
        raise ArgumentError(
            f"--calibration: {twice[0]} is given twice, and would count twice; give it once"
        )
    if prompts is not None and GENERATE not in texts:
        raise ArgumentError(f"--prompts: it is for --calibration {GENERATE}")
    checkpoint = hf.examine(folder)
    model = hf.load(checkpoint)
    configured = model.config.to_dict()  # type: ignore[union-attr, operator]
    settings = {
        "model": str(folder),
        "model class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    batches = measure = None
    if texts:
        chosen = {name: value for name, value in text.items() if value is not None}
        calibrating = joined(
            [
                text_batches(checkpoint, model, each, **chosen)
                if isinstance(each, Path)
                else generated_batches(checkpoint, model, prompts=prompts, seed=seed, **chosen)
                for each in texts
            ]
        )
        batches = calibrating.batches
        settings |= calibrating.settings
        if calibrating.held_back:
            measure = functools.partial(perplexity, model, calibrating.held_back)

    places = {} if checkpoint.gguf else places_of(model, folder, checkpoint.files)

    def save(
        out: Path, masks: Mapping[str, Tensor], memory: int | None, offload: Offload | None
    ) -> dict[str, Any]:
        config = hf.differing(configured, model.config.to_dict())  # type: ignore[union-attr, operator]
        if offload is not None and all(name in places for name, _ in model.named_parameters()):
            return rewrite(model, checkpoint, out, masks, places, config, offload.drop)
        return hf.save(
            model, checkpoint, out, masks, shard_bytes=shard_bytes, memory=memory, config=config
        )

    head = hf.output_layer(model)
    return Job(model, batches, hf.first_output, head, save, settings, measure, places)


def _call(source: str) -> tuple[nn.Module, Any, Forward | None]:
    module, _, name = source.partition(":")
    try:
        function = operator.attrgetter(name)(importlib.import_module(module))
    except Exception as error:  # whatever a module of the user's raises
        raise ArgumentError(f"MODEL: {source} cannot be imported: {_raised(error)}") from error
    if not callable(function):
        raise ArgumentError(f"MODEL: {source} is a {type(function).__name__}, not a function")
    try:
        result = function()
    except Exception as error:
        raise LobsError(f"MODEL: {source}() raised {_raised(error)}") from error
    if (
        not isinstance(result, tuple)
        or len(result) not in {2, 3}
        or not isinstance(result[0], nn.Module)
    ):
        what = type(result).__name__
        if isinstance(result, tuple):
            what = f"({', '.join(type(part).__name__ for part in result)})"
        raise DtypeError(
            f"MODEL: {source}() returned {what}, expected (model, batches) or (model, batches, "
            "forward) with an nn.Module first"
        )
    return result[0], result[1], result[2] if len(result) == 3 else None


def _raised(error: Exception) -> str:
    """The error in one line, with the place it comes from."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}, line {place.lineno})"


def _save_state(
    model: nn.Module,
    out: Path,
    masks: Mapping[str, Tensor],
    memory: int | None,
    offload: Offload | None,
) -> dict[str, Any]:
    """The state dict as one file; a tensor that has several names is in it once. It is read back
    tensor by tensor, whatever ``memory`` allows, and wherever the network is."""
    check_zeros(model, masks)
    path = out / hf.WEIGHTS
    try:
        with writing(path):
            save_model(model, str(path), metadata={"format": "pt"})
            written = safefile.read_header(path)
    except RuntimeError as error:  # tensors that share a part of their memory
        raise CheckpointError(f"{path}: safetensors cannot write this model: {error}") from error
    state = model.state_dict()
    for name in written:
        with safe_open(path, "pt") as file:  # anew, so that a file that is mapped does not stay
            value = file.get_tensor(name)
        if not same_bits(state[name].detach().cpu(), value):
            raise CheckpointError(f"{path}: {name} differs from what was written when read again")
    return {}


# ---- the work ------------------------------------------------------------------------------------


def _for_job(job: Job, settings: NetworkSettings) -> tuple[NetworkSettings, list[Skipped]]:
    """The settings with the job's own ``forward``, and with the layer that makes the logits
    excluded unless something includes it."""
    settings = dataclasses.replace(settings, forward=job.forward)
    excluded = [] if settings.exclude is None else globs_of(settings.exclude, "exclude")
    if job.head is None or settings.include or job.head in excluded:
        return settings, []
    excluding = dataclasses.replace(settings, exclude=[*excluded, job.head])
    return excluding, [Skipped(job.head, HEAD)]


def _without(skipped: Sequence[Skipped], others: Sequence[Skipped]) -> tuple[Skipped, ...]:
    """``others`` with the reasons of ``skipped`` in place of "excluded"."""
    reasons = {layer.name: layer.reason for layer in skipped}
    return tuple(dataclasses.replace(x, reason=reasons.get(x.name, x.reason)) for x in others)


def plan(job: Job, settings: NetworkSettings) -> dict[str, Any]:
    """What would be pruned, as plain JSON values: layers in order, with the memory that its
    method takes for each, in bytes; and, where there is data, what the whole run will take in
    memory, disk and time. Changes nothing.

    Raises as :func:`lobs_native.prune` does before it starts.
    """
    settings, skipped = _for_job(job, settings)
    whole = None
    if job.batches is None:
        settled = without_data(candidates_of(job.model, settings), settings)
        selected, others = settled.jobs, settled.skipped
    else:
        with offloaded(job.model, settings, job.places) as offload:
            pruning = Pruning(job.model, job.batches, settings, job.places, offload=offload)
            whole = pruning.plan(stacklevel=2)
        selected, others = pruning.jobs, pruning.skipped
    layers = []
    for planned in selected:
        layer, target = planned.layer, planned.settings.target
        method = method_of(planned.settings.method, planned.settings.resolved_pattern)
        layers.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "weights": planned.weights,
                "asked": target.label,
                "method": planned.settings.method,
                "bytes": method.memory(planned.extent, backend=settings.backend).total,
            }
        )
    return {
        "format": 1,
        "run": None if whole is None else {**whole.to_dict(), "text": str(whole)},
        "layers": layers,
        "skipped": [dataclasses.asdict(layer) for layer in _without(skipped, others)],
        "settings": job.settings,
    }


def run(
    job: Job,
    settings: NetworkSettings,
    out: Path,
    *,
    overwrite: bool,
    masks: bool,
    mask_bits: bool = False,
    group: Any = None,
) -> Report:
    """Prune the network and write it with its report into a new folder; of several ranks, the first
    writes it.

    Parameters
    ----------
    job : Job
        Its model is pruned in place.
    settings : NetworkSettings
        The arguments of :func:`lobs_native.prune`, but for ``forward``, which the job brings.
    out : Path
        Gets the weights, report.json, report.html, and masks.safetensors (layer name -> bool, True
        = kept) if ``masks`` says so; with one bit per weight if ``mask_bits`` does.
    group : torch.distributed.ProcessGroup, optional
        The ranks that share the work.

    Raises
    ------
    LobsError
        No folder has been written; an earlier one is still there.
    """
    settings, skipped = _for_job(job, settings)
    keep_tight(_MAPPED)
    with contextlib.ExitStack() as scope:
        offload = scope.enter_context(offloaded(job.model, settings, job.places))

        def prune() -> Report:
            how: dict[str, Any] = {"group": group, "offload": offload}
            return carrying_out.carried_out(job.model, job.batches, settings, job.places, **how)

        if not Ranks(group).first:
            return prune()
        folder = scope.enter_context(new_folder(out, overwrite=overwrite))
        clock, measured = Stages(), dict[str, float | None]()
        if job.measure is not None:
            with clock.stage("perplexity"):
                measured["perplexity before"] = job.measure()
        with clock.stage("pruning"):
            report = prune()
        if job.measure is not None:
            with clock.stage("perplexity"):
                measured["perplexity after"] = job.measure()
        with clock.stage("saving"):
            saved = job.save(folder, report.masks, settings.memory, offload)
        _, around = clock.total()
        del around["pruning"]
        around["other"] += report.settings["seconds"]["other"]
        seconds = {"loading": job.loading, **report.settings["seconds"], **around}
        report = dataclasses.replace(
            report,
            skipped=_without(skipped, report.skipped),
            seconds=sum(seconds.values()),
            settings={**report.settings, "seconds": seconds, **job.settings, **measured, **saved},
        )
        if masks or mask_bits:
            path = folder / "masks.safetensors"
            with writing(path):
                tensors = {name: mask.cpu().contiguous() for name, mask in report.masks.items()}
                save_file(pack_masks(tensors) if mask_bits else tensors, path)
        report.save(folder / "report.json")
        report.save(folder / "report.html")
    return report
