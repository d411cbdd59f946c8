"""LOBSModifier inside llm-compressor's oneshot, on a tiny Llama with local data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lobs_native as lobs

pytest.importorskip("llmcompressor", reason="llmcompressor is not installed")
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import active_session
from llmcompressor.modifiers.factory import ModifierFactory
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lobs_native.compat.llmcompressor import LOBSModifier

pytestmark = [
    pytest.mark.filterwarnings("default"),  # the host warns about itself
    pytest.mark.usefixtures("one_thread", "_offline"),
]
WORDS = 48
LINEAR = 14  # linear layers in the decoder


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with a tokenizer: oneshot reads its configuration from its path."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w1"))
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(
        path
    )
    return path


@pytest.fixture
def model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def sentences(rows: int = 12, length: int = 10, padded: bool = False) -> Dataset:
    ids = torch.randint(2, WORDS, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            mask[row, length - 1 - row % 5 :] = 0
        ids[mask == 0] = 0
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})


def run(model: Any, *modifiers: Any, dataset: Any = None, **arguments: Any) -> None:
    arguments = {"shuffle_calibration_samples": False, **arguments}
    data = sentences() if dataset is None else dataset
    oneshot(model=model, dataset=data, recipe=list(modifiers), **arguments)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def zeros(module: nn.Linear) -> int:
    return int((module.weight == 0).sum())


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moments_of(model: nn.Module, dataset: Dataset) -> dict[str, lobs.Hessian]:
    """Second moments of all linear layers, summed by hooks of our own."""
    found: dict[str, lobs.Hessian] = {}
    handles = []
    for name, module in linears(model).items():
        found[name] = lobs.Hessian(module.in_features, bias=module.bias is not None)
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, name=name: found[name].update(args[0], mask) and None
            )
        )
    with torch.no_grad():
        for row in dataset.with_format("torch"):
            mask = row["attention_mask"][None].double()
            model(input_ids=row["input_ids"][None], attention_mask=row["attention_mask"][None])
    for handle in handles:
        handle.remove()
    return found


def same(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equality up to the order in which batches are summed, which the host's sampler decides."""
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    return torch.equal(ours == 0, expected == 0)


METHODS = ["exact", "admm", "sweep", "lobs", "magnitude", "wanda"]


