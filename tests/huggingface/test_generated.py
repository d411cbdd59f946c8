"""Calibration on text that the network writes itself."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import hf_folders

from lobs_native.cli import commands as cli
from lobs_native.cli import job
from lobs_native.errors import ArgumentError
from lobs_native.huggingface import checkpoint as hf
from lobs_native.huggingface.text import generated_batches

transformers = pytest.importorskip(
    "transformers", reason='transformers is not installed: pip install "lobs-native[hf]"'
)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Python's own, from packages that transformers imports.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]


@pytest.fixture
def source(tmp_path):
    return hf_folders.save(tmp_path / "in", "LlamaForCausalLM")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(hf_folders.text(lines=3))
    return path


def rows(found):
    return torch.cat([batch["input_ids"] for batch in found.batches])


def write(source, **options):
    """Half a dozen sequences of 10 tokens, and the model that wrote them."""
    model = hf_folders.network("LlamaForCausalLM")
    options = {"tokens": 65, "length": 10, "batch_size": 4, **options}
    return generated_batches(hf.examine(source), model, **options), model


def test_sequences_begin_as_the_prompts_do_and_a_seed_repeats_them(source, prompts):
    found, _ = write(source, prompts=prompts)
    assert [tuple(b["input_ids"].shape) for b in found.batches] == [(4, 10), (2, 10)]
    lines = [line.split()[:3] for line in prompts.read_text().splitlines()[3:]]
    begun = [[2, *(4 + int(word[1:]) for word in line)] for line in lines]  # after [CLS]
    assert rows(found)[:, :4].tolist() == begun + begun
    state = torch.get_rng_state()
    assert torch.equal(rows(write(source, prompts=prompts)[0]), rows(found))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(rows(write(source, prompts=prompts, seed=1)[0]), rows(found))
    assert found.settings["tokens"] == 60


def test_tokens_are_drawn_from_the_network_s_own_probabilities(source, prompts):
    """Of a network that always gives three tokens 1/2, 1/3 and 1/6, without those that would end
    the text; whatever its own settings for writing are."""
    model = hf_folders.network("LlamaForCausalLM", tie_word_embeddings=False)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # so that the logits are the same everywhere
        head = torch.nn.Linear(32, hf_folders.VOCABULARY)
        head.weight.zero_()
        head.bias.fill_(-60.0)
        head.bias[[10, 20, 30]] = torch.tensor([3.0, 2.0, 1.0]).log()
        head.bias[3] = 5.0  # the end of a text
    model.lm_head = head
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.1)
    found = generated_batches(hf.examine(source), model, tokens=6400, length=64, prompts=prompts)
    written = rows(found)[:, 4:].flatten()
    shares = [float((written == token).float().mean()) for token in (10, 20, 30)]
    assert shares == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 4}, "--tokens: 65 in sequences of 4"),
        ({"tokens": 9}, "--tokens: 9 in sequences of 10"),
        ({"length": 100}, "--length: 100; the network takes at most 64"),
    ],
)
def test_what_does_not_fit_is_refused(source, options, message):
    with pytest.raises(ArgumentError, match=message):
        write(source, **options)


def test_only_a_causal_language_model_writes(tmp_path):
    source = hf_folders.save(tmp_path / "encoder", "BertModel")
    with pytest.raises(ArgumentError, match="needs a causal language model, and BertModel"):
        generated_batches(hf.examine(source), hf_folders.network("BertModel"))


def test_without_prompts_there_must_be_a_token_that_begins_a_text(source):
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    assert tokenizer.get("bos_token") is None
    with pytest.raises(ArgumentError, match="--prompts: the tokenizer has no token that begins"):
        write(source)


def test_the_command_calibrates_on_it(source, prompts, tmp_path, capsys):
    """The report says so; prompts without it are refused."""
    line = ["prune", str(source), "--sparsity", "0.5", "--out", str(tmp_path / "out")]
    line += ["--tokens", "256", "--length", "16", "--prompts", str(prompts), "--seed", "5"]
    assert cli.main([*line, "--calibration", "generate", "--no-progress"]) == cli.OK
    settings = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]
    assert settings["text"] == "written by the network, seed 5"
    assert settings["tokens"] == 256
    assert cli.main([*line, "--calibration", str(prompts), "--overwrite"]) == cli.USAGE
    assert "--prompts: it is for --calibration generate" in capsys.readouterr().err


def test_several_texts_are_calibrated_on_together(source, prompts, tmp_path):
    """Their batches one after another, as each would be by itself; with what it was, and totals."""
    other = tmp_path / "other.txt"
    other.write_text(hf_folders.text(lines=200, words=30))
    how = {"tokens": 256, "length": 16}
    written = {**how, "prompts": prompts}
    parts = [job.find(str(source), ["generate"], written), job.find(str(source), [other], how)]
    found = job.find(str(source), ["generate", other], written)
    batches = [batch for part in parts for batch in part.batches]
    assert len(found.batches) == len(batches) == 4
    for a, b in zip(found.batches, batches, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
    described = [{k: part.settings[k] for k in ("text", "tokens")} for part in parts]
    assert [{k: x[k] for k in ("text", "tokens")} for x in found.settings["texts"]] == described
    assert found.settings["tokens"] == 512
    assert found.settings["tokens held back"] == parts[1].settings["tokens held back"] > 0
    assert found.measure() == parts[1].measure()


def test_a_text_is_given_once(source, prompts, capsys):
    line = ["prune", str(source), "--sparsity", "0.5", "--out", "out"]
    line += ["--calibration", str(prompts)] * 2
    assert cli.main(line) == cli.USAGE
    assert "is given twice, and would count twice" in capsys.readouterr().err
