"""What is left alone by convention, and how it is recognised: routers of mixtures, adapters, and
tables that are looked up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn

__all__ = ["MIXING", "TABLE", "Conventions"]

_ROUTER = (
    "it is the router of a mixture of experts: a small change of it sends rows to other experts; "
    "include it by name to prune it"
)
MIXING = (
    "it is the router of a convolution whose filters it mixes: a small change of it changes every "
    "filter; include it by name to prune it"
)
_ADAPTER = (
    "it is part of an adapter, and zeros in it are lost when it is merged: merge it first, or keep "
    "it and prune the weight under it"
)
TABLE = "it is a table that is looked up, not multiplied"

_ROUTER_CLASS = re.compile(r"Router|TopK\w*Gat|MoE\w*Gat(?:e|ing)$", re.IGNORECASE)
_ROUTER_NAME = {"gate", "router", "routing_fn", "gating", "wg"}
_COUNTS = ("num_experts", "num_local_experts", "n_experts", "n_routed_experts", "moe_num_experts")
_ADAPTER_NAME = re.compile(r"(?:^|\.)(?:lora|hada|lokr|oft|boft|vera|vblora|ia3)_\w")


class Conventions:
    """The conventions as they apply to one model."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: Mapping[str, nn.Module] = dict(model.named_modules())
        self._adapting = tuple(self._adapters())

    def of(self, name: str, prefix: str, rows: int) -> str:
        """Why the weight of a layer with so many outputs is left alone; "" if it is not.

        ``name`` is the layer's or parameter's, ``prefix`` that of the module that owns it.
        """
        if _ADAPTER_NAME.search(name) or f"{prefix}.".startswith(self._adapting):
            return _ADAPTER
        if isinstance(self._modules.get(prefix), (nn.Embedding, nn.EmbeddingBag)):
            return TABLE
        return _ROUTER if self._is_router(prefix, rows) else ""

    def under_adapter(self, prefix: str) -> bool:
        """Whether an adapter is added to the output of the module of this name."""
        own = self._modules[prefix]
        above = self._modules[prefix.rpartition(".")[0]]
        names = [name for m in (own, above) for name in (*m._parameters, *m._modules)]
        return any(_ADAPTER_NAME.match(name) for name in names)

    def _adapters(self) -> Iterator[str]:
        """Prefixes of modules that peft lists as those of an adapter."""
        for name, module in self._modules.items():
            listed = getattr(type(module), "adapter_layer_names", ())
            for part in listed if isinstance(listed, tuple) else ():
                yield f"{name}.{part}." if name else f"{part}."

    def _is_router(self, prefix: str, rows: int) -> bool:
        above, _, own = prefix.rpartition(".")
        parent = self._modules[above]
        if any(_ROUTER_CLASS.search(type(m).__name__) for m in (self._modules[prefix], parent)):
            return True
        if own not in _ROUTER_NAME:
            return False
        counts = {getattr(parent, count, None) for count in _COUNTS}
        for name, child in parent.named_children():
            if "expert" in name and isinstance(child, nn.ModuleList):
                counts.add(len(child))
        return rows in counts
