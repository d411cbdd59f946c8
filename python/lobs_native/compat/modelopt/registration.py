"""NVIDIA Model-Optimizer: our pruning as one of its sparsity modes.

``register()`` makes the mode ``"lobs"`` known to ``modelopt.torch.sparsity.sparsify``:

    import modelopt.torch.sparsity as mts
    from lobs_native.compat import modelopt

    modelopt.register()
    model = mts.sparsify(model, "lobs", config={"data_loader": loader, "collect_func": collect})

See ``lobs_native.compat.modelopt.mode.LOBSSearcher`` for what ``config`` may say. Call ``register``
also before ``modelopt.torch.opt.restore`` of a model that was pruned this way.

Different from the host's ``"sparsegpt"``, which keeps the weights as they were and only masks them:
the weights that are left are the repaired ones. Tested with nvidia-modelopt 0.47.0, which is not
needed until ``register`` is called.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Make the sparsity mode ``"lobs"`` known. Doing it again does nothing.

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
