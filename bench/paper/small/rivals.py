"""Two weak rivals of the paper's table 1 that the library lacks: random removal, and OBD.

OBD is Optimal Brain Damage (LeCun, Denker & Solla 1990).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

_OBD_IMAGES, _AT_ONCE = 1000, 50


def masks_by(
    score: Callable[[str, Tensor], Tensor], model: nn.Module, kept: Mapping[str, float]
) -> dict[str, Tensor]:
    """Masks that keep the highest scores of every layer; ``kept`` holds the shares."""
    masks = {}
    for name, share in kept.items():
        weight: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        scores = score(name, weight.detach()).flatten()
        scores[weight.detach().flatten() == 0] = -1.0  # existing zeros go first
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[scores.topk(round(share * len(scores))).indices] = True
        masks[name] = mask.view(weight.shape)
    return masks


def random_masks(model: nn.Module, kept: Mapping[str, float], seed: int) -> dict[str, Tensor]:
    """Every weight of a layer equally likely to stay."""
    generator = torch.Generator().manual_seed(seed)
    return masks_by(lambda name, w: torch.rand(w.shape, generator=generator), model, kept)


def obd_masks(
    model: nn.Module, x: Tensor, kept: Mapping[str, float], seed: int
) -> dict[str, Tensor]:
    """Keep the largest ``h_kk w_k**2 / 2``, with h the diagonal of the Gauss-Newton matrix.

    Of the cross-entropy, from gradients of single samples (N, ...) with labels drawn from the
    network's own output. The kept weights are not repaired.
    """
    h = _diagonal(model, x[:_OBD_IMAGES], seed)
    return masks_by(lambda name, w: 0.5 * h[f"{name}.weight"] * w**2, model, kept)


def _diagonal(model: nn.Module, x: Tensor, seed: int) -> dict[str, Tensor]:
    """Mean over samples of the squared gradients of all parameters."""
    model = copy.deepcopy(model).eval()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        labels = torch.multinomial(model(x).softmax(1), 1, generator=generator)[:, 0]

    def loss(p: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
        out = functional_call(model, {**p, **buffers}, (sample[None],))
        return nn.functional.cross_entropy(out, label[None])

    one = vmap(grad(loss), in_dims=(None, 0, 0))
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for xs, ys in zip(x.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True):
        for n, g in one(parameters, xs, ys).items():
            total[n] += (g**2).sum(0)
    return {n: t / len(x) for n, t in total.items()}
