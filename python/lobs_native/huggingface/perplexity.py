"""The perplexity of a causal language model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lobs_native.calibration.session import Session
from lobs_native.huggingface.checkpoint import first_output

__all__ = ["perplexity"]

_PIECE = 1 << 18  # logits whose logarithms are in memory at a time


def perplexity(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> float | None:
    """``exp`` of the mean negative log-likelihood of each token but the first of a sequence, given
    those before it; None if it is beyond the range of a float.

    ``batches`` hold input_ids (batch, tokens) without padding. The model is left as it was.
    """
    session = Session(model, batches, first_output, None, 0, False)
    total, count = 0.0, 0
    with session.evaluating():
        for batch in batches:
            logits = session.call(model, batch)
            step = max(1, _PIECE // logits.shape[-1])
            for row, ids in zip(logits, batch["input_ids"], strict=True):
                parts = zip(row[:-1].split(step), ids[1:].to(row.device).split(step), strict=True)
                for some, following in parts:
                    total += float(cross_entropy(some.float(), following, reduction="sum"))
                count += len(ids) - 1
    mean = total / count if count else math.inf
    return math.exp(mean) if mean < 700 else None  # NaN is not less
