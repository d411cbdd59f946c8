"""Everything that needs a GPU, in one go: build, tests, compute-sanitizer, benches, one table.

    python bench/speed/gpu.py [--out FOLDER] [--rehearse]

Needs torch, numpy, safetensors, tqdm, pytest (pytest-benchmark, hypothesis), nvcc, cmake, ninja and
pybind11, no network, and under ten minutes. It builds the package for this machine's own
architecture into a temporary folder, so that nothing installed is touched. Every step has a time
limit and its outcome is in the JSON, which is written after each step. ``--rehearse`` goes the same
way on the host with the emulated kernels at toy sizes: it checks this script, and measures nothing.

Times are of CUDA events, after a warm-up, both sides interleaved; medians. Answers are checked in
the same run. Bytes and flops are those of the contracts in ``csrc/``, set against a copy and two
matrix products that were measured just before on the same device.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SIZES = (1, 31, 33, 127, 129, 1000)
LIMIT = {"build": 150, "exercise": 60, "bench": 160, "tests": 150, "sanitizer": 60}  # seconds
DEADLINE = 580.0  # seconds for all of them: later steps get what is left
_BEGUN = time.perf_counter()


# ---- steps, each in a process of its own ---------------------------------------------------------


def step(name: str, command: list[str], limit: float, env: dict[str, str]) -> dict[str, Any]:
    """Run a command; its end, seconds and last lines."""
    begun = time.perf_counter()
    limit = max(1.0, min(limit, DEADLINE - (begun - _BEGUN)))
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **env},
            timeout=limit,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        code, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        code = 124
        text = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else ""
        text += f"\n{name}: stopped after {limit:.0f} s"
    seconds = round(time.perf_counter() - begun, 1)
    lines = text.rstrip().splitlines()
    print(f"== {name}: exit {code} after {seconds} s", flush=True)
    print("\n".join(lines[-(12 if code == 0 else 60) :]), flush=True)
    return {"exit": code, "seconds": seconds, "tail": lines[-12:], "text": text}


def version() -> str:
    for line in (ROOT / "python/lobs_native/__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise SystemExit("python/lobs_native/__init__.py has no __version__")


def build(scratch: Path, env: dict[str, str]) -> tuple[dict[str, Any], Path]:
    """The package for this device into ``scratch / site``."""
    site = scratch / "site"
    major, minor = torch.cuda.get_device_capability()
    where = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    )
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(scratch / "build"), "-G", "Ninja",
        "-DSKBUILD_PROJECT_NAME=lobs_native", f"-DSKBUILD_PROJECT_VERSION={version()}",
        "-DLOBS_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}-real",
        f"-Dpybind11_DIR={where.stdout.strip()}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_INSTALL_PREFIX={site}",
    ]  # fmt: skip
    made = step("configure", configure, LIMIT["build"], env)
    if made["exit"] == 0:
        made = step(
            "build", ["cmake", "--build", str(scratch / "build"), "--target", "install"],
            LIMIT["build"], env,
        )  # fmt: skip
    shutil.copytree(ROOT / "python/lobs_native", site / "lobs_native", dirs_exist_ok=True)
    sizes = {p.name: p.stat().st_size for p in (site / "lobs_native").glob("*.so")}
    made["bytes"] = sizes
    return made, site


def sanitize(tool: str, env: dict[str, str]) -> dict[str, Any]:
    """This script's ``--exercise`` under one of compute-sanitizer's tools."""
    own = [sys.executable, str(Path(__file__)), "--exercise"]
    checker = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(checker).is_file():
        return {"exit": None, "tail": ["compute-sanitizer is not on this machine"]}
    options = ["--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=lobs"]
    found = step(
        f"compute-sanitizer {tool}",
        [checker, *options, *own],
        LIMIT["sanitizer"],
        {**env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    found["errors"] = next(
        (line.strip("= ") for line in reversed(found["text"].splitlines()) if "SUMMARY" in line),
        "no summary",
    )
    return found


# ---- what runs in the child processes ------------------------------------------------------------


class Place:
    """Where it runs: the device with its events, or the host for a rehearsal."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.backend = "emulated" if rehearse else "cuda"
        if rehearse:
            from lobs_native import ops

            ops._core.load_backend(os.environ["LOBS_EMULATED"])

    def wait(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any]) -> float:
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
    damped = H.double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    return torch.cholesky_inverse(torch.linalg.cholesky(damped)).contiguous()


