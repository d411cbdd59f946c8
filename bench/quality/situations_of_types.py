"""Layers of all kinds, in all types, with all targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from quality.situation import INPUTS, prune, situation


class Attention(nn.Module):
    """Self-attention and a linear layer."""

    def __init__(self, **form: Any) -> None:
        super().__init__()
        self.a, self.o = nn.MultiheadAttention(16, 2, **form), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.a(x, x, x)[0])
        return out


class Recurrent(nn.Module):
    """A recurrent layer and a linear one."""

    def __init__(self, kind: type[nn.RNNBase], **form: Any) -> None:
        super().__init__()
        self.rnn = kind(16, 12, **form)  # type: ignore[arg-type]
        self.o = nn.Linear(form.get("proj_size", 12), 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.rnn(x)[0])
        return out


class Experts(nn.Module):
    """Stacked experts, of which one gets few rows and one none, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8, 16))
        self.w_bias, self.o = nn.Parameter(torch.randn(6, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.reshape(-1, 16).split([2, 10, 10, 10, 10])
        rows = zip(parts, (0, 1, 2, 4, 5), strict=True)
        seen = [functional.linear(part, self.w[e], self.w_bias[e]) for part, e in rows]
        out: Tensor = self.o(torch.cat(seen))
        return out


class Function(nn.Module):
    """A function of inputs and a parameter, and a linear layer."""

    def __init__(self, weight: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.run, self.o = nn.Parameter(weight), run, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.run(x, self.w))
        return out


def _convolutions(first: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(2, (4, 4)), first, nn.ReLU(), nn.Conv2d(8, 4, 1))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Attention(batch_first=True),
    "attention with more keys": lambda: Attention(add_bias_kv=True),
    "attention with zeros": lambda: Attention(add_zero_attn=True),
    "projected states": lambda: Recurrent(nn.LSTM, proj_size=6),
    "no biases": lambda: Recurrent(nn.GRU, bias=False),
    "two layers with dropout": lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.2),
    "experts": Experts,
    "copy in another dtype": lambda: Function(
        torch.randn(8, 16), lambda x, w: functional.linear(x.float(), w.float()).to(x.dtype)
    ),
    "copy in another order": lambda: Function(
        torch.randn(8, 2, 8),
        lambda x, w: torch.einsum("bnhd,ohd->bno", x.unflatten(2, (2, 8)), w),
    ),
    "groups and strides": lambda: _convolutions(nn.Conv2d(7, 8, 3, stride=2, padding=1)),
    "transposed": lambda: _convolutions(nn.ConvTranspose2d(7, 8, 3, stride=2, output_padding=1)),
    "reflected": lambda: _convolutions(nn.Conv2d(7, 8, 3, padding="same", padding_mode="reflect")),
    "normalized": lambda: nn.Sequential(weight_norm(nn.Linear(16, 8)), nn.ReLU(), nn.Linear(8, 4)),
}
TARGETS: dict[str, dict[str, Any]] = {
    "half": {},
    "nine tenths": {"sparsity": 0.9},
    "half of each row": {"scope": "row"},
    "half of the model": {"scope": "model", "sensitivity": None},
    "2:4": {"pattern": "2:4", "sparsity": None},
    "1x4": {"pattern": "1x4"},
    "an error": {"sparsity": None, "max_error": 0.5},
}


@situation(
    "the mask is right and counted exactly, and all else is as before",
    kind=tuple(KINDS),
    target=tuple(TARGETS),
    dtype=(torch.bfloat16, torch.float16, torch.float64),
    inputs=INPUTS,
)
def layers_types_and_targets(kind: str, target: str, dtype: torch.dtype, inputs: str) -> None:
    net = KINDS[kind]().to(dtype)
    data = [torch.randn(6, 7, 16).to(dtype) for _ in range(2)]
    report = prune(net, data, inputs=inputs, **TARGETS[target])
    if not TARGETS[target]:
        coverage = report.coverage
        assert coverage is not None
        assert coverage.not_understood == 0, [x.reason for x in report.skipped]
    if target == "2:4":
        for layer in report.layers:
            assert layer.sparsity == 0.5, f"{layer.name}: {layer.sparsity}"
