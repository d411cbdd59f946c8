"""Sums over a pass that are kept on the way, so that a run which was killed goes on inside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lobs_native.calibration.run import Source
from lobs_native.errors import CheckpointError

__all__ = ["Kept", "States", "Summing", "passed_before", "readable", "resumable"]

Kept = tuple[Mapping[str, Tensor], dict[str, Any]]  # tensors, and plain JSON values
_KEY = "statistics"  # there is one pass at a time
_RANDOM = "random"


class States(Protocol):
    """What is kept of work that is under way; a run directory has them."""

    def load(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved under ``key`` last."""

    def info(self, key: str) -> dict[str, Any] | None:
        """Of what :meth:`load` gives."""

    def due(self, key: str, size: int) -> bool:
        """Whether saving so many bytes is worth its time now."""

    def save(self, key: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Keep this in place of what was there. Ends the run if it has been asked to."""

    def drop(self, key: str) -> None:
        """Forget what is there."""


class Summing(Protocol):
    """Sums that a pass over the data adds to."""

    @property
    def names(self) -> Sequence[str]:
        """Of the layers that have a part in them."""

    def size(self) -> int:
        """Bytes of what :meth:`kept` returns."""

    def kept(self) -> Kept:
        """All of it."""

    def restore(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Take over what :meth:`kept` gave, of these layers and perhaps others. KeyError,
        TypeError or a LobsError if that is something else."""


def passed_before(states: States | None, what: str) -> list[str]:
    """The layers of a pass ``what`` of which sums are kept."""
    found = None if states is None else states.info(_KEY)
    if found is None or found.get("pass") != what:
        return []
    names = found.get("layers")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def resumable(
    source: Source, said: str, what: str, sums: Summing, states: States | None
) -> Iterator[Any]:
    """The batches of a pass from where ``states`` has its sums, which are kept on the way.

    Parameters
    ----------
    source, said
        What is run, and the pass's name for people.
    what : str
        Which pass it is: of the same name and layers, the sums are the same.
    sums : Summing
        The caller adds to them before it asks for the next batch.
    states : States, optional
        None: the plain batches.
    """
    if states is None:
        yield from source.each(said)
        return
    count, start, random = len(source.batches), 0, dict[str, Tensor]()
    told = states.info(_KEY)
    if told is not None and _is_of(told, what, sums):
        found = states.load(_KEY)
        assert found is not None
        start, random = _restored(*found, sums)
        del found
    if start >= count:
        return
    done = start
    for batch in source.each(said, start):
        if random:  # where the pass was, for a model that draws random numbers
            _set_random(random)
            random = {}
        yield batch
        done += 1
        if states.due(_KEY, sums.size()):
            tensors, info = sums.kept()
            drawn = {f"{_RANDOM}/{name}": x for name, x in _random().items()}
            told = {"pass": what, "layers": list(sums.names), "batches": done, "sums": info}
            states.save(_KEY, {**tensors, **drawn}, told)


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """While what a run directory keeps is taken apart: wrong values are a CheckpointError. Their
    hashes were right, so somebody has written them so."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"run_dir: the {what} that are kept there cannot be read: {error}; repair the run or "
            "begin a new one"
        ) from error


def _is_of(info: Mapping[str, Any], what: str, sums: Summing) -> bool:
    """Whether all the layers had a part in the pass that was kept."""
    layers = info.get("layers")
    return (
        info.get("pass") == what
        and isinstance(layers, list)
        and all(name in layers for name in sums.names)
    )


def _restored(
    tensors: Mapping[str, Tensor], info: Mapping[str, Any], sums: Summing
) -> tuple[int, dict[str, Tensor]]:
    """How many batches are in the sums, which are taken over, and the random state after them."""
    with readable("statistics"):
        done, told = info["batches"], info["sums"]
        if type(done) is not int or done < 1 or not isinstance(told, dict):
            raise TypeError("no number of batches")
        sums.restore(tensors, told)
    begin = f"{_RANDOM}/"
    return done, {k.removeprefix(begin): x for k, x in tensors.items() if k.startswith(begin)}


def _random() -> dict[str, Tensor]:
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found |= {str(i): x for i, x in enumerate(torch.cuda.get_rng_state_all())}
    return found


def _set_random(kept: Mapping[str, Tensor]) -> None:
    for name, value in kept.items():
        if name == "cpu":
            torch.set_rng_state(value.clone())
        elif int(name) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value.clone(), int(name))
