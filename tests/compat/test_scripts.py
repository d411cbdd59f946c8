"""Unmodified programs of hosts under ``python -m lobs_native.run``.

``LOBS_HOSTS=FOLDER`` names a folder that holds clones of IST-DASLab/sparsegpt and locuslab/wanda.
Their ``datasets`` is replaced by a module on PYTHONPATH that serves local text.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import hf_folders

import lobs_native as lobs
from lobs_native.compat.ablate import AblateGPT
from lobs_native.compat.sparsegpt import SparseGPT

HOSTS = os.environ.get("LOBS_HOSTS")
pytestmark = pytest.mark.skipif(HOSTS is None, reason="LOBS_HOSTS names no folder with the hosts")

DATASETS = """
import os
import sys
import torch

if not torch.cuda.is_available():  # the program is written for cuda:0
    for name in ("modelutils", "__main__"):
        sys.modules[name].DEV = torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None

class Rows(list):
    def __getitem__(self, key):
        rows = list.__getitem__(self, key)
        return {"text": [row["text"] for row in rows]} if isinstance(key, slice) else rows

def load_dataset(*names, data_files=None, split):
    lines = open(os.environ["LOCAL_TEXT"]).read().splitlines()
    lines = lines[:200] if split == "train" else lines[200:]
    if "c4" in names[0]:
        return Rows({"text": " ".join(lines[i : i + 20])} for i in range(0, len(lines), 20))
    return {"text": lines, "sentence": lines}
"""


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """A small random OPT in a folder, and the environment of the program."""
    transformers = pytest.importorskip("transformers")
    base = tmp_path_factory.mktemp("opt")
    (base / "standin").mkdir()
    (base / "standin" / "datasets.py").write_text(DATASETS)
    (base / "text.txt").write_text(hf_folders.text(lines=400))
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=hf_folders.VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.2,
    )
    transformers.OPTForCausalLM(config).save_pretrained(base / "model")
    hf_folders.save_tokenizer(base / "model")
    paths = [str(base / "standin"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return base, {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "LOCAL_TEXT": str(base / "text.txt"),
        "OMP_NUM_THREADS": "1",
    }


def run(opt, *before, pattern):
    folder, environment = opt
    script = str(Path(HOSTS) / "sparsegpt" / "opt.py")
    command = [sys.executable, *before, script, str(folder / "model"), "wikitext2"]
    done = subprocess.run(
        [*command, "--nsamples", "8", *pattern],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def figures(done, name):
    return [float(value) for value in re.findall(rf"^{name} ?(\S+)", done.stdout, re.MULTILINE)]


PATTERNS = {
    # With four bits, the rounding of a weight half-way between two levels depends on the last bit
    # of H, which both sides sum in different orders. From the same H, the results are equal.
    "50%": (("--sparsity", "0.5"), 1e-5),
    "2:4": (("--prunen", "2", "--prunem", "4"), 1e-5),
    "50% and 4 bits": (("--sparsity", "0.5", "--wbits", "4"), 2e-2),
}


@pytest.mark.parametrize(("pattern", "close"), PATTERNS.values(), ids=PATTERNS)
def test_opt_py_of_sparsegpt_prints_the_same_as_alone(opt, pattern, close):
    own = run(opt, pattern=pattern)
    ours = run(opt, "-m", "lobs_native.run", "--verify", "1", pattern=pattern)
    perplexities = figures(own, "Perplexity:")
    assert len(perplexities) == 3
    assert figures(ours, "Perplexity:") == pytest.approx(perplexities, rel=close)
    assert figures(ours, "error") == pytest.approx(figures(own, "error"), rel=max(close, 1e-3))
    assert "SparseGPT.add_batch: 96 calls" in ours.stderr
    assert "SparseGPT.fasterprune: 12 calls" in ours.stderr
    assert "12 verified" in ours.stderr
    assert "BEYOND" not in ours.stderr
    assert "lobs_native" not in own.stderr


def test_opt_py_runs_with_the_exact_method(opt):
    own = run(opt, pattern=("--sparsity", "0.5"))
    ours = run(opt, "-m", "lobs_native.run", "--numerics", "ours", pattern=("--sparsity", "0.5"))
    first = slice(0, 3)  # the layers that read the same inputs in both
    assert (
        max(
            a / b
            for a, b in zip(
                figures(ours, "error")[first], figures(own, "error")[first], strict=True
            )
        )
        < 0.9
    )


def test_modules_of_wanda_get_ours(monkeypatch):
    folder = Path(HOSTS) / "wanda"
    if not folder.is_dir():
        pytest.skip("LOBS_HOSTS has no folder wanda")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=None))
    before = set(sys.modules)
    try:
        with lobs.compat.patch("sparsegpt"):
            prune = importlib.import_module("lib.prune")
            assert issubclass(prune.SparseGPT, SparseGPT)
            assert issubclass(prune.AblateGPT, AblateGPT)
        assert prune.SparseGPT.__module__ == "lib.sparsegpt"
        assert prune.AblateGPT.__module__ == "lib.ablate"
    finally:
        for name in set(sys.modules) - before:
            if name == "lib" or name.startswith("lib."):
                del sys.modules[name]
