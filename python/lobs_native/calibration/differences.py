"""How far layers' outputs on the pruned network's inputs are from those in the original network:
sums over rows, for one layer, or shared by several that read one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.errors import NonFiniteError
from lobs_native.layers import Layer
from lobs_native.solvers.drift import Drift
from lobs_native.solvers.hessian import Hessian, needs_float64
from lobs_native.solvers.measurement import pieces, quadratic_form

__all__ = ["AT_ONCE", "Differences", "Gap"]

AT_ONCE = 4096  # rows in one float32 product


class Differences:
    """How far a layer's outputs on the pruned network's inputs are from its outputs in the original
    network, before the layer itself is pruned: sums over rows.

    ``unlike`` tells why the two networks could not be compared row by row; "" if they could.
    """

    def __init__(self, layer: Layer, gap: Gap | None = None) -> None:
        self.layer = layer
        self.gap = gap  # from which everything follows
        wide = layer.weight().dtype == torch.float64
        self.dtype = torch.float64 if wide else torch.float32
        if gap is None:
            self.W = self._weight()
            self.bias = self._bias()
            D = layer.width + (self.bias is not None)
            self.pull = [
                torch.zeros(D, layer.rows, dtype=torch.float64, device=self.W.device)
                for _ in range(layer.groups)
            ]
        self.inherited = [0.0] * layer.groups
        self.energy = [0.0] * layer.groups
        self.summed = False
        self.unlike = ""
        if layer.routed:
            self.unlike = "its experts are not sent the same rows as in the original network"

    def _weight(self) -> Tensor:
        return self.layer.weight().to(self.dtype)  # (G, R, C)

    def _bias(self) -> Tensor | None:
        bias = self.layer.bias()
        return None if bias is None else bias.to(self.dtype)

    @ops.full_precision()
    def update(
        self, g: int, x: Tensor, x0: Tensor, extra: Tensor | None, weights: Tensor | None
    ) -> None:
        """Add rows x (n, C) of the pruned and x0 (n, C) of the original network. ``extra`` (n, R)
        is what is added to the layer's output in the original network, less what is in this one."""
        C, W, dtype = self.layer.width, self.W[g], self.dtype
        if needs_float64(x, weights) or needs_float64(x0, weights):
            dtype, W = torch.float64, W.double()
        for at in _some_rows(len(x), weights):
            a, b = x[at].to(dtype), x0[at].to(dtype)
            missing = (b - a) @ W.T
            if extra is not None:
                missing += extra[at].to(dtype)
            target = b @ W.T
            if self.bias is not None:
                target += self.bias[g]
            w = None if weights is None else weights[at, None].to(dtype)
            weighted = missing if w is None else missing * w
            self.pull[g][:C] += (a.T @ weighted).double()
            if len(self.pull[g]) > C:
                self.pull[g][C] += weighted.sum(0).double()
            self.inherited[g] += float((missing * weighted).sum(dtype=torch.float64))
            self.energy[g] += float(
                (target.square() * (1.0 if w is None else w)).sum(dtype=torch.float64)
            )

    def tensors(self) -> dict[str, Tensor]:
        """The sums, as :class:`lobs_native.calibration.tree.Summing` says; those that it shares
        belong to one layer."""
        if self.gap is None:
            return {f"pull.{g}": p for g, p in enumerate(self.pull)}
        return self.gap.tensors() if self.gap.layer is self.layer else {}

    def lower(self) -> list[str]:
        """The names of those that are zero above the diagonal."""
        return [name for name in self.tensors() if not name.startswith(("pull.", "cross."))]

    def values(self) -> dict[str, Any]:
        """What else belongs to the sums."""
        values: dict[str, Any] = {"summed": self.summed, "unlike": self.unlike}
        if self.gap is None:
            return {**values, "inherited": self.inherited[:], "energy": self.energy[:]}
        return {**values, "gap": self.gap.values()}

    def set_values(self, values: Mapping[str, Any]) -> None:
        """Take over what :meth:`values` returned."""
        self.summed, self.unlike = bool(values["summed"]), str(values["unlike"])
        if self.gap is None:
            self.inherited, self.energy = list(values["inherited"]), list(values["energy"])
        else:
            self.gap.set_values(values["gap"])

    def drift(self, rows: Sequence[float]) -> Drift:
        """The means over the rows that each group saw. Call it once: it overwrites the sums."""
        infinite = self.gap.infinite if self.gap is not None else not self._is_finite()
        if infinite:
            raise NonFiniteError(
                f"layer {self.layer.name!r}: NaN or infinity in its input in the original network"
            )
        each = [n or 1.0 for n in rows]
        if self.gap is not None:
            return self.gap.drift(self._weight(), self._bias(), each)
        return Drift(
            pull=[p.div_(n) for p, n in zip(self.pull, each, strict=True)],
            inherited=sum(e / n for e, n in zip(self.inherited, each, strict=True)),
            energy=sum(e / n for e, n in zip(self.energy, each, strict=True)),
        )

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.pull)


