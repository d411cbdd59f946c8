"""Every kernel at every size against float64 on the host: what compute-sanitizer watches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lobs_native import ops
from speed.gpu_place import Place, distance

SIZES = (1, 31, 33, 127, 129, 1000)
TRACES: tuple[dict[str, Any], ...] = (  # how exact_trace is called; the limit is half of C
    {"limit": True, "update": True},
    {"group": 4, "per_group": 2},
    {"block": 4},
)


class Exercise:
    """The operations on one problem: W (5, C) and A (C, C), in one dtype on the device.

    The expected answers are those of the CPU kernels in float64.
    """

    def __init__(self, place: Place, W: Tensor, A: Tensor, dtype: torch.dtype) -> None:
        self.place, self.backend = place, place.backend
        self.W, self.A, self.C = W, A, A.shape[0]  # W float32, A float64, both on the host
        self.block = min(self.C, 128)
        self.dtype = dtype
        self.tolerance = 1e-3 if dtype == torch.float32 else 1e-9

    def run(self) -> None:
        """Run all of them; end the program at the first wrong answer."""
        for options in TRACES:
            self.exact(options)
        for group in (0, self.block):
            self.sweep(group)
        self.inverse()
        self.admm()
        self.saliency()
        self.ranking_and_static_order()
        self.columns()

    def exact(self, options: dict[str, Any]) -> None:
        """``exact_trace``."""
        if "limit" in options:
            options = {**options, "limit": (self.C + 1) // 2}
        trace = ops.exact_trace(
            self.there(self.W), self.there(self.A), backend=self.backend, **options
        )
        expected = ops.exact_trace(self.W.double(), self.A, backend="cpu", **options)
        if int(expected.count.sum()):
            self.check(
                f"exact {options}",
                trace.loss.double().cumsum(1),
                expected.loss.double().cumsum(1),
            )

    def sweep(self, group: int) -> None:
        """``sweep_block_``, half removed: in groups, or by a mask without groups."""
        B = self.block
        U = torch.linalg.cholesky(self.A[:B, :B], upper=True)
        mask = (torch.arange(5 * B).view(5, B) % 2).to(torch.uint8)
        w, error = self.there(self.W[:, :B]), self.there(torch.zeros(5, B))
        expected, expected_error = self.W[:, :B].double().clone(), torch.zeros(5, B).double()
        half = {"group": group, "per_group": group // 2}
        there = mask.to(self.place.device, copy=True)
        ops.sweep_block_(w, self.there(U), there, error, backend=self.backend, **half)
        ops.sweep_block_(expected, U.contiguous(), mask, expected_error, backend="cpu", **half)
        self.check("sweep", w, expected)

    def inverse(self) -> None:
        """``inverse_update_`` of three blocks, the last one cut."""
        B = self.block
        expected = torch.eye(B, dtype=torch.float64).expand(3, B, B).contiguous().clone()
        G = torch.randn(19, 3 * B - (B > 2))
        F = self.there(expected)
        ops.inverse_update_(F, self.there(G), 20.0, backend=self.backend)
        ops.inverse_update_(expected, G.double(), 20.0, backend="cpu")
        self.check("inverse", F, expected)

    def saliency(self) -> None:
        """``saliency_argmin``."""
        live = torch.ones(self.C).bool()
        diag = self.A.diagonal()
        column, _ = ops.saliency_argmin(
            self.there(self.W),
            self.there(diag),
            live.to(self.place.device),
            backend=self.backend,
        )
        expected, _ = ops.saliency_argmin(self.W.double(), diag, live, backend="cpu")
        self.check("saliency", column + 1, expected + 1)

    def ranking_and_static_order(self) -> None:
        """``rank_lowest``, and ``static_order_prune_`` of what it chose."""
        score = torch.randn(6, self.C, dtype=torch.float64)
        lowest = ops.rank_lowest(
            score.to(self.place.device), self.C // 2, backend=self.backend
        ).cpu()
        self.check("ranking", lowest.double() + 1, ops.rank_lowest(score, self.C // 2) + 1.0)
        order, start = ops.rank_rows(score[:5], lowest[:5], backend="cpu")
        w, expected = self.there(self.W), self.W.double().clone()
        ops.static_order_prune_(
            w,
            self.there(self.A),
            order.to(self.place.device),
            start.to(self.place.device),
            backend=self.backend,
        )
        ops.static_order_prune_(expected, self.A, order, start, backend="cpu")
        self.check("static order", w, expected)

    def admm(self) -> None:
        """``admm_step_`` of all rows, by row and in groups, and ``conjugate_step_`` after it."""
        half = (torch.arange(5 * self.C).view(5, self.C) % 2).bool()
        W = self.W.to(self.dtype)
        for options in (
            {"count": 5 * self.C // 2},
            {"count": self.C // 2, "by_row": True},
            {"count": self.C // 4, "unit": 2},
            {"group": 4, "per_group": 2},
        ):
            made, gone = W * 0.5, half.clone()
            there, mask = self.there(W * 0.5), half.to(self.place.device, copy=True)
            ops.admm_step_(W * 0.3, made, W, gone, backend="cpu", **options)
            ops.admm_step_(
                self.there(W * 0.3), there, self.there(W), mask, backend=self.backend, **options
            )
            self.check("ADMM's choice", mask + 1.0, gone + 1.0)
            self.check("ADMM", there, made.double())
        g = W.double().masked_fill(half, 0)
        rr = g.square().sum(dim=1)
        own = (W.double(), g, g.clone(), g @ self.A)
        theirs = tuple(self.there(x) for x in own)
        there = rr.to(self.place.device, copy=True)
        ops.conjugate_step_(*theirs, half.to(self.place.device), there, backend=self.backend)
        ops.conjugate_step_(*own, half, rr, backend="cpu")
        self.check("conjugate gradients", theirs[0], own[0])

    def columns(self) -> None:
        """``columns_trace`` of single columns, and of pairs: what all removals cost."""
        for size in (1, 2):
            start = torch.arange(max(1, self.C // size) + 1) * size
            start[-1] = self.C
            layer = ops.ColumnLayer(self.there(self.W), self.there(self.A), self.there_index(start))
            few = min(32, len(start) - 1)
            trace = ops.columns_trace([layer], few, backend=self.backend)
            own = ops.columns_trace([ops.ColumnLayer(self.W.double(), self.A, start)], few)
            self.check("columns", torch.tensor([sum(trace.cost)]), torch.tensor([sum(own.cost)]))

    def there_index(self, x: Tensor) -> Tensor:
        """A copy on the device."""
        return x.to(self.place.device, copy=True)

    def there(self, x: Tensor) -> Tensor:
        """A copy on the device, in this dtype."""
        return x.to(device=self.place.device, dtype=self.dtype).contiguous().clone()

    def check(self, what: str, answer: Tensor, expected: Tensor) -> None:
        """End the program if an answer is wrong."""
        _check(f"{what} at {self.C}", answer, expected, self.tolerance)


def exercise(place: Place) -> None:
    """Run every kernel at every size."""
    sizes = SIZES[:4] if place.rehearse else SIZES
    count = 0
    for C in sizes:
        X = torch.randn(C + 40, C).relu()
        H = X.double().T @ X.double() / len(X) + 0.1 * torch.eye(C, dtype=torch.float64)
        A = torch.linalg.inv(H).contiguous()
        A = (A + A.T) / 2
        W = torch.randn(5, C)
        for dtype in (torch.float32, torch.float64) if C < 1000 else (torch.float32,):
            Exercise(place, W, A, dtype).run()
            count += 1
        long = torch.randn(1, 64 * C, dtype=torch.float64)
        lowest = ops.rank_lowest(long.to(place.device), 13 * C, backend=place.backend)
        expected = ops.rank_lowest(long, 13 * C) + 1.0
        _check(f"long ranking at {C}", lowest.cpu().double() + 1, expected, 1e-9)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            x = X.to(dtype)
            M = torch.zeros(C, C, dtype=torch.float64, device=place.device)
            ops.hessian_accumulate_(M, x.to(place.device), backend=place.backend)
            expected = (x.double().T @ x.double()).tril()
            _check(f"hessian {dtype} at {C}", M.tril(), expected, 1e-5)
            count += 1
    place.wait()
    print(f"exercised {count} combinations at sizes {', '.join(map(str, sizes))}")


def _check(what: str, answer: Tensor, expected: Tensor, tolerance: float) -> None:
    error = distance(answer.cpu(), expected) if expected.numel() else 0.0
    if not error <= tolerance:
        raise SystemExit(f"{what}: error {error:.3g}")
