"""The sides of a case as parameters of a benchmark, and the fixture that times and checks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import lobs_native as lobs
from speed.case import Case, Side

_STATE = {name: (ready, detail) for name, ready, detail in lobs.backends()}


@dataclass(frozen=True)
class Impl:
    """One side of a case, and where it runs."""

    rival: str | None  # None: ours
    device: str = "cpu"

    def side(self, case: Case) -> Side:
        """This side of the case; ours with the backend of the device."""
        if self.rival is not None:
            return case.rivals[self.rival]
        run = case.ours.run
        assert run is not None
        return replace(case.ours, run=lambda *inputs: run(*inputs, backend=self.device))


def impls(*rivals: str, devices: Sequence[str] = ("cpu", "cuda")) -> list[ParameterSet]:
    """Parameters of a benchmark: the rivals by name, then ours on each device.

    A device that cannot run here is skipped with its reason.
    """
    parameters = [pytest.param(Impl(name), id=name) for name in rivals]
    for device in devices:
        ready, detail = _STATE[device]
        marks = [pytest.mark.skipif(not ready, reason=f"{device}: {detail}")]
        marks += [pytest.mark.gpu] if device == "cuda" else []
        parameters.append(pytest.param(Impl(None, device), id=f"lobs-{device}", marks=marks))
    return parameters


class Bench:
    """Times one side of a case, checks its answer, and notes the circumstances beside the time."""

    def __init__(self, benchmark: BenchmarkFixture) -> None:
        self._benchmark = benchmark
        self.small = bool(benchmark.disabled)  # nothing is timed: only the answers matter

    def __call__(self, case: Case, impl: Impl, *, rounds: int) -> None:
        """Fail if the answer's error exceeds the case's tolerance."""
        side = impl.side(case)
        run = side.run
        assert run is not None
        inputs = tuple(_on(x, impl.device) for x in case.inputs)

        def to_its_end(*arguments: Any) -> Any:
            with torch.device(impl.device):
                answer = run(*arguments)
            if impl.device == "cuda":
                torch.cuda.synchronize()
            return answer

        answer = self._benchmark.pedantic(
            to_its_end,
            setup=lambda: (case.prepared(side, inputs), {}),
            rounds=rounds,
            warmup_rounds=1,
        )
        error = case.error_of(side, _on(side.result(answer), "cpu"))
        self._benchmark.extra_info.update(
            case=case.name,
            side=side.label,
            device=impl.device,
            threads=torch.get_num_threads(),
            backends=[detail for name, _, detail in lobs.backends() if name == impl.device],
            error=error,
        )
        if self._benchmark.enabled:
            median = self._benchmark.stats.stats.median
            self._benchmark.extra_info[case.unit] = case.work / median / 1e9
        assert error <= case.tolerance, f"{case.name}: {side.label} is wrong"


def _on(x: Any, device: str) -> Any:
    """Tensors, also those in a tuple, on a device; anything else as it is."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, tuple):
        parts = [_on(part, device) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x
