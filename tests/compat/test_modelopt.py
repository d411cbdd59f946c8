"""The sparsity mode "lobs" of NVIDIA Model-Optimizer, on small networks on the CPU."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lobs_native as lobs
from lobs_native.compat import modelopt

mto = pytest.importorskip("modelopt.torch.opt", reason="nvidia-modelopt is not installed")
mts = pytest.importorskip("modelopt.torch.sparsity", reason="nvidia-modelopt is not installed")
pytestmark = [
    pytest.mark.filterwarnings("default"),  # the host warns about itself
    pytest.mark.usefixtures("one_thread"),
]
modelopt.register()


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(32, 48), nn.ReLU(), nn.Dropout(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 8)
    )


@pytest.fixture
def batches() -> list[torch.Tensor]:
    mix = torch.randn(32, 32)
    return [torch.randn(64, 32) @ mix for _ in range(4)]


def sparsified(model: nn.Module, batches: list[torch.Tensor], mode: Any = "lobs", **config: Any):
    def loop(m: nn.Module) -> None:
        for x in batches:
            m(x)

    return mts.sparsify(model, mode, config={"forward_loop": loop, "verbose": False, **config})


def linears(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def moments(model: nn.Module, batches: list[torch.Tensor]) -> list[lobs.Hessian]:
    found = []
    with torch.no_grad():
        model.eval()
        for layer in linears(model):
            h = lobs.Hessian(layer.in_features, bias=layer.bias is not None)
            handle = layer.register_forward_pre_hook(
                lambda _, args, h=h: h.update(args[0]) and None
            )
            for x in batches:
                model(x)
            handle.remove()
            found.append(h)
        model.train()
    return found


@pytest.mark.parametrize("method", ["exact", "admm", "sweep", "lobs", "magnitude", "wanda"])
@pytest.mark.parametrize("target", [{}, {"sparsity": 0.6}], ids=["2:4", "60%"])
def test_weights_and_masks_are_those_of_prune_weight(model, batches, method, target):
    before = [
        (layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in linears(model)
    ]
    known = moments(model, batches)
    sparsified(model, batches, method=method, **target)
    assert model.training
    asked = target or {"pattern": "2:4"}
    for layer, (weight, bias), h in zip(linears(model), before, known, strict=True):
        out = lobs.prune_weight(weight, h, bias=bias, method=method, **asked)
        assert torch.equal(layer._parameters["weight"], out.weight)
        assert torch.equal(layer.bias, out.bias)
        assert torch.equal(layer._weight_mask, out.mask)
        assert torch.equal(layer.weight, out.weight)


def test_the_host_s_own_mode_keeps_the_weights_and_ours_repairs_them(batches):
    """The host's "sparsegpt" discards the weights that its sweep has repaired, contrary to its
    documentation. The masks of the sweep are the same."""
    model = nn.Sequential(nn.Linear(32, 48, bias=False), nn.Tanh(), nn.Linear(48, 16, bias=False))
    theirs, known = copy.deepcopy(model), moments(model, batches)
    before = [layer.weight.detach().clone() for layer in linears(model)]
    sparsified(theirs, batches, "sparsegpt", hessian_damp=0.1)
    sparsified(model, batches, method="sweep", damping=0.1)
    agreement = []
    for ours, host, weight, h in zip(linears(model), linears(theirs), before, known, strict=True):
        assert torch.equal(host._parameters["weight"], weight), "the host has been mended"
        agreement.append(float((ours._weight_mask == host._weight_mask).double().mean()))
        H = h.matrix()
        left, kept = (x.weight.detach().double() - weight.double() for x in (host, ours))
        assert float(((kept @ H) * kept).sum()) < float(((left @ H) * left).sum())
    assert min(agreement) > 0.99, agreement


def test_convolutions_overrides_rules_and_report(tmp_path):
    net = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 16, 12), nn.Linear(12, 4),
    )  # fmt: skip
    images = [torch.randn(8, 8, 6, 6) for _ in range(3)]
    path = tmp_path / "report.json"
    sparsified(
        net,
        images,
        [("lobs", {"nn.Linear": {"*": {}, "6": None}, "nn.Conv2d": {"*": {}}})],
        sparsity=0.5,
        overrides={"2": {"sparsity": 0.25}, "5": {"pattern": "2:4"}},
        report=path,
    )
    shares = {0: 0.5, 2: 0.25, 5: 0.5, 6: 0.0}
    for index, share in shares.items():
        weight = net[index].weight
        assert int((weight == 0).sum()) == int(share * weight.numel())
    assert bool(((net[5].weight != 0).reshape(12, -1, 4).sum(2) == 2).all())
    report = json.loads(Path(path).read_text())
    assert [layer["name"] for layer in report["layers"]] == ["0", "2", "5"]
    assert report["layers"][0]["rows"] == 3 * 8 * 36  # with the padding


def test_a_memory_limit_means_further_passes_on_the_pruned_network(model, batches):
    other, calls = copy.deepcopy(model), []

    def loop(m: nn.Module) -> None:
        calls.append(m)
        for x in batches:
            m(x)

    mts.sparsify(model, "lobs", config={"forward_loop": loop, "memory": 1, "sparsity": 0.5})
    assert len(calls) == 3
    lobs.prune(other, batches, sparsity=0.5, inputs="pruned", sensitivity=None, blocks=None)
    for ours, expected in zip(linears(model), linears(other), strict=True):
        torch.testing.assert_close(ours.weight, expected.weight)


def test_a_saved_model_is_restored_and_exported(model, batches, tmp_path):
    sparsified(model, batches)
    state = mto.modelopt_state(model)
    fresh = nn.Sequential(
        nn.Linear(32, 48), nn.ReLU(), nn.Dropout(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 8)
    )
    fresh = mto.restore_from_modelopt_state(fresh, state)
    fresh.load_state_dict(model.state_dict())
    exported = mts.export(model)
    assert type(exported[0]) is nn.Linear
    for ours, expected in zip(linears(fresh), linears(exported), strict=True):
        assert torch.equal(ours.weight, expected.weight)
        assert bool(((expected.weight != 0).reshape(len(expected.weight), -1, 4).sum(2) <= 2).all())


@pytest.mark.parametrize("memory", [None, 1], ids=["", "after others have been written"])
def test_a_failure_names_the_layer_and_undoes_everything(model, batches, memory):
    original = [p.detach().clone() for p in model.parameters()]
    model[4].register_forward_hook(lambda m, args, out: out * float("nan"))
    with pytest.raises(lobs.NonFiniteError, match="layer '5'"):
        sparsified(model, batches, sparsity=0.5, memory=memory)
    for p, before in zip(model.parameters(), original, strict=True):
        assert torch.equal(p, before)
    masks = [layer._weight_mask for layer in linears(model)]
    assert all(mask is None or bool(mask.all()) for mask in masks)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"speed": 1}, r"config: \['speed'\] unknown"),
        ({"forward_loop": None}, "calibration is needed"),
        ({"scope": "model", "sparsity": 0.5}, "scope: 'model'"),
        ({"pattern": "3:5 sparsity"}, "does not divide"),
        ({"sparsity": 0.5, "pattern": "1:4"}, "removes 0.75"),
        ({"overrides": {"9": {"sparsity": 0.1}}}, "overrides: '9'"),
        ({"report": "r.txt"}, "report: 'r.txt'"),
        ({"memory": 0}, "memory: 0"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(model, batches, config, message):
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        sparsified(model, batches, **config)
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was)


def test_registering_again_has_no_effect():
    modelopt.register()
    modelopt.register()
