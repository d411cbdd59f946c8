"""Fixtures: every backend in turn, and the real data where it lies beside the checkout."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lobs_native import ops

ROOT = Path(__file__).resolve().parents[1]
_ROWS = {name: (ready, detail) for name, ready, detail, _ in ops._core.backends()}
_BACKENDS = [
    "reference",
    *(name for name in _ROWS if name.startswith("cpu_")),
    "emulated",
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend by name; one that cannot run here is skipped with its reason."""
    name: str = request.param
    if name == "emulated":
        return request.getfixturevalue("emulated")
    if name != "reference":
        ready, detail = _ROWS[name]
        if not ready:
            pytest.skip(f"{name}: {detail}")
    return name


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The CUDA kernels, compiled for the host against ``tests/emulator`` and loaded as a backend."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("emulated: there is no C++ compiler to build the CUDA kernels for the host")
    sources = sorted((ROOT / "cuda").glob("*.cu"))
    everything = [*sources, *(ROOT / "cuda").glob("*.cuh"), *(ROOT / "csrc").glob("*.h")]
    everything += (ROOT / "tests" / "emulator").glob("*.h")
    flags = [
        "-std=c++17",
        "-O2",
        "-march=native",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-DLOBS_EMULATE",
    ]
    flags += ["-Wno-unknown-pragmas", "-Icsrc", "-Itests/emulator"]
    digest = hashlib.sha256(" ".join([compiler, *flags]).encode())
    for path in sorted(everything):
        digest.update(path.read_bytes())
    folder = Path(os.environ.get("LOBS_EMULATED_CACHE") or tmp_path_factory.getbasetemp())
    built = folder / f"emulated-{digest.hexdigest()[:16]}.so"
    if not built.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        objects = [folder / f"{s.stem}-{os.getpid()}.o" for s in sources]
        jobs = [
            subprocess.Popen([compiler, *flags, "-c", "-x", "c++", str(s), "-o", str(o)], cwd=ROOT)
            for s, o in zip(sources, objects, strict=True)
        ]
        assert [job.wait() for job in jobs] == [0] * len(jobs)
        subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(built)], check=True)
        for o in objects:
            o.unlink()
    return ops._core.load_backend(str(built))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For files of many tiny calls: handing them to other threads costs more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with MNIST and the authors' LeNet-300-100, outside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "lenet300-100" / "w_layer1.npy").is_file():
        pytest.skip(
            "the shared data folder (MNIST, the authors' LeNet-300-100) is not beside this checkout"
        )
    return folder
