"""Sizes of layers in named real models, and synthetic contents that behave like theirs.

Letters as everywhere: W (R, C) weights, X (N, C) inputs, H (C, C) their mean second moment, A its
damped inverse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

DAMPING = 0.01  # fraction of the mean diagonal of H: prune_weight's default


@dataclass(frozen=True)
class LayerShape:
    """One weight matrix of a published model, convolutions flattened per output channel."""

    name: str
    rows: int  # R
    columns: int  # C
    bias: bool = False  # the last column is the bias, so the last input is always 1

    def __str__(self) -> str:
        return self.name

    def small(self) -> LayerShape:
        """A sixteenth of each side: the same code runs, in milliseconds."""
        return replace(self, rows=max(8, self.rows // 16), columns=max(8, self.columns // 16))


LAYERS = {
    shape.name: shape
    for shape in (
        LayerShape("lenet300-100.fc1", 300, 785, bias=True),  # as its authors prune it
        LayerShape("lenet300-100.fc2", 100, 301, bias=True),
        LayerShape("resnet50.layer1.conv2", 64, 576),
        LayerShape("resnet50.layer4.conv2", 512, 4608),
        LayerShape("bert-base.attention", 768, 768),
        LayerShape("bert-base.fc1", 3072, 768),
        LayerShape("bert-base.fc2", 768, 3072),
        LayerShape("bert-large.attention", 1024, 1024),
        LayerShape("opt-125m.fc2", 768, 3072),
        LayerShape("opt-1.3b.attention", 2048, 2048),
        LayerShape("opt-1.3b.fc2", 2048, 8192),
    )
}


def named(name: str, *, small: bool = False) -> LayerShape:
    """A layer of a real model, or its small version."""
    return LAYERS[name].small() if small else LAYERS[name]


# Block inverse of WoodFisher and oBERT: a million weights, the published block sizes.
FISHER_WEIGHTS = 1_000_000
FISHER_GRADIENTS = 64
FISHER_BLOCKS = (50, 128)
FISHER_ALPHA = 1e4  # start alpha * I, in units in which a gradient entry is about 0.1


def relu_features(rows: int, columns: int, seed: int = 0) -> Tensor:
    """X (N, C) float32: ReLU of correlated Gaussians whose spectrum decays, as in real layers.

    Independent columns would give a nearly diagonal H, for which the order of removal does not
    matter.
    """
    generator = torch.Generator().manual_seed(seed)
    latent = max(4, columns // 4)
    strength = torch.arange(1, latent + 1).rsqrt()  # (latent,)
    mixing = torch.randn(latent, columns, generator=generator) * strength[:, None] / strength.norm()
    signal = torch.randn(rows, latent, generator=generator) @ mixing  # (N, C)
    return torch.relu_(signal.add_(torch.randn(rows, columns, generator=generator), alpha=0.3))


def weights(shape: LayerShape, seed: int = 1) -> Tensor:
    """W (R, C) float32, scaled so that outputs are of order one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape.rows, shape.columns, generator=generator) / shape.columns**0.5


def halves(shape: LayerShape, seed: int = 4) -> Tensor:
    """Bool (R, C): 40 to 60 % of every row, as uneven as when a whole layer is pruned."""
    generator = torch.Generator().manual_seed(seed)
    share = 0.4 + 0.2 * torch.rand(shape.rows, 1, generator=generator)
    return torch.rand(shape.rows, shape.columns, generator=generator) < share


def second_moment(shape: LayerShape) -> Tensor:
    """H (C, C) float64 of 4 C correlated inputs: full rank, and far from diagonal."""
    X = relu_features(4 * shape.columns, shape.columns)
    if shape.bias:
        X[:, -1] = 1.0
    return (X.T @ X).to(torch.float64) / len(X)


def damped(H: Tensor) -> Tensor:
    """H + damping * mean(diag H) * I."""
    out = H.clone()
    out.diagonal().add_(DAMPING * H.diagonal().mean())
    return out


def inverse(H: Tensor) -> Tensor:
    """A (C, C) = (H + damping * mean(diag H) * I)^-1, row-major like every matrix here."""
    return torch.cholesky_inverse(torch.linalg.cholesky(damped(H))).contiguous()


def cost(W: Tensor, pruned: Tensor, H: Tensor) -> float:
    """tr(dW H dW^T) in float64: what the layer's output loses."""
    change = pruned.to(torch.float64) - W.to(torch.float64)
    return float(((change @ H) * change).sum())


def gradients(count: int, columns: int, seed: int = 2) -> Tensor:
    """G (count, columns) float32: rows of very different length, like gradients of samples."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.rand(count, 1, generator=generator).add_(0.1)
    return torch.randn(count, columns, generator=generator).mul_(0.2 * length)
