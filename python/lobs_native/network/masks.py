"""Masks after pruning, which keep removed weights at zero while the network is trained further."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lobs_native import checks
from lobs_native.errors import ArgumentError, DtypeError, ShapeError
from lobs_native.network.mask_places import Place, pieces_of, places_of, whole_shape
from lobs_native.network.packed import PackedMask, packed_bytes

__all__ = ["KeptMasks", "apply_masks", "as_torch_prune", "keep_masks", "pack_masks"]


class _Kept:
    """The removed weights of one parameter, and the parameter as it is now: its module may have got
    another one since (``load_state_dict(assign=True)``, a conversion, an assignment)."""

    def __init__(self, place: Place, removed: Tensor) -> None:
        self.place = place
        self.removed = removed
        self.parameter = place.parameter
        self.hook: Any = None  # on the parameter

    def follow(self) -> None:
        """Turn to the parameter that the module has now, and observe its gradients."""
        module, part = self.place.module, self.place.part
        now = None if module is None else module._parameters.get(part)
        if now is not None and now is not self.parameter:
            if now.shape != self.removed.shape:
                raise ShapeError(
                    f"masks: a parameter {part!r} of shape {tuple(self.removed.shape)} was "
                    f"replaced by one of shape {tuple(now.shape)}; call remove() and keep_masks() "
                    "anew"
                )
            self.release()
            self.parameter = now
        if self.removed.device != self.parameter.device:
            self.removed = self.removed.to(self.parameter.device)
        if self.hook is None and self.parameter.requires_grad:
            self.hook = self.parameter.register_post_accumulate_grad_hook(self._zero_gradient)

    def release(self) -> None:
        """Stop observing the parameter."""
        if self.hook is not None:
            self.hook.remove()
        self.hook = None

    @torch.no_grad()
    def apply(self) -> None:
        """Set the removed weights to zero."""
        self.follow()
        self.parameter.masked_fill_(self.removed, 0)

    @torch.no_grad()
    def _zero_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(self.removed.to(parameter.grad.device), 0)

    def zero_gradient(self) -> None:
        """Set the gradients of the removed weights to zero."""
        self.follow()
        self._zero_gradient(self.parameter)


class KeptMasks:
    """The handle that :func:`keep_masks` returns; leaving it as a context manager calls
    :meth:`remove`."""

    def __init__(self, kept: Sequence[_Kept]) -> None:
        self._kept = kept
        self._hooks = contextlib.ExitStack()
        for each in kept:
            self._hooks.callback(each.release)

    def apply(self) -> None:
        """Set the removed weights to zero now, for changes made outside a torch optimizer."""
        for each in self._kept:
            each.apply()

    def remove(self) -> None:
        """Stop: remove all hooks. The weights stay as they are."""
        self._hooks.close()

    def __enter__(self) -> KeptMasks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _watch(
        self,
        before: Callable[[Callable[..., None]], Any],
        after: Callable[[Callable[..., None]], Any],
    ) -> None:
        """Zero the removed weights after the optimizer's steps, and their gradients: at once, or
        before the step for parameters that are new."""

        def concerned(optimizer: Optimizer) -> list[_Kept]:
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for each in self._kept:
                each.follow()
            return list(self._kept) if any(id(e.parameter) in ids for e in self._kept) else []

        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for each in concerned(optimizer):
                each.zero_gradient()

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for each in concerned(optimizer):
                each.apply()

        self._hooks.callback(before(before_step).remove)
        self._hooks.callback(after(after_step).remove)
        for each in self._kept:
            each.follow()


def keep_masks(model_or_optimizer: nn.Module | Optimizer, masks: Mapping[str, Tensor]) -> KeptMasks:
    """Keep pruned weights at zero while the network is trained with any torch optimizer.

    Two things happen until the handle is removed. After each step of an optimizer, the removed
    weights are set to zero, so that neither earlier momentum nor weight decay nor noise revives
    one. After each backward pass, their gradients are zero, so that they never enter a gradient's
    norm, Adam's moments, or the direction of a line search (LBFGS). With a model, the masks follow
    its weights when it is moved or converted, when other values are loaded into it, and when a
    parameter is replaced by one of the same shape.

    Parameters
    ----------
    model_or_optimizer : nn.Module or torch.optim.Optimizer
        With a model, every torch optimizer that holds one of its masked weights is observed, even
        one that is made later. With an optimizer, only that one is; it must know the names of its
        parameters, as ``AdamW(model.named_parameters())`` does. This call itself changes no
        weights.
    masks : {layer name: bool tensor}
        As in ``report.masks``: shaped like the layer's weight, True where a weight is kept, on any
        device; copied. A name may also be that of the weight ("layer.weight", as in weight files),
        and a mask that of :func:`pack_masks`. Masks of experts may be stacked or one for each
        expert, under the names of either release of transformers, whichever the model has.

    Returns
    -------
    KeptMasks
        ``.remove()`` ends it, and so does the end of a ``with`` block; ``.apply()`` sets the
        removed weights to zero after a change made outside a torch optimizer.

    Raises
    ------
    ArgumentError, DtypeError, ShapeError
        A mask does not fit the model, or a weight that a mask removes is not zero: the masks belong
        to another network, or :func:`apply_masks` must be called first. Nothing has been hooked.

    Notes
    -----
    A copy of the model (``copy.deepcopy``) is not observed: call this function on the copy too.
    """
    fitting = _fitting(model_or_optimizer, masks)
    _refuse_nonzero(fitting)
    handle = KeptMasks([_Kept(place, removed) for place, removed in _merged(fitting)])
    if isinstance(model_or_optimizer, Optimizer):
        optimizer = model_or_optimizer
        handle._watch(optimizer.register_step_pre_hook, optimizer.register_step_post_hook)
    else:
        handle._watch(register_optimizer_step_pre_hook, register_optimizer_step_post_hook)
    return handle


def pack_masks(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Store masks with one bit per weight, an eighth of their size.

    Parameters
    ----------
    masks : {name: bool tensor}
        As in ``report.masks``; not modified.

    Returns
    -------
    {name: uint8 tensor}
        One-dimensional, eight weights in a byte, in the order of the flattened mask, the first in
        the lowest bit (``numpy.packbits(..., bitorder="little")``). :func:`keep_masks`,
        :func:`apply_masks` and :func:`as_torch_prune` take them as they are.

    Raises
    ------
    DtypeError
        A mask is not a bool tensor.
    """
    if not isinstance(masks, Mapping):
        raise DtypeError(f"masks: expected a mapping, got {type(masks).__name__}")
    return {
        name: PackedMask.of(
            checks.tensor(mask, f"masks[{name!r}]", dtypes=(torch.bool,)).contiguous()
        ).bits
        for name, mask in masks.items()
    }


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> int:
    """Set the weights that the masks remove to zero, without repairing the others.

    Parameters
    ----------
    model : nn.Module
        Its weights are changed in place. Biases are not.
    masks : {layer name: bool tensor}
        As in :func:`keep_masks`.

    Returns
    -------
    int
        How many of these weights were not zero before.

    Raises
    ------
    ArgumentError, DtypeError, ShapeError
        A mask does not fit the model; nothing has been changed.
    """
    changed = 0
    for place, removed in _merged(_fitting(_model(model), masks)):
        changed += int((place.parameter[removed] != 0).sum())
        place.parameter.masked_fill_(removed, 0)
    return changed


