"""Prune a single matrix, and draw its error against sparsity: one pass answers for all of them.

    python examples/one_layer_and_its_curve.py

Takes a second. No model is needed: a weight matrix, and the second moment of its inputs.
"""

from __future__ import annotations

import torch

import lobs_native as lobs

torch.manual_seed(0)

# Inputs with 128 features that depend on each other, as activations do.
mixing = torch.randn(40, 128)
inputs = torch.relu(torch.randn(4000, 40) @ mixing)
weight, bias = torch.randn(64, 128) / 128**0.5, torch.zeros(64)

# The second moment streams: call update once per batch. With bias=True, the bias is repaired too.
moment = lobs.Hessian(128, bias=True)
for batch in inputs.split(1000):
    moment.update(batch)

half = lobs.prune_weight(weight, moment, sparsity=0.5, bias=bias)
print(f"half of the weights removed: {int((half.weight == 0).sum())} of {weight.numel()} are zero")
print(f"relative error of the output: {half.relative_error:.4f}")
before = inputs @ weight.T + bias
change = inputs @ half.weight.T + half.bias - before
print(f"measured on the inputs:       {float((change**2).sum() / (before**2).sum()):.4f}")
change = inputs @ (weight * half.mask).T + bias - before
print(f"without repairing the others: {float((change**2).sum() / (before**2).sum()):.4f}\n")

# One exact pass gives the error at every sparsity, and the layer at any of them.
trace = lobs.trace_weight(weight, moment, bias=bias)
sparsity, error = trace.curve()
print("sparsity  relative error, as predicted by the trace")
for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
    nearest = int((sparsity - share).abs().argmin())
    relative = float(error[nearest]) / half.energy
    print(f"{share:8.0%}  {relative:.4f} {'#' * round(60 * relative)}")

ninety = trace.at(0.9)
print(f"\nthe layer at 90%, from the same trace: relative error {ninety.relative_error:.4f}")
