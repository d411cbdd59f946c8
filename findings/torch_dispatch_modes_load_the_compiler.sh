#!/usr/bin/env bash
# torch 2.13.0: the first operation under any TorchDispatchMode imports torch._dynamo, the compiler.
#
# Nothing is compiled: the class is wrapped when it is defined, so that the compiler leaves it alone,
# and to say so to the compiler it is imported. Counting or watching a few operations that way takes
# as long as importing torch a second time (2.2 CPU seconds here, 3.2 for torch), once in every
# process. A mode that answers False in _should_skip_dynamo is not wrapped and does not pay.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

begun = time.process_time()
import torch
from torch.utils._python_dispatch import TorchDispatchMode

print(f"torch {torch.__version__}, imported in {time.process_time() - begun:.1f} CPU seconds")


class Unwrapped(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Usual(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


loaded = []
for mode in (Unwrapped, Usual):
    begun = time.process_time()
    with mode():
        torch.ones(2) + 1
    loaded.append("torch._dynamo" in sys.modules)
    seconds = time.process_time() - begun
    print(f"{mode.__name__}: {seconds:.2f} CPU seconds, compiler loaded: {loaded[-1]}")
assert loaded == [False, True], "changed since this was written"
PYTHON
