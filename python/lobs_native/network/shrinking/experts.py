"""Whole experts of mixtures with stacked weights, as in transformers: which go, at what cost.

A block of a network with E experts routes each row to k of them, and adds up what they return,
each times its routing weight. Without some experts and their rows of the router, it routes among
the others. What that changes is no function of one matrix, so there is nothing to repair exactly;
but it is known exactly. With f_e(x) what expert e returns for a row, and p_e(x) its routing weight,
zero for those not chosen, the sum changes by

    sum_e (q_e(x) - p_e(x)) f_e(x)

where q are the weights of the smaller router, which is run: softmax, normalisation and biases of
the choice are the block's own. All f_e are computed once for a sample of rows, and of them only the
products G(x) = [f_e(x) . f_h(x)] are kept, so that any choice of experts costs one run of the
router and ``(q - p)^T G (q - p)``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.calibration.finished import with_forward
from lobs_native.calibration.hooks import attached
from lobs_native.calibration.outputs import floating_tensors
from lobs_native.calibration.session import Session
from lobs_native.layers.experts import Experts
from lobs_native.network.shrinking.alike import alike
from lobs_native.network.shrinking.families import counts_around
from lobs_native.network.shrinking.surgery import new_counts, replace, take_out
from lobs_native.network.shrinking.units import Family, Slot
from lobs_native.solvers.joint import Removal

__all__ = ["expert_families", "expert_removals"]

_ROWS = 2048  # on which what experts return is compared; with the rest of the batch they are in
_AT_ONCE = 64 << 20  # bytes of what all experts return for a piece of the rows
_FIELDS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    *("num_routed_experts", "n_experts", "num_moe_experts"),
)


def expert_families(model: nn.Module) -> Iterator[Family]:
    """A family for every block with stacked experts and a router beside them."""
    for name, module in model.named_modules():
        if Experts.base_of(module) is None:
            continue
        layers = Experts.of(name, module)
        units = layers[0].groups
        block = name.rpartition(".")[0]
        tensors = _tensors(model, block)
        parts = {layer.name for layer in layers} | {f"{name}.{x.bias_part}" for x in layers}
        axes = {p: 0 for p in tensors if p in parts}
        routers = {
            p: int(len(x) != units)
            for p, x in tensors.items()
            if not p.startswith(f"{name}.") and _is_of_router(x, units)
        }
        if any(tensors[p].ndim == 2 and axis == 0 for p, axis in routers.items()):
            each = torch.arange(units)
            yield Family(
                kind="experts",
                units=units,
                readers=(),
                producers=(name,),
                slots=tuple(Slot(p, axis, each) for p, axis in (axes | routers).items()),
                counts=tuple(counts_around(model, block, dict.fromkeys(_FIELDS, units), units)),
            )


def _is_of_router(x: Tensor, units: int) -> bool:
    """Whether it has an entry or a row for each expert: (E,), (E, n) or (1, E)."""
    return x.ndim in (1, 2) and (len(x) == units or x.shape == (1, units))


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The parameters and buffers at and below a module, by their names in the model."""
    module = model.get_submodule(name)
    prefix = f"{name}." if name else ""
    return {f"{prefix}{p}": x for p, x in (*module.named_parameters(), *module.named_buffers())}


def expert_removals(
    families: Sequence[Family], session: Session, notes: list[str]
) -> list[Removal | None]:
    """In which order the experts of each family go, and what each removal adds to the squared
    change of the sum, relative to the sum's square; inside :meth:`Session.evaluating`. As many as a
    row is routed to stay in any case. None, and a note, for a block whose way of routing is not
    understood."""
    blocks = [_Block(session.model, family) for family in families]
    with attached(hook for block in blocks for hook in block.hooks()):
        for batch in session.each("experts"):
            if all(block.enough for block in blocks):
                break
            for block in blocks:
                block.mask = session.mask(batch)
            session.call(session.model, batch)
    removals: list[Removal | None] = []
    for block in blocks:
        try:
            removals.append(block.removal())
        except _NotUnderstoodError as why:
            notes.append(f"{block.family.producers[0]}: its experts stay: {why}")
            removals.append(None)
    return removals


