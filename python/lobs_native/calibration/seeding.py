"""The random numbers of a pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["random_state", "seeded", "set_random_state"]

_STRIDE = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, odd: multiples differ in every part


def seeded(batches: Iterable[Any], seed: int) -> Iterator[Any]:
    """The batches, with torch's random numbers seeded before each is loaded: the first with
    ``seed``, the others with other numbers. A batch then has the same ones wherever a pass begins,
    and whether or not the model is run on those before it."""
    if torch.cuda.is_available():  # it may start in this pass
        torch.manual_seed(seed)
    else:
        _seed(seed)
    for number, batch in enumerate(batches, 1):
        yield batch
        _seed((seed + number * _STRIDE) % 2**64)


def _seed(seed: int) -> None:
    """As torch.manual_seed, which writes down where it is called from (a tenth of a millisecond, or
    ten in a deep stack) for a CUDA that is not in use."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def random_state() -> dict[str, Tensor]:
    """The states of torch's random numbers, of the CPU and of every CUDA device in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {str(i): x for i, x in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Go back to what :func:`random_state` returned."""
    for name, value in states.items():
        if name == "cpu":
            torch.set_rng_state(value.clone())
        elif int(name) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value.clone(), int(name))
