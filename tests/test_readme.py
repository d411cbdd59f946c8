"""What the README and the package's docstring show is run here."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import torch

import lobs_native

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_ten_lines_run_and_say_what_they_claim(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["0", "0.8"], ["2", "0.8"]]
    measured, bound = (float(x) for x in lines[2].split(" <= "))
    assert measured <= bound
    assert (tmp_path / "report.html").is_file()


def test_the_names_in_the_second_example_exist():
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    fields = re.findall(r"out\.(\w+)", code)
    assert set(fields) <= set(lobs_native.PrunedWeight.__dataclass_fields__)
    assert "lobs.Hessian(" in code


def test_the_second_and_third_examples_run():
    second, third = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1:3]
    generator = torch.Generator().manual_seed(0)
    names = {
        "lobs": lobs_native,
        "inputs": torch.rand(500, 64, generator=generator),
        "token_weights": torch.ones(500),
        "weight": torch.randn(32, 64, generator=generator),
        "bias": torch.randn(32, generator=generator),
    }
    exec(compile(second + third, "README.md", "exec"), names)
    assert names["half"].error <= names["out"].error * 1.001
    assert int((names["two_of_four"].weight == 0).sum()) == 32 * 32


def test_the_training_example_keeps_the_zeros():
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[3]
    model, x = torch.nn.Linear(8, 4), torch.rand(50, 8)
    report = lobs_native.prune(model, [x], sparsity=0.5, progress=False)

    def train(model: torch.nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters())
        model(x).square().sum().backward()
        optimizer.step()

    names = {"lobs": lobs_native, "model": model, "report": report, "train": train}
    exec(compile(code, "README.md", "exec"), names)
    assert int((model.weight == 0).sum()) == 16


def test_the_example_of_torch_prune_runs():
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[4]
    model, batches = torch.nn.Sequential(torch.nn.Linear(8, 4)), [torch.rand(50, 8)]
    exec(compile(code, "README.md", "exec"), {"model": model, "batches": batches})
    assert int((model[0].weight_orig == 0).sum()) == int((model[0].weight_mask == 0).sum()) == 16


def test_the_files_it_points_at_exist():
    for name in re.findall(r"`((?:csrc|python|docs|bench)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`python (bench/\w+\.py)`", README):
        assert (ROOT / name).is_file(), name


def test_the_docstring_s_example_is_true():
    assert doctest.testmod(lobs_native).failed == 0
