"""The table of ``gpu.py``: times, shares of the roofline, and ratios to published code."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lobs_native import ops
from speed.baselines import exact, hessian, inverse, sweep
from speed.cases.exact import useful_flops
from speed.cases.sweep import swept_
from speed.gpu_place import Place, distance, features, inverse_of


class Bench:
    """Measures, checks and keeps rows."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.ceilings = place.ceilings()
        self.rows: list[dict[str, Any]] = []

    def pair(
        self,
        what: str,
        ours: Callable[[], Any],
        rivals: dict[str, tuple[Callable[[], Any], float]],
        *,
        flops: float,
        moved: float,
        kind: str,
        error: float,
        tolerance: float,
        repeats: int = 5,
    ) -> None:
        """``rivals``: a run and what its time is multiplied by. ``error`` of ours, checked."""
        if not error <= tolerance:
            raise SystemExit(f"{what}: wrong: error {error:.3g}, above {tolerance:g}")
        ours()
        for run, _ in rivals.values():
            run()
        ours_seconds: list[float] = []
        rivals_seconds: dict[str, list[float]] = {name: [] for name in rivals}
        for _ in range(repeats):
            ours_seconds.append(self.place.seconds(ours))
            for name, (run, times) in rivals.items():
                rivals_seconds[name].append(self.place.seconds(run) * times)
        median = statistics.median(ours_seconds)
        top = self.ceilings[f"{kind}_flops"]
        floor = max(flops / top, moved / self.ceilings["copy_bytes"])
        row: dict[str, Any] = {
            "what": what, "ms": median * 1e3, "all_ms": [s * 1e3 for s in ours_seconds],
            "error": error, "tflops": flops / median / 1e12, "gbytes": moved / median / 1e9,
            "roofline": floor / median, "ratios": {},
        }  # fmt: skip
        for name, values in rivals_seconds.items():
            ratios = sorted(t / m for t, m in zip(values, ours_seconds, strict=True))
            row["ratios"][name] = [statistics.median(ratios), ratios[0], ratios[-1]]
        self.rows.append(row)
        against = "; ".join(f"{n} {r[0]:.3g}x" for n, r in row["ratios"].items())
        print(
            f"| {what} | {row['ms']:.3g} ms | {row['tflops']:.3g} TFLOP/s | "
            f"{row['gbytes']:.4g} GB/s | {row['roofline']:.0%} | {against} | {error:.1e} |",
            flush=True,
        )


