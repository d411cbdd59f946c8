"""Masks of mixtures of experts: stacked, or one for each expert, on models of either kind."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import hf_folders
from helpers.experts import Experts
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError, ShapeError

E, INNER, WIDTH = 4, 8, 6
TRIOS = [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("fc1", "fc3", "fc2")]


class Stacked(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = Experts(transposed).float()


class Single(nn.Module):
    """As in weight files and in transformers 4."""

    def __init__(self, block: str, trio: tuple[str, str, str]) -> None:
        super().__init__()
        gate, up, down = trio
        experts = nn.ModuleList()
        for _ in range(E):
            expert = nn.Module()
            expert.add_module(gate, nn.Linear(WIDTH, INNER, bias=False))
            expert.add_module(up, nn.Linear(WIDTH, INNER, bias=False))
            expert.add_module(down, nn.Linear(INNER, WIDTH, bias=False))
            experts.append(expert)
        self.add_module(block, nn.Module())
        self.get_submodule(block).experts = experts


def stacked_masks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"gate_up_proj": (E, 2 * INNER, WIDTH), "down_proj": (E, WIDTH, INNER)}
    return {
        f"mlp.experts.{part}": torch.rand(shape, generator=generator) < 0.5
        for part, shape in shapes.items()
    }


def single_masks(block: str, trio: tuple[str, str, str]) -> dict[str, Tensor]:
    """The same masks, of which every one is a matrix."""
    joined, down = stacked_masks().values()
    found = {}
    for e in range(E):
        matrices = (joined[e, :INNER], joined[e, INNER:], down[e])
        for part, matrix in zip(trio, matrices, strict=True):
            found[f"{block}.experts.{e}.{part}.weight"] = matrix.contiguous()
    return found


@pytest.mark.parametrize("trio", TRIOS, ids="".join)
@pytest.mark.parametrize("block", ["mlp", "block_sparse_moe"])
def test_either_spelling_fits_models_of_either_kind(block, trio):
    stacked, single = stacked_masks(), single_masks(block, trio)
    removed = sum(int((~mask).sum()) for mask in stacked.values())
    for given in (stacked, lobs.pack_masks(stacked), single, lobs.pack_masks(single)):
        for model, expected in ((Stacked(), stacked), (Single(block, trio), single)):
            assert lobs.apply_masks(model, given) == removed
            now = {name: (p != 0).tolist() for name, p in model.named_parameters()}
            assert now == {name: mask.tolist() for name, mask in expected.items()}


def test_training_keeps_the_zeros_of_either_spelling():
    single = single_masks("block_sparse_moe", TRIOS[1])
    for model, given in (
        (Stacked(), single),
        (Single("block_sparse_moe", TRIOS[1]), stacked_masks()),
    ):
        lobs.apply_masks(model, given)
        before = [p.detach() == 0 for p in model.parameters()]
        for by in ("model", "optimizer"):
            optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
            with lobs.keep_masks(model if by == "model" else optimizer, given):
                sum((p + 1).square().sum() for p in model.parameters()).backward()
                optimizer.step()
            assert [(p == 0).tolist() for p in model.parameters()] == [x.tolist() for x in before]
    stacked = Stacked()
    lobs.apply_masks(stacked, single)
    lobs.as_torch_prune(stacked, single)
    for name, mask in stacked_masks().items():
        part = name.rpartition(".")[2]
        assert torch.equal(getattr(stacked.mlp.experts, f"{part}_mask").bool(), mask)


def test_masks_that_do_not_fit_the_experts_are_refused():
    single = Single("block_sparse_moe", TRIOS[1])
    before = copy.deepcopy(single.state_dict())
    name = "mlp.experts.gate_up_proj"
    mask = stacked_masks()[name]
    whole = r"masks\['mlp.experts.gate_up_proj'\]: .*\(4, 16, 6\)"
    for wrong in (
        mask[:3],
        mask[:, :15],
        mask.transpose(1, 2),
        lobs.pack_masks({"": mask[:3]})[""],
    ):
        with pytest.raises(ShapeError, match=whole):
            lobs.apply_masks(single, {name: wrong})
    del single.block_sparse_moe.experts[2].w3
    with pytest.raises(ShapeError, match=r"\(4, 8, 6\), .* \(2, 8, 6\)"):
        lobs.apply_masks(single, {"mlp.experts.up_proj": mask[:, :INNER]})
    with pytest.raises(ShapeError, match=r"\(2, 16, 6\)"):
        lobs.apply_masks(single, {name: mask})
    del single.block_sparse_moe.experts[0].w2
    with pytest.raises(ArgumentError, match="no layer of this name"):
        lobs.apply_masks(
            single, {"mlp.experts.down_proj": stacked_masks()["mlp.experts.down_proj"]}
        )
    assert all(torch.equal(value, before[n]) for n, value in single.state_dict().items())

    matrix = mask[0, :INNER].contiguous()
    for wrong in ("experts.4.w1", "experts.0.w4", "experts.x.w1", "experts.w1"):
        with pytest.raises(ArgumentError, match="no layer of this name"):
            lobs.apply_masks(Stacked(), {f"mlp.{wrong}": matrix})
    with pytest.raises(ShapeError, match=r"\(8, 6\)"):
        lobs.apply_masks(Stacked(), {"mlp.experts.0.w1": matrix[:7]})
    # Rows of gates and of the others alternate in transposed experts.
    with pytest.raises(ArgumentError, match="no layer of this name"):
        lobs.apply_masks(Stacked(transposed=True), {"mlp.experts.0.gate_proj": matrix})


def test_names_of_a_weight_file_of_transformers_fit_its_model(tmp_path):
    pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    model = hf_folders.network("MixtralForCausalLM", num_hidden_layers=1)
    ids = [torch.randint(0, 40, (4, 12))]
    report = lobs.prune(model, ids, sparsity=0.5, method="magnitude", progress=False)
    model.save_pretrained(tmp_path)
    file = safetensors.load_file(tmp_path / "model.safetensors")
    masks = {name: x != 0 for name, x in file.items() if x.ndim > 1 and bool((x == 0).any())}
    assert sum("experts.2." in name for name in masks) == 3
    fresh = hf_folders.network("MixtralForCausalLM", num_hidden_layers=1)
    lobs.apply_masks(fresh, masks)
    layers = dict(fresh.named_parameters())
    for name, mask in report.masks.items():
        weight = layers.get(name)
        weight = layers[f"{name}.weight"] if weight is None else weight
        assert torch.equal(weight != 0, mask)
