"""Settings for pruning a network: those of its layers, and those of the whole run."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from lobs_native import checks
from lobs_native.calibration.session import Forward
from lobs_native.errors import ArgumentError, DtypeError, PatternError
from lobs_native.rundir.ledger import RESUMES
from lobs_native.solvers.methods import TABLE
from lobs_native.solvers.options import number, option, option_of
from lobs_native.solvers.settings import AUTO, SCOPES, LayerOptions, LayerSettings, merged

__all__ = ["NetworkSettings", "chosen_of", "globs_of"]


def globs_of(value: Any, name: str) -> list[str]:
    """A glob or several as a list; DtypeError for anything else."""
    globs = [value] if isinstance(value, str) else value
    if not isinstance(globs, (list, tuple, set)) or not all(isinstance(g, str) for g in globs):
        raise DtypeError(
            f"{name}: expected a glob or a list of globs on module names, got {value!r}"
        )
    return list(globs)


def _globs(value: Any, name: str) -> str | Sequence[str]:
    globs_of(value, name)
    kept: str | Sequence[str] = value
    return kept


def _overrides(value: Any, name: str) -> Mapping[str, Mapping[str, Any]]:
    if not (
        isinstance(value, Mapping)
        and all(isinstance(k, str) and isinstance(v, Mapping) for k, v in value.items())
    ):
        raise DtypeError(f"{name}: expected {{glob: {{argument: value}}}}, got {value!r}")
    return value


def _spread(value: Any, name: str) -> float:
    spread = number(value, name)
    if not 0 <= spread <= 1:
        raise ArgumentError(f"{name}: {spread:g}; it is a difference of sparsities, from 0 to 1")
    return spread


def _count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DtypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 0:
        raise ArgumentError(f"{name}: {value}; it is a number of divisions, 0 or more")
    return value


def _classes(value: Any, name: str) -> int | None:
    if value is None:
        return None
    classes = checks.positive_int(value, name)
    if classes < 2:
        raise ArgumentError(f"{name}: {classes}; it is the number of logits in a row, 2 or more")
    return classes


def _passes(value: Any, name: str) -> int | None:
    return None if value is None else checks.positive_int(value, name)


def _rate(value: Any, name: str) -> float | None:
    if value is None:
        return None
    rate = number(value, name)
    if not 0 < rate < 1:
        raise ArgumentError(
            f"{name}: {rate:g}; it is a share of the size of a parameter, above 0 and below 1"
        )
    return rate


def _seconds(value: Any, name: str) -> float | None:
    if value is None:
        return None
    seconds = number(value, name)
    if not seconds >= 0:
        raise ArgumentError(f"{name}: {seconds:g}; it is a time in seconds, 0 or more")
    return seconds


def _held_back(value: Any, name: str) -> float:
    share = number(value, name)
    if not 0 <= share < 1:
        raise ArgumentError(f"{name}: {share:g}; it is a share of the batches, from 0 to below 1")
    return share


def _seed(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DtypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**64:
        raise ArgumentError(f"{name}: {value}; torch takes 64 bits, from -2**63 to 2**64 - 1")
    return value


def _folder(value: Any, name: str) -> str | os.PathLike[str]:
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise DtypeError(f"{name}: expected a path, got {type(value).__name__}")
    if not os.fspath(value) or "\0" in os.fspath(value):
        raise ArgumentError(f"{name}: {os.fspath(value)!r} is not the path of a folder")
    return value


def _forward(value: Any, name: str) -> Forward:
    if not callable(value):
        raise DtypeError(f"{name}: expected callable(model, batch), got {type(value).__name__}")
    kept: Forward = value
    return kept


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(LayerOptions):
    """The arguments of :func:`lobs_native.prune` as one object; they are explained there.

    Two of them may contradict each other only where ``overrides`` can still decide: see
    :meth:`for_layer`. Values are stored unchanged.

    Raises
    ------
    ArgumentError, DtypeError, PatternError
        An argument is not acceptable; the message names it.
    """

    scope: str = option("layer", choices=(*SCOPES, "model"), help="default: %(default)s")
    include: str | Sequence[str] | None = option(
        None,
        check=_globs,
        help="glob on layer names; may be repeated; default: every layer of a known type",
    )
    exclude: str | Sequence[str] | None = option(
        None, check=_globs, help="likewise, to leave layers out"
    )
    overrides: Mapping[str, Mapping[str, Any]] | None = option(None, check=_overrides)
    strict: bool = option(
        False,
        check=checks.flag,
        compared=False,  # it changes no result
        help="end with an error, before anything is changed, where a layer that is not excluded "
        "cannot be pruned; default: it is left out and named",
    )
    spread: float = option(
        0.2,
        check=_spread,
        help="scope model: how far a layer may be from --sparsity (1: any); default: %(default)s",
    )
    sensitivity: str | None = option(
        "auto",
        choices=("auto", "output", "bound"),
        optional=True,
        help="weight rows and layers by how much the output depends on them; auto: with scope "
        "model or --token-weights",
    )
    token_weights: str | None = option(
        None,
        choices=("output",),
        optional=True,
        help="output: tokens (samples, positions) count in calibration as much as the output "
        "depends on each; default: all the same",
    )
    budget: str = option(
        "weights",
        choices=("weights", "flops"),
        help="with scope model, what --sparsity is a share of; default: %(default)s",
    )
    search: int = option(
        0,
        check=_count,
        help="scope model: prune the network with so many other divisions of the budget, and take "
        "the one with which the output is closest to the original on batches held back (needs "
        "--held-back); default: %(default)s",
    )
    search_seconds: float | None = option(
        None,
        check=_seconds,
        help="begin no further division after so many seconds of --search; default: no limit",
    )
    inputs: str = option(
        "corrected",
        choices=("corrected", "pruned", "dense"),
        help="what layers are calibrated on; default: %(default)s, which also makes up for what "
        "the layers before lost, in two to three times the time of pruned",
    )
    blocks: str | None = option(
        "auto",
        choices=("auto",),
        optional=True,
        help="run stacks of blocks block by block, or the whole model for every layer",
    )
    tune: str | None = option(
        None,
        choices=("blocks", "network"),
        optional=True,
        help="tune all that was pruned together, by gradients, towards what the original network "
        "returned, with the zeros held: the network at the end, or every block once its layers are "
        "pruned; default: off",
    )
    tune_passes: int | None = option(
        None,
        check=_passes,
        help="of tuning, over the calibration data; default: 2",
    )
    tune_rate: float | None = option(
        None,
        check=_rate,
        help="of the first step of tuning, relative to the size of a parameter; default: 0.001 for "
        "the network, 0.002 for blocks",
    )
    classes: int | None = option(
        None,
        check=_classes,
        help="the network returns logits over so many classes, in the last dimension: --tune "
        "network and --search compare them by the Kullback-Leibler divergence; default: over "
        "vocab_size of its config, if there is one",
    )
    device: torch.device | str | None = option(
        None, help="move the model and each batch there, for example cuda"
    )
    backend: str | None = option(None, help="a name from lobs-native doctor; default: the fastest")
    memory: int | None = option(
        None,
        check=checks.positive_int,
        in_bytes=True,
        compared=False,  # it changes no result
        help="limit on what pruning takes besides the model and its forward pass, for example 4GB",
    )
    offload: str | os.PathLike[str] | None = option(
        None,
        check=_folder,
        compared=False,  # it changes no result
        reported=False,
        help="keep weights in files, and in memory only those of the block that is run: for "
        "networks beyond memory; the folder gets files without names, as large as what is pruned",
    )
    seed: int = option(0, check=_seed, help="default: %(default)s")
    token_mask: str | None = option(
        "auto",
        choices=("auto",),
        optional=True,
        help="leave out what the batches' attention_mask leaves out, or count it",
    )
    measure: str = option(
        "sample",
        choices=("sample", "all"),
        compared=False,  # it changes no layer
        help="on which calibration batches the change of the output is measured at the end: a "
        "sample with some 512 rows of output (tokens), or all; default: %(default)s",
    )
    held_back: float = option(
        0.0,
        check=_held_back,
        help="share of the batches that nothing is calibrated on, so that the change of the output "
        "and the error of every layer are measured on them as well; default: %(default)s",
    )
    forward: Forward | None = option(None, check=_forward, reported=False)
    run_dir: str | os.PathLike[str] | None = option(
        None,
        check=_folder,
        reported=False,
        help="save every finished layer there; after an interruption the same command resumes",
    )
    resume: str = option(
        "auto",
        choices=RESUMES,
        reported=False,
        help="where --run-dir holds a run: resume it if it is the same one (auto, the default), "
        "or anyway; never: refuse",
    )
    progress: bool = option(True, reported=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search and not self.held_back:
            raise ArgumentError(
                f"search: {self.search} divisions are compared on batches that are held back; pass "
                "held_back, for example 0.1"
            )
        if self.search_seconds is not None and not self.search:
            raise ArgumentError("search_seconds: it limits a search; pass search, for example 20")
        if self.tune_passes is not None and self.tune is None:
            raise ArgumentError("tune_passes: it is how long to tune; pass tune, as 'network'")
        if self.tune_rate is not None and self.tune is None:
            raise ArgumentError("tune_rate: it is how far steps of tuning go; pass tune")
        if self.classes is not None and self.tune != "network" and not self.search:
            raise ArgumentError(
                f"classes: {self.classes}; it says how outputs are compared where the network is "
                "tuned or a division is searched for; pass tune='network' or search"
            )
        if self.offload is not None and self.tune is not None:
            raise ArgumentError(
                f"offload: tune={self.tune!r} needs the weights in memory; leave one of them out"
            )
        if self.offload is not None and torch.device(self.device or "cpu").type != "cpu":
            raise ArgumentError(
                f"offload: it keeps weights in files that the CPU reads, and device is "
                f"{str(self.device)!r}; leave one of them out"
            )
        if not self.overrides:
            _ = self._common  # raises if what all layers are pruned with does not fit together

    def for_layer(self, name: str) -> tuple[LayerSettings, bool]:
        """The settings of the layer of this name, and whether it shares a budget with others.

        Entries of ``overrides`` that match it apply one after another. ArgumentError or
        PatternError if the result does not fit together.
        """
        if not self.overrides:
            return self._common
        matching = {
            glob: changes for glob, changes in self.overrides.items() if fnmatchcase(name, glob)
        }
        try:
            return dataclasses.replace(self, overrides=None, **merged(matching))._common
        except (ArgumentError, DtypeError, PatternError) as error:
            if not matching:
                raise
            entries = ", ".join(f"overrides[{glob!r}]" for glob in matching)
            raise type(error)(f"{entries}: {error}") from error

    @functools.cached_property
    def _common(self) -> tuple[LayerSettings, bool]:
        """The settings of a layer that no entry of ``overrides`` matches, and whether it shares."""
        if self.scope != "model":
            return LayerSettings.of(self), False
        settings = LayerSettings.of(self, scope="layer")
        if not (
            (settings.method == AUTO or TABLE[settings.method].compares_layers)
            and settings.resolved_pattern.is_unstructured
            and settings.target.sparsity is not None
        ):
            raise ArgumentError(
                "scope: 'model' needs method 'auto', 'exact' or 'admm', pattern 'unstructured' and "
                "a sparsity; use 'layer'"
            )
        return settings, True

    def check_apart(self) -> None:
        """Raise ArgumentError for what says how layers share a budget: none does."""
        way_out = "use scope 'model' with it"
        if self.budget == "flops":
            raise ArgumentError(f"budget: 'flops' is shared among layers; {way_out}")
        if self.spread != NetworkSettings.spread:
            raise ArgumentError(
                f"spread: {self.spread:g} bounds how layers share a budget; {way_out}"
            )
        if self.search:
            raise ArgumentError(
                f"search: {self.search} divisions of a budget that layers share; {way_out}"
            )
        if self.sensitivity == "bound":
            raise ArgumentError(f"sensitivity: 'bound' compares layers; {way_out}")

    def arguments(self, *, compared: bool = False) -> dict[str, Any]:
        """name -> value for the report; or, if ``compared``, what a resumed run must repeat."""
        chosen = {
            field.name: copy.deepcopy(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if (option_of(field).compared if compared else option_of(field).reported)
        }
        if not isinstance(self.pattern, str):
            chosen["pattern"] = repr(self.pattern)
        if self.device is not None:
            chosen["device"] = str(self.device)
        return chosen


def chosen_of(settings: NetworkSettings | None, arguments: NetworkSettings) -> NetworkSettings:
    """The settings of a call: the object if one was passed, the keywords otherwise."""
    if settings is None:
        return arguments
    if not isinstance(settings, NetworkSettings):
        raise DtypeError(f"settings: expected NetworkSettings, got {type(settings).__name__}")
    if changed := arguments.changed():
        raise ArgumentError(
            f"settings: {', '.join(changed)} given as well; pass one or the other, or "
            "dataclasses.replace(settings, ...)"
        )
    return settings
