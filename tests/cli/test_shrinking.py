"""``lobs-native shrink`` on folders: stock transformers loads what it writes."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
import torch
from helpers import hf_folders

from lobs_native.cli import commands as cli
from lobs_native.network import layerwise
from lobs_native.rundir import inspection

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Python's own, from packages that transformers imports.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(hf_folders.text())
    return path


def shrink(source, text, *more, code=cli.OK):
    out = source.parent / "out"
    arguments = ["--calibration", str(text), "--length", "32", "--out", str(out), *more]
    assert cli.main(["shrink", str(source), *arguments]) == code
    return out


def test_a_folder_gets_smaller_and_only_sizes_change_in_its_configuration(tmp_path, text, capsys):
    source = hf_folders.save(tmp_path / "model", "LlamaForCausalLM")
    out = shrink(source, text, "--neurons", "0.5", "--heads", "0.5", "--multiple", "4")
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, out))
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed <= {
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    }
    assert after["intermediate_size"] * 2 == before["intermediate_size"]
    report = json.loads((out / "report.json").read_text())
    assert report["configured"]
    assert (out / "report.html").is_file()
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == report["parameters"][1]
    feed_forward = model.model.layers[0].mlp.up_proj.weight
    assert feed_forward.shape[0] == after["intermediate_size"]
    with torch.no_grad():
        assert model(torch.arange(4, 24).reshape(2, 10)).logits.isfinite().all()
    assert {p.name for p in source.iterdir()} <= {p.name for p in out.iterdir()}
    assert "multiplications for a row in the layers concerned" in capsys.readouterr().out


def test_json_is_all_of_standard_output(tmp_path, text, capsys):
    source = hf_folders.save(tmp_path / "model", "BertModel")
    out = shrink(source, text, "--parameters", "0.6", "--multiple", "1", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "report.json").read_text())
    assert printed["multiplications"][1] <= 0.6 * printed["multiplications"][0]
    assert {layer["kind"] for layer in printed["layers"]} == {"neurons"}
    assert any("heads stay" in note for note in printed["notes"])


def test_blocks_go_and_the_configuration_counts_what_is_left(tmp_path, text, capsys):
    source = hf_folders.save(tmp_path / "model", "LlamaForCausalLM")
    out = shrink(source, text, "--blocks", "0.5", "--neurons", "0.5", "--multiple", "4")
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, out))
    assert after["num_hidden_layers"] * 2 == before["num_hidden_layers"]
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    report = json.loads((out / "report.json").read_text())
    assert report["configured"]
    assert sum(p.numel() for p in model.parameters()) == report["parameters"][1]
    assert report["layers"][0]["kind"] == "blocks"
    assert f"{before['num_hidden_layers']} blocks" in capsys.readouterr().out


def test_a_budget_takes_blocks_where_they_are_named(tmp_path, text):
    source = hf_folders.save(tmp_path / "model", "LlamaForCausalLM")
    out = shrink(source, text, "--parameters", "0.5", "--kinds", "blocks", "--pairs", "0")
    report = json.loads((out / "report.json").read_text())
    assert {layer["kind"] for layer in report["layers"]} == {"blocks"}
    assert report["pruning"] is None
    assert not (out / "report.html").exists()


def test_wrong_usage_is_one_line_and_nothing_is_written(tmp_path, text, capsys):
    source = hf_folders.save(tmp_path / "model", "LlamaForCausalLM")
    capsys.readouterr()
    wrong = [
        (
            "--latency, --heads, --neurons, --channels, --experts, --blocks: give one",
            [],
        ),
        ("--experts, --blocks: give one", ["--parameters", "0.5", "--heads", "0.5"]),
        ("--experts, --blocks: give one", ["--parameters", "0.5", "--multiplications", "0.5"]),
        ("--neurons: 0.0; something has to stay", ["--neurons", "0"]),
        ("--heads: 1.5; it is a fraction", ["--heads", "1.5"]),
        (
            "--heads, --neurons, --channels, --experts, --blocks: with ",
            ["--neurons", "1"],
        ),  # all units stay
        ("--multiple: ", ["--neurons", "0.5", "--multiple", "0"]),
        ("--parameters: 0.001; with the fewest", ["--parameters", "0.001"]),
        ("--damping: ", ["--neurons", "0.5", "--damping", "-1"]),
    ]
    for message, options in wrong:
        out = shrink(source, text, *options, code=cli.USAGE)
        assert not out.exists()
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert message in said
        assert "keep[" not in said


def test_a_run_that_was_ended_is_resumed_with_the_same_bytes(tmp_path, text, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf_folders.save(tmp_path / "model", "LlamaForCausalLM")
    options = ["--calibration", str(text), "--length", "32", "--multiple", "4", "--no-progress"]
    line = ["shrink", "model", *options, "--neurons", "0.5", "--heads", "0.5", "--out"]
    assert cli.main([*line, "whole"]) == cli.OK
    real, pruned = layerwise.prune_layer, []

    def ended(*args: Any, **kwargs: Any) -> Any:
        pruned.append(args[0].layer.name)
        if len(pruned) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(layerwise, "prune_layer", ended)
    assert cli.main([*line, "out", "--run-dir", "run"]) == cli.STOPPED
    assert not (tmp_path / "out").exists()
    state = inspection.inspect("run")
    assert [layer["name"] for layer in state["done"]] == pruned
    (tmp_path / "run").rename("moved")
    assert cli.main(["resume", "moved"]) == cli.OK
    assert len(pruned) == state["layers"]  # none twice
    settings = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]
    assert settings["resumed layers"] == 2
    whole, out = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert whole.read_bytes() == out.read_bytes()
    capsys.readouterr()
    assert cli.main(["resume", "moved"]) == cli.OK
    assert "nothing is left to do" in capsys.readouterr().out


def test_the_run_of_another_command_is_not_continued(tmp_path, text, capsys):
    source = hf_folders.save(tmp_path / "model", "BertModel")
    run = ["--run-dir", str(tmp_path / "run")]
    shrink(source, text, "--neurons", "0.5", *run)
    for message, options in [
        ("this is another run: config.overrides", ["--neurons", "0.25"]),
        ("--run-dir: ", ["--neurons", "0.5", "--resume", "never"]),
        ("another run: ", ["--neurons", "0.5", "--method", "wanda"]),
    ]:
        capsys.readouterr()
        shrink(source, text, *options, *run, "--overwrite", code=cli.USAGE)
        assert message in capsys.readouterr().err
