"""Calibration block by block gives the same result as running the whole model for every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stacks import Model, batches, made
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.calibration.blocks import find_stacks
from lobs_native.calibration.session import Session
from lobs_native.errors import ArgumentError, CheckpointError, LobsError
from lobs_native.files.shelf import Place, Shelf

pytestmark = pytest.mark.usefixtures("one_thread")


def pruned(model: nn.Module, data: Any, **options: Any) -> tuple[lobs.Report, dict[str, Tensor]]:
    report = lobs.prune(model, data, progress=False, **{"sparsity": 0.5, **options})
    return report, {name: p.detach().clone() for name, p in model.state_dict().items()}


def check_equal(kind: type[Model], **options: Any) -> tuple[lobs.Report, lobs.Report]:
    whole, plain = pruned(made(kind), batches(), blocks=None, **options)
    parts, found = pruned(made(kind), batches(), **options)
    assert plain.keys() == found.keys()
    for name, value in plain.items():
        assert torch.equal(value, found[name]), name
    assert [(x.name, x.error, x.rows) for x in whole.layers] == [
        (x.name, x.error, x.rows) for x in parts.layers
    ]
    return whole, parts


@pytest.mark.parametrize("method", ["exact", "sweep", "wanda"])
def test_the_result_is_that_of_running_the_whole_model(method):
    whole, parts = check_equal(Model, method=method)
    assert whole.settings["blocks"] == []
    assert parts.settings["blocks"] == ["layers"]
    assert parts.settings["no blocks"] == []


def test_the_model_is_run_far_less_often():
    model = made()
    pruned(model, batches(), blocks=None)
    once = model.forwards
    model = made()
    pruned(model, batches())
    # Order, readers, finding the stack, its inputs, embed and head, the check, the measurement.
    assert model.forwards < once / 2


def test_layers_that_read_one_tensor_are_calibrated_together(monkeypatch):
    passes: list[str] = []
    each = Session.each

    def spy(self: Session, label: str, *rest: Any) -> Any:
        passes.append(label)
        return each(self, label, *rest)

    monkeypatch.setattr(Session, "each", spy)
    pruned(made(), batches())
    calibrated = [p for p in passes if p.startswith("calibrate")]
    assert calibrated == [
        "calibrate embed",
        *(f"calibrate layers.{i}.{name}" for i in range(3) for name in ("q", "up", "down")),
        "calibrate head",
    ]


class Derived(Model):
    """An argument of the blocks is computed from the hidden state along the way."""

    def between(self, x: Tensor, i: int) -> dict[str, Any]:
        return {"scale": float(x.abs().mean())}


def test_where_a_replay_differs_from_the_model_all_is_done_again_with_the_whole_model(tmp_path):
    options = {"sparsity": 0.9, "method": "magnitude"}
    model = made(Derived)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    message = "'layers' do not return what they return in the model"
    with pytest.raises(LobsError, match=rf"{message}; pass blocks="):
        pruned(model, batches(), run_dir=tmp_path / "run", **options)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    once = iter(batches())  # an iterator can be read only once
    report, weights = pruned(model, once, **options)
    assert report.settings["blocks"] == []
    assert report.settings["no blocks"][0].endswith(message)
    whole, plain = pruned(made(Derived), batches(), blocks=None, **options)
    assert all(torch.equal(weights[name], value) for name, value in plain.items())
    assert [x.error for x in report.layers] == [x.error for x in whole.layers]


class Cached(Model):
    """Every block is also passed an object that accumulates something."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for layer in self.layers:
            plain = layer.forward
            layer.forward = lambda x, mask, cache, plain=plain: (cache.append(1), plain(x, mask))[1]

    def between(self, x: Tensor, i: int) -> dict[str, Any]:
        return {"cache": self.cache}

    def forward(self, x: Tensor) -> Tensor:
        self.cache = type("Cache", (list,), {})()
        return super().forward(x)


class Skipping(Model):
    """The later blocks also read the first one's second result."""

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        x, weights = self.layers[0](self.embed(x))
        for layer in list(self.layers)[1:]:
            x = layer(x, mask=weights)[0]
        return self.head(x)