class Gap:
    """How far the inputs x of layers are from those, x0, in the original network: the sums over
    rows ``[x 1]^T (x0 - x)``, ``(x0 - x)^T (x0 - x)`` and ``[x0 1]^T [x0 1]``; the ones are there
    if there is a bias.

    They give the :class:`Differences` of every layer that reads the tensor and whose output is not
    compared as a part of a sum: with W (R, C), ``x^T (x0 - x) W^T``, the trace of
    ``W (x0 - x)^T (x0 - x) W^T``, and so on. It takes as much arithmetic as two layers with R = C,
    however many there are and however many outputs they have.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer  # one of those that share it
        bias, device = layer.bias() is not None, layer.weight().device
        self.infinite = False  # whether an input of the original network is NaN or infinite
        self.cross = [
            torch.zeros(layer.width + bias, layer.width, dtype=torch.float64, device=device)
            for _ in range(layer.groups)
        ]
        self.apart = [Hessian(layer.width, device=device) for _ in range(layer.groups)]
        self.original = [
            Hessian(layer.width, bias=bias, device=device) for _ in range(layer.groups)
        ]
        self._wide = layer.weight().dtype == torch.float64

    @staticmethod
    def pays(layers: Iterable[Layer]) -> bool:
        """Whether it takes less arithmetic than these layers' own sums: three products of R x C
        each, against one of C x C and two halves."""
        some = [layer for layer in layers if not layer.routed]  # the others are not compared
        return bool(some) and 3 * sum(layer.rows for layer in some) > 2 * some[0].width

    @ops.full_precision()
    def update(self, g: int, x: Tensor, x0: Tensor, weights: Tensor | None) -> None:
        """Add rows x (n, C) of the pruned and x0 (n, C) of the original network."""
        C = self.layer.width
        wide = self._wide or needs_float64(x, weights) or needs_float64(x0, weights)
        dtype = torch.float64 if wide else torch.float32
        for at in _some_rows(len(x), weights):
            a, b = x[at].to(dtype), x0[at].to(dtype)
            w = None if weights is None else weights[at]
            apart = b - a
            try:
                self.original[g].update(b, w)
                self.apart[g].update(apart, w)
            except NonFiniteError:  # the layer's own second moment has seen that x is finite
                self.infinite = True
                return
            weighted = apart if w is None else apart * w[:, None].to(dtype)
            self.cross[g][:C] += (a.T @ weighted).double()
            if len(self.cross[g]) > C:
                self.cross[g][C] += weighted.sum(0).double()

    def tensors(self) -> dict[str, Tensor]:
        """The sums."""
        tensors = {f"cross.{g}": x for g, x in enumerate(self.cross)}
        for kind, moments in (("apart", self.apart), ("original", self.original)):
            tensors |= {f"{kind}.{g}": h.running_sum for g, h in enumerate(moments)}
        return tensors

    def values(self) -> dict[str, Any]:
        """What else belongs to the sums."""
        rows = [[h.rows for h in moments] for moments in (self.apart, self.original)]
        return {"rows": rows, "infinite": self.infinite}

    def set_values(self, values: Mapping[str, Any]) -> None:
        """Take over what :meth:`values` returned."""
        self.infinite = bool(values["infinite"])
        for moments, rows in zip((self.apart, self.original), values["rows"], strict=True):
            for h, n in zip(moments, rows, strict=True):
                h.set_rows(n)

    @ops.full_precision()
    def drift(self, W: Tensor, bias: Tensor | None, rows: Sequence[float]) -> Drift:
        """What a layer with W (G, R, C) and bias (G, R) should compensate: means over ``rows``."""
        pulls, inherited, energy = [], 0.0, 0.0
        for g, (cross, n) in enumerate(zip(self.cross, rows, strict=True)):
            pulls.append((cross.to(W.dtype) @ W[g].T).double().div_(n))
            if not self.apart[g].rows:
                continue
            apart, original = self.apart[g].matrix(), self.original[g].matrix()
            for part in pieces(*W[g].shape):
                w = W[g, part].double()
                inherited += quadratic_form(w, apart)
                if bias is not None:
                    w = torch.cat([w, bias[g, part, None].double()], 1)
                energy += quadratic_form(w, original)
        return Drift(pulls, max(0.0, inherited), max(0.0, energy))


def _some_rows(count: int, weights: Tensor | None) -> Iterator[Any]:
    """What selects the rows that count, so many at a time; without weights, views of all."""
    for first in range(0, count, AT_ONCE):
        part = slice(first, first + AT_ONCE)
        yield part if weights is None else first + (weights[part] > 0).nonzero()[:, 0]
