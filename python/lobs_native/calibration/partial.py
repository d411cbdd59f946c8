"""Resumable passes: sums over the data are saved along the way, so that a killed run can resume in
the middle of a pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lobs_native.calibration.session import Source
from lobs_native.errors import CheckpointError

__all__ = [
    "Kept",
    "States",
    "Summing",
    "below",
    "passed_before",
    "random_state",
    "readable",
    "resumable",
    "set_random_state",
]

Kept = tuple[Mapping[str, Tensor], dict[str, Any]]  # tensors, and plain JSON values
_KEY = "statistics"  # one key, since there is one pass at a time
_RANDOM = "random"


class States(Protocol):
    """A store for the state of unfinished work, such as a run directory's."""

    def load(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and values last saved under ``key``; None if there are none."""

    def info(self, key: str) -> dict[str, Any] | None:
        """The values alone."""

    def due(self, key: str, size: int) -> bool:
        """Whether it is time to save a state of ``size`` bytes."""

    def save(self, key: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Replace the state under ``key``. Ends the run if it has been asked to stop."""

    def drop(self, key: str) -> None:
        """Delete the state under ``key``."""


class Summing(Protocol):
    """Sums that a pass over the data adds to."""

    @property
    def names(self) -> Sequence[str]:
        """The layers that contribute to them."""

    def size(self) -> int:
        """The number of bytes of what :meth:`kept` returns."""

    def kept(self) -> Kept:
        """All sums."""

    def restore(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Take over what :meth:`kept` returned, for these layers and perhaps others. Raises
        KeyError, TypeError or a LobsError if it is something else."""


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, named without it."""
    return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}


def passed_before(states: States | None, purpose: str) -> list[str]:
    """The layers of an unfinished pass for ``purpose`` whose sums are saved."""
    info = None if states is None else states.info(_KEY)
    if info is None or info.get("pass") != purpose:
        return []
    names = info.get("layers")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def resumable(
    source: Source, label: str, purpose: str, sums: Summing, states: States | None
) -> Iterator[Any]:
    """The batches of a pass, from the one at which ``states`` has its sums. They are saved along
    the way.

    Parameters
    ----------
    source, label : Source, str
        What runs the model, and the pass's name in the progress bar.
    purpose : str
        The kind of pass. Passes of the same purpose and layers have the same sums.
    sums : Summing
        The caller adds to them before it asks for the next batch.
    states : States, optional
        None yields all batches and saves nothing.
    """
    if states is None:
        yield from source.each(label)
        return
    count, start, random = len(source.batches), 0, dict[str, Tensor]()
    saved = states.info(_KEY)
    if saved is not None and _is_of(saved, purpose, sums):
        state = states.load(_KEY)
        assert state is not None
        start, random = _restored(*state, sums)
        del state
    if start >= count:
        return
    done = start
    for batch in source.each(label, start):
        if random:  # continue the random sequence of the pass, for a model that draws numbers
            set_random_state(random)
            random = {}
        yield batch
        done += 1
        if states.due(_KEY, sums.size()):
            tensors, info = sums.kept()
            drawn = {f"{_RANDOM}/{name}": x for name, x in random_state().items()}
            progress = {"pass": purpose, "layers": list(sums.names), "batches": done, "sums": info}
            states.save(_KEY, {**tensors, **drawn}, progress)


@contextlib.contextmanager
def readable(label: str) -> Iterator[None]:
    """Turn the errors of decoding a saved state into a CheckpointError. Its hash was right, so it
    was written with these values."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"run_dir: the saved {label} cannot be read: {error}; repair the run or begin a new one"
        ) from error


def _is_of(info: Mapping[str, Any], purpose: str, sums: Summing) -> bool:
    """Whether a saved pass is for ``purpose`` and includes all layers of ``sums``."""
    layers = info.get("layers")
    return (
        info.get("pass") == purpose
        and isinstance(layers, list)
        and all(name in layers for name in sums.names)
    )


def _restored(
    tensors: Mapping[str, Tensor], info: Mapping[str, Any], sums: Summing
) -> tuple[int, dict[str, Tensor]]:
    """Restore ``sums``. Returns how many batches they cover, and the random state after those."""
    with readable("statistics"):
        done, values = info["batches"], info["sums"]
        if type(done) is not int or done < 1 or not isinstance(values, dict):
            raise TypeError("no number of batches")
        sums.restore(tensors, values)
    return done, below(f"{_RANDOM}/", tensors)


def random_state() -> dict[str, Tensor]:
    """The states of torch's random numbers, of the CPU and of every CUDA device in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {str(i): x for i, x in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Go back to what :func:`random_state` returned."""
    for name, value in states.items():
        if name == "cpu":
            torch.set_rng_state(value.clone())
        elif int(name) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value.clone(), int(name))
