"""``lobs-native speed``: its table, JSON and picture."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import hf_folders

from lobs_native.cli import commands as cli

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = """
import torch

def pair():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 4))
    with torch.no_grad():
        model[0].weight[:, :240] = 0
    return model, [torch.ones(2, 300)]

def dense():
    return torch.nn.Sequential(torch.nn.Linear(300, 400), torch.nn.Linear(400, 4)), []

def smaller():
    return torch.nn.Sequential(torch.nn.Linear(300, 100), torch.nn.Linear(100, 4)), []

def triple():
    return *pair(), lambda model, batch: model(batch)
"""
FAST = ("--runtime", "torch", "--runtime", "lobs.to_sparse", "--pairs", "2")


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    (tmp_path / "speed_networks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)


def test_it_prints_a_table_and_the_advice(capsys):
    assert cli.main(["speed", "speed_networks:pair", *FAST]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["runtime", "version"]
    assert [line.split()[0] for line in lines[1:3]] == ["torch", "lobs.to_sparse"]
    assert "78.9% of the linear weights are zero; 91,504 parameters against 91,504" in out
    assert lines[-1].startswith(("It pays here", "It does not pay here"))


def test_json_picture_and_another_dense_network(capsys, tmp_path):
    picture = tmp_path / "speed.png"
    arguments = ["speed", "speed_networks:pair", "--against", "speed_networks:dense", *FAST]
    assert cli.main([*arguments, "--json", "--picture", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["engine"] for each in found["engines"]] == ["torch", "lobs.to_sparse"]
    assert found["parameters"] == [122004, 91504]
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_several_networks_share_a_table(capsys, tmp_path):
    names = ["speed_networks:pair", "speed_networks:smaller"]
    dense = ["--against", "speed_networks:dense"]
    assert cli.main(["speed", *names, *dense, *FAST, "--picture", "speed.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["runtime", "network", "version"]
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["torch", names[0]],
        ["torch", names[1]],
        ["lobs.to_sparse", names[0]],
    ]
    for name in names:
        assert sum(line.startswith(f"{name}: It ") for line in lines) == 1
    assert sum(line.startswith(f"{names[1]}: lobs.to_sparse: not measured") for line in lines) == 1
    assert "ms at best" in lines[-1]
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["speed", *names, *dense, *FAST, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [*found["networks"]] == names
    assert "ms at best" in found["advice"]
    for arguments, words in (
        (names, "--against: several networks"),
        ([names[0], names[0], *dense], "MODEL: speed_networks:pair is given more than once"),
    ):
        assert cli.main(["speed", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_a_folder_runs_on_random_tokens(capsys, tmp_path):
    pytest.importorskip("transformers")
    hf_folders.save(tmp_path / "model", "LlamaForCausalLM")
    arguments = ["speed", str(tmp_path / "model"), *FAST, "--length", "3", "--batch", "2"]
    assert cli.main(arguments) == 0
    assert "0.0% of the linear weights are zero" in capsys.readouterr().out
    assert cli.main([*arguments, "--length", "0"]) == 2
    assert "--length: 0" in capsys.readouterr().err


def test_what_it_cannot_time_is_said(capsys):
    for arguments, words in (
        (["speed_networks:triple"], "forward function"),
        (["speed_networks:dense"], "no batch"),
        (["speed_networks:pair", "--pairs", "0"], "--pairs: 0"),
        (["speed_networks:pair", "--runtime", "tensorrt"], "--runtime: 'tensorrt'"),
        (["nothing"], "is not a folder"),
    ):
        assert cli.main(["speed", *arguments]) == 2
        assert words in capsys.readouterr().err
