"""SparseGPT's released sweep, its factor, and the same sweep in tuned torch."""

from __future__ import annotations

import torch
from torch import Tensor


def sparsegpt_(
    W: Tensor, U: Tensor, sparsity: float, group: int = 0, per_group: int = 0, width: int = 128
) -> Tensor:
    """Prune W (R, C) in place, with U^T U the damped inverse: SparseGPT's released loop (2023).

    Without groups a block loses what is below the sorted scores' ``sparsity`` quantile; with them,
    ``per_group`` of every ``group`` columns. Every column takes a dozen small operations on new
    tensors and one outer product over the rest of the block, masked or not.
    """
    for begin in range(0, W.shape[1], width):
        end = min(begin + width, W.shape[1])
        block = W[:, begin:end].clone()  # (R, B)
        u = U[begin:end, begin:end]
        kept, errors = torch.zeros_like(block), torch.zeros_like(block)
        if group:
            removed = torch.zeros_like(block, dtype=torch.bool)
        else:
            score = block**2 / u.diagonal().reshape(1, -1) ** 2
            ranked = torch.sort(score.flatten()).values
            removed = score <= ranked[int(score.numel() * sparsity)]
        for j in range(end - begin):
            column, pivot = block[:, j], u[j, j]
            if group and j % group == 0:
                members = slice(j, j + group)
                score = block[:, members] ** 2 / u.diagonal()[members].reshape(1, -1) ** 2
                lowest = torch.topk(score, per_group, dim=1, largest=False).indices
                removed.scatter_(1, j + lowest, True)
            left = column.clone()
            left[removed[:, j]] = 0
            error = (column - left) / pivot
            block[:, j:] -= error.unsqueeze(1).matmul(u[j, j:].unsqueeze(0))
            kept[:, j] = left
            errors[:, j] = error
        W[:, begin:end] = kept
        W[:, end:] -= errors.matmul(U[begin:end, end:])
    return W


def sweep_transposed_(
    W: Tensor, U: Tensor, sparsity: float, group: int = 0, per_group: int = 0, width: int = 128
) -> Tensor:
    """The best that torch does with the same sweep: three operations a column, all in place.

    A block is transposed, so that a column of W is a row of memory. kthvalue replaces the sort.
    Errors go directly into the block that repairs the columns to its right.
    """
    C = W.shape[1]
    for begin in range(0, C, width):
        end = min(begin + width, C)
        block = W[:, begin:end].T.contiguous()  # (B, R)
        u = U[begin:end, begin:end].contiguous()
        inverse = u.diagonal().reciprocal()
        errors = torch.empty_like(block)
        if group:
            kept = torch.empty(block.shape, dtype=torch.bool)
        else:
            score = (block * inverse[:, None]).square_()
            count = int(score.numel() * sparsity)
            kept = score > score.view(-1).kthvalue(max(count, 1)).values if count else score >= 0
        for j in range(end - begin):
            if group and j % group == 0:
                members = slice(j, j + group)
                score = (block[members] * inverse[members, None]).square_()
                lowest = score.topk(per_group, dim=0, largest=False).indices
                kept[members] = True
                kept[members].scatter_(0, lowest, False)
            torch.mul(block[j], inverse[j], out=errors[j]).masked_fill_(kept[j], 0)
            if j + 1 < end - begin:
                block[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)
        W[:, begin:end] = block.masked_fill_(~kept, 0).T
        W[:, end:].addmm_(errors.T, U[begin:end, end:], alpha=-1)
    return W


def sparsegpt_factor(H: Tensor, damping: float) -> Tensor:
    """U (C, C) for :func:`sparsegpt_` from H, as published: three factorisations in H's type."""
    damped = H.clone()
    damped.diagonal().add_(damping * H.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
