"""The device that ``gpu.py`` measures, its ceilings, and inputs that are made on it."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lobs_native import ops


class Place:
    """Where everything runs: the GPU with its events, or the host for a rehearsal."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.backend = "emulated" if rehearse else "cuda"
        if rehearse:
            ops._core.load_backend(os.environ["LOBS_EMULATED"])

    def wait(self) -> None:
        """Until the device is idle."""
        if not self.rehearse:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any]) -> float:
        """Time one run, by the device's own clock."""
        if self.rehearse:
            begun = time.perf_counter()
            run()
            return time.perf_counter() - begun
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def ceilings(self) -> dict[str, float]:
        """Bytes per second of a copy, flops per second of products, as measured now."""
        n, side = (1 << 20, 128) if self.rehearse else (1 << 32, 8192)
        pair = torch.ones(2, n, dtype=torch.uint8, device=self.device)
        out = {"copy_bytes": 2 * n / self._best(lambda: pair[0].copy_(pair[1]))}
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
            out[f"{name}_flops"] = 2 * side**3 / self._best(lambda a=a, b=b: a @ b)
        return out

    def _best(self, run: Callable[[], Any]) -> float:
        for _ in range(2):
            run()
        return statistics.median(self.seconds(run) for _ in range(7))


def features(N: int, C: int, device: torch.device, seed: int = 0) -> Tensor:
    """ReLU of correlated Gaussians, (N, C) float32, made on the device."""
    generator = torch.Generator(device=device).manual_seed(seed)
    latent = max(4, C // 4)
    mixing = torch.randn(latent, C, generator=generator, device=device)
    mixing *= torch.arange(1, latent + 1, device=device).rsqrt()[:, None]
    mixing /= mixing.norm() / C**0.5
    signal = torch.randn(N, latent, generator=generator, device=device) @ mixing
    return torch.relu_(
        signal.add_(torch.randn(N, C, generator=generator, device=device), alpha=0.3)
    )


def inverse_of(H: Tensor) -> Tensor:
    """Damped inverse (C, C) float64."""
    damped = H.double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    return torch.cholesky_inverse(torch.linalg.cholesky(damped)).contiguous()


def distance(x: Tensor, expected: Tensor) -> float:
    """Relative distance in the Frobenius norm, in float64."""
    expected = expected.double()
    return float((x.double().to(expected.device) - expected).norm() / expected.norm())
