"""nn.MultiheadAttention: the query, key, value and output projections, each a layer of its own."""

from __future__ import annotations

from torch import nn

from lobs_native.layers.base import Layer
from lobs_native.layers.matrix import Matrix

__all__ = ["Attention"]


class Attention(Matrix):
    """Layers ``<name>.q_proj``, ``.k_proj``, ``.v_proj`` (each with its third of ``in_proj_bias``)
    and ``.out_proj``.

    They are separate layers even if one parameter packs their weights, because their inputs may
    differ.
    """

    module_type = nn.MultiheadAttention

    @property
    def reads_keys(self) -> bool:
        """Whether its inputs are keys or values of the attention, not queries or what they find."""
        return self.name.endswith(("k_proj", "v_proj"))

    @classmethod
    def of(cls, name: str, module: nn.Module) -> list[Layer]:
        assert isinstance(module, nn.MultiheadAttention)
        kind, size = type(module).__name__, module.embed_dim
        bias = "" if module.in_proj_bias is None else "in_proj_bias"
        layers: list[Layer] = []
        for i, which in enumerate("qkv"):
            third = slice(i * size, (i + 1) * size)
            part, take = f"{which}_proj_weight", {"in_proj_bias": third}
            if getattr(module, part) is None:
                part, take = "in_proj_weight", {**take, "in_proj_weight": third}
            layers.append(cls(name, f"{which}_proj", module, kind, part, bias, take=take))
        out = f"{name}.out_proj" if name else "out_proj"
        return [*layers, cls(out, "", module.out_proj, kind, caller=module)]
