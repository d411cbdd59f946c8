"""Hugging Face folders: the network that is read back is the one that was pruned in memory."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import hf_folders
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.cli import commands as cli
from lobs_native.errors import ArgumentError, CheckpointError, LobsError
from lobs_native.huggingface import checkpoint as hf
from lobs_native.huggingface import library
from lobs_native.huggingface.text import text_batches
from lobs_native.network.pruning import Pruning

transformers = pytest.importorskip(
    "transformers", reason='transformers is not installed: pip install "lobs-native[hf]"'
)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Python's own, from packages that transformers imports.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]

KINDS = (
    "BertModel",
    "BertForMaskedLM",
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "MixtralForCausalLM",
)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(hf_folders.text())
    return path


def prune(source: Path, text: Path, *more: str, code: int = cli.OK) -> Path:
    """Prune a folder with the command line into a folder beside it."""
    out = source.parent / "out"
    arguments = ["--sparsity", "0.5", "--length", "32", "--out", str(out), *more]
    assert cli.main(["prune", str(source), "--calibration", str(text), *arguments]) == code
    return out


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.no_grad():
        return model.eval()(input_ids=ids)[0]


def headers(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {k: file.get_slice(k).get_dtype() for k in file.keys()}  # noqa: SIM118
    return found


# ---- end to end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_holds_the_network_pruned_in_memory(tmp_path, text, kind, dtype, monkeypatch):
    source = hf_folders.save(tmp_path / "in", kind, dtype=dtype)
    in_memory: list[Tensor] = []
    save = hf.save

    def saving(model: nn.Module, *rest: Any, **more: Any) -> dict[str, Any]:
        in_memory.append(logits(model))
        return save(model, *rest, **more)

    monkeypatch.setattr(hf, "save", saving)
    out = prune(source, text, "--masks")
    again, info = getattr(transformers, kind).from_pretrained(
        out, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.dtype == dtype
    assert torch.equal(logits(again), in_memory[0]), "bit by bit"
    assert not torch.equal(logits(again), logits(hf_folders.network(kind).to(dtype)))
    assert headers(out) == headers(source)

    report = json.loads((out / "report.json").read_text())
    masks = load_file(out / "masks.safetensors")
    assert [layer["name"] for layer in report["layers"]] == list(masks) or set(masks) == {
        layer["name"] for layer in report["layers"]
    }
    weights = dict(again.named_parameters())
    zeros = 0
    for layer in report["layers"]:
        name = layer["name"]
        mask = masks[name]
        weight = weights[name] if name in weights else weights[f"{name}.weight"]  # or experts
        assert mask.dtype == torch.bool
        assert list(mask.shape) == layer["shape"] == list(weight.shape)
        assert torch.equal(weight == 0, ~mask)
        assert int((~mask).sum()) == round(layer["sparsity"] * mask.numel()) == mask.numel() // 2
        zeros += int((weight == 0).sum())
    assert zeros == report["removed"] > 0
    lobs.keep_masks(again, masks).remove()  # they are masks of this network


def test_the_command_prunes_as_the_python_function_does(tmp_path, text):
    source = hf_folders.save(tmp_path / "in", "LlamaForCausalLM")
    out = prune(source, text)
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    found = text_batches(hf.examine(source), model, text, length=32)
    lobs.prune(
        model,
        found.batches,
        sparsity=0.5,
        exclude="lm_head",
        forward=lambda m, batch: m(**batch, use_cache=False)[0],
        progress=False,
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_everything_but_the_weights_is_copied_unchanged(tmp_path, text):
    source = hf_folders.save(tmp_path / "in")
    (source / "LICENSE").write_text("do as you like")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    save_file({"weight": torch.ones(2)}, source / "1_Pooling" / "model.safetensors")
    (source / "onnx").mkdir()
    (source / "onnx" / "model.onnx").write_text("the dense network")
    (source / "pytorch_model.bin").write_text("a pickle, never opened")
    (source / ".cache").mkdir()
    (source / ".cache" / "x").write_text("hidden")
    for name in ("report.json", "masks.safetensors"):
        (source / name).write_text("of an earlier run")
    out = prune(source, text)
    for path in source.rglob("*"):
        name = path.relative_to(source)
        same = (out / name).is_file() and (out / name).read_bytes() == path.read_bytes()
        left_out = {"model.safetensors", "report.json", "masks.safetensors", "pytorch_model.bin"}
        if path.is_file():
            expected = str(name) not in left_out and name.parts[0] not in {".cache", "onnx"}
            assert same == expected, name
    assert not (out / "masks.safetensors").exists()
    settings = json.loads((out / "report.json").read_text())["settings"]
    assert settings["files left out"] == ["onnx/model.onnx", "pytorch_model.bin"]


def test_large_weights_are_written_in_shards_with_an_index(tmp_path, text):
    source = hf_folders.save(tmp_path / "in", "LlamaForCausalLM", shard="20KB")
    assert len(list(source.glob("model-*.safetensors"))) > 3
    out = prune(source, text, "--shard-size", "30kB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {path.name for path in out.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert len(files) > 2
    assert files.isdisjoint({"model.safetensors"})
    assert set(index["weight_map"]) == set(headers(source))
    whole = prune(source, text, "--overwrite")
    assert {path.name for path in whole.glob("*.safetensors")} == {"model.safetensors"}
    assert not (whole / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM"])
def test_the_layer_of_the_logits_is_skipped_and_reported(tmp_path, text, kind):
    source = hf_folders.save(tmp_path / "in", kind)
    dense = hf_folders.network(kind).get_output_embeddings()
    out = prune(source, text)
    again = getattr(transformers, kind).from_pretrained(out)
    assert torch.equal(again.get_output_embeddings().weight, dense.weight)
    report = json.loads((out / "report.json").read_text())
    name = "cls.predictions.decoder" if kind == "BertForMaskedLM" else "lm_head"
    skipped = {s["name"]: s["reason"] for s in report["skipped"]}
    assert "logits" in skipped.pop(name)
    assert all("looked up" in reason for reason in skipped.values())


def test_tied_embeddings_stay_tied(tmp_path, text):
    source = hf_folders.save(tmp_path / "in", "LlamaForCausalLM", tie_word_embeddings=True)
    out = prune(source, text)
    assert "lm_head.weight" not in headers(out)
    again = transformers.LlamaForCausalLM.from_pretrained(out)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    prune(source, text, "--include", "lm_head", "--overwrite", code=cli.USAGE)


def test_the_head_is_pruned_if_it_is_included(tmp_path, text):
    source = hf_folders.save(tmp_path / "in", "LlamaForCausalLM")
    out = prune(source, text, "--include", "lm_*")
    again = transformers.LlamaForCausalLM.from_pretrained(out)
    assert int((again.lm_head.weight == 0).sum()) == again.lm_head.weight.numel() // 2


def test_a_second_run_replaces_only_a_result_and_only_on_request(tmp_path, text, capsys):
    source = hf_folders.save(tmp_path / "in")
    out = prune(source, text)
    first = (out / "model.safetensors").read_bytes()
    prune(source, text, code=cli.USAGE)
    assert "not empty" in capsys.readouterr().err
    prune(source, text, "--overwrite", "--method", "magnitude")
    assert (out / "model.safetensors").read_bytes() != first
    (out / "report.json").unlink()
    prune(source, text, "--overwrite", code=cli.USAGE)
    assert "not an earlier result" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "text.txt"]


def test_an_interrupted_run_leaves_nothing(tmp_path, text, monkeypatch, capsys):
    source = hf_folders.save(tmp_path / "in")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hf, "compare", interrupt)  # everything has been written by then
    prune(source, text, code=cli.INTERRUPTED)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "text.txt"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_original_weights_are_not_copied_where_the_folder_has_them(
    tmp_path, text, dtype, monkeypatch
):
    source = hf_folders.save(tmp_path / "in", "LlamaForCausalLM", dtype=dtype)
    original = load_file(source / "model.safetensors")
    in_memory: list[int] = []

    def failing(self: Pruning, *rest: Any) -> None:
        session, names = self.session, list(self.session.originals)
        in_memory.append(session.originals.in_memory)
        parameters = dict(session.model.named_parameters())
        assert len(names) == 7 * len(session.model.model.layers)
        with torch.no_grad():
            for name in names:
                parameters[name].zero_()
                session.changed.add(name)
        restored.update(parameters)
        raise KeyboardInterrupt

    restored: dict[str, nn.Parameter] = {}
    monkeypatch.setattr(Pruning, "_prune", failing)
    prune(source, text, code=cli.INTERRUPTED)
    assert in_memory == [0]
    assert all(torch.equal(value, restored[name]) for name, value in original.items())


def test_files_that_hold_another_network_are_an_error(tmp_path, text, monkeypatch, capsys):
    source = hf_folders.save(tmp_path / "in")
    load = hf._from_pretrained

    def change(transformers: Any, kind: Any, folder: Path, dtype: torch.dtype) -> Any:
        for path in folder.glob("model.safetensors") if folder != source else ():
            tensors = load_file(path)
            tensors["encoder.layer.1.output.dense.weight"][3, 4] += 1e-3
            save_file(tensors, path, metadata={"format": "pt"})
        return load(transformers, kind, folder, dtype)

    monkeypatch.setattr(hf, "_from_pretrained", change)
    prune(source, text, code=cli.FAILED)
    message = "encoder.layer.1.output.dense.weight differs from what was written"
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "text.txt"]


def test_a_tensor_pruned_in_another_dtype_keeps_its_own_and_is_reported(tmp_path, text, capsys):
    source = hf_folders.save(tmp_path / "in", dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    name, unpruned = "encoder.layer.0.output.dense.weight", "encoder.layer.0.output.LayerNorm.bias"
    for changed in (name, unpruned):
        tensors[changed] = tensors[changed].float()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = prune(source, text)
    assert headers(out)[name] == headers(out)[unpruned] == "F32"
    settings = json.loads((out / "report.json").read_text())["settings"]
    assert settings["dtype"] == "bfloat16"
    assert settings["tensors pruned in another dtype"] == [name]
    assert f"lobs-native: tensors pruned in another dtype: {name}\n" in capsys.readouterr().err


def test_without_architectures_automodel_chooses_the_class(tmp_path, text):
    source = hf_folders.save(tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    del config["architectures"]
    (source / "config.json").write_text(json.dumps(config))
    settings = json.loads((prune(source, text) / "report.json").read_text())["settings"]
    assert settings["model class"] == "BertModel"


# ---- text ----------------------------------------------------------------------------------------


def test_an_encoder_reads_lines_and_no_batch_is_padded(tmp_path, text):
    source = hf_folders.save(tmp_path / "in", "BertModel")
    found = text_batches(
        hf.examine(source), hf_folders.network("BertModel"), text, lines=10, length=27, batch_size=3
    )
    sizes = [tuple(batch["input_ids"].shape) for batch in found.batches]
    assert sizes == [(3, 26), (1, 26), (3, 27), (3, 27)]  # 24, 25, 26 words, 2 tokens more, cut
    for batch in found.batches:
        assert batch["input_ids"][:, 0].tolist() == [2] * len(batch["input_ids"])
        assert batch["input_ids"].min() > 0, "no padding, no unknown words"
        assert bool(batch["attention_mask"].all())
    assert found.settings["lines"] == 10
    assert found.settings["tokens"] == 4 * 26 + 6 * 27
    assert found.settings["text as"] == "lines of at most 27 tokens"


def test_a_causal_language_model_reads_blocks(tmp_path, text):
    source = hf_folders.save(tmp_path / "in", "GPT2LMHeadModel")
    model = hf_folders.network("GPT2LMHeadModel")
    found = text_batches(hf.examine(source), model, text, lines=5, length=30, batch_size=3)
    assert [tuple(b["input_ids"].shape) for b in found.batches] == [(3, 30), (1, 30)]
    rows = torch.cat([b["input_ids"] for b in found.batches]).flatten().tolist()
    words = [line.split() for line in text.read_text().splitlines()[3:8]]
    expected = [2, *(4 + int(w[1:]) for line in words for w in line), 3]
    assert rows == expected[:120]
    assert found.settings["text as"] == "blocks of 30 tokens"


@pytest.mark.parametrize(("kind", "length"), [("GPT2LMHeadModel", 30), ("BertModel", 64)])
def test_so_many_tokens_are_read_in_whole_sequences(tmp_path, text, kind, length):
    source = hf_folders.save(tmp_path / "in", kind)
    checkpoint, model = hf.examine(source), hf_folders.network(kind)
    every = text_batches(checkpoint, model, text, length=length).batches
    found = text_batches(checkpoint, model, text, length=length, tokens=100)
    taken = [batch["input_ids"] for batch in found.batches]
    assert sum(x.numel() for x in taken) == found.settings["tokens"] == (90 if length == 30 else 81)
    rows = {tuple(row.tolist()) for batch in every for row in batch["input_ids"]}
    assert all(tuple(row.tolist()) in rows for x in taken for row in x)
    # More than the text has: all of it, beyond the usual number of lines.
    everything = text_batches(checkpoint, model, text, length=length, tokens=10**9)
    assert everything.settings["lines"] == 40
    with pytest.raises(ArgumentError, match="--tokens: 5; "):
        text_batches(checkpoint, model, text, length=length, tokens=5)


def test_the_perplexity_on_the_lines_after_the_calibration_is_reported(tmp_path, text, capsys):
    source = hf_folders.save(tmp_path / "in", "GPT2LMHeadModel")
    out = prune(source, text, "--lines", "12")
    settings = json.loads((out / "report.json").read_text())["settings"]
    # Three of the lines after the first twelve (24, 25 and 26 words): two blocks of 32.
    model = hf_folders.network("GPT2LMHeadModel")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    ids = tokenizer("\n".join(text.read_text().splitlines()[15:18]))["input_ids"][:64]
    rows = torch.tensor(ids).reshape(2, 32)
    assert settings["tokens held back"] == 64
    again = transformers.GPT2LMHeadModel.from_pretrained(out)
    for network, when in ((model, "before"), (again.eval(), "after")):
        with torch.no_grad():
            expected = float(network(input_ids=rows, labels=rows).loss.exp())
        assert settings[f"perplexity {when}"] == pytest.approx(expected, rel=1e-5)
    assert "on 64 other tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "lines"), [("GPT2LMHeadModel", "40"), ("BertModel", "12")])
def test_without_lines_after_the_calibration_there_is_no_perplexity(tmp_path, text, kind, lines):
    found = prune(hf_folders.save(tmp_path / "in", kind), text, "--lines", lines)
    settings = json.loads((found / "report.json").read_text())["settings"]
    assert not any("perplexity" in name for name in settings)


# ---- damaged folders -----------------------------------------------------------------------------


def without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def configured(**changed: Any) -> Any:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changed}))

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_of_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"pooler.dense.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of(text: str) -> Any:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def twice(folder: Path) -> None:
    """Two entries of the same name: which of them counts depends on the reader."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    assert data.count(b'"pooler.dense.bias"') == 1
    again = data.replace(b'"embeddings.LayerNorm.bias"', b'"pooler.dense.bias"        ')
    path.write_bytes(again)


