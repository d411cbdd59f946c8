"""Every kernel at every size against float64 on the host: what compute-sanitizer watches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lobs_native import ops
from speed.gpu_place import Place, distance

SIZES = (1, 31, 33, 127, 129, 1000)


def exercise(place: Place) -> None:
    """Every kernel at every size, against float64 on the host; for compute-sanitizer."""
    sizes = SIZES[:4] if place.rehearse else SIZES
    ran = 0
    for C in sizes:
        X = torch.randn(C + 40, C).relu()
        H = X.double().T @ X.double() / len(X) + 0.1 * torch.eye(C, dtype=torch.float64)
        A = torch.linalg.inv(H).contiguous()
        A = (A + A.T) / 2
        W = torch.randn(5, C)
        for dtype in (torch.float32, torch.float64) if C < 1000 else (torch.float32,):
            tolerance = 1e-3 if dtype == torch.float32 else 1e-9

            def check(
                what: str, got: Tensor, expected: Tensor, least: float = tolerance, C: int = C
            ) -> None:
                error = distance(got.cpu(), expected) if expected.numel() else 0.0
                if not error <= least:
                    raise SystemExit(f"{what} at {C}: error {error:.3g}")

            def there(x: Tensor, dtype: torch.dtype = dtype) -> Tensor:
                return x.to(device=place.device, dtype=dtype).contiguous().clone()

            b = place.backend
            options: dict[str, Any]
            for options in (
                {"limit": (C + 1) // 2, "update": True},
                {"group": 4, "per_group": 2},
                {"block": 4},
            ):
                found = ops.exact_trace(there(W), there(A), backend=b, **options)
                known = ops.exact_trace(W.double(), A, backend="cpu", **options)
                if int(known.count.sum()):
                    check(
                        f"exact {options}",
                        found.loss.double().cumsum(1),
                        known.loss.double().cumsum(1),
                    )
            B = min(C, 128)
            for group in (0, B):
                w, e = there(W[:, :B]), there(torch.zeros(5, B))
                U = torch.linalg.cholesky(A[:B, :B], upper=True)
                gone = (torch.arange(5 * B).view(5, B) % 2).to(torch.uint8)
                v, f, dead = W[:, :B].double().clone(), torch.zeros(5, B).double(), gone.clone()
                gone = gone.to(place.device)
                half = {"group": group, "per_group": group // 2}
                ops.sweep_block_(w, there(U), gone, e, backend=b, **half)
                ops.sweep_block_(v, U.contiguous(), dead, f, backend="cpu", **half)
                check("sweep", w, v)
            F = torch.eye(B, dtype=torch.float64).expand(3, B, B).contiguous().clone()
            G = torch.randn(19, 3 * B - (B > 2))
            known_F = F.clone()
            got = there(F)
            ops.inverse_update_(got, there(G), 20.0, backend=b)
            ops.inverse_update_(known_F, G.double(), 20.0, backend="cpu")
            check("inverse", got, known_F)
            column, _ = ops.saliency_argmin(
                there(W), there(A.diagonal()), there(torch.ones(C)).bool(), backend=b
            )
            known_column, _ = ops.saliency_argmin(
                W.double(), A.diagonal(), torch.ones(C).bool(), backend="cpu"
            )
            check("saliency", column + 1, known_column + 1)
            score = torch.randn(6, C, dtype=torch.float64)
            low = ops.rank_lowest(score.to(place.device), C // 2, backend=b)
            check("ranking", low.cpu().double() + 1, ops.rank_lowest(score, C // 2) + 1.0)
            order, start = ops.rank_rows(score[:5], low[:5].cpu(), backend="cpu")
            w, v = there(W), W.double().clone()
            ops.static_order_prune_(
                w, there(A), order.to(place.device), start.to(place.device), backend=b
            )
            ops.static_order_prune_(v, A, order, start, backend="cpu")
            check("static order", w, v)
            ran += 1
        long = torch.randn(1, 64 * C, dtype=torch.float64)
        low = ops.rank_lowest(long.to(place.device), 13 * C, backend=place.backend)
        check("long ranking", low.cpu().double() + 1, ops.rank_lowest(long, 13 * C) + 1.0)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            x = X.to(dtype)
            M = torch.zeros(C, C, dtype=torch.float64, device=place.device)
            ops.hessian_accumulate_(M, x.to(place.device), backend=place.backend)
            check(f"hessian {dtype}", M.tril(), (x.double().T @ x.double()).tril(), 1e-5)
            ran += 1
    place.wait()
    print(f"exercised {ran} combinations at sizes {', '.join(map(str, sizes))}")