class Twice(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        x = self.embed(x)
        for layer in [*self.layers, self.layers[0]]:
            x = layer(x)[0]
        return self.head(x)


class Noisy(Model):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for layer in self.layers:
            layer.norm = nn.Sequential(layer.norm, Noise())


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.randn_like(x)


class Writing(Model):
    """Blocks write to the mask that they are passed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for layer in self.layers:
            plain = layer.forward
            layer.forward = lambda x, mask, scale, plain=plain: plain(x, mask.mul_(1.0))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Skipping, "layers.1 also reads other results of the stack"),
        (Twice, "not called once each"),
        (Noisy, "returns something else when run again"),
        (Writing, "writes to its arguments"),
    ],
)
def test_blocks_that_cannot_be_replayed_run_as_a_whole_and_the_report_says_why(kind, reason):
    _, parts = check_equal(kind)
    assert parts.settings["blocks"] == []
    assert reason in parts.settings["no blocks"][0]


def test_a_stack_is_not_replayed_if_it_is_passed_objects_that_may_change_between_calls():
    model = made(Cached)
    session = Session(model, batches(1), None, None, 0, False)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    with torch.no_grad():
        stacks, reasons = find_stacks(session, layers)
    assert stacks == []
    assert "passed a Cache, which may change" in reasons[0]


def test_plain_chains_are_not_stacks():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    report, _ = pruned(model, batches())
    assert report.settings["blocks"] == []
    assert report.settings["no blocks"] == []


def test_hidden_states_go_to_disk_if_memory_is_short(monkeypatch):
    model = made()
    size = model.embed(batches()[0]).numel() * 4
    kept: list[tuple[int, int]] = []
    put = Shelf.put

    def spy(self: Shelf, key: Any, value: Tensor) -> None:
        put(self, key, value)
        if isinstance(key, int):  # others are original weights
            kept.append((self.in_memory, self.on_disk))

    monkeypatch.setattr(Shelf, "put", spy)
    report, whole = pruned(made(), batches(), method="magnitude", inputs="pruned")
    assert max(disk for _, disk in kept) == 0
    assert report.settings["plan"]["disk"] == 0
    kept.clear()
    layers = (m for m in made().modules() if isinstance(m, nn.Linear))
    weights = sum(p.numel() * 4 for layer in layers for p in layer.parameters())
    outputs = sum(made()(batch).numel() * 4 for batch in batches())
    # Without a limit, q, k, v and up repeat outputs, which are as wide as states or twice as wide.
    repeated = (3 + 2) * size * len(batches())
    # 4 * size for states and weights
    needed = report.settings["plan"]["memory"] - weights + size - outputs - repeated
    limit = -(-needed * 16 // 15)
    usable = limit - limit // 16  # the rest is left for what lies between tensors
    options = {"method": "magnitude", "inputs": "pruned", "memory": limit}
    report, found = pruned(made(), batches(), **options)
    assert report.settings["plan"]["memory"] == usable
    assert report.settings["plan"]["disk"] == outputs + weights - size - (usable - needed)
    assert max(memory for memory, _ in kept) == 2 * size
    assert max(disk for _, disk in kept) == size
    assert all(torch.equal(value, found[name]) for name, value in whole.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_shelf_returns_the_stored_tensors(dtype):
    shelf = Shelf(100)
    values = [torch.randn(5, 3).to(dtype).T for _ in range(4)]
    for key, value in enumerate(values):
        shelf.put(key, value)
    assert shelf.in_memory <= 100
    assert shelf.on_disk > 0
    folder = shelf._folder
    assert folder is not None
    for key, value in enumerate(values):
        shelf.copy_of(key).zero_()
        assert torch.equal(shelf.get(key), value)
    shelf.put(0, values[1])
    assert torch.equal(shelf.get(0), values[1])
    shelf.close()
    assert shelf.in_memory == shelf.on_disk == 0
    assert not Path(folder.name).exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_shelf_stores_the_place_of_what_lies_in_a_file(dtype, tmp_path):
    value, path = torch.randn(5, 3).to(dtype), tmp_path / "weights"
    path.write_bytes(b"header" + value.view(torch.uint8).numpy().tobytes())
    kept = value.clone()
    with Shelf(0) as shelf:
        shelf.put_copy("there", value, Place(path, 6))
        shelf.put_copy("elsewhere", value, Place(path, 4))
        shelf.put_copy("beyond", value, Place(path, 10))
        assert (shelf.in_memory, shelf.on_disk) == (0, 2 * value.nbytes)
        value.zero_()
        assert all(torch.equal(shelf[key], kept) for key in shelf)
        assert torch.equal(torch.cat(list(shelf.parts("there", 2))), kept)
        path.write_bytes(path.read_bytes() + b"!")
        with pytest.raises(CheckpointError, match="weights: it was changed while it was in use"):
            shelf["there"]
        shelf.drop("there")
        assert list(shelf) == ["elsewhere", "beyond"]
    assert path.exists()


def test_every_block_is_logged_once(caplog):
    with caplog.at_level("INFO", "lobs_native"):
        report, _ = pruned(made(), batches())
    names = [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    assert names == ["embed", "layers.0", "layers.1", "layers.2", "head"]
    total = len(report.layers)
    assert caplog.records[-1].getMessage().startswith(f"{total} of {total} layers after ")


def test_blocks_is_auto_or_none():
    with pytest.raises(ArgumentError, match="blocks: 'yes'; expected one of auto"):
        pruned(made(), batches(), blocks="yes")


# ---- models of transformers ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_transformers_models_are_calibrated_block_by_block(name):
    transformers = pytest.importorskip("transformers")
    small = {
        "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 32, "vocab_size": 40,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "input_ids": torch.randint(0, 40, (3, 9), generator=generator),
            "attention_mask": torch.ones(3, 9, dtype=torch.long),
        }
        for _ in range(2)
    ]

    def model() -> nn.Module:
        torch.manual_seed(1)
        if name == "bert":
            return transformers.BertModel(transformers.BertConfig(**small))
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**small, num_key_value_heads=2)
        )

    whole, plain = pruned(model(), data, blocks=None)
    parts, found = pruned(model(), data)
    assert parts.settings["blocks"] == ["encoder.layer" if name == "bert" else "model.layers"], (
        parts.settings
    )
    assert whole.layers[0].rows == 54
    assert parts.error_bound.measured == whole.error_bound.measured > 0
    for key, value in plain.items():
        assert torch.equal(value, found[key]), key
