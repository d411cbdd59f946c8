"""Folders of transformers, pruned from the command line: names and dtypes stay."""

from __future__ import annotations

import contextlib
import io
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from quality.situation import situation

_SIZES: dict[str, dict[str, int]] = {
    "Llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64},
    "OPT": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
}
_PREFIX = {"Llama": "model.", "GPT2": "transformer.", "OPT": "model."}


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, **{f"w{i}": i + 1 for i in range(60)}}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


@situation(
    "the new folder has the old one's names, and its dtypes, tensor by tensor",
    kind=tuple(_SIZES),
    dtype=(torch.float16, torch.bfloat16, torch.float32),
    norms=(torch.float32, None),
    prefix=(True, False),
    method=("sweep", "magnitude"),
)
def names_and_dtypes_of_a_folder(
    kind: str, dtype: torch.dtype, norms: torch.dtype | None, prefix: bool, method: str
) -> None:
    import transformers
    from safetensors.torch import load_file, save_file

    from lobs_native.cli import commands

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, **_SIZES[kind]
    )
    names = {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel", "OPT": "OPTForCausalLM"}
    model = getattr(transformers, names[kind])(config).to(dtype)
    with tempfile.TemporaryDirectory() as top, contextlib.redirect_stderr(io.StringIO()) as said:
        folder, out, text = Path(top, "old"), Path(top, "new"), Path(top, "text")
        model.save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        draw = random.Random(0)
        lines = (" ".join(f"w{draw.randrange(60)}" for _ in range(30)) for _ in range(40))
        text.write_text("\n".join(lines))
        old = load_file(folder / "model.safetensors")
        if not prefix:  # as the class does not spell them
            old = {name.removeprefix(_PREFIX[kind]): value for name, value in old.items()}
        for name in old if norms is not None else ():
            if "norm" in name or "ln_" in name:  # more than float16 holds
                old[name] = 1e5 * (1 + 0.01 * torch.randn(old[name].shape, dtype=norms))
        save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
        options = ["--length", "32", "--sparsity", "0.5", "--method", method, "--no-progress"]
        arguments = ["prune", str(folder), "--calibration", str(text), "--out", str(out)]
        with contextlib.redirect_stdout(io.StringIO()):
            code = commands.main([*arguments, *options])
        assert code == 0, said.getvalue()
        new = load_file(out / "model.safetensors")
    assert set(new) == set(old), f"names {sorted(set(new) ^ set(old))}"
    for name, value in old.items():
        assert new[name].dtype == value.dtype, f"{name}: {value.dtype} became {new[name].dtype}"
        pruned = value.ndim == 2 and "emb" not in name and "wte" not in name and "wpe" not in name
        if not pruned and not name.endswith("bias"):
            assert torch.equal(new[name], value), f"{name} changed"
        elif pruned:
            zeros = int((new[name] == 0).sum())
            assert 2 * zeros >= value.numel() - 1, f"{name}: {zeros} zeros"
