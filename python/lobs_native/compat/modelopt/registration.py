"""Registration of this package's pruning as a sparsity mode of NVIDIA Model-Optimizer.

``register()`` adds the mode ``"lobs"`` to ``modelopt.torch.sparsity.sparsify``:

    import modelopt.torch.sparsity as mts
    from lobs_native.compat import modelopt

    modelopt.register()
    model = mts.sparsify(model, "lobs", config={"data_loader": loader, "collect_func": collect})

``lobs_native.compat.modelopt.mode.LOBSSearcher`` describes ``config``. Call ``register`` also
before ``modelopt.torch.opt.restore`` of a model that was pruned this way.

Unlike the host's ``"sparsegpt"``, which masks the original weights, this mode repairs the kept
weights. Tested with nvidia-modelopt 0.47.0, which is not needed until ``register`` is called.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Register the sparsity mode ``"lobs"``. Further calls have no effect.

    Raises
    ------
    ImportError
        Model-Optimizer is not installed.
    """
    try:
        from modelopt.torch.sparsity.weight_sparsity.mode import SparsityModeRegistry
    except ModuleNotFoundError as error:
        raise ImportError(
            "the sparsity mode 'lobs' needs NVIDIA Model-Optimizer: pip install nvidia-modelopt "
            f"({error})"
        ) from error
    from lobs_native.compat.modelopt.mode import LOBSModeDescriptor

    if "lobs" not in SparsityModeRegistry:
        SparsityModeRegistry.register_mode(LOBSModeDescriptor)