def as_torch_prune(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Give each masked layer the buffers of ``torch.nn.utils.prune``: ``weight_orig`` and
    ``weight_mask``, from which its weight is computed in each forward pass.

    Parameters
    ----------
    model : nn.Module
        Changed in place; its outputs stay the same. Call this before making the optimizer, because
        the parameters are renamed. ``torch.nn.utils.prune.remove(layer, "weight")`` undoes it.
    masks : {layer name: bool tensor}
        As in :func:`keep_masks`.

    Returns
    -------
    nn.Module
        The model.

    Raises
    ------
    ArgumentError, DtypeError, ShapeError
        As in :func:`keep_masks`; nothing has been changed.
    """
    fitting = _fitting(_model(model), masks)
    _refuse_nonzero(fitting)
    for place, removed in _merged(fitting):
        assert place.module is not None
        torch_prune.custom_from_mask(place.module, place.part, ~removed)
    return model


def _model(value: Any) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise DtypeError(f"model: expected an nn.Module, got {type(value).__name__}")
    return value


_Fitting = Sequence[tuple[str, Place, Tensor]]


def _fitting(owner: Any, masks: Any) -> _Fitting:
    """Layer name, a place of its weight, and where its mask removes something; all checked."""
    if not isinstance(masks, Mapping):
        raise DtypeError(
            f"masks: expected {{layer name: bool tensor}}, got {type(masks).__name__}; "
            "report.masks is one"
        )
    if not masks:
        raise ArgumentError("masks: there are none; give those of a report")
    places = dict(places_of(owner))
    fitting = []
    for name, mask in masks.items():
        if not isinstance(name, str):
            raise DtypeError(f"masks: a key is a {type(name).__name__}, expected a layer's name")
        pieces = pieces_of(name, places)
        if not pieces:
            some = ", ".join(repr(n) for n in list(places)[:8])
            raise ArgumentError(
                f"masks[{name!r}]: no layer of this name has a weight of its own (one that is not "
                f"computed from others); there are {some or 'none'}"
            )
        for piece in pieces:
            checks.tensor(piece.place.weight, f"{name}: weight")
        shape = whole_shape(pieces)
        kept = checks.tensor(mask, f"masks[{name!r}]", dtypes=(torch.bool, torch.uint8))
        if kept.dtype == torch.uint8:
            kept = _unpacked(kept, shape, f"masks[{name!r}]")
        if kept.shape != shape:
            raise ShapeError(
                f"masks[{name!r}]: its shape is {tuple(kept.shape)}, but that of the layer's "
                f"weight is {tuple(shape)}"
            )
        for piece in pieces:
            removed = ~piece.of(kept).to(piece.place.weight.device)
            fitting.append((name, piece.place, removed))
    return fitting


def _unpacked(bits: Tensor, shape: torch.Size, name: str) -> Tensor:
    """The bool tensor of this shape of which :func:`pack_masks` made ``bits``."""
    entries = shape.numel()
    if bits.shape != (packed_bytes(entries),):
        raise ShapeError(
            f"{name}: uint8 of shape {tuple(bits.shape)}; a mask is bool of shape {tuple(shape)}, "
            f"or {packed_bytes(entries)} bytes of one bit per weight, as pack_masks makes them"
        )
    if entries % 8 and int(bits[-1]) >> entries % 8:
        raise ArgumentError(f"{name}: has bits beyond its {entries} weights; it is damaged")
    return PackedMask(bits.contiguous(), shape, 0).unpacked()


def _refuse_nonzero(fitting: _Fitting) -> None:
    for name, place, removed in fitting:
        nonzero = int((place.weight[removed] != 0).sum())
        if nonzero:
            raise ArgumentError(
                f"masks[{name!r}]: {nonzero} of the {int(removed.sum())} weights that it removes "
                "are not zero; are these the masks of this network? apply_masks() would set them "
                "to zero"
            )


def _merged(fitting: _Fitting) -> list[tuple[Place, Tensor]]:
    """One mask of removed weights for each parameter; several layers may own parts of one."""
    masks: dict[int, tuple[Place, Tensor]] = {}
    for _, place, removed in fitting:
        p, part = place.parameter, place.weight
        if id(p) not in masks:
            whole = torch.empty_strided(p.shape, p.stride(), dtype=torch.bool, device=p.device)
            masks[id(p)] = (place, whole.fill_(False))
        offset = part.storage_offset() - p.storage_offset()
        masks[id(p)][1].as_strided(part.shape, part.stride(), offset).logical_or_(removed)
    return list(masks.values())
