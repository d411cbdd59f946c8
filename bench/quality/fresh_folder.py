"""Does stock transformers load a smaller network's folder where this package is not installed?

    python -m venv fresh && fresh/bin/pip install torch transformers
    python bench/quality/fresh_folder.py MODEL --python fresh/bin/python [--neurons X] [--heads X]
                                         [--tokens N] [--out FILE]

MODEL, a folder as of ``lobs-native shrink``, is shrunk on the text of ``whole_encoder.py`` and
written as the command line does. Another Python then loads the new folder by the class that its
configuration names, tokenizes a sentence, and runs the network on tokens that this one chose. What
it returns is compared with what the network in this process returns, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors.torch import load_file, save_file

import lobs_native as lobs
from lobs_native.cli import job
from quality.whole_encoder import TEXT

SENTENCE = "The ship left the harbor before the storm."
# Run by the other Python: it may import nothing of this one.
ELSEWHERE = """
import importlib.util, json, sys
import torch, transformers
from safetensors.torch import load_file, save_file

folder, tokens, outputs, sentence = sys.argv[1:]
torch.set_num_threads(1)
config = transformers.AutoConfig.from_pretrained(folder)
made = getattr(transformers, config.architectures[0])
model, loading = made.from_pretrained(folder, output_loading_info=True)
model.eval()
given = load_file(tokens)
with torch.no_grad():
    found = model(**given)[0]
save_file({"output": found.contiguous()}, outputs)
print(json.dumps({
    "has lobs_native": importlib.util.find_spec("lobs_native") is not None,
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "class": f"{made.__module__}.{made.__name__}",
    "parameters": sum(p.numel() for p in model.parameters()),
    "missing or unexpected": sorted(
        x for part in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for x in map(str, loading[part])
    ),
    "sentence": transformers.AutoTokenizer.from_pretrained(folder)(sentence)["input_ids"],
}))
"""


def compared(folder: Path, python: str, keep: dict[str, float], tokens: int) -> dict[str, Any]:
    """Shrink, write, load elsewhere, compare."""
    import transformers

    found = job.find(str(folder), [TEXT], {"tokens": tokens})
    report = lobs.shrink(
        found.model, found.batches, keep=keep, forward=found.forward, progress=False
    )
    assert report.configured
    generator = torch.Generator().manual_seed(0)
    vocabulary = found.model.config.vocab_size  # type: ignore[union-attr]
    ids = torch.randint(vocabulary, (4, 64), generator=generator)  # type: ignore[arg-type]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        here = found.model.eval()(**given)[0]
    with tempfile.TemporaryDirectory() as scratch:
        written, tokens_, outputs = (Path(scratch) / x for x in ("smaller", "tokens", "outputs"))
        written.mkdir()
        found.save(written, {}, None, None)
        save_file(given, tokens_)
        arguments = [python, "-c", ELSEWHERE, *map(str, (written, tokens_, outputs)), SENTENCE]
        done = subprocess.run(
            arguments, capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1"}, check=False
        )
        if done.returncode:
            sys.exit(done.stderr)
        told = json.loads(done.stdout.splitlines()[-1])
        there = load_file(outputs)["output"]
        words = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCE)["input_ids"]
    return {
        "kept": {family.kind: len(family.kept) / family.units for family in report.layers},
        "parameters": report.parameters,
        "output changed by": report.change,
        "elsewhere": told,
        "same tokens": told.pop("sentence") == words,
        "same shape": here.shape == there.shape,
        "same bits": torch.equal(here, there),
        "largest difference": float((here.double() - there.double()).abs().max()),
    }


def main() -> None:
    """Print the comparison as JSON, and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--python", required=True, help="of an environment without this package")
    for kind in ("neurons", "heads"):
        parser.add_argument(f"--{kind}", type=float, metavar="X", help="share that stays")
    parser.add_argument("--tokens", type=int, default=1024, help="default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it there as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep = {kind: x for kind in ("neurons", "heads") if (x := getattr(options, kind)) is not None}
    text = json.dumps(compared(options.model, options.python, keep, options.tokens), indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
