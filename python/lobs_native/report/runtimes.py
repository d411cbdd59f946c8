"""Where the sparsity of a report runs faster today, and where it does not.

Only statements with a source, which stands above each; looked up in November 2026. A runtime whose
source says nothing about a pattern is said to need another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # report imports this module
    from lobs_native.report.records import LayerReport

__all__ = ["Runtime", "runtimes"]

YES, CONDITIONS, NO = "yes", "with conditions", "no"


@dataclass(frozen=True)
class Runtime:
    """One way to run the pruned network."""

    where: str
    faster: str  # "yes", "with conditions" or "no"
    why: str


def runtimes(layers: Sequence[LayerReport], pattern: str) -> tuple[Runtime, ...]:
    """What is known for the layers' patterns; ``pattern`` is that of layers that name none."""
    patterns = {layer.pattern or pattern for layer in layers} or {pattern}
    semi = all(_within_two_of_four(name) for name in patterns)
    return (
        # "Zeroing out pruned parameters doesn't affect the latency": torchao/sparsity/README.md.
        Runtime(
            "PyTorch as it is, on CPU and GPU",
            NO,
            "The weights are stored dense, and zeros are multiplied like other numbers.",
        ),
        _semi_structured(layers, semi),
        # developer.nvidia.com/blog/accelerating-inference-with-sparsity-using-ampere-and-tensorrt
        Runtime(
            "TensorRT, NVIDIA Ampere and later",
            CONDITIONS if semi else NO,
            "From TensorRT 8.0 on it has kernels for sparse tensor cores, which take 2:4."
            + ("" if semi else _NEEDS),
        ),
        # vllm-project/vllm pull request 36799 (March 2026), llm-compressor pull request 2720.
        Runtime(
            "vLLM",
            NO,
            "Its 2:4 kernels were removed in March 2026; a model stored as 2:4 is refused since "
            "0.19.1. Stored dense, it runs as before.",
        ),
        # torch/sparse/_triton_ops.py, check_blocksize, torch 2.13.
        Runtime(
            "PyTorch, block-sparse matrices (BSR) on GPU",
            NO,
            "Its kernels take blocks of at least 16 x 16; no pattern here has such.",
        ),
        # docs.pytorch.org/docs/stable/sparse.html, "Why and when to use sparsity".
        Runtime(
            "PyTorch, compressed rows (CSR)",
            CONDITIONS,
            "Its documentation warns that run time may grow instead: only at high sparsity, and "
            "only if a measurement with your shapes says so.",
        ),
        # docs.openvino.ai, sparse_weights_decompression_rate and the notebook
        # sparsity-optimization: BERT in 8 bits on a 4th generation Xeon.
        Runtime(
            "OpenVINO, Intel Xeon from the 4th generation on",
            CONDITIONS,
            "Any pattern, after quantising to int8: weights of matrix products are packed, which "
            "saves memory traffic, where CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE is set.",
        ),
        # apple.github.io/coremltools/docs-guides/source/opt-pruning-perf.html
        Runtime(
            "Core ML, Apple Neural Engine",
            CONDITIONS,
            "Any pattern, stored sparse: it typically helps where loading weights is the limit, "
            "and from about 75 % sparsity, or with zeros in blocks, computation can be skipped.",
        ),
        # tensorflow/lite/delegates/xnnpack/README.md, "Sparse Inference".
        Runtime(
            "XNNPACK (TensorFlow Lite)",
            CONDITIONS if any(_pointwise(layer) for layer in layers) else NO,
            "Any pattern, but only convolutional networks: 1 x 1 convolutions, at least two thirds "
            "zero, in a part of the graph that begins with a 3 x 3 convolution of stride 2.",
        ),
        # neuralmagic/deepsparse issue 1676.
        Runtime(
            "DeepSparse",
            NO,
            "It was made for unstructured sparsity on CPUs, and came to its end of life on 2 June "
            "2025.",
        ),
    )


_NEEDS = " They need 2:4, which was not asked for in every layer."


def _semi_structured(layers: Sequence[LayerReport], semi: bool) -> Runtime:
    where = "PyTorch, torch.sparse.to_sparse_semi_structured, NVIDIA Ampere and later"
    # _DTYPE_SHAPE_CONSTRAINTS in torch/sparse/semi_structured.py, torch 2.13; compute capability
    # 8.0 in the PyTorch tutorial "semi_structured_sparse".
    rules = (
        "2:4, linear layers only, in float16 or bfloat16 (rows a multiple of 32, columns of 64; "
        "with cuSPARSELt 16 and 16) or int8 (16 and 128; 32 and 32); compute capability 8.0."
    )
    if not semi:
        return Runtime(where, NO, rules + _NEEDS)
    linear = [layer for layer in layers if layer.kind == "Linear"]
    fit = sum(layer.shape[0] % 32 == 0 and layer.shape[1] % 64 == 0 for layer in linear)
    # Gains: torchao/sparsity/README.md, segment-anything on an A100.
    return Runtime(
        where,
        CONDITIONS,
        f"{rules} {fit} of these {len(layers)} layers have such a shape in float16. A whole vision "
        "transformer on an A100 came to 1.10 times the speed with only its large products sparse, "
        "and to 1.07 with the attention's as well.",
    )


def _within_two_of_four(pattern: str) -> bool:
    """Whether a pattern leaves at most 2 of every 4 neighbouring weights."""
    keep, colon, size = pattern.partition(":")
    if not colon or not keep.isdecimal() or not size.isdecimal():
        return False
    return size in ("1", "2", "4") and int(keep) * 2 <= int(size)


def _pointwise(layer: LayerReport) -> bool:
    return layer.kind == "Conv2d" and layer.shape[2:] == (1, 1)
