"""Commands that torchrun may not start as several processes, and processes that do not find one
another."""

import os
import subprocess
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from lobs_native.cli import commands as cli
from stress.forks import Forks


@pytest.mark.parametrize("command", ["shrink", "speed", "export"])
def test_what_runs_in_one_process_is_refused_under_torchrun(command, capsys, tmp_path, monkeypatch):
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    words = {
        "shrink": ["--calibration", "text.txt", "--neurons", "0.5", "--out", str(tmp_path / "out")],
        "speed": [],
        "export": ["--out", str(tmp_path / "out")],
    }
    assert cli.main([command, "model", *words[command]]) == 2
    assert f"torchrun: {command} runs in one process, and 3 were started" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# A process that joins others for one second at most; before, it may change how.
JOINING = """
import sys, time
from torch import distributed
from lobs_native.cli import torchrun
from lobs_native.errors import RankError

if sys.argv[1] == "hangs":
    distributed.init_process_group = lambda *given, **how: time.sleep(600)
try:
    with torchrun.joined(1.0):
        print("joined")
except RankError as error:
    print(error)
    sys.exit(torchrun.LOST)
"""


def joining(forks: Forks, folder: Path, how: str) -> tuple[int, str, str]:
    """Exit code and texts of one of two processes, the other of which never comes."""
    (folder / "joining.py").write_text(JOINING)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    process = forks.start(
        [folder / "joining.py", how],
        env={**os.environ, **environment, "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    printed, errors = process.communicate(120)
    return process.wait(), printed, errors


def test_a_process_whose_others_do_not_come_ends(forks, tmp_path):
    code, printed, _ = joining(forks, tmp_path, "waits")
    assert code == 75
    assert "torchrun: the processes did not find one another" in printed


def test_joining_that_goes_on_beyond_its_time_is_ended(forks, tmp_path):
    """By the watchdog: what stands in for torch's own waiting would last ten minutes."""
    code, printed, errors = joining(forks, tmp_path, "hangs")
    assert (code, printed) == (75, "")
    assert "torchrun: the processes did not find one another in time" in errors
