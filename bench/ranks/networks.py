"""The networks that are pruned on several ranks, with random weights, and their data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NETWORKS"]


def _tokens(count: int, vocabulary: int, length: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (2, length)
    return [
        {"input_ids": torch.randint(vocabulary, shape, generator=generator)} for _ in range(count)
    ]


def llm() -> tuple[nn.Module, list[Any]]:
    """A decoder-only language model of four blocks, as Llama's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 320, "intermediate_size": 880, "num_hidden_layers": 4}
    config = LlamaConfig(
        vocab_size=512, num_attention_heads=5, num_key_value_heads=5, use_cache=False, **sizes
    )
    return LlamaForCausalLM(config).eval(), _tokens(32, 512, 256)


def moe() -> tuple[nn.Module, list[Any]]:
    """The same with a mixture of four experts in each of two blocks, as Mixtral's."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2}
    config = MixtralConfig(
        vocab_size=256,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        use_cache=False,
        **sizes,
    )
    return MixtralForCausalLM(config).eval(), _tokens(24, 256, 128)


class Encoder(nn.Module):
    """An encoder of texts with padding, as torch's transformer layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 384, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(128, 8)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(self.embed(x), src_key_padding_mask=src_key_padding_mask))
        return y


def encoder() -> tuple[nn.Module, list[Any]]:
    """See :class:`Encoder`."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    data = []
    for i in range(20):
        padding = torch.arange(64)[None] >= torch.tensor([[64 - i], [50], [64], [40 + i]])
        data.append((torch.randint(256, (4, 64), generator=generator), padding))
    return Encoder().eval(), data


class Residual(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(x + self.norms[1](self.second(y)))


def resnet() -> tuple[nn.Module, list[Any]]:
    """A residual network of convolutions."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        *(Residual(24) for _ in range(3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )
    return model.eval(), [torch.randn(4, 3, 16, 16, generator=generator) for _ in range(16)]


NETWORKS: dict[str, Callable[[], tuple[nn.Module, list[Any]]]] = {
    "llm": llm,
    "moe": moe,
    "encoder": encoder,
    "resnet": resnet,
}
