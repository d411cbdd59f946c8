"""The arguments of a block's calls, and their serialisation as tensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lobs_native.files.strict_json import parse_json

__all__ = ["STRUCTURE", "BlockCall", "packed", "unpacked"]

STRUCTURE = "structure"


@dataclass
class BlockCall:
    """The arguments of one call of a block; the hidden state is at position or keyword ``slot``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str

    @property
    def hidden(self) -> Any:
        return self.args[self.slot] if isinstance(self.slot, int) else self.kwargs[self.slot]

    def with_hidden(self, value: Any) -> BlockCall:
        if isinstance(self.slot, int):
            args = (*self.args[: self.slot], value, *self.args[self.slot + 1 :])
            return BlockCall(args, self.kwargs, self.slot)
        return BlockCall(self.args, {**self.kwargs, self.slot: value}, self.slot)


def packed(value: Any) -> dict[str, Tensor]:
    """Serialise ``value``: its tensors, each once, and JSON (as bytes) that refers to them."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    calls: dict[str, int] = {}  # most calls are equal, so each text is stored once

    def pack(x: Any) -> Any:
        if isinstance(x, Tensor):
            name = names.setdefault(id(x), f"{len(names)}")
            tensors[name] = x
            return {"tensor": name, "device": str(x.device)}
        if isinstance(x, BlockCall):
            text = json.dumps([pack(x.args), pack(x.kwargs)])
            return {"call": calls.setdefault(text, len(calls))}
        if isinstance(x, torch.Size):
            return {"size": list(x)}
        if isinstance(x, (torch.dtype, torch.device)):
            return {type(x).__name__: str(x).removeprefix("torch.")}
        if isinstance(x, (list, tuple)):
            return [pack(part) for part in x]
        if isinstance(x, dict):
            return {"dict": [[key, pack(part)] for key, part in x.items()]}
        if isinstance(x, float):
            return {"float": x.hex()}
        return x

    value_text = json.dumps(pack(value))  # before ``calls`` is read: it fills them
    text = f'{{"value": {value_text}, "calls": [{", ".join(calls)}]}}'.encode()
    return {**tensors, STRUCTURE: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def unpacked(tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`packed`; lists and tuples come back as tuples."""
    moved: dict[str, Tensor] = {}

    def unpack(x: Any) -> Any:
        if isinstance(x, list):
            return tuple(unpack(part) for part in x)
        if not isinstance(x, dict):
            return x
        if "tensor" in x:
            name = x["tensor"]
            if name not in moved:
                moved[name] = tensors[name].clone().to(x["device"])
            return moved[name]
        if "call" in x:
            return unpack(structure["calls"][x["call"]])
        if "size" in x:
            return torch.Size(x["size"])
        if "dtype" in x:
            kind = getattr(torch, x["dtype"])
            if not isinstance(kind, torch.dtype):
                raise TypeError(f"{x['dtype']} is not a dtype")
            return kind
        if "device" in x:
            return torch.device(x["device"])
        if "float" in x:
            return float.fromhex(x["float"])
        return {key: unpack(part) for key, part in x["dict"]}

    structure = parse_json(tensors[STRUCTURE].numpy().tobytes(), STRUCTURE)
    return unpack(structure["value"])
