"""What makes up for blocks that have gone: the last layer before a gap whose output is added to
what blocks pass on.

With m what that layer reads, and s what the block passes on, the blocks of the gap made t of s. The
block before then passes on s + D m instead, with D the regression of t - s on m: no layer more, and
the linear part of what went is back. Source: the linear transform that Shopkhoev et al. 2025
(ReplaceMe) put in the place of blocks, here of what the layer reads rather than of what it returns,
with damping by generalised cross-validation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.calibration.hooks import Enough, attached, ending, without_caches
from lobs_native.calibration.outputs import Sample, floating_tensors
from lobs_native.calibration.session import Session
from lobs_native.network.shrinking.alike import alike
from lobs_native.network.shrinking.blocks import output_loss
from lobs_native.network.shrinking.comparison import in_eval_mode
from lobs_native.network.shrinking.shrink_plan import ShrinkPlan
from lobs_native.network.shrinking.shrink_report import Shrunk
from lobs_native.network.shrinking.surgery import put
from lobs_native.network.shrinking.units import Family, inputs_axis, linear_shape
from lobs_native.solvers.hessian import Hessian
from lobs_native.solvers.kept_columns import regressed

__all__ = ["gaps_filled"]


def gaps_filled(
    session: Session,
    original: nn.Module | None,
    blocks: ShrinkPlan,
    sample: Sample,
    damping: float,
    notes: list[str],
    undo: contextlib.ExitStack,
) -> list[Shrunk]:
    """Repair what is left of lists of blocks towards the original network, if there is a copy of
    it with the same tensors; inside :meth:`Session.evaluating`. Weights are replaced, and stay
    replaced only where that brings the output closer to ``sample``, of the original one. Returns
    what became of each list, and adds to ``notes`` which gaps nothing makes up for."""
    lists = [(f, x) for i, f in enumerate(blocks.families) if (x := blocks.kept(i)) is not None]
    repaired: list[list[str]] = [[] for _ in lists]
    if lists and original is not None:
        repaired, why = _GapRepair(session, original, sample, damping).carry_out(lists, undo)
        notes += why
    return [
        Shrunk(f.kind, tuple(names), f.producers, f.units, tuple(kept.tolist()), blocks.spent(i))
        for i, ((f, kept), names) in enumerate(zip(lists, repaired, strict=True))
    ]


class _GapRepair:
    """The repair of a network without some blocks, towards the network with them; inside
    :meth:`Session.evaluating`."""

    def __init__(
        self, session: Session, original: nn.Module, sample: Sample, damping: float
    ) -> None:
        """``original`` is a copy of the network with its blocks and the same tensors, ``sample`` of
        its outputs."""
        self.session, self.original = session, original
        self.sample, self.damping = sample, damping

    def carry_out(
        self, lists: Sequence[tuple[Family, Tensor]], undo: contextlib.ExitStack
    ) -> tuple[list[list[str]], list[str]]:
        """Repair what is left of some lists, of which these blocks stay, gap by gap. Weights are
        replaced, and stay replaced only where that brings the output closer to the original one.

        Returns
        -------
        repaired : list of list of str
            The layers that were repaired, of each list.
        notes : list of str
            Why others were not.
        """
        repaired: list[list[str]] = [[] for _ in lists]
        notes: list[str] = []
        with in_eval_mode(self.original), without_caches(self.original):
            for (family, kept), done in zip(lists, repaired, strict=True):
                (name,) = family.producers
                for place, gone in _gaps(kept.tolist(), family.units):
                    blocks = ", ".join(map(str, gone))
                    where = f"{name}: nothing makes up for blocks {blocks}, "
                    if place < 0:
                        notes.append(f"{where}which were the first")
                        continue
                    layer, why = self._filled(name, place, gone[-1], undo)
                    if layer is None:
                        notes.append(f"{where}{why}")
                    else:
                        done.append(layer)
        return repaired, notes

    def _filled(
        self, name: str, place: int, last: int, undo: contextlib.ExitStack
    ) -> tuple[str | None, str]:
        """Repair the block at a place of what is left of a list, after which all up to ``last`` of
        the original list have gone; the layer, or None and why it stays."""
        block = list(self.session.model.get_submodule(name).children())[place]
        target = list(self.original.get_submodule(name).children())[last]
        layer = self._writer(block)
        if layer is None:
            return None, "as no linear layer of the block before adds to what it passes on"
        before = output_loss(self.session, self.sample)
        with contextlib.ExitStack() as tried:
            if not self._regress(layer, block, target, tried):
                return None, "as the regression on what the block before computes has no solution"
            if not output_loss(self.session, self.sample) < before:
                return None, "as that would not bring the output closer to the original one"
            undo.push(tried.pop_all())
        names = {module: path for path, module in self.session.model.named_modules()}
        return names[layer], ""

    def _writer(self, block: nn.Module) -> nn.Module | None:
        """The last linear layer of a block whose output is added to what the block passes on, by
        adding something to it."""
        (whole,) = self._first([block])
        generator = torch.Generator().manual_seed(0)
        for layer in reversed(list(block.modules())):
            shape = linear_shape(layer)
            if shape is None or whole is None or shape[0] != whole.shape[-1]:
                continue
            more = torch.randn(shape[0], generator=generator).to(whole)

            def add(_: nn.Module, __: Any, output: Tensor, more: Tensor = more) -> Tensor:
                return output + more

            with attached([layer.register_forward_hook(add)]):
                (moved,) = self._first([block])
            if moved is not None and alike([whole + more], [moved]):
                return layer
        return None

    def _first(self, modules: Sequence[nn.Module]) -> list[Tensor | None]:
        """What modules of the network return for the first batch."""
        for batch in self.session.each("blocks"):
            return self._returned(self.session.model, modules, batch)
        return [None] * len(modules)

    def _returned(
        self, model: nn.Module, modules: Sequence[nn.Module], batch: Any
    ) -> list[Tensor | None]:
        """What modules return, the last of them last, when a model is run on a batch."""
        seen: dict[nn.Module, Tensor | None] = {}

        def see(module: nn.Module, _: Any, output: Any) -> None:
            seen[module] = next(floating_tensors(output), None)

        with attached([module.register_forward_hook(see) for module in modules]):
            self._run(model, modules[-1], batch)
        return [seen.get(module) for module in modules]

    def _run(self, model: nn.Module, until: nn.Module, batch: Any) -> None:
        with contextlib.suppress(Enough), ending(until):
            self.session.call(model, batch)

    def _regress(
        self, layer: nn.Module, block: nn.Module, target: nn.Module, undo: contextlib.ExitStack
    ) -> bool:
        """Give a layer the weights with which its block passes on what the target does; False if
        they are not to be had."""
        session, weight, bias = self.session, layer.weight, layer.bias
        assert isinstance(weight, nn.Parameter)
        assert bias is None or isinstance(bias, nn.Parameter)
        moments: Hessian | None = None
        read: list[Tensor] = []

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read.append(next(floating_tensors([args, kwargs])))

        rows = outputs = 0
        for batch in session.each("repair of blocks"):
            (wanted,) = self._returned(self.original, [target], batch)
            read.clear()
            with attached([layer.register_forward_pre_hook(see, with_kwargs=True)]):
                (now,) = self._returned(session.model, [block], batch)
            if wanted is None or now is None or wanted.shape != now.shape or len(read) != 1:
                return False
            inputs = read[0].reshape(-1, read[0].shape[-1])
            outputs = now.shape[-1]
            parts = [inputs, inputs.new_ones(len(inputs), 1), (wanted - now).flatten(0, -2)]
            x = torch.cat(parts if bias is not None else [parts[0], parts[2]], 1)
            mask = session.mask(batch)
            if mask is not None and mask.numel() == len(x):
                x = x[mask.reshape(-1).to(x.device)]
            if moments is None:
                moments = Hessian(x.shape[1], device=x.device)
            moments.update(x)
            rows += len(x)
        if moments is None:
            return False
        H = moments.matrix().double()
        gone = torch.arange(len(H), device=H.device) >= len(H) - outputs
        shift = self.damping * float(H.diagonal()[~gone].mean())
        every = torch.eye(outputs, dtype=H.dtype, device=H.device)
        found = regressed(H, every, gone, shift, rows)
        if found is None or not bool(found.change.isfinite().all()):
            return False
        change = found.change
        if bias is not None:
            put(session.model, bias, (bias.double() + change[:, -1]).to(bias.dtype), undo)
            change = change[:, :-1]
        if inputs_axis(layer) == 0:
            change = change.T
        put(session.model, weight, (weight.double() + change).to(weight.dtype), undo)
        return True


def _gaps(kept: Sequence[int], units: int) -> Iterator[tuple[int, list[int]]]:
    """The blocks that have gone in a row, and the place among those left of the one before."""
    for place, (a, b) in enumerate(zip([-1, *kept], [*kept, units], strict=True)):
        if b > a + 1:
            yield place - 1, list(range(a + 1, b))
