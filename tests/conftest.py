"""Fixtures: each backend in turn, and the real data if it is beside the checkout."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import moved
from helpers.emulated import build as build_emulated

from lobs_native import ops
from stress.forks import Forks

_ROWS = {name: (ready, detail) for name, ready, detail, _ in ops._core.backends()}
_BACKENDS = [
    "reference",
    *(name for name in _ROWS if name.startswith("cpu_")),
    "emulated",
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def pytest_configure() -> None:
    """Workers share the cores: more threads than cores wait for one another."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(params=_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend by name. One that cannot run here is skipped with the reason."""
    name: str = request.param
    if name == "emulated":
        return request.getfixturevalue("emulated")
    if name != "reference":
        ready, detail = _ROWS[name]
        if not ready:
            pytest.skip(f"{name}: {detail}")
    if name == "cuda":
        moved.install(request.getfixturevalue("monkeypatch"), name, torch.device("cuda"))
    return name


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The CUDA kernels, compiled for the CPU against ``tests/emulator``, as a backend."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which the workers share
    built = build_emulated(Path(os.environ.get("LOBS_EMULATED_CACHE") or folder))
    if built is None:
        pytest.skip("emulated: there is no C++ compiler to build the CUDA kernels for the CPU")
    return ops._core.load_backend(str(built))


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts processes that have imported the package, in milliseconds and not in seconds."""
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For files with many tiny calls, which cost less than distributing them to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where fsync costs nothing; on the disk if there is none."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with MNIST and the authors' LeNet-300-100, outside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "lenet300-100" / "w_layer1.npy").is_file():
        pytest.skip(
            "the shared data folder (MNIST, the authors' LeNet-300-100) is not beside this checkout"
        )
    return folder
