"""Adapters for PyTorch's two pruning packages, ``torch.nn.utils.prune`` and ``torch.ao.pruning``.

In both, a weight is a parameter times a mask. But Optimal Brain Surgeon also changes the kept
weights. The adapters therefore write the repaired weights, with exact zeros for the removed ones,
into the parameter behind the mask (``weight_orig``; ``parametrizations.weight.original``), and the
bias into the module's. They write in place, so that optimizers keep their references. The original
values are lost: copy the model first if you need them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.pruning.sparsifier.base_sparsifier import BaseSparsifier
from torch.ao.pruning.sparsifier.utils import FakeSparsity
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from lobs_native.calibration.session import Forward
from lobs_native.compat.torch_prune.one_parameter import (
    Pruned,
    layer_of,
    prune_parameter,
    second_moments,
    write_bias,
)
from lobs_native.errors import ArgumentError, DtypeError
from lobs_native.layers import Layer
from lobs_native.report.records import LayerReport
from lobs_native.solvers.settings import LAYER_OPTIONS, LayerSettings

__all__ = ["LOBSSparsifier", "LOBSUnstructured", "lobs_unstructured", "second_moments"]


# ---- torch.nn.utils.prune ------------------------------------------------------------------------


class LOBSUnstructured(BasePruningMethod):
    """Prune a layer's weight by second-order information, as a method of ``torch.nn.utils.prune``.

    Call :meth:`apply`; the instance remains in the module's hooks. ``mask`` is its mask, and
    ``report`` the ``LayerReport``, whose ``rows`` are nan if ``hessian`` was a matrix.
    """

    PRUNING_TYPE = "global"  # so that compute_mask is called on whole tensors, in their own shape

    def __init__(self, mask: Tensor, report: LayerReport) -> None:
        self.mask = mask
        self.report = report

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask, combined with the one from before."""
        return default_mask * self.mask.to(device=default_mask.device, dtype=default_mask.dtype)

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        module: nn.Module,
        name: str,
        hessian: Any = None,
        *,
        sparsity: float | None = None,
        threshold: float | None = None,
        max_error: float | None = None,
        method: str = "auto",
        pattern: Any = "unstructured",
        scope: str = "layer",
        damping: float = 0.01,
        refine: str | None = None,
        update_bias: bool = True,
        backend: str | None = None,
    ) -> BasePruningMethod:
        """Prune the tensor ``name`` of ``module``, repair the kept weights, and attach the mask.

        The repaired values are written into the parameter, which becomes ``<name>_orig``, before
        ``<name>_mask`` is attached. Without the mask, the weights are therefore those of the pruned
        layer, not the original ones.

        Parameters
        ----------
        module : nn.Module
            Linear, Conv1d to 3d (also with groups), their transposes, transformers' Conv1D, or a
            type registered with ``register_layer``. Its weight may already be pruned, by any method
            of ``torch.nn.utils.prune``.
        name : str
            The weight's name, usually ``"weight"``.
        hessian : Hessian, (C, C) tensor, or a list of these, one for each group
            The mean second moment of the layer's inputs, from :func:`second_moments`. Not modified.
            The columns of convolutions are ordered by kernel position, then input channel.
        sparsity : float in [0, 1]
            The fraction of the whole weight that is zero afterwards, including what was pruned
            before (in torch's own methods, ``amount`` is a fraction of what is left). It must not
            be lower than the fraction that the mask already removes. Without a target, for a weight
            with a mask, nothing more is removed and the kept weights are repaired for that mask.
        threshold, max_error, method, pattern, scope, damping, refine, backend
            As in :func:`lobs_native.prune_weight`.
        update_bias : bool
            Update ``module.bias`` together with the weights if ``hessian`` has a last column of
            ones. Otherwise the bias does not change.

        Returns
        -------
        LOBSUnstructured, or PruningContainer
            The hook, as from torch's own methods: a container whose last member is ours if the
            weight was already pruned.

        Raises
        ------
        ArgumentError, DtypeError, ShapeError, PatternError, BackendError
            An argument does not fit. Nothing was changed.
        NonFiniteError, NotPositiveDefiniteError
            As in :func:`lobs_native.prune_weight`. Nothing was changed.

        Warns
        -----
        RuntimeWarning
            More damping was needed than requested; ``report`` tells how much.

        Notes
        -----
        ``prune.remove``, ``prune.is_pruned``, containers and ``state_dict`` work as with torch's
        own methods. For one budget for several layers, use ``lobs_native.prune(model,
        scope="model")`` and then ``as_torch_prune``, which makes the same buffers. A weight that
        several modules share must also be pruned by ``lobs_native.prune``.
        """
        settings = LayerSettings(
            sparsity=sparsity,
            threshold=threshold,
            max_error=max_error,
            method=method,
            pattern=pattern,
            scope=scope,
            damping=damping,
            refine=refine,
        )
        layer = layer_of(module, name, type(module).__name__)
        parameter, mask = _parameter(module, name)
        pruned = prune_parameter(
            layer,
            _effective(parameter, mask),
            mask,
            hessian,
            settings,
            update_bias=update_bias,
            backend=backend,
        )
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(pruned.weight)
        try:
            hook = super().apply(  # type: ignore[no-untyped-call]
                module, name, pruned.mask, pruned.report
            )
        except BaseException:
            with torch.no_grad():
                parameter.copy_(before)
            raise
        write_bias(layer, pruned.bias)
        assert isinstance(hook, BasePruningMethod)
        return hook


