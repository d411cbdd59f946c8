"""Reports as JSON, and files that are written atomically."""

from __future__ import annotations

import json
import os

import pytest
import torch
from helpers import reports
from helpers.reports import layer
from torch import nn

import lobs_native as lobs
from lobs_native.cli.tables import report_table
from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.files.atomic import write_file
from lobs_native.report.review import notes_of
from lobs_native.solvers.patterns import Unstructured


@pytest.fixture
def report():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return lobs.prune(model, [torch.randn(40, 6)], sparsity=0.5, inputs="dense", progress=False)


def test_json_holds_everything_but_the_masks(report, tmp_path):
    path = report.save(tmp_path / "new folder" / "report.json")
    saved = json.loads(path.read_text())
    assert saved["format"] == 1
    assert saved["sparsity"] == 0.5
    assert [x["name"] for x in saved["layers"]] == ["0", "2"]
    assert saved["layers"][0]["error"] == report.layers[0].error
    bound = saved["error_bound"]
    assert bound["spectral"] == report.error_bound.spectral
    assert sum(bound["parts"].values()) == pytest.approx(bound["spectral"])
    assert bound["relative"]["measured"] == bound["measured"] / bound["output_norm"]
    assert saved["settings"]["inputs"] == "dense"
    assert saved["versions"]["torch"] == torch.__version__
    assert "masks" not in saved
    assert list(report.masks) == ["0", "2"]


def test_settings_of_any_kind_can_be_saved(tmp_path):
    report = lobs.prune(
        nn.Sequential(nn.Linear(6, 8)),
        [torch.randn(40, 6)],
        sparsity=0.5,
        include={"0"},
        overrides={"0": {"pattern": Unstructured(), "sparsity": torch.tensor(0.25)}},
        progress=False,
    )
    saved = json.loads(report.save(tmp_path / "r.json").read_text())["settings"]
    assert saved["include"] == ["0"]
    assert saved["overrides"]["0"]["pattern"] == "Unstructured()"


def test_infinities_are_legal_json(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight[:, 0] = 0
    x = torch.zeros(4, 3)
    x[:, 0] = 1.0  # the layer's output is zero: relative to it, any error is infinite
    report = lobs.prune(model, [x], sparsity=0.5, method="magnitude", progress=False)
    json.loads(
        report.save(tmp_path / "r.json").read_text(), parse_constant=lambda c: pytest.fail(c)
    )


def test_other_names_are_refused(report, tmp_path):
    with pytest.raises(ArgumentError, match=r"report\.txt.*\.json or \.html"):
        report.save(tmp_path / "report.txt")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_atomically_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a b\n.txt"
    write_file(path, "old")
    assert write_file(path, b"new") == path
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == [path.name]
    assert path.stat().st_mode & 0o400


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failed_write_keeps_the_old_file_and_cleans_up(tmp_path, monkeypatch, call):
    path = tmp_path / "report.json"
    write_file(path, "old")

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(CheckpointError, match=r"report\.json: .*3 bytes.*No space"):
        write_file(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        write_file(tmp_path / "file" / "report.json", "{}")


def test_notes_that_differ_in_numbers_alone_are_one_with_an_example():
    first, second = (
        "7 rows were padding and were left out",
        "12 rows were padding and were left out",
    )
    layers = [layer("a", notes=(first, "odd")), layer("b", notes=(second,)), layer("c")]
    assert [(x.text, x.layers) for x in notes_of(layers)] == [
        (f"for example, {first}", ("a", "b")),
        ("odd", ("a",)),
    ]
    alike = [layer("a", notes=(first,)), layer("b", notes=(first,))]
    assert [(x.text, x.layers) for x in notes_of(alike)] == [(first, ("a", "b"))]
    assert "2 layers (a to b): for example, 7 rows" in report_table(reports.report(*layers))