@pytest.mark.parametrize("method", METHODS)
def test_half_of_every_layer_is_removed_but_not_the_head(model, method):
    before = model.lm_head.weight.detach().clone()
    modifier = LOBSModifier(sparsity=0.5, method=method, ignore=["lm_head"])
    run(model, modifier)
    for name, module in linears(model).items():
        assert zeros(module) == (0 if name == "lm_head" else module.weight.numel() // 2), name
    assert torch.equal(model.lm_head.weight, before)
    assert {layer.method for layer in modifier.result.layers} == {method}
    assert len(modifier.result.layers) == LINEAR
    assert modifier.result.sparsity == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_two_of_every_four_neighbours_are_kept(model, method):
    run(model, LOBSModifier(mask_structure="2:4", method=method, ignore="re:.*lm_head"))
    for name, module in linears(model).items():
        if name != "lm_head":
            left = (module.weight != 0).reshape(len(module.weight), -1, 4).sum(2)
            assert bool((left == 2).all()), name


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_are_those_of_prune_weight_on_the_same_second_moments(model, method):
    before, moments = weights(model), moments_of(model, sentences())
    run(model, LOBSModifier(sparsity=0.5, method=method), pipeline="basic")
    for name, module in linears(model).items():
        bias = before.get(f"{name}.bias")
        out = lobs.prune_weight(
            before[f"{name}.weight"], moments[name], sparsity=0.5, method=method, bias=bias
        )
        assert same(module.weight, out.weight)
        assert bias is None or same(module.bias, out.bias)


def test_later_blocks_are_calibrated_on_the_outputs_of_pruned_ones(model, folder):
    run(model, LOBSModifier(sparsity=0.5, ignore=["lm_head"]))
    other = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    other.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    moments = moments_of(other, sentences())
    for name, module in linears(other).items():
        if name.startswith("model.layers.1"):
            out = lobs.prune_weight(module.weight, moments[name], sparsity=0.5, bias=module.bias)
            assert same(model.get_submodule(name).weight, out.weight)


def test_settings_named_as_in_the_host_mean_the_same(model, folder):
    run(
        model,
        LOBSModifier(
            mask_structure="1:4", dampening_frac=0.1, method="sweep", ignore=["re:.*lm_head"]
        ),
    )
    other = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    run(other, LOBSModifier(pattern="3:4", damping=0.1, method="sweep", ignore=["lm_head"]))
    for name, module in linears(model).items():
        assert torch.equal(module.weight, other.get_submodule(name).weight)
        assert zeros(module) == (0 if name == "lm_head" else module.weight.numel() // 4)


def test_overrides_scope_report_and_recipe_text(model, tmp_path):
    path = tmp_path / "report.json"
    assert ModifierFactory._registered_registry["LOBSModifier"] is LOBSModifier
    recipe = f"""
    prune_stage:
      pruning_modifiers:
        LOBSModifier:
          sparsity: 0.25
          method: sweep
          scope: row
          targets: ["re:.*mlp.*"]
          overrides: {{"re:.*down_proj": {{sparsity: 0.75}}, "model.layers.0.mlp.up_proj": {{pattern: "2:4"}}}}
          report: {path}
    """  # noqa: E501
    oneshot(model=model, dataset=sentences(), recipe=recipe, shuffle_calibration_samples=False)
    share = {"down_proj": 0.75, "0.mlp.up_proj": 0.5}
    report = json.loads(path.read_text())
    assert len(report["layers"]) == 6
    assert report["settings"]["scope"] == "row"
    for layer in report["layers"]:
        module = model.get_submodule(layer["name"])
        expected = next((s for end, s in share.items() if layer["name"].endswith(end)), 0.25)
        assert bool(((module.weight == 0).sum(1) == int(expected * module.in_features)).all())
        assert layer["rows"] == 120


def test_a_saved_model_has_the_zeros_and_a_recipe_that_can_be_rerun(model, folder, tmp_path):
    out = tmp_path / "out"
    settings = {"mask_structure": "2:4", "method": "sweep", "ignore": ["lm_head"]}
    run(model, LOBSModifier(**settings), output_dir=str(out))
    saved = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    again = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    oneshot(
        model=again,
        dataset=sentences(),
        recipe=str(out / "recipe.yaml"),
        shuffle_calibration_samples=False,
    )
    for name, module in linears(model).items():
        assert torch.equal(saved.get_submodule(name).weight, module.weight)
        assert torch.equal(again.get_submodule(name).weight, module.weight)


@pytest.mark.parametrize("first", [True, False], ids=["then quantised", "after its settings"])
def test_a_recipe_may_also_quantise(model, first):
    pruning = LOBSModifier(sparsity=0.5, method="sweep", targets=["re:.*mlp.*"])
    rounding = QuantizationModifier(targets=["Linear"], scheme="W8A8", ignore=["lm_head"])
    run(model, *([pruning, rounding] if first else [rounding, pruning]))
    assert len(pruning.result.layers) == 6
    for name, module in linears(model).items():
        assert zeros(module) == (256 if "mlp" in name else 0), name


def test_existing_zeros_are_preserved(model):
    module = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        module.weight[:, ::2] = 0
        module.weight[0, :] += 1e-3  # row 0 alone has none
    gone = module.weight == 0
    run(model, LOBSModifier(sparsity=0.6, preserve_sparsity_mask=True, targets=["re:.*q_proj"]))
    assert bool((module.weight[gone] == 0).all())
    assert zeros(module) == round(0.6 * module.weight.numel())


@pytest.mark.parametrize("shuffle", [False, True])
def test_padding_does_not_count(model, shuffle):
    data = sentences(padded=True)
    before, moments = weights(model), moments_of(model, data)
    run(
        model,
        LOBSModifier(sparsity=0.5, method="sweep", ignore=["lm_head"]),
        dataset=data,
        pipeline="basic",
        shuffle_calibration_samples=shuffle,
        batch_size=3 if shuffle else 1,
    )
    name = "model.layers.1.mlp.down_proj"
    out = lobs.prune_weight(before[f"{name}.weight"], moments[name], sparsity=0.5, method="sweep")
    assert same(model.get_submodule(name).weight, out.weight)


def test_padding_is_left_out_in_the_sequential_pipeline_and_reported(model):
    data = sentences(padded=True)
    padding = sum(1 - x for row in data["attention_mask"] for x in row)
    modifier = LOBSModifier(sparsity=0.5, method="wanda", ignore=["lm_head"])
    run(model, modifier, dataset=data, shuffle_calibration_samples=True)
    for layer in modifier.result.layers:
        assert layer.rows == 120 - padding
        assert any("were padding" in note for note in layer.notes), layer.notes


def test_loss_masks_are_respected(model):
    data = sentences()
    data = data.add_column("loss_mask", [[1, 0] * 5] * len(data))
    loader = DataLoader(data.with_format("torch"), batch_size=2)
    modifier = LOBSModifier(sparsity=0.5, method="wanda", targets=["re:.*mlp.*"])

    def forward(**kwargs: Any) -> Any:
        kwargs.pop("loss_mask")
        return original(**kwargs)

    original, model.forward = model.forward, forward
    run(model, modifier, dataset=loader, pipeline="basic", use_loss_mask=True)
    assert {layer.rows for layer in modifier.result.layers} == {60.0}


def test_another_order_of_the_batches_is_detected(model):
    data = sentences(padded=True).with_format("torch")

    class Changing(torch.utils.data.Sampler):
        def __iter__(self) -> Iterator[int]:
            turns.append(len(turns))
            return iter(range(12) if len(turns) < 2 else reversed(range(12)))

        def __len__(self) -> int:
            return 12

        def __deepcopy__(self, memo: Any) -> Any:
            return self

    turns: list[int] = []
    loader = DataLoader(data, batch_size=1, sampler=Changing())
    before = weights(model)
    with pytest.raises(lobs.LobsError, match="other token ids"):
        run(model, LOBSModifier(sparsity=0.5), dataset=loader, pipeline="basic")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# ---- failures ------------------------------------------------------------------------------------


def test_a_layer_that_fails_is_named_and_all_weights_are_restored(model):
    before = weights(model)
    handle = model.model.layers[1].mlp.act_fn.register_forward_hook(
        lambda module, args, out: out * float("nan")
    )
    with pytest.raises(lobs.NonFiniteError, match=r"layer 'model\.layers\.1\.mlp\.down_proj'"):
        run(model, LOBSModifier(sparsity=0.5, ignore=["lm_head"]))
    handle.remove()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    run(model, LOBSModifier(sparsity=0.5, method="sweep", ignore=["lm_head"]))  # and again
    assert zeros(model.model.layers[0].mlp.up_proj) == 256


def test_undo_after_a_failure_of_the_network_itself(model):
    class BrokenError(Exception):
        pass

    def broken(*_: Any) -> None:
        raise BrokenError

    before = weights(model)
    handle = model.model.norm.register_forward_hook(broken)  # after the last block
    modifier = LOBSModifier(sparsity=0.5, method="wanda", ignore=["lm_head"])
    with pytest.raises(BrokenError):
        run(model, modifier)
    assert zeros(model.model.layers[0].mlp.up_proj) == 256
    modifier.undo()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    handle.remove()
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert modifier.result is None


def test_zeros_that_a_pattern_has_no_room_for_are_an_error_that_names_the_layer(model):
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, :3] = 0
    settings = {"mask_structure": "2:4", "targets": ["re:.*q_proj"], "method": "sweep"}
    with pytest.raises(lobs.ArgumentError, match=r"layers\.1.*q_proj'.*removes 3 of 4"):
        run(model, LOBSModifier(preserve_sparsity_mask=True, **settings))
    run(model, LOBSModifier(**settings))  # two of the three stay zero, the third is repaired


def test_without_originals_only_the_failing_part_is_undone(model):
    before = weights(model)
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda m, a, out: out * float("nan"))
    with pytest.raises(lobs.NonFiniteError):
        run(model, LOBSModifier(sparsity=0.5, ignore=["lm_head"], keep_originals=False))
    assert zeros(model.model.layers[0].mlp.up_proj) == 256
    for name, p in model.model.layers[1].named_parameters():
        assert torch.equal(p, before[f"model.layers.1.{name}"])


