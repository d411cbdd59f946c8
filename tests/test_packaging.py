"""What is in the sdist and the wheel, and what the wheel's binaries ask for. Needs LOBS_DIST, a
folder with both."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SDIST_FOLDERS = (
    *("csrc/", "cuda/", "python/", "tests/", "bench/", "docs/", "examples/", "findings/"),
)
SDIST_FILES = {
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "RELEASING.md",
    "SECURITY.md",
    "noxfile.py",
    "CMakeLists.txt",
    "pyproject.toml",
}


def built(pattern: str) -> Path:
    folder = os.environ.get("LOBS_DIST")
    if not folder:
        pytest.skip("LOBS_DIST does not name a folder with a built sdist and wheel")
    (path,) = Path(folder).glob(pattern)
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(built("*.whl")) as archive:
        archive.extractall(folder)
        return archive.namelist(), folder


def test_the_sdist_is_exactly_the_listed_part_of_the_repository():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    expected = {f for f in tracked if f in SDIST_FILES or f.startswith(SDIST_FOLDERS)}
    with tarfile.open(built("*.tar.gz")) as archive:
        found = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}
    assert found - {"PKG-INFO"} == expected


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names, _ = wheel
    package = {
        str(p.relative_to(ROOT / "python"))
        for p in (ROOT / "python").rglob("*")
        if p.suffix in {".py", ".pyi", ".typed", ".j2", ".css", ".js", ".json"}
    }
    assert package | {"lobs_native/py.typed"} <= set(names)
    rest = [
        n
        for n in names
        if n not in package and ".dist-info/" not in n and not n.endswith("/py.typed")
    ]
    assert all(re.fullmatch(r"lobs_native/(_core\.\S+|_lobs_cuda)\.so", n) for n in rest), rest
    assert any("_core." in n for n in rest)
    assert not any(".libs/" in n for n in names)
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_the_binaries_need_no_torch_no_cuda_and_no_grafted_openmp(wheel):
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    names, folder = wheel
    for name in names:
        if not name.endswith(".so"):
            continue
        listing = subprocess.run(
            ["readelf", "-d", str(folder / name)], capture_output=True, text=True, check=True
        ).stdout
        needed = set(re.findall(r"NEEDED.*\[(.*)\]", listing))
        allowed = {
            "libgomp.so.1",
            "libstdc++.so.6",
            "libm.so.6",
            "libgcc_s.so.1",
            "libc.so.6",
            "libdl.so.2",
            "librt.so.1",
        }
        allowed |= {"libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
        assert needed <= allowed, (name, needed - allowed)
        if "_core" in name:
            assert (
                "libgomp.so.1" in needed
            )  # by its plain soname: torch's copy, already loaded, is the one used
        assert "RPATH" not in listing
        assert "RUNPATH" not in listing


def test_the_wheel_s_metadata_says_what_the_package_says(wheel):
    import lobs_native

    names, folder = wheel
    (metadata,) = [n for n in names if n.endswith(".dist-info/METADATA")]
    text = (folder / metadata).read_text()
    assert f"\nVersion: {lobs_native.__version__}\n" in text
    assert "\nName: lobs-native\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert "\nRequires-Dist: torch>=2.8\n" in text
    assert "\nRequires-Dist: jinja2>=3\n" in text
    (entry,) = [n for n in names if n.endswith(".dist-info/entry_points.txt")]
    assert "lobs-native = lobs_native.cli:main" in re.sub(
        r"=", " = ", (folder / entry).read_text()
    ).replace("  ", " ")
