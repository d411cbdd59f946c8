"""How much each row of a layer's inputs (a token, sample or position) counts in its second moment:
as much as the network's output depends on the layer's output at that row.

With a gradient g (N, R) of the output at the layer's outputs, the change ``dY`` of these changes
the output by ``sum_tr g_tr dY_tr``. If its parts are independent, the mean square of that is
``sum_tr g_tr^2 dY_tr^2``. Here ``g_tr^2`` is taken as ``a_t b_r``: tokens times rows of the weight.
Then one second moment ``sum_t a_t x_t x_t^T`` still serves all rows of W. It is the factored form
of the Fisher information (K-FAC, Martens & Grosse 2015), with the tokens' factor kept for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["TokenWeights"]


class TokenWeights:
    """The mean square, over a layer's outputs at a row, of the gradients there: by layer, batch
    and call in that batch, relative to the layer's mean over all rows that count.

    Rows that do not count have weight 0.
    """

    def __init__(self) -> None:
        self._of: dict[str, dict[tuple[int, int], Tensor]] = {}  # (n,) float32
        self._sums: dict[str, float] = {}
        self._rows: dict[str, int] = {}

    def add(self, layer: str, batch: int, call: int, squares: Tensor, rows: int) -> None:
        """Add the mean squares (n,) of one call, ``rows`` of which count."""
        self._of.setdefault(layer, {})[batch, call] = squares.float()
        self._sums[layer] = self._sums.get(layer, 0.0) + float(squares.sum(dtype=torch.float64))
        self._rows[layer] = self._rows.get(layer, 0) + rows

    def __contains__(self, layer: str) -> bool:
        return self._sums.get(layer, 0.0) > 0

    def of(self, layers: Iterable[str], batch: int, call: int) -> Tensor | None:
        """The weights (n,) float64 of the rows of one call, whose mean over the data is 1: the mean
        for those of ``layers``, which read one tensor, that are known. None if none is."""
        known = [name for name in layers if name in self and (batch, call) in self._of[name]]
        total: Tensor | None = None
        for name in known:
            scale = self._rows[name] / self._sums[name] / len(known)
            part = self._of[name][batch, call].double() * scale
            total = part if total is None or total.shape != part.shape else total + part
        return total

    @property
    def size(self) -> int:
        """Bytes of what :meth:`kept` returns, or a little less."""
        return sum(4 * len(x) + 24 for calls in self._of.values() for x in calls.values())

    def kept(self) -> dict[str, Tensor]:
        """All of it, by layer, from which :meth:`restore` resumes."""
        tensors = {}
        for name, calls in self._of.items():
            places = [[*place, len(x)] for place, x in calls.items()]
            tensors[f"weights of {name}"] = torch.cat([*calls.values()]).cpu()
            tensors[f"calls of {name}"] = torch.tensor(places, dtype=torch.int64)
            sums = [self._sums[name], float(self._rows[name])]
            tensors[f"sums of {name}"] = torch.tensor(sums, dtype=torch.float64)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`kept` returned. KeyError or ValueError if it is something else."""
        for key, places in tensors.items():
            if not key.startswith("calls of "):
                continue
            name = key.removeprefix("calls of ")
            rows = places[:, 2].tolist()
            parts = tensors[f"weights of {name}"].clone().split(rows)
            calls = [(int(batch), int(call)) for batch, call, _ in places.tolist()]
            self._of[name] = dict(zip(calls, parts, strict=True))
            total, count = tensors[f"sums of {name}"].tolist()
            self._sums[name], self._rows[name] = total, int(count)