def test_a_singular_second_moment_is_an_error_not_an_identity(model):
    with pytest.raises(lobs.NotPositiveDefiniteError, match=r"layer 'model\.layers\.0"):
        run(model, LOBSModifier(sparsity=0.5, damping=0.0), dataset=sentences(rows=1, length=4))


def test_layers_that_are_never_called_are_named(model):
    model.extra = nn.Linear(4, 4)
    before = weights(model)
    with pytest.raises(lobs.LobsError, match=r"1 of 15 layers were never called.*: extra"):
        run(model, LOBSModifier(sparsity=0.5, method="wanda", ignore=["lm_head"]))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_head_tied_to_the_embeddings_is_skipped_and_reported(model):
    model.lm_head.weight = model.model.embed_tokens.weight
    before = model.lm_head.weight.detach().clone()
    for _ in range(2):  # the second time, the host offloads the weights
        modifier = LOBSModifier(sparsity=0.5, method="magnitude")
        run(model, modifier)
        assert torch.equal(model.lm_head.weight, before)
        (skipped,) = modifier.result.skipped
        assert skipped.name == "lm_head"
        assert "embed_tokens" in skipped.reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give exactly one of them"),
        ({"sparsity": 1.5}, "sparsity: 1.5"),
        ({"sparsity": 0.5, "method": "best"}, "method: 'best'"),
        ({"sparsity": 0.5, "scope": "model"}, "scope: 'model'"),
        ({"pattern": "2:4", "mask_structure": "2:4"}, "pass one of them"),
        ({"mask_structure": "5:4"}, "mask_structure: '5:4'"),
        ({"sparsity": 0.5, "damping": 0.1, "dampening_frac": 0.2}, "two names"),
        ({"sparsity": 0.5, "report": "report.txt"}, r"must end in \.json or \.html"),
        ({"sparsity": 0.5, "block_size": 64}, "block_size"),
    ],
)
def test_wrong_settings_are_refused_when_the_modifier_is_constructed(settings, message):
    with pytest.raises(ValueError, match=message):
        LOBSModifier(**settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"targets": ["Conv9d"]}, lobs.ArgumentError, "targets: 'Conv9d' matches no module"),
        ({"ignore": ["Linear"]}, lobs.ArgumentError, "leave no layer to prune"),
        ({"overrides": {"x": {"sparsity": 0.1}}}, lobs.ArgumentError, "overrides: 'x'"),
        ({"overrides": {"Linear": {"speed": 1}}}, lobs.ArgumentError, "'speed'.*unknown"),
        ({"report": "/no/such/folder/r.json"}, lobs.ArgumentError, "report: the folder"),
        ({"sparsity": None, "pattern": "3:5"}, lobs.PatternError, r"layer 'model\.layers\.0"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_calibration(
    model, settings, error, message
):
    before = weights(model)
    with pytest.raises(error, match=message):
        run(model, LOBSModifier(**{"sparsity": 0.5, **settings}))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# ---- the host's own behaviour --------------------------------------------------------------------


def test_the_host_prunes_a_head_that_is_ignored_by_name(model):
    """A bug of the host that LOBSModifier does not have: it compares ``ignore`` with "lm_head."."""
    run(model, SparseGPTModifier(sparsity=0.5, ignore=["lm_head"]))
    assert zeros(model.lm_head) > 0, "the host has been mended: change what the docs say of it"


def test_the_host_reads_a_target_given_as_text_letter_by_letter(model):
    """A bug of the host that LOBSModifier does not have: nothing is pruned, without a message."""
    run(model, SparseGPTModifier(sparsity=0.5, targets="Linear"))
    assert not any(zeros(module) for module in linears(model).values())


def test_the_host_prunes_the_embeddings_through_a_tied_head(model):
    """A bug of the host that LOBSModifier does not have (it skips the head, see above)."""
    model.lm_head.weight = model.model.embed_tokens.weight
    before = model.model.embed_tokens.weight.detach().clone()
    run(model, SparseGPTModifier(sparsity=0.5))
    assert not torch.equal(model.model.embed_tokens.weight, before)


def test_the_host_silently_skips_layers_that_were_never_called(model):
    """A bug of the host that LOBSModifier does not have: it names them."""
    model.extra = nn.Linear(8, 8)
    run(model, SparseGPTModifier(sparsity=0.5, ignore=["re:.*lm_head"]))
    assert zeros(model.extra) == 0


def test_the_host_cannot_calibrate_its_owl_profile(model):
    """OWL calibrates during initialisation, which the host's own lifecycle forbids."""
    owl = {"sparsity_profile": "owl", "owl_m": 5, "owl_lmbda": 0.05}
    with pytest.raises(ValueError, match="Cannot invoke event before initializing"):
        run(model, SparseGPTModifier(sparsity=0.5, targets=["LlamaDecoderLayer"], **owl))


def test_the_session_is_ready_for_the_next_run(model):
    run(model, LOBSModifier(sparsity=0.5, method="magnitude", ignore=["lm_head"]))
    assert active_session().lifecycle.finalized
    assert not any(m._forward_pre_hooks for m in model.modules())