def far(x: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((x.double().to(expected.device) - expected).norm() / expected.norm())


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
        mine: list[float] = []
        theirs: dict[str, list[float]] = {name: [] for name in rivals}
        for _ in range(repeats):
            mine.append(self.place.seconds(ours))
            for name, (run, times) in rivals.items():
                theirs[name].append(self.place.seconds(run) * times)
        median = statistics.median(mine)
        top = self.ceilings[f"{kind}_flops"]
        floor = max(flops / top, moved / self.ceilings["copy_bytes"])
        row: dict[str, Any] = {
            "what": what, "ms": median * 1e3, "all_ms": [m * 1e3 for m in mine], "error": error,
            "tflops": flops / median / 1e12, "gbytes": moved / median / 1e9,
            "roofline": floor / median, "ratios": {},
        }  # fmt: skip
        for name, values in theirs.items():
            ratios = sorted(t / m for t, m in zip(values, mine, strict=True))
            row["ratios"][name] = [statistics.median(ratios), ratios[0], ratios[-1]]
        self.rows.append(row)
        against = "; ".join(f"{n} {r[0]:.3g}x" for n, r in row["ratios"].items())
        print(
            f"| {what} | {row['ms']:.3g} ms | {row['tflops']:.3g} TFLOP/s | "
            f"{row['gbytes']:.4g} GB/s | {row['roofline']:.0%} | {against} | {error:.1e} |",
            flush=True,
        )


def bench(place: Place, out: Path) -> None:
    """The table, row by row; what was measured so far is on disk if a later row fails."""
    sys.path.insert(0, str(ROOT / "bench"))
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
    import baselines

    from lobs_native import ops

    place = b.place
    N, C = (700, 130) if place.rehearse else (131072, 4096)
    X = features(N, C, place.device).to(torch.bfloat16)
    H = torch.zeros(C, C, dtype=torch.float64)
    ops.hessian_accumulate_(H, X, backend=place.backend)
    some = slice(0, min(C, 256))
    expected = X[:, some].double().T @ X.double()[:, some]
    error = far(H[some, some].tril(), expected.tril())
    running = torch.zeros(C, C)

    def together() -> Tensor:
        if place.rehearse:
            return X.float().T @ X.float()
        return torch.mm(X.T, X, out_dtype=torch.float32)

    b.pair(
        f"second moment, {N} x {C} bfloat16",
        lambda: ops.hessian_accumulate_(H, X, backend=place.backend),
        {
            "published float32 GEMM": (lambda: baselines.gram_running_mean_(running, 0, X), 1.0),
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
        error=far(G[some, some].tril(), expected.tril()),
        tolerance=1e-5,
    )


def _layer(place: Place, C: int) -> tuple[Tensor, Tensor]:
    """W (C, C) float32 and A (C, C) float64."""
    X = features(4 * C, C, place.device).double()
    generator = torch.Generator(device=place.device).manual_seed(1)
    W = torch.randn(C, C, generator=generator, device=place.device) / C**0.5
    return W, inverse_of(X.T @ X / len(X))


def sweep_rows(b: Bench) -> None:
    import baselines
    from pairings import _swept

    from lobs_native import ops

    place = b.place
    C = 256 if place.rehearse else 4096
    W, A = _layer(place, C)
    U = torch.linalg.cholesky(A, upper=True).float()
    chosen = ops.select_backend

    def select(asked: str | None, device: torch.device) -> str:
        return place.backend if asked is None else chosen(asked, device)

    ops.select_backend = select
    try:
        for pattern in (None, "2:4"):
            groups = (4, 2) if pattern else (0, 0)
            pruned = _swept(W.clone(), U, C * C // 2, pattern)
            removed = int((pruned == 0).sum())
            rival = baselines.sparsegpt_(W.clone(), U, 0.5, *groups)
            worse = _cost(W, pruned, A) / _cost(W, rival, A) - 1
            b.pair(
                f"sweep, {C} x {C}, {pattern or 'half'}, given the factor",
                lambda pattern=pattern: _swept(W.clone(), U, C * C // 2, pattern),
                {
                    "published SparseGPT loop": (
                        lambda groups=groups: baselines.sparsegpt_(W.clone(), U, 0.5, *groups),
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
    finally:
        ops.select_backend = chosen


def _cost(W: Tensor, pruned: Tensor, A: Tensor) -> float:
    change = (pruned.double() - W.double()) @ torch.linalg.inv(torch.linalg.cholesky(A, upper=True))
    return float(change.square().sum())


def inverse_rows(b: Bench) -> None:
    import baselines

    from lobs_native import ops

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
    error = far(F[few], expected)
    sample = 2

    def published() -> None:
        baselines.inverse_update_one_by_one_(F, G[:sample].contiguous(), 1000.0)

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
    import baselines

    from lobs_native import ops

    place = b.place
    C = 128 if place.rehearse else 4096
    W, A = _layer(place, C)
    a, k = A.float(), C // 2
    useful = 2.0 * C * (C * k**2 / 2 - k**3 / 3)
    few = slice(0, 3)
    for pattern in (None, "2:4"):
        options: dict[str, int] = {"group": 4, "per_group": 2} if pattern else {"limit": k}
        found = ops.exact_trace(W, a, backend=place.backend, **options)
        with torch.device("cpu"):
            wide = ops.exact_trace(W[few].double().cpu(), A.cpu(), backend="cpu", **options)
        expected = wide.loss[:, :k].cumsum(1)
        error = far(found.loss[few, :k].double().cumsum(1).cpu(), expected)
        if bool(found.lost.any()) or int(found.count.min()) != k:
            error = math.inf
        rows, sample = min(32, C), min(24, k // 2)
        keep = (2, 4) if pattern else (0, 0)
        batch = baselines.PublishedRows(W[:rows], a, *keep)
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


def exercise(place: Place) -> None:
    """Every kernel at every size, against float64 on the host; for compute-sanitizer."""
    from lobs_native import ops

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
                error = far(got.cpu(), expected) if expected.numel() else 0.0
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


# ---- together ------------------------------------------------------------------------------------


def about(rehearse: bool) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or os.environ.get("LOBS_COMMIT", "unknown"),
        "device": "host, emulated: no measurement" if rehearse else torch.cuda.get_device_name(),
    }
    if not rehearse:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        found["driver"] = driver.stdout.strip()
        found["cuda"] = torch.version.cuda or ""
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Build, test, sanitize and measure on a GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--rehearse", action="store_true", help="on the host, emulated, toy sizes")
    parser.add_argument("--exercise", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bench", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.exercise:
        exercise(Place(arguments.rehearse))
        return
    if arguments.bench:
        bench(Place(arguments.rehearse), arguments.bench)
        return
    if not arguments.rehearse and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing to measure (--rehearse checks this script)")

    result: dict[str, Any] = {"about": about(arguments.rehearse)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / ("gpu-rehearsal.json" if arguments.rehearse else "gpu.json")

    def keep(name: str, value: dict[str, Any]) -> None:
        result[name] = {k: v for k, v in value.items() if k != "text"}
        file.write_text(json.dumps(result, indent=1) + "\n")

    own = [sys.executable, str(Path(__file__))]
    with tempfile.TemporaryDirectory() as folder:
        env: dict[str, str] = {}
        if arguments.rehearse:
            own.append("--rehearse")
            sys.path.insert(0, str(ROOT / "tests"))
            from emulated import build as build_emulated

            cache = Path(os.environ.get("LOBS_EMULATED_CACHE") or folder)
            env = {"LOBS_EMULATED": str(build_emulated(cache))}
        else:
            made, site = build(Path(folder), env)
            keep("build", made)
            if made["exit"] != 0:
                raise SystemExit(1)
            env = {"PYTHONPATH": str(site)}
        keep("exercise", step("exercise", [*own, "--exercise"], LIMIT["exercise"], env))
        bench_file = Path(folder) / "bench.json"
        measured = step("bench", [*own, "--bench", str(bench_file)], LIMIT["bench"], env)
        if bench_file.is_file():
            measured["table"] = json.loads(bench_file.read_text())
        keep("bench", measured)
        if not arguments.rehearse:
            gpu = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
            keep("tests", step("tests", gpu, LIMIT["tests"], env))
            for tool in TOOLS:
                keep(tool, sanitize(tool, env))
    ends = {name: value.get("exit") for name, value in result.items() if name != "about"}
    print(json.dumps({**result["about"], "exits": ends}))
    print(f"written: {file.name}")
    if any(code != 0 for code in ends.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
