"""The steps of ``gpu.py`` that are processes of their own: the build, and compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("gpu.py")
LIMIT = {"build": 150, "exercise": 60, "bench": 160, "tests": 150, "sanitizer": 60}  # seconds
DEADLINE = 580.0  # seconds for all of them: later steps get what is left
_BEGUN = time.perf_counter()


def step(name: str, command: list[str], limit: float, env: dict[str, str]) -> dict[str, Any]:
    """Run a command; its exit code, seconds and last lines."""
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
    """The package's version, without importing it."""
    for line in (ROOT / "python/lobs_native/version.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise SystemExit("python/lobs_native/version.py has no __version__")


def build(scratch: Path, env: dict[str, str]) -> tuple[dict[str, Any], Path]:
    """Build the package for this device into ``scratch / site``; the outcome, and that folder."""
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
    outcome = step("configure", configure, LIMIT["build"], env)
    if outcome["exit"] == 0:
        outcome = step(
            "build", ["cmake", "--build", str(scratch / "build"), "--target", "install"],
            LIMIT["build"], env,
        )  # fmt: skip
    shutil.copytree(ROOT / "python/lobs_native", site / "lobs_native", dirs_exist_ok=True)
    sizes = {p.name: p.stat().st_size for p in (site / "lobs_native").glob("*.so")}
    outcome["bytes"] = sizes
    return outcome, site


def sanitize(tool: str, env: dict[str, str]) -> dict[str, Any]:
    """``gpu.py --exercise`` under one of compute-sanitizer's tools."""
    own = [sys.executable, str(SCRIPT), "--exercise"]
    checker = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(checker).is_file():
        return {"exit": None, "tail": ["compute-sanitizer is not on this machine"]}
    options = ["--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=lobs"]
    outcome = step(
        f"compute-sanitizer {tool}",
        [checker, *options, *own],
        LIMIT["sanitizer"],
        {**env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    outcome["errors"] = next(
        (line.strip("= ") for line in reversed(outcome["text"].splitlines()) if "SUMMARY" in line),
        "no summary",
    )
    return outcome