class _NotUnderstoodError(Exception):
    """A block does not route as described above; the message says what it does."""


@dataclass
class _Call:
    """A call of a block, and which of its rows count."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None

    def counted(self, rows: Tensor) -> Tensor:
        """(n,) float64 for the rows (n, d): 1 for those that count, 0 for padding."""
        if self.mask is None or self.mask.numel() != len(rows):
            return rows.new_ones(len(rows), dtype=torch.float64)
        return self.mask.reshape(-1).to(rows.device, torch.float64)


class _Block:
    """The module around some experts, its calls, and what the experts do in them."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        (name,) = family.producers
        block, _, self.name = name.rpartition(".")
        self.family = family
        self.block = model.get_submodule(block)
        self.experts = model.get_submodule(name)
        start = len(block) + 1 if block else 0
        # The same family in the block alone.
        self.inside = dataclasses.replace(
            family, slots=tuple(dataclasses.replace(s, name=s.name[start:]) for s in family.slots)
        )
        # Without the weights of the experts: routing does not read them, and they are large.
        routing = tuple(s for s in self.inside.slots if not s.name.startswith(f"{self.name}."))
        self.router = dataclasses.replace(self.inside, slots=routing)
        self.calls: list[_Call] = []
        self.mask: Tensor | None = None
        self._rows = 0

    @property
    def enough(self) -> bool:
        """Whether the calls have rows enough."""
        return self._rows >= _ROWS

    def hooks(self) -> Iterator[Any]:
        """Hooks that keep the calls of the block."""

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.enough:
                self.calls.append(_Call(args, kwargs, self.mask))

        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(floating_tensors([args, kwargs]), None)
            if x is not None:
                self._rows += x.numel() // x.shape[-1]

        yield self.block.register_forward_pre_hook(keep, with_kwargs=True)
        yield self.experts.register_forward_pre_hook(count, with_kwargs=True)

    def removal(self) -> Removal:
        """See :func:`expert_removals`."""
        units, cheap = self.family.units, _idle(self)
        before = self._routing(range(units), {})
        if not alike([before.weights], [self._routing(range(units), cheap).weights]):
            cheap = {}  # the router depends on them
        products = self._products(before)
        whole = _squared(products, before.weights) or 1.0
        stay, order, spent, last = list(range(units)), list[int](), list[float](), 0.0
        self._check(before, cheap)
        while len(stay) > max(1, before.chosen):
            costs = []
            for gone in stay:
                left = [e for e in stay if e != gone]
                moved = self._routing(left, cheap).weights - before.weights
                costs.append((_squared(products, moved) / whole, gone))
            cost, gone = min(costs)
            stay.remove(gone)
            order.append(gone)
            spent.append(cost - last)
            last = cost
        return Removal(order, spent)

    def _check(self, before: _Routing, idle: Mapping[nn.Module, Any]) -> None:
        """That the block without its first expert returns what the routing weights say."""
        left = torch.arange(1, self.family.units)
        call = self.calls[0]
        whole = self._run(call)
        with contextlib.ExitStack() as undo:
            self._reduce(self.inside, left, undo)
            fewer = self._run(call)
        moved = self._routing(left.tolist(), idle).weights - before.weights
        rows = before.inputs[0]
        change = torch.zeros_like(rows, dtype=torch.float64)
        for e in range(self.family.units):
            change += moved[: len(rows), e, None] * self._returned(rows, e).double()
        a, b = (next(floating_tensors(x)).reshape(rows.shape).double() for x in (whole, fewer))
        if not alike([b.to(rows.dtype)], [(a + change).to(rows.dtype)]):
            raise _NotUnderstoodError(
                "without one of them the block does not return what its routing weights say"
            )

    def _run(self, call: _Call) -> Any:
        """What the block returns for a call."""
        try:
            return self.block(*call.args, **call.kwargs)
        except _NotUnderstoodError:
            raise
        except Exception as error:  # groups of experts that have to be alike, for example
            why = str(error).partition("\n")[0] or type(error).__name__
            raise _NotUnderstoodError(f"with fewer it does not run ({why})") from error

    def _returned(self, rows: Tensor, expert: int) -> Tensor:
        """What one expert returns for rows."""
        index = torch.full((len(rows), 1), expert, device=rows.device)
        found: Tensor = self.experts(rows, index, torch.ones_like(index, dtype=rows.dtype))
        return found

    def _products(self, routing: _Routing) -> Tensor:
        """G (N, E, E) float64, zero for rows that do not count."""
        units, parts = self.family.units, []
        for rows, call in zip(routing.inputs, self.calls, strict=True):
            step = max(1, _AT_ONCE // (8 * units * rows.shape[-1]))
            for some, counts in zip(rows.split(step), call.counted(rows).split(step), strict=True):
                f = torch.stack([self._returned(some, e).double() for e in range(units)], 1)
                f *= counts[:, None, None]
                parts.append(f @ f.mT)
        return torch.cat(parts)

    def _reduce(self, family: Family, left: Tensor, undo: contextlib.ExitStack) -> None:
        """Leave only these experts in the tensors of ``inside`` or ``router``."""
        take_out(self.block, family, left, undo)
        for owner, name, value in new_counts([family], [len(left)]):
            replace(owner, name, value, undo)

    def _routing(self, left: Sequence[int], idle: Mapping[nn.Module, Any]) -> _Routing:
        """How the block routes its rows if it has these experts."""
        inputs: list[Tensor] = []
        weights: list[Tensor] = []
        chosen = 0
        numbers = torch.tensor(left)

        def record(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal chosen
            rows, index, shares = _arguments(args, kwargs)
            chosen = index.shape[-1]
            spread = rows.new_zeros(len(rows), len(left) + 1, dtype=torch.float64)
            # transformers marks what is routed nowhere by one past the last expert
            spread.scatter_add_(1, index.clamp(max=len(left)), shares.double())
            every = spread.new_zeros(len(rows), self.family.units)
            every[:, numbers.to(rows.device)] = spread[:, :-1]
            inputs.append(rows)
            weights.append(every)
            return torch.zeros_like(rows)

        with contextlib.ExitStack() as undo:
            if len(left) < self.family.units:
                self._reduce(self.router, numbers, undo)
            for module, forward in ((self.experts, record), *idle.items()):
                undo.enter_context(with_forward(module, forward))
            for call in self.calls:
                self._run(call)
        if len(inputs) != len(self.calls):
            raise _NotUnderstoodError("they are not called once in each call of the block")
        return _Routing(inputs, torch.cat(weights), chosen)


@dataclass(frozen=True)
class _Routing:
    """Which experts the rows of some calls go to."""

    inputs: list[Tensor]  # of the experts, by call: (n, d)
    weights: Tensor  # (N, E) float64, zero for those not chosen
    chosen: int  # experts for each row


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (n, d), the experts of each (n, k) and their weights (n, k)."""
    given = [*args, *kwargs.values()]
    tensors = [x for x in given if isinstance(x, Tensor)]
    if len(given) == len(tensors) == 3:
        rows, index, weights = tensors
        listed = rows.ndim == index.ndim == 2 and not index.is_floating_point()
        if listed and weights.shape == index.shape and len(index) == len(rows):
            return rows, index, weights
    raise _NotUnderstoodError("they are not called with rows, experts for each and their weights")


def _idle(block: _Block) -> dict[nn.Module, Callable[..., Tensor]]:
    """The modules beside experts and router that return as much as they read, such as a shared
    expert, with a forward that takes no time."""
    shapes: dict[nn.Module, bool] = {}

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        same = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        shapes[module] = same and output.shape == args[0].shape

    routing = {s.name.partition(".")[0] for s in block.inside.slots}
    beside = [m for name, m in block.block.named_children() if name not in routing]
    with attached(m.register_forward_hook(see) for m in beside):
        block.block(*block.calls[0].args, **block.calls[0].kwargs)
    return {module: torch.zeros_like for module, same in shapes.items() if same}


def _squared(products: Tensor, weights: Tensor) -> float:
    """``sum_x w(x)^T G(x) w(x)``."""
    return max(0.0, float(torch.einsum("ne,nef,nf->", weights, products, weights)))