def bench(place: Place, out: Path) -> None:
    """Print the table and write it after each row: a later failure does not lose earlier rows."""
    torch.backends.cuda.matmul.allow_tf32 = False
    b = Bench(place)
    c = b.ceilings
    print(
        f"ceilings: copy {c['copy_bytes'] / 1e9:.0f} GB/s, float32 {c['float32_flops'] / 1e12:.3g}"
        f" and bfloat16 {c['bfloat16_flops'] / 1e12:.4g} TFLOP/s"
    )
    print("| what | time | rate | bytes | of roofline | rivals' time over ours | error |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    failed = {}
    for rows in (hessian_rows, sweep_rows, inverse_rows, exact_rows):
        try:
            with torch.device(place.device):  # the rivals make their tensors there
                rows(b)
        except (Exception, SystemExit) as error:  # the other rows are still worth having
            failed[rows.__name__] = f"{type(error).__name__}: {error}"
            print(f"{rows.__name__}: {failed[rows.__name__]}", flush=True)
        out.write_text(
            json.dumps({"ceilings": c, "rows": b.rows, "failed": failed}, indent=1) + "\n"
        )
    if failed:
        raise SystemExit(1)


def hessian_rows(b: Bench) -> None:
    """Second moments of bfloat16 and float32 inputs."""
    place = b.place
    N, C = (700, 130) if place.rehearse else (131072, 4096)
    X = features(N, C, place.device).to(torch.bfloat16)
    H = torch.zeros(C, C, dtype=torch.float64)
    ops.hessian_accumulate_(H, X, backend=place.backend)
    some = slice(0, min(C, 256))
    expected = X[:, some].double().T @ X.double()[:, some]
    error = distance(H[some, some].tril(), expected.tril())
    running = torch.zeros(C, C)

    def together() -> Tensor:
        if place.rehearse:
            return X.float().T @ X.float()
        return torch.mm(X.T, X, out_dtype=torch.float32)

    b.pair(
        f"second moment, {N} x {C} bfloat16",
        lambda: ops.hessian_accumulate_(H, X, backend=place.backend),
        {
            "published float32 GEMM": (lambda: hessian.gram_running_mean_(running, 0, X), 1.0),
            "torch bfloat16 GEMM, float32 out": (together, 1.0),
        },
        flops=float(N) * C * (C + 1),
        moved=N * C * 2.0 + C * C * 8.0,
        kind="bfloat16",
        error=error,
        tolerance=1e-5,
    )
    Y = X[: N // 4].float()
    G = torch.zeros(C, C, dtype=torch.float64)
    ops.hessian_accumulate_(G, Y, backend=place.backend)
    expected = Y[:, some].double().T @ Y.double()[:, some]
    b.pair(
        f"second moment, {len(Y)} x {C} float32",
        lambda: ops.hessian_accumulate_(G, Y, backend=place.backend),
        {"torch float32 GEMM, no TF32": (lambda: Y.T @ Y, 1.0)},
        flops=float(len(Y)) * C * (C + 1),
        moved=len(Y) * C * 4.0 + C * C * 8.0,
        kind="float32",
        error=distance(G[some, some].tril(), expected.tril()),
        tolerance=1e-5,
    )


def _layer(place: Place, C: int) -> tuple[Tensor, Tensor]:
    """W (C, C) float32 and A (C, C) float64."""
    X = features(4 * C, C, place.device).double()
    generator = torch.Generator(device=place.device).manual_seed(1)
    W = torch.randn(C, C, generator=generator, device=place.device) / C**0.5
    return W, inverse_of(X.T @ X / len(X))


def sweep_rows(b: Bench) -> None:
    """SparseGPT's sweep of a layer, given the factor."""
    place = b.place
    C = 256 if place.rehearse else 4096
    W, A = _layer(place, C)
    U = torch.linalg.cholesky(A, upper=True).float()

    def prune(pattern: str | None) -> Tensor:
        return swept_(W.clone(), U, C * C // 2, pattern, backend=place.backend)

    for pattern in (None, "2:4"):
        groups = (4, 2) if pattern else (0, 0)
        pruned = prune(pattern)
        removed = int((pruned == 0).sum())
        rival = sweep.sparsegpt_(W.clone(), U, 0.5, *groups)
        worse = _cost(W, pruned, A) / _cost(W, rival, A) - 1
        b.pair(
            f"sweep, {C} x {C}, {pattern or 'half'}, given the factor",
            lambda pattern=pattern: prune(pattern),
            {
                "published SparseGPT loop": (
                    lambda groups=groups: sweep.sparsegpt_(W.clone(), U, 0.5, *groups),
                    1.0,
                )
            },
            flops=float(C) * C * C,
            moved=C * C / 128 * C * 4.0,
            kind="float32",
            error=max(0.0, worse) if removed == C * C // 2 else math.inf,
            tolerance=0.01,
            repeats=3,
        )


def _cost(W: Tensor, pruned: Tensor, A: Tensor) -> float:
    change = (pruned.double() - W.double()) @ torch.linalg.inv(torch.linalg.cholesky(A, upper=True))
    return float(change.square().sum())


def inverse_rows(b: Bench) -> None:
    """The block inverse Fisher of 64 gradients."""
    place = b.place
    d, B, r = (1280, 128, 20) if place.rehearse else (1 << 26, 128, 64)
    generator = torch.Generator(device=place.device).manual_seed(2)
    G = torch.randn(r, d, generator=generator, device=place.device) * 0.1
    eye = torch.eye(B, device=place.device) * 100.0
    F = eye.expand(d // B, B, B).clone()
    few = slice(0, 4)
    ops.inverse_update_(F, G, 1000.0, backend=place.backend)
    g = G.view(r, d // B, B)[:, few].double()
    expected = torch.linalg.inv(
        torch.eye(B, dtype=torch.float64) / 100 + torch.einsum("rbi,rbj->bij", g, g) / 1000
    )
    error = distance(F[few], expected)
    sample = 2

    def published() -> None:
        inverse.inverse_update_one_by_one_(F, G[:sample].contiguous(), 1000.0)

    b.pair(
        f"block inverse, {d / 1e6:.3g}M weights, B = {B}, {r} gradients",
        lambda: ops.inverse_update_(F, G, 1000.0, backend=place.backend),
        {f"published rank-1 updates (timed on {sample})": (published, r / sample)},
        flops=4.0 * r * B * d,
        moved=2.0 * d * B * 4 + r * d * 4.0,
        kind="float32",
        error=error,
        tolerance=1e-4,
        repeats=3,
    )


def exact_rows(b: Bench) -> None:
    """Exact removal of half of a layer, and 2:4."""
    place = b.place
    C = 128 if place.rehearse else 4096
    W, A = _layer(place, C)
    a, k = A.float(), C // 2
    useful = useful_flops(C, C, k)
    few = slice(0, 3)
    for pattern in (None, "2:4"):
        options: dict[str, int] = {"group": 4, "per_group": 2} if pattern else {"limit": k}
        trace = ops.exact_trace(W, a, backend=place.backend, **options)
        with torch.device("cpu"):
            wide = ops.exact_trace(W[few].double().cpu(), A.cpu(), backend="cpu", **options)
        expected = wide.loss[:, :k].cumsum(1)
        error = distance(trace.loss[few, :k].double().cumsum(1).cpu(), expected)
        if bool(trace.lost.any()) or int(trace.count.min()) != k:
            error = math.inf
        rows, sample = min(32, C), min(24, k // 2)
        keep = (2, 4) if pattern else (0, 0)
        batch = exact.PublishedRows(W[:rows], a, *keep)
        batch.remove(sample)
        begun = batch.removed

        def published(batch: Any = batch, sample: int = sample, begun: int = begun) -> None:
            batch.removed = begun  # every removal takes the same time; these repeat the same steps
            batch.remove(sample)

        w = W.clone()
        b.pair(
            f"exact, {C} x {C}, {pattern or 'half removed'}, with weights",
            lambda options=options, w=w: ops.exact_trace(
                w.copy_(W), a, update=True, backend=place.backend, **options
            ),
            {
                f"published loop (timed on {sample} removals of {rows} rows)": (
                    published,
                    k / sample * C / rows,
                )
            },
            flops=useful,
            moved=C * C * 4.0 * 3,
            kind="float32",
            error=error,
            tolerance=1e-3,
            repeats=2,
        )
        del batch
