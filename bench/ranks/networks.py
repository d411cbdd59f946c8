"""The networks that are pruned on several ranks, with random weights, and their data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "SMALL"]


def _tokens(count: int, vocabulary: int, length: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (2, length)
    return [
        {"input_ids": torch.randint(vocabulary, shape, generator=generator)} for _ in range(count)
    ]


def llm(
    width: int = 320,
    inner: int = 880,
    blocks: int = 4,
    heads: tuple[int, int] = (5, 5),
    vocabulary: int = 512,
    tied: bool = False,
    batches: int = 32,
    length: int = 256,
) -> tuple[nn.Module, list[Any]]:
    """A decoder-only language model, as Llama's; ``heads`` of queries and of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks}
    config = LlamaConfig(
        vocab_size=vocabulary,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=tied,
        use_cache=False,
        **sizes,
    )
    return LlamaForCausalLM(config).eval(), _tokens(batches, vocabulary, length)


def moe(
    width: int = 96,
    inner: int = 160,
    blocks: int = 2,
    vocabulary: int = 256,
    batches: int = 24,
    length: int = 128,
) -> tuple[nn.Module, list[Any]]:
    """The same with a mixture of four experts in each block, as Mixtral's."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks}
    config = MixtralConfig(
        vocab_size=vocabulary,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        use_cache=False,
        **sizes,
    )
    return MixtralForCausalLM(config).eval(), _tokens(batches, vocabulary, length)


class Encoder(nn.Module):
    """An encoder of texts with padding, as torch's transformer layers are."""

    def __init__(self, width: int, inner: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        layer = nn.TransformerEncoderLayer(width, 4, inner, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(self.embed(x), src_key_padding_mask=src_key_padding_mask))
        return y


def encoder(
    width: int = 128, inner: int = 384, layers: int = 3, batches: int = 20, length: int = 64
) -> tuple[nn.Module, list[Any]]:
    """See :class:`Encoder`."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    data = []
    for i in range(batches):
        ends = [length - i, length - 14, length, length - 24 + i]
        padding = torch.arange(length)[None] >= torch.tensor(ends)[:, None]
        data.append((torch.randint(256, (4, length), generator=generator), padding))
    return Encoder(width, inner, layers).eval(), data


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


def resnet(
    width: int = 24, parts: int = 3, batches: int = 16, size: int = 16
) -> tuple[nn.Module, list[Any]]:
    """A residual network of convolutions."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        *(Residual(width) for _ in range(parts)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )
    shape = (4, 3, size, size)
    return model.eval(), [torch.randn(shape, generator=generator) for _ in range(batches)]


def wide() -> tuple[nn.Module, list[Any]]:
    """One layer of many outputs, whose rows are shared."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(4)
    return nn.Linear(1024, 4096), [torch.randn(256, 1024, generator=generator) for _ in range(16)]


NETWORKS: dict[str, Callable[[], tuple[nn.Module, list[Any]]]] = {
    "llm": llm,
    "moe": moe,
    "encoder": encoder,
    "resnet": resnet,
    "wide": wide,
}

# The same kinds, small; the language model as SmolLM2: fewer keys than queries, tied embeddings.
SMALL: dict[str, Callable[[], tuple[nn.Module, list[Any]]]] = {
    "llm": partial(llm, 32, 64, 1, (4, 2), 64, True, 5, 12),
    "moe": partial(moe, 32, 48, 1, 64, 5, 16),
    "encoder": partial(encoder, 32, 64, 1, 5, 32),
    "resnet": partial(resnet, 32, 1, 5, 6),
}
