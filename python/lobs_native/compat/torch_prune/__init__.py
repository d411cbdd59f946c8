"""Methods for ``torch.nn.utils.prune`` and ``torch.ao.pruning`` that repair the kept weights."""

from lobs_native.compat.torch_prune.pruning import (
    LOBSSparsifier,
    LOBSUnstructured,
    lobs_unstructured,
    second_moments,
)

__all__ = ["LOBSSparsifier", "LOBSUnstructured", "lobs_unstructured", "second_moments"]
