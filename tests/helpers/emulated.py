"""Build of the CUDA kernels for the host, against ``tests/emulator``: a backend for tests."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FLAGS = ["-std=c++17", "-O2", "-march=native", "-fPIC", "-fvisibility=hidden"]
_FLAGS += ["-DLOBS_EMULATE", "-Wno-unknown-pragmas", "-Icsrc", "-Itests/emulator"]


def build(folder: Path) -> Path | None:
    """Build the object in ``folder`` unless it is there already. None without a compiler.

    Of several processes, one builds and the others wait.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    sources = sorted((ROOT / "cuda").glob("*.cu"))
    inputs = [*sources, *(ROOT / "cuda").glob("*.cuh"), *(ROOT / "csrc").glob("*.h")]
    inputs += (ROOT / "tests" / "emulator").glob("*.h")
    digest = hashlib.sha256(" ".join([compiler, *_FLAGS]).encode())
    for path in sorted(inputs):
        digest.update(path.read_bytes())
    built = folder / f"emulated-{digest.hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with built.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.is_file():
            _compile(compiler, sources, built)
    return built


def _compile(compiler: str, sources: list[Path], built: Path) -> None:
    objects = [built.with_name(f"{s.stem}.o") for s in sources]
    jobs = [
        subprocess.Popen([compiler, *_FLAGS, "-c", "-x", "c++", str(s), "-o", str(o)], cwd=ROOT)
        for s, o in zip(sources, objects, strict=True)
    ]
    codes = [job.wait() for job in jobs]
    if any(codes):
        raise RuntimeError("the CUDA kernels do not compile for the host: see above")
    linked = built.with_suffix(".linked")  # an interrupted link leaves nothing that looks built
    subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(linked)], check=True)
    linked.replace(built)
    for o in objects:
        o.unlink()
