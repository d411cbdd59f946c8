"""``bench/quality/fresh_folder.py``: a shrunk folder, loaded by a Python of its own."""

from __future__ import annotations

import sys

import pytest
from helpers import hf_folders

pytest.importorskip(
    "transformers", reason='transformers is not installed: pip install "lobs-native[hf]"'
)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Python's own, from packages that transformers imports.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]


def test_a_smaller_network_is_the_same_elsewhere(tmp_path, monkeypatch):
    from quality import fresh_folder

    text = tmp_path / "text.txt"
    text.write_text(hf_folders.text(lines=80))
    monkeypatch.setattr(fresh_folder, "TEXT", text)
    source = hf_folders.save(tmp_path / "in", "LlamaForCausalLM", max_position_embeddings=128)
    found = fresh_folder.compared(source, sys.executable, {"neurons": 0.5}, 256)
    assert found["kept"] == {"neurons": 0.5}
    assert found["parameters"][1] < found["parameters"][0]
    assert found["same tokens"]
    assert found["same bits"]
