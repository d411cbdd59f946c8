"""Resumable passes: sums over the data are saved along the way, so that a killed run can resume in
the middle of a pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from lobs_native.calibration.session import Source
from lobs_native.calibration.tree import Summing, Tree, own_batches
from lobs_native.errors import CheckpointError

__all__ = ["States", "passed_before", "readable", "resumable"]

_KEY = "statistics"  # one key, since there is one pass at a time
_CHUNK, _TOTAL, _OF_BATCHES = "sums", "sums before", "of batches"


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


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
    source: Source,
    label: str,
    purpose: str,
    names: Sequence[str],
    sums: Summing,
    states: States | None,
) -> Iterator[Any]:
    """The batches of a pass, from the one at which ``states`` has its sums. They are saved along
    the way. Of several ranks, each gets its own batches, and nothing is saved; when the pass is
    over, all have the sums over all batches.

    Parameters
    ----------
    source, label : Source, str
        What runs the model, and the pass's name in the progress bar.
    purpose, names : str, sequence of str
        The kind of pass, and its layers. Passes of the same purpose and layers have the same sums.
    sums : Summing
        The caller adds to them before it asks for the next batch.
    states : States, optional
        None saves nothing.
    """
    count, start = len(source.batches), 0
    tree = Tree(sums, source.ranks, count)
    if source.ranks.size > 1:
        states = None
    if states is not None:
        saved = states.info(_KEY)
        if saved is not None and _is_of(saved, purpose, names):
            state = states.load(_KEY)
            assert state is not None
            start = _restored(*state, tree)
            del state
    if start >= count:
        return
    own = own_batches(count, source.ranks)
    ends = tree.ends
    for batch, number in zip(source.each(label, start, own), list(own)[start:], strict=False):
        yield batch
        done = number + 1
        if done in ends:
            tree.add()
        if states is not None and states.due(_KEY, _size(tree)):
            progress = {"pass": purpose, "layers": list(names), "batches": done}
            states.save(_KEY, *_kept(tree, progress))
    while not tree.complete:  # other ranks have one more chunk
        tree.add()


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


def _is_of(info: Mapping[str, Any], purpose: str, names: Sequence[str]) -> bool:
    """Whether a saved pass is for ``purpose`` and includes all these layers."""
    layers = info.get("layers")
    return (
        info.get("pass") == purpose
        and isinstance(layers, list)
        and all(name in layers for name in names)
    )


def _size(tree: Tree) -> int:
    some = [*tree.sums.tensors().values(), *tree.total.values()]
    return sum(x.numel() * x.element_size() for x in some) + tree.sums.bytes_of_batches()


def _kept(tree: Tree, progress: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is saved of a pass: the sums over the chunk at hand, and over those before."""
    tensors = {f"{_CHUNK}/{name}": x for name, x in tree.sums.tensors().items()}
    tensors |= {f"{_TOTAL}/{name}": x for name, x in tree.total.items()}
    tensors |= {f"{_OF_BATCHES}/{name}": x for name, x in tree.sums.of_batches().items()}
    return tensors, {**progress, _CHUNK: tree.sums.values(), _TOTAL: tree.total_values}


def _restored(tensors: Mapping[str, Tensor], info: Mapping[str, Any], tree: Tree) -> int:
    """Restore the sums of a pass. Returns how many batches they cover."""
    with readable("statistics"):
        done = info["batches"]
        if type(done) is not int or not 0 < done <= tree.chunks[-1].stop:
            raise TypeError("no number of batches")
        tree.added = sum(chunk.stop <= done for chunk in tree.chunks)
        for name, x in tree.sums.tensors().items():
            x.copy_(tensors[f"{_CHUNK}/{name}"])
            if tree.added and not tree.complete:
                tree.total[name] = tensors[f"{_TOTAL}/{name}"].clone().to(x.device)
                if tree.total[name].shape != x.shape:
                    raise TypeError(f"{name} has another shape")
        tree.sums.add_of_batches(_below(f"{_OF_BATCHES}/", tensors))
        tree.sums.set_values(info[_CHUNK])
        if tree.added:
            tree.total_values = {name: info[_TOTAL][name] for name in tree.sums.values()}
    return done
