"""The scripts in ``examples/`` run, say what they are to show, and stay short."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lobs_native as lobs

ROOT = Path(__file__).resolve().parents[1]
SHOWN = {  # script -> what its output must hold
    "one_layer_and_its_curve.py": (r"4096 of 8192 are zero", r"50%  0\.\d{4} #"),
    "quick_start.py": (r"before pruning: accuracy 0\.9\d", r"90%  +0\.\d{3} +0\.\d{3} +0\.\d{3}"),
    "resume.py": (
        r"code -9, [2-5] layers",
        r"resumed: [2-5] of 6 layers",
        r"uninterrupted run: True",
    ),
    "transformer_folder.py": (r"exit code 0", r"masks\.safetensors", r"34,816 of 69,632 weights"),
}


def test_every_script_is_known_here():
    assert {p.name for p in (ROOT / "examples").glob("*.py")} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_an_example_runs_and_shows_something(name, tmp_path, forks):
    """One of them in a fresh interpreter; it starts another one itself."""
    if name == "transformer_folder.py":
        pytest.importorskip("transformers")
    script = str(ROOT / "examples" / name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if name == "resume.py":
        done = subprocess.run(
            [sys.executable, script],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    else:
        done = forks.run([script], cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    for pattern in SHOWN[name]:
        assert re.search(pattern, done.stdout), done.stdout
    assert not list(tmp_path.iterdir())  # nothing is left behind


@pytest.mark.parametrize("name", SHOWN)
def test_an_example_imports_what_it_uses(name):
    """A process that has imported more would not notice."""
    used = set(re.findall(r"\blobs\.(\w+)", (ROOT / "examples" / name).read_text()))
    assert used <= set(lobs.__all__)


@pytest.mark.parametrize("name", SHOWN)
def test_an_example_is_short(name):
    text = (ROOT / "examples" / name).read_text()
    assert len(text.splitlines()) < 60
    assert f"python examples/{name}" in text
