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
        self._sums: dict[str, dict[tuple[int, int], tuple[float, float]]] = {}  # sum, rows
        self._means: dict[str, float] = {}  # over the rows that count, as far as asked for

    def add(self, layer: str, batch: int, call: int, squares: Tensor, rows: int) -> None:
        """Add the mean squares (n,) of one call, ``rows`` of which count."""
        place, total = (batch, call), float(squares.sum(dtype=torch.float64))
        self._of.setdefault(layer, {})[place] = squares.float()
        self._sums.setdefault(layer, {})[place] = total, float(rows)
        self._means.pop(layer, None)

    def _mean(self, layer: str) -> float:
        """The mean over the rows that count, in the order of the calls; 0 without any."""
        if layer not in self._means:
            each = [sums for _, sums in sorted(self._sums.get(layer, {}).items())]
            rows = sum(n for _, n in each)
            self._means[layer] = sum(total for total, _ in each) / rows if rows else 0.0
        return self._means[layer]

    def __contains__(self, layer: str) -> bool:
        return self._mean(layer) > 0

    def of(self, layers: Iterable[str], batch: int, call: int) -> Tensor | None:
        """The weights (n,) float64 of the rows of one call, whose mean over the data is 1: the mean
        for those of ``layers``, which read one tensor, that are known. None if none is."""
        known = [name for name in layers if name in self and (batch, call) in self._of[name]]
        total: Tensor | None = None
        for name in known:
            scale = 1 / self._mean(name) / len(known)
            part = self._of[name][batch, call].double() * scale
            total = part if total is None or total.shape != part.shape else total + part
        return total

    @property
    def size(self) -> int:
        """Bytes of what :meth:`kept` returns, or a little less."""
        return sum(4 * len(x) + 40 for calls in self._of.values() for x in calls.values())

    def kept(self) -> dict[str, Tensor]:
        """All of it, by layer, which :meth:`restore` adds again."""
        tensors = {}
        for name, calls in self._of.items():
            places = [[*place, len(x)] for place, x in calls.items()]
            tensors[f"weights of {name}"] = torch.cat([*calls.values()]).cpu()
            tensors[f"calls of {name}"] = torch.tensor(places, dtype=torch.int64)
            sums = [self._sums[name][place] for place in calls]
            tensors[f"sums of {name}"] = torch.tensor(sums, dtype=torch.float64)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Add what :meth:`kept` returned. KeyError or ValueError if it is something else."""
        for key, places in tensors.items():
            if not key.startswith("calls of "):
                continue
            name = key.removeprefix("calls of ")
            parts = tensors[f"weights of {name}"].clone().split(places[:, 2].tolist())
            sums = tensors[f"sums of {name}"].tolist()
            calls = [(int(batch), int(call)) for batch, call, _ in places.tolist()]
            self._of.setdefault(name, {}).update(zip(calls, parts, strict=True))
            of_calls = zip(calls, ((total, rows) for total, rows in sums), strict=True)
            self._sums.setdefault(name, {}).update(of_calls)
            self._means.pop(name, None)