def lobs_unstructured(module: nn.Module, name: str, hessian: Any = None, **how: Any) -> nn.Module:
    """:meth:`LOBSUnstructured.apply` in the style of ``prune.l1_unstructured``: returns the module.

    Parameters
    ----------
    module, name, hessian, **how
        As there. The module is changed in place.

    Returns
    -------
    nn.Module
        The same module.
    """
    LOBSUnstructured.apply(module, name, hessian, **how)
    return module


def _parameter(module: nn.Module, name: str) -> tuple[nn.Parameter, Tensor | None]:
    """The parameter behind a weight, and its mask (bool) or None."""
    own, original = module._parameters.get(name), module._parameters.get(f"{name}_orig")
    hooks = [
        hook
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name
    ]
    if own is not None and not hooks:
        return own, None
    mask = module._buffers.get(f"{name}_mask")
    if original is None or mask is None or len(hooks) != 1:
        raise ArgumentError(
            f"name: {name!r} of {type(module).__name__} is computed from other parameters, but not "
            "by torch.nn.utils.prune; use LOBSSparsifier for the parametrizations of "
            "torch.ao.pruning, or make it permanent first (remove_parametrizations)"
        )
    return original, mask != 0


def _effective(parameter: Tensor, mask: Tensor | None) -> Tensor:
    """The weight as used by the next forward."""
    value = parameter.detach()
    return value if mask is None else value.masked_fill(~mask, 0)


# ---- torch.ao.pruning ----------------------------------------------------------------------------


