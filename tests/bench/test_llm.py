"""The benchmark on a language model: its statistics, and cases that are not run again."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers import hf_folders

from quality import calibration_texts
from quality.llm import __main__ as llm
from quality.llm import material, rivals


def test_differences_are_paired():
    """Each of 1, 3 and 2 has mean 2, and 1 / sqrt(3) is its standard error."""
    mean, error = llm.paired([11.0, 23.0, 32.0], [10.0, 20.0, 30.0])
    assert mean == pytest.approx(2.0)
    assert error == pytest.approx(3**-0.5)


def test_cases_that_are_known_are_not_run_again(tmp_path, monkeypatch, capsys):
    """A second call runs what was not asked for before, and nothing else."""
    ran = []

    def run(case, folder, arguments):
        ran.append((case["method"], case["target"]))
        nats = [3.0, 4.0] if case["target"] is None else [3.5, 4.7]
        return {"nats": nats, "cpu seconds": 1.0, "peak bytes": None}

    monkeypatch.setattr(llm, "run", run)
    monkeypatch.setattr(llm, "make_folder", lambda folder: None)
    words = ["bench", "--out", str(tmp_path / "out.json"), "--only", "sweep", "--targets", "70%"]
    monkeypatch.setattr(llm.sys, "argv", words)
    llm.main()
    assert ran == [("dense", None), ("sweep", "70%")]
    assert "| 70% | sweep | 60.34 | 0.6000 ± 0.1000 |" in capsys.readouterr().out
    monkeypatch.setattr(llm.sys, "argv", [*words, "2:4"])
    llm.main()
    assert ran[2:] == [("sweep", "2:4")]
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 3


def test_half_of_the_windows_are_of_each_text():
    """The first ones of each, and one more of the first text where their number is odd."""
    texts = {"text": torch.arange(10)[:, None], "written": torch.arange(10, 20)[:, None]}
    found = {kind: calibration_texts.calibration(texts, kind, 5) for kind in ("written", "both")}
    assert found["written"].flatten().tolist() == [10, 11, 12, 13, 14]
    assert found["both"].flatten().tolist() == [0, 1, 2, 10, 11]


@pytest.mark.parametrize(("target", "share"), [("70%", 0.7), ("2:4", 0.5)])
def test_llm_compressor_prunes_the_first_blocks_to_the_target(target, share, tmp_path):
    """The head, which is tied to the embeddings, and the other block stay as they were."""
    pytest.importorskip("llmcompressor")
    folder = hf_folders.save(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True)
    model = material.loaded(folder)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    rivals.by_product(model, torch.randint(hf_folders.VOCABULARY, (4, 16)), target, 1)
    pruned = [name for name in before if re.fullmatch(r"model.layers.0.*_proj.weight", name)]
    assert len(pruned) == 7
    for name, x in model.state_dict().items():
        if name in pruned:
            assert float((x == 0).float().mean()) == pytest.approx(share, abs=0.002)
        else:
            assert torch.equal(x, before[name])
