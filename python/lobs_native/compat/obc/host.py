"""The host OBC (IST-DASLab/OBC, ``trueobs.py``): the replacement of its class, and its
verification."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lobs_native.compat.hosts import Call, Compare, Difference, Host, Replacement
from lobs_native.compat.obc.trueobs import TrueOBS

__all__ = ["HOST", "TrueOBS"]

_PRUNING = ("prune_unstr", "prune_blocked", "nmprune")


def _verify(call: Call) -> Compare | None:
    """Repeat a pruning with OBC's own class on a copy of the layer and the same H."""
    if call.method not in _PRUNING:
        return None
    ours: TrueOBS = call.instance
    host = call.original(copy.deepcopy(ours.layer), rel_damp=ours.rel_damp)
    H = ours.H
    host.H, host.nsamples = None if H is None else H.clone(), ours.nsamples
    unit = ours.Traces.unit if ours.Traces is not None else 1

    def compare(result: Any) -> Difference:
        if call.method == "nmprune":
            host.nmprune(*call.args, **call.kwargs)
            return Difference.between(ours.layer.get_parameter("weight"), host.layer.weight)
        if call.method == "prune_unstr":
            host.prepare_unstr()
        else:
            host.prepare_blocked(unit)
        theirs = getattr(host, call.method)(*call.args, **call.kwargs)
        return Difference.between(torch.cat(result), torch.cat(theirs))

    return compare


HOST = Host(
    "obc",
    (
        Replacement(
            modules=("trueobs",),
            attribute="TrueOBS",
            ours=TrueOBS,
            signatures={
                "__init__": ("(self, layer, rel_damp=0)",),
                "add_batch": ("(self, inp, out)",),
                "prepare_unstr": ("(self, parallel=32)",),
                "prune_unstr": ("(self, sparsities)",),
                "prepare_blocked": ("(self, size=4, parallel=32)",),
                "prune_blocked": ("(self, sparsities)",),
                "nmprune": ("(self, n=2, m=4, parallel=32)",),
                "quantize": ("(self, parallel=32)",),
                "free": ("(self)",),
            },
            methods=("add_batch", "prepare_unstr", "prepare_blocked", *_PRUNING),
            verify=_verify,
        ),
    ),
)
