"""The neurons and heads of a transformer, found by name: parts of a network whose outputs one
linear layer reads, and which can be removed unit by unit.

A unit is a neuron of a feed-forward layer (with its gate), or a group of attention heads that share
keys and values. It is found by the names that libraries give to the layers, and by sizes that fit;
:mod:`lobs_native.network.shrinking.shrink` checks by running the network that nothing else depends
on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lobs_native.network.shrinking.units import Family, Slot, inputs_axis, linear_shape

__all__ = ["counts_around", "families_of", "held_lists"]

# Layers that make what the last one reads, below one module.
_NEURONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
    (("lin1",), "lin2"),
    (("linear1",), "linear2"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
    (("intermediate_dense",), "output_dense"),
    (("ffn",), "ffn_output"),
    (("linear_1",), "linear_2"),
    (("input_linear",), "output_linear"),
    (("Wi",), "Wo"),
)
_HEADS: tuple[tuple[tuple[str, str, str], str], ...] = (
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
    (("q_lin", "k_lin", "v_lin"), "out_lin"),
    (("self.query", "self.key", "self.value"), "output.dense"),
)
# Names under which configurations, and modules, know the number of units.
_NEURON_FIELDS = (
    *("intermediate_size", "ffn_dim", "hidden_dim", "d_ff", "n_inner", "dim_feedforward"),
    *("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "shared_intermediate_size"),
)
_DERIVED = "n_inner"  # GPT-2's None stands for 4 times the width
_HEAD_FIELDS = (
    *("num_attention_heads", "num_heads", "n_heads", "n_head"),
    *("encoder_attention_heads", "decoder_attention_heads"),
)
_KV_FIELDS = ("num_key_value_heads",)
_WIDTH_FIELDS = ("all_head_size",)


def families_of(model: nn.Module, kinds: Sequence[str] = ("heads", "neurons")) -> Iterator[Family]:
    """The families of a model in the order of its modules, each reader once."""
    seen: set[str] = set()
    for name, module in model.named_modules():
        for find, kind in ((_heads, "heads"), (_neurons, "neurons")):
            if kind not in kinds:
                continue
            family = find(model, name, module)
            if family is not None and seen.isdisjoint(family.readers):
                seen.update(family.readers)
                yield family


def _below(module: nn.Module, path: str) -> nn.Module | None:
    """The module of that path, or None."""
    for part in path.split("."):
        found = getattr(module, part, None)
        if not isinstance(found, nn.Module):
            return None
        module = found
    return module


def _sizes(
    module: nn.Module, producers: tuple[str, ...], reader: str
) -> tuple[list[int], int] | None:
    """The numbers of outputs of the producers, and of inputs of the reader; None if one of them
    is not there, or not linear."""
    shapes = [linear_shape(_below(module, path)) for path in (*producers, reader)]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return None
    return [outputs for outputs, _ in known[:-1]], known[-1][1]


def _neurons(model: nn.Module, name: str, module: nn.Module) -> Family | None:
    for producers, reader in _NEURONS:
        if (sizes := _sizes(module, producers, reader)) is None:
            continue
        outs, units = sizes
        if all(out == units for out in outs):
            parts = 1
        elif outs == [2 * units]:
            parts = 2  # gate and up in one matrix
        else:
            continue
        return Family(
            kind="neurons",
            units=units,
            readers=(_joined(name, reader),),
            producers=tuple(_joined(name, path) for path in producers),
            slots=(
                *_outputs(model, name, producers, units, (1,) * len(producers), parts),
                _inputs(model, _joined(name, reader), 1),
            ),
            counts=tuple(_counts(model, name, dict.fromkeys(_NEURON_FIELDS, units), units)),
        )
    return None


def _heads(model: nn.Module, name: str, module: nn.Module) -> Family | None:
    for producers, reader in _HEADS:
        if (sizes := _sizes(module, producers, reader)) is None:
            continue
        (q, k, v), width = sizes
        inner = _joined(name, producers[0]).rpartition(".")[0]
        heads = _number(model, inner, _HEAD_FIELDS)
        if heads is None or q % heads or width != q or k != v:
            continue
        size = q // heads
        if k % size or heads % (k // size):
            continue
        groups, each = k // size, heads // (k // size)  # heads that share keys and values
        rows = dict(zip(producers, (each * size, size, size), strict=True))
        for path, child in module.named_children():  # gates of each head, or of all that it makes
            made = (linear_shape(child) or (0, 0))[0]
            if path not in (*producers, reader) and made in (q, heads):
                rows[path] = each * size if made == q else each
        expected = dict.fromkeys(_HEAD_FIELDS, heads) | dict.fromkeys(_KV_FIELDS, groups)
        expected |= dict.fromkeys(_WIDTH_FIELDS, q)
        return Family(
            kind="heads",
            units=groups,
            readers=(_joined(name, reader),),
            producers=tuple(_joined(name, path) for path in rows),
            slots=(
                *_outputs(model, name, tuple(rows), groups, tuple(rows.values())),
                *_of_heads(model, inner, heads, each),
                _inputs(model, _joined(name, reader), each * size),
            ),
            counts=tuple(_counts(model, inner, expected, groups)),
        )
    return None


def _of_heads(model: nn.Module, name: str, heads: int, each: int) -> Iterator[Slot]:
    """Parameters of an attention module that have an entry for each head, such as sinks."""
    for part, parameter in model.get_submodule(name).named_parameters(recurse=False):
        if parameter.shape == (heads,):
            groups = torch.arange(heads // each).repeat_interleave(each)
            yield Slot(_joined(name, part), 0, groups)


def _outputs(
    model: nn.Module,
    name: str,
    producers: Sequence[str],
    units: int,
    rows: Sequence[int],
    parts: int = 1,
) -> Iterator[Slot]:
    """The outputs of layers below a module: so many neighbouring rows of each for a unit, in each
    of ``parts`` equal parts."""
    for path, each in zip(producers, rows, strict=True):
        of_rows = torch.arange(units).repeat_interleave(each).repeat(parts)
        layer = _joined(name, path)
        module = model.get_submodule(layer)
        yield Slot(f"{layer}.weight", 1 - inputs_axis(module), of_rows)
        if getattr(module, "bias", None) is not None:
            yield Slot(f"{layer}.bias", 0, of_rows)


def _inputs(model: nn.Module, layer: str, columns: int) -> Slot:
    """The inputs of a layer: so many neighbouring columns for a unit."""
    module = model.get_submodule(layer)
    shape = linear_shape(module)
    assert shape is not None
    of_columns = torch.arange(shape[1] // columns).repeat_interleave(columns)
    return Slot(f"{layer}.weight", inputs_axis(module), of_columns, read=True)


def _joined(name: str, path: str) -> str:
    return f"{name}.{path}" if name else path


def _owners(model: nn.Module, name: str) -> Iterator[Any]:
    """The module of that name, and the configurations of it and of all around it, inmost first."""
    yield model.get_submodule(name)
    while True:
        config = getattr(model.get_submodule(name), "config", None)
        if config is not None:
            yield config
        if not name:
            return
        name = name.rpartition(".")[0]


def _held(owner: Any, name: str) -> Any:
    """An attribute; None if it has no one value, which configurations of layers that differ say by
    errors of their own."""
    try:
        return getattr(owner, name, None)
    except Exception:
        return None


def _number(model: nn.Module, name: str, fields: tuple[str, ...]) -> int | None:
    """The first of the fields that has a number, from the inside out."""
    for owner in _owners(model, name):
        for each in fields:
            value = _held(owner, each)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _counts(
    model: nn.Module, name: str, expected: dict[str, int], units: int
) -> Iterator[tuple[Any, str, int]]:
    """The fields that hold the expected numbers, with their factors: of the module, and of its
    configuration and those around it, inmost first."""
    for owner in _owners(model, name):
        for each, number in expected.items():
            derived = each == _DERIVED and hasattr(owner, each) and getattr(owner, each) is None
            if derived or _held(owner, each) == number:
                yield owner, each, number // units


def counts_around(
    model: nn.Module, name: str, expected: dict[str, int], units: int
) -> Iterator[tuple[Any, str, int]]:
    """The same, and of all modules below a module and around it."""
    path = name.split(".") if name else []
    around = [model.get_submodule(".".join(path[:k])) for k in range(len(path))]
    for module in (*model.get_submodule(name).modules(), *around):
        for each, number in expected.items():
            if _held(module, each) == number:
                yield module, each, number // units
    yield from _counts(model, name, expected, units)


def held_lists(model: nn.Module, name: str, length: int) -> Iterator[tuple[Any, str]]:
    """The fields of configurations of a module and of all around it that are lists of so many
    entries, each once, inmost first."""
    configs = {id(x): x for x in _owners(model, name) if not isinstance(x, nn.Module)}
    for owner in configs.values():
        for each, value in vars(owner).items():
            if isinstance(value, list) and len(value) == length:
                yield owner, each
