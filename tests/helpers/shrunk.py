"""What tests of smaller networks have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lobs_native.network import layerwise

SIZES: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2}


def tokens(batches: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(60, (4, 16), generator=generator) for _ in range(batches)]


def interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise KeyboardInterrupt when the second layer is to be pruned, once."""
    real, calls = layerwise.prune_layer, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(layerwise, "prune_layer", interrupted)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.to_tuple()[0]


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
