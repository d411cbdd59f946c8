"""Commands that torchrun may not start as several processes."""

import pytest

from lobs_native.cli import commands as cli


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
