"""python -m lobs_native.run runs an unmodified script as python would, with the host replaced."""

from __future__ import annotations

import json

import pytest

HOST_FILE = """
import torch

class SparseGPT:
    def __init__(self, layer):
        self.layer = layer
        self.nsamples = 0

    def add_batch(self, inp, out, blocksize=1024):
        self.H = inp.T @ inp

    def fasterprune(self, sparsity, prunen=0, prunem=0, blocksize=128, percdamp=.01):
        self.layer.weight.data = torch.zeros_like(self.layer.weight)

    def free(self):
        pass
"""
SCRIPT = """
import json
import os
import sys

import torch
from sparsegpt import *
from beside import NAME

layer = torch.nn.Linear(8, 4)
gpt = SparseGPT(layer)
gpt.add_batch(torch.randn(20, 8), None)
gpt.fasterprune(0.5)
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__, "beside": NAME,
    "main": sys.modules["__main__"].SparseGPT is SparseGPT,
    "ours": "lobs_native" in SparseGPT.__module__,
    "zeros": int((layer.weight == 0).sum()),
}))
if "--fail" in sys.argv:
    raise KeyError("the script's own")
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path):
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "sparsegpt.py").write_text(HOST_FILE)
    (folder / "beside.py").write_text("NAME = 'beside'\n")
    (folder / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("NAME = 'of the working directory'\n")
    return folder / "script.py"


@pytest.fixture
def run(forks):
    def run(script, *arguments, options=()):
        command = ["-m", "lobs_native.run", *options, str(script), *arguments]
        return forks.run(command, cwd=script.parent.parent)

    return run


def printed(result):

    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("options", [(), ("--hosts", "sparsegpt")], ids=["all", "named"])
def test_the_script_runs_as_with_python_and_gets_ours(run, script, options):
    result = run(script, "3", "--verify", "x", "--", "-y", options=options)
    assert result.returncode == 3, result.stderr
    output = printed(result)
    assert output["argv"] == [str(script), "3", "--verify", "x", "--", "-y"]
    assert output["path"] == str(script.parent)
    assert output["name"] == "__main__"
    assert output["file"] == str(script)
    assert output["beside"] == "beside"
    assert output["main"]
    assert output["ours"]
    assert output["zeros"] == 17
    assert "SparseGPT.fasterprune: 1 calls" in result.stderr
    assert "replaced sparsegpt.SparseGPT" in result.stderr


def test_verify_reports_differences(run, script):
    result = run(script, "0", options=("--verify", "1"))
    assert result.returncode == 0
    assert "SparseGPT.fasterprune" in result.stderr
    assert "BEYOND TOLERANCE" in result.stderr  # this host removes everything


def test_our_numerics(run, script):
    result = run(script, "0", options=("--numerics", "ours", "--method", "sweep"))
    assert result.returncode == 0, result.stderr
    assert printed(result)["zeros"] == 16


def test_an_exception_of_the_script_propagates_with_the_record(run, script):
    result = run(script, "0", "--fail")
    assert result.returncode == 1
    assert 'KeyError: "the script\'s own"' in result.stderr
    assert "SparseGPT.fasterprune: 1 calls" in result.stderr


def test_a_host_with_another_signature_stops_the_script(run, script):
    host = script.parent / "sparsegpt.py"
    host.write_text(HOST_FILE.replace("percdamp=.01", "percdamp=.1"))
    result = run(script, "0")
    assert result.returncode == 1
    assert "HostError: sparsegpt.SparseGPT.fasterprune takes" in result.stderr
    assert "nothing was replaced" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hosts", "nohost"), "unknown host 'nohost'"),
        (("--verify", "-1"), "verify: -1"),
        (("--verify", "1", "--numerics", "ours"), "leave one of them out"),
    ],
)
def test_wrong_options_are_refused(run, script, options, message):
    result = run(script, "0", options=options)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_a_missing_script_is_refused(run, script):
    result = run(script.with_name("other.py"))
    assert result.returncode == 2
    assert "other.py" in result.stderr