def long_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((17 << 20).to_bytes(8, "little"))
    os.truncate(path, 18 << 20)


def changed_tensors(change: Any) -> Any:
    def run(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return run


def lacking(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    del tensors["pooler.dense.weight"]
    return tensors


def not_a_number(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors["pooler.dense.weight"][2, 3] = float("nan")
    return tensors


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


WRONG: dict[str, tuple[Any, type[LobsError], str]] = {
    "no config": (without("config.json"), ArgumentError, "has no config.json; name a folder"),
    "config cut": (
        lambda f: (f / "config.json").write_text('{"a":'),
        CheckpointError,
        "config.json cannot be read as JSON",
    ),
    "config a list": (
        lambda f: (f / "config.json").write_text("[]"),
        CheckpointError,
        "config.json holds a list",
    ),
    "no weights": (without("model.safetensors"), ArgumentError, "has no model.safetensors"),
    "pickle": (
        pickled,
        ArgumentError,
        "pytorch_model.bin, a pickled file.*save it as safetensors",
    ),
    "cut": (cut, CheckpointError, "model.safetensors: is not a complete safetensors file"),
    "empty": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        CheckpointError,
        "not a complete safetensors file",
    ),
    "tensor twice": (twice, CheckpointError, "'pooler.dense.bias' occurs twice"),
    "header of 17 MB": (long_header, CheckpointError, "a header of 17825792 bytes; the limit is"),
    "index key twice": (index_of('{"weight_map":{},"weight_map":{}}'), CheckpointError, "twice"),
    "shard elsewhere": (
        index_of('{"weight_map":{"a":"../in/model.safetensors"}}'),
        CheckpointError,
        "lists '../in/model.safetensors'",
    ),
    "shard missing": (index_of_nothing, CheckpointError, "lists 'model-00001-of-00002"),
    "quantised": (
        configured(quantization_config={"quant_method": "gptq"}),
        ArgumentError,
        "quantised.*floating-point checkpoint",
    ),
    "float8": (
        changed_tensors(lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()}),
        ArgumentError,
        "F8_E4M3, which is quantised",
    ),
    "integers": (
        changed_tensors(lambda t: {k: v.to(torch.int8) for k, v in t.items()}),
        CheckpointError,
        "no floating-point weights",
    ),
    "adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        ArgumentError,
        "adapter.*merge it",
    ),
    "weights missing": (
        changed_tensors(lacking),
        CheckpointError,
        "lacks 1 weights of BertModel, which would be random: pooler.dense.weight",
    ),
    "unknown type": (
        configured(model_type="never_heard_of", architectures=["NeverHeardOf"]),
        CheckpointError,
        "transformers cannot load",
    ),
    "shapes differ": (configured(intermediate_size=47), CheckpointError, "cannot load"),
    "not a number": (changed_tensors(not_a_number), lobs.NonFiniteError, r"nan at \(2, 3\)"),
    "no tokenizer": (no_tokenizer, ArgumentError, "has no tokenizer.*copy its files there"),
    "tokenizer cut": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        CheckpointError,
        "transformers cannot load the tokenizer",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_damaged_folder_is_refused_and_nothing_is_written(tmp_path, text, wrong, capsys):
    change, error, message = WRONG[wrong]
    source = hf_folders.save(tmp_path / "in")
    change(source)
    capsys.readouterr()  # discard what transformers prints while it saves
    code = cli.USAGE if error is ArgumentError else cli.FAILED
    prune(source, text, code=code)
    captured = capsys.readouterr()
    assert captured.out == ""
    with pytest.raises(error, match=message):
        _raise_again(source, text)
    (line,) = captured.err.splitlines()
    assert line.startswith("lobs-native: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "text.txt"]


def _raise_again(source: Path, text: Path) -> None:
    checkpoint = hf.examine(source)
    model = hf.load(checkpoint)
    found = text_batches(checkpoint, model, text, length=32)
    lobs.prune(model, found.batches, sparsity=0.5, forward=hf.first_output, progress=False)


def test_a_tokenizer_of_another_network_is_refused(tmp_path, text):
    source = hf_folders.save(tmp_path / "in", vocab_size=30)
    with pytest.raises(CheckpointError, match=r"returns token 6\d, but the network knows 30"):
        _raise_again(source, text)


def test_a_text_of_unknown_words_is_refused(tmp_path, text):
    source = hf_folders.save(tmp_path / "in")
    text.write_text(hf_folders.text().replace("w", "v"))
    with pytest.raises(ArgumentError, match=r"9\d % of its tokens are unknown to the tokenizer"):
        _raise_again(source, text)


def test_an_encoder_of_sounds_is_refused_with_a_way_out(tmp_path):
    config = transformers.WhisperConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "in")
    with pytest.raises(ArgumentError, match=r"reads input_features.*module:function"):
        hf.load(hf.examine(tmp_path / "in"))


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    source = hf_folders.save(tmp_path / "in")
    checkpoint = hf.examine(source)  # needs only safetensors
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LobsError, match=r'pip install "lobs-native\[hf\]"'):
        hf.load(checkpoint)


def test_the_oldest_transformers_is_the_one_of_the_extra():
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert 'hf = ["transformers>={}.{}"]'.format(*library.OLDEST) in project


def test_an_old_transformers_is_refused(tmp_path, monkeypatch):
    source = hf_folders.save(tmp_path / "in")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.55.4")
    with pytest.raises(LobsError, match=r"4\.55\.4 is too old: pip install .transformers>=4\.56"):
        hf.load(hf.examine(source))


def test_within_a_limit_files_are_small_and_the_network_is_given_up_before_it_is_read(tmp_path):
    checkpoint = hf.examine(hf_folders.save(tmp_path / "in", "LlamaForCausalLM"))
    model, out = hf.load(checkpoint), tmp_path / "out"
    before = logits(model)
    out.mkdir()
    hf.save(model, checkpoint, out, {}, shard_bytes=10**9, memory=60_000)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    sizes = [path.stat().st_size for path in out.glob("model*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) < 32_000  # with the header
    again = transformers.LlamaForCausalLM.from_pretrained(out)
    assert torch.equal(logits(again), before)