class LOBSSparsifier(BaseSparsifier):
    """Prune a model's layers by second-order information, in the manner of ``torch.ao.pruning``.

    ``prepare(model, config)`` puts masks of ones on the weights, ``step()`` prunes, and
    ``squash_mask()`` makes the result permanent. Repaired values are written to
    ``parametrizations.<name>.original`` and masks to ``parametrizations.<name>[0].mask``, in place,
    once all layers have been computed, so that a failure changes nothing. A later step with a
    higher sparsity continues from there and does not restore any weight.

    Parameters
    ----------
    hessians : {module name: Hessian, (C, C) tensor, or a list of these, one for each group}
        The result of :func:`second_moments`. Not modified.
    calibration : iterable of batches
        Instead of ``hessians``: at every step the model runs on them with its present weights.
        ``forward`` is as in :func:`second_moments`.
    sparsity, threshold, max_error, method, pattern, scope, damping, refine, update_bias, backend
        As in :meth:`LOBSUnstructured.apply`, for all layers. An entry of ``config`` may have its
        own values, beside its ``tensor_fqn``.

    Attributes
    ----------
    reports : {tensor_fqn: LayerReport}
        The report of each layer from the last step.

    Raises
    ------
    ArgumentError, DtypeError
        Not exactly one of ``hessians`` and ``calibration`` is given, or its type is wrong.

    Notes
    -----
    As in every BaseSparsifier, a config of None means all nn.Linear, and the model's state_dict
    contains no masks; the zeros are in the weights themselves.
    """

    def __init__(
        self,
        hessians: Mapping[str, Any] | None = None,
        *,
        calibration: Any = None,
        forward: Forward | None = None,
        sparsity: float | None = None,
        threshold: float | None = None,
        max_error: float | None = None,
        method: str = "auto",
        pattern: Any = "unstructured",
        scope: str = "layer",
        damping: float = 0.01,
        refine: str | None = None,
        update_bias: bool = True,
        backend: str | None = None,
    ) -> None:
        if (hessians is None) == (calibration is None):
            raise ArgumentError("hessians, calibration: pass exactly one of them")
        if hessians is not None and not isinstance(hessians, Mapping):
            raise DtypeError(
                f"hessians: expected {{module name: Hessian}}, got {type(hessians).__name__}"
            )
        super().__init__(
            defaults={
                "sparsity": sparsity,
                "threshold": threshold,
                "max_error": max_error,
                "method": method,
                "pattern": pattern,
                "scope": scope,
                "damping": damping,
                "refine": refine,
                "update_bias": update_bias,
                "backend": backend,
            }
        )
        self.hessians = hessians
        self.calibration = calibration
        self.forward = forward
        self.reports: dict[str, LayerReport] = {}

    def step(self, use_path: bool = True) -> None:
        """Prune all layers of the config to their targets, or none if there is an error.

        Raises
        ------
        ArgumentError
            A layer has no second moment, or cannot be pruned.
        LobsError
            As in :func:`lobs_native.prune_weight`, with the layer's name. Nothing was changed.
        """
        if not self.enable_mask_update:
            return
        hessians = self._hessians([group["module_fqn"] for group in self.groups])
        results = [(group, *self._pruned(hessians, **group)) for group in self.groups]
        for group, layer, pruned in results:
            _write(group["module"], group["tensor_name"], layer, pruned)
            self.reports[group["tensor_fqn"]] = pruned.report

    def update_mask(self, module: nn.Module, tensor_name: str, **kwargs: Any) -> None:
        """Prune one tensor of the config; ``step`` prunes all of them."""
        hessians = self._hessians([kwargs["module_fqn"]])
        layer, pruned = self._pruned(hessians, module, tensor_name, **kwargs)
        _write(module, tensor_name, layer, pruned)
        self.reports[kwargs["tensor_fqn"]] = pruned.report

    def _hessians(self, names: list[str]) -> Mapping[str, Any]:
        if self.hessians is not None:
            return self.hessians
        return second_moments(self.model, self.calibration, names=names, forward=self.forward)

    def _pruned(
        self,
        hessians: Mapping[str, Any],
        module: nn.Module,
        tensor_name: str,
        module_fqn: str,
        **config: Any,
    ) -> tuple[Layer, Pruned]:
        layer = layer_of(module, tensor_name, module_fqn or type(module).__name__)
        original, mask = _parametrized(module, tensor_name, layer.name)
        settings = LayerSettings(**{k: config[k] for k in LAYER_OPTIONS if k in config})
        value, kept = original.detach(), mask != 0
        pruned = prune_parameter(
            layer,
            value.masked_fill(~kept, 0),
            None if bool(kept.all()) else kept,
            hessians.get(module_fqn),
            settings,
            update_bias=config["update_bias"],
            backend=config["backend"],
        )
        return layer, pruned


def _parametrized(module: nn.Module, name: str, label: str) -> tuple[Tensor, Tensor]:
    """The parameter behind a weight, and the mask of its only parametrization."""
    chain: Any = ()
    if parametrize.is_parametrized(module, name):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        chain = module.parametrizations[name]
    kinds = [type(member).__name__ for member in chain]
    if len(kinds) != 1 or not isinstance(chain[0], FakeSparsity):
        raise ArgumentError(
            f"layer {label!r}: its {name} must have one parametrization, the FakeSparsity from "
            f"prepare(); it has {', '.join(kinds) or 'none'}"
        )
    mask = chain[0].mask
    assert isinstance(mask, Tensor)
    return chain.original, mask


@torch.no_grad()
def _write(module: nn.Module, name: str, layer: Layer, pruned: Pruned) -> None:
    original, mask = _parametrized(module, name, layer.name)
    original.copy_(pruned.weight)
    mask.copy_(pruned.mask)
    write_bias(layer, pruned.bias)
