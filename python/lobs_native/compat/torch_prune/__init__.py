"""``torch.nn.utils.prune`` and ``torch.ao.pruning`` with repaired weights behind their masks."""

from lobs_native.compat.torch_prune.pruning import (
    LOBSSparsifier,
    LOBSUnstructured,
    lobs_unstructured,
    second_moments,
)

__all__ = ["LOBSSparsifier", "LOBSUnstructured", "lobs_unstructured", "second_moments"]
