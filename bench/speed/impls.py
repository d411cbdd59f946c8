"""Who takes part in a benchmark: published loops, the best that torch does, and ours per device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from torch import Tensor

import lobs_native as lobs

_STATE = {name: (ready, detail) for name, ready, detail in lobs.backends()}


@dataclass(frozen=True)
class Impl:
    """One way to do it, and where."""

    name: str
    run: Callable[..., Any]
    device: str = "cpu"

    def place(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The inputs where this way wants them; not part of what is timed."""
        return tuple(x.to(self.device) for x in tensors)

    def __call__(self, *arguments: Any) -> Any:
        """Run to its end, a device's queue included."""
        with torch.device(self.device):
            found = self.run(*arguments)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return found


def impls(
    ours: Callable[..., Any],
    *,
    devices: Sequence[str] = ("cpu", "cuda"),
    **rivals: Callable[..., Any],
) -> list[ParameterSet]:
    """Parameters of a benchmark: the rivals by name, then ``ours(..., backend=...)`` on each
    device; one that cannot run here is skipped with its reason."""
    made = [
        pytest.param(Impl(name.replace("_", " "), run), id=name.replace("_", "-"))
        for name, run in rivals.items()
    ]
    for device in devices:
        ready, detail = _STATE[device]
        marks = [pytest.mark.skipif(not ready, reason=f"{device}: {detail}")]
        marks += [pytest.mark.gpu] if device == "cuda" else []
        impl = Impl(f"lobs {device}", partial(ours, backend=device), device)
        made.append(pytest.param(impl, id=f"lobs-{device}", marks=marks))
    return made
