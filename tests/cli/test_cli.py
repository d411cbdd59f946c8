"""The command line: exit codes, one-line errors, and both ways to call it."""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers import reports

import lobs_native
from lobs_native.cli import arguments, demo
from lobs_native.cli import commands as cli
from lobs_native.cli.tables import report_table
from lobs_native.errors import LobsError


def test_version_is_the_version_of_the_package(capsys):
    assert cli.main(["--version"]) == cli.OK
    assert capsys.readouterr().out == f"lobs-native {lobs_native.__version__}\n"


def test_help_names_every_command_and_every_exit_code(capsys):
    assert cli.main(["--help"]) == cli.OK
    text = capsys.readouterr().out
    for word in ("demo", "prune", "resume", "inspect", "report", "doctor", "exit codes"):
        assert word in text
    for code in (cli.OK, cli.FAILED, cli.USAGE, cli.INTERRUPTED, cli.READER_GONE):
        assert f"\n  {code} " in text


@pytest.mark.parametrize(
    "arguments", [[], ["prune"], ["demo", "--sparsity", "0.5"], ["doctor", "x"], ["demo", "--out"]]
)
def test_wrong_usage_exits_with_2_and_a_usage_line(arguments, capsys):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage: lobs-native")


# ---- prune ---------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a module that makes networks, two folders and a text file."""
    (tmp_path / "small_here.py").write_text(
        "import torch\n"
        "def pair():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(6, 8)), [torch.randn(30, 6)]\n"
        "def escaping():\n"
        "    model, batches = pair()\n"
        "    model.add_module('\\x1b[31m', torch.nn.Linear(8, 4))\n"
        "    return model, batches\n"
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "text.txt").write_text("word " * 30)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("small_here", None)


def names(folder):
    return sorted(str(p) for p in folder.rglob("*") if "__pycache__" not in str(p))


def test_prune_prints_a_table_and_its_output_folder(here, capsys):
    line = "prune small_here:pair --sparsity 0.5 --out out --exclude none*"
    assert cli.main(line.split()) == cli.USAGE
    capsys.readouterr()
    assert cli.main(line.split()[:-2]) == cli.OK
    captured = capsys.readouterr()
    (told,) = captured.err.splitlines()
    assert re.fullmatch(r"lobs-native: 1 of 1 layers after \d+ s: 0", told)
    lines = captured.out.splitlines()
    assert lines[0].split() == ["layer", "sparsity", "relative", "error", "damping"]
    assert lines[1].split()[:2] == ["0", "0.5000"]
    assert re.match(r"removed 24 of 48 weights \(0\.5000\) in ", lines[-2])
    assert lines[-1] == f"wrote {here / 'out'}"


def test_json_is_one_object_and_nothing_else(here, capsys):
    line = "prune small_here:pair --sparsity 0.5 --out out --json"
    assert cli.main(line.split()) == cli.OK
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert printed.pop("out") == str(here / "out")
    assert printed == json.loads((here / "out" / "report.json").read_text())
    assert captured.err == ""


def test_names_cannot_steer_the_terminal(here, capsys):
    for more in (["--plan"], ["--out", "out"]):
        arguments = ["prune", "small_here:escaping", "--sparsity", "0.5", *more]
        assert cli.main(arguments) == cli.OK
        printed = capsys.readouterr().out
        assert "\\x1b[31m" in printed
        assert "\x1b" not in printed


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4000000000", 4_000_000_000),
        ("4GB", 4_000_000_000),
        ("4g", 4_000_000_000),
        ("1.5 MB", 1_500_000),
        ("4GiB", 4 << 30),
        ("20KB", 20_000),
        ("7B", 7),
        ("2TiB", 2 << 40),
    ],
)
def test_sizes(text, size):
    assert arguments._size(text) == size


# Wrong usage: arguments after "prune", exit code, and a part of the last line of standard error.
PAIR, FOLDER = "small_here:pair --out out", "folder --out out"
WRONG = {
    "no out": ("small_here:pair --sparsity 0.5", 2, "--out: it is missing; name a folder to wr"),
    "no model": ("--sparsity 0.5 --out out", 2, "the following arguments are required: MODEL"),
    "missing folder": (
        "gone --sparsity 0.5 --out out",
        2,
        "MODEL: 'gone' is not a folder or GGUF file here, and",
    ),
    "a file": (
        "text.txt --sparsity 0.5 --out out",
        2,
        "MODEL: 'text.txt' is not a folder or GGUF file here",
    ),
    "missing GGUF file": (
        "gone.gguf --sparsity 0.5 --out out --calibration text.txt",
        2,
        "MODEL: there is no file gone.gguf",
    ),
    "override without settings": (f"{PAIR} --override 0", 2, "--override: '0' is not of the form"),
    "override of nothing": (
        f"{PAIR} --sparsity 0.5 --override x:sparsity=0.1",
        2,
        "--override: 'x' matches no prunable layer",
    ),
    "override of what a layer has not": (
        f"{PAIR} --override 0:inputs=dense",
        2,
        "--override: '0:inputs=dense': a layer has no inputs; it has sparsity,",
    ),
    "override by no number": (
        f"{PAIR} --override 0:sparsity=half",
        2,
        "--override: '0:sparsity=half': 'half' is not a number",
    ),
    "override out of range": (
        f"{PAIR} --sparsity 0.5 --override 0:sparsity=2",
        2,
        "--override['0']: sparsity: 2",
    ),
    "override by neither true nor false": (
        f"{PAIR} --sparsity 0.5 --override 0:prune-bias=1",
        2,
        "--override: '0:prune-bias=1': prune_bias is true or false, not '1'",
    ),
    "spread without a common budget": (
        f"{PAIR} --sparsity 0.5 --spread 0.1",
        2,
        "--spread: 0.1 bounds how layers share a budget; use scope 'model' with it",
    ),
    "no config": (
        f"{FOLDER} --sparsity 0.5 --calibration text.txt",
        2,
        "has no config.json; name a folder with",
    ),
    "no calibration": (
        f"{FOLDER} --sparsity 0.5",
        2,
        "--calibration: it is missing; give a text file",
    ),
    "calibration of a function": (
        f"{PAIR} --sparsity 0.5 --calibration text.txt",
        2,
        "--calibration: it is for folders; the function small_here:pair brings its own batches",
    ),
    "shards of a function": (
        f"{PAIR} --sparsity 0.5 --shard-size 5GB",
        2,
        "--shard-size: it is for folders",
    ),
    "lines of a function": (f"{PAIR} --sparsity 0.5 --min-words 0", 2, "--min-words: it is for"),
    "no target": (PAIR, 2, "sparsity, threshold, max_error: give exactly one of them"),
    "sparsity above 1": (f"{PAIR} --sparsity 1.5", 2, "sparsity: 1.5"),
    "sparsity below 0": (f"{PAIR} --sparsity=-0.1", 2, "sparsity: -0.1"),
    "sparsity NaN": (f"{PAIR} --sparsity nan", 2, "sparsity: NaN; expected a number"),
    "sparsity a word": (f"{PAIR} --sparsity half", 2, "argument --sparsity: invalid float value"),
    "two targets": (
        f"{PAIR} --sparsity 0.5 --max-error 1",
        2,
        "argument --max-error: not allowed with argument --sparsity",
    ),
    "target and N:M": (f"{PAIR} --sparsity 0.4 --pattern 2:3", 2, "pattern '2:3' removes"),
    "unknown method": (
        f"{PAIR} --sparsity 0.5 --method obs",
        2,
        "argument --method: invalid choice: 'obs' (choose from",
    ),
    "unknown pattern": (f"{PAIR} --pattern 2-4", 2, "pattern: "),
    "pattern that does not fit": (f"{PAIR} --pattern 2:4", 2, "layer '0': "),
    "unknown scope": (f"{PAIR} --sparsity 0.5 --scope net", 2, "argument --scope: invalid choice"),
    "scope that does not fit": (
        f"{PAIR} --sparsity 0.5 --scope model --method sweep",
        2,
        "scope: 'model' needs method 'auto', 'exact' or 'admm'",
    ),
    "unknown refine": (f"{PAIR} --sparsity 0.5 --refine x", 2, "argument --refine: invalid"),
    "unknown inputs": (f"{PAIR} --sparsity 0.5 --inputs x", 2, "argument --inputs: invalid"),
    "include nothing": (
        f"{PAIR} --sparsity 0.5 --include fc*",
        2,
        "include: 'fc*' matches no prunable layer; there are '0'",
    ),
    "exclude everything": (f"{PAIR} --sparsity 0.5 --exclude *", 2, "no layer is left to prune"),
    "damping below 0": (f"{PAIR} --sparsity 0.5 --damping=-1", 2, "damping: -1"),
    "out in use": (
        "small_here:pair --sparsity 0.5 --out full",
        2,
        "full exists and is not empty; name another folder, or pass --overwrite",
    ),
    "out not ours": (
        "small_here:pair --sparsity 0.5 --out full --overwrite",
        2,
        "full has no report.json, so it is not an earlier result",
    ),
    "out a file": ("small_here:pair --sparsity 0.5 --out text.txt", 2, "text.txt is a file"),
    "out below a file": (
        "small_here:pair --sparsity 0.5 --out text.txt/out",
        1,
        "could not be written",
    ),
    "out the model": (
        "folder --calibration text.txt --sparsity 0.5 --out folder",
        2,
        "must lie apart",
    ),
    "out in the model": (
        "folder --calibration text.txt --sparsity 0.5 --out folder/out",
        2,
        "must lie apart",
    ),
    "memory a word": (
        f"{PAIR} --sparsity 0.5 --memory lots",
        2,
        "argument --memory: 'lots' is not a size in bytes; write for example 4000000000, 4GB or "
        "4GiB",
    ),
    "memory zero": (f"{PAIR} --sparsity 0.5 --memory 0GB", 2, "argument --memory: '0GB' is not"),
    "memory too small": (f"{PAIR} --sparsity 0.5 --memory 10", 1, "memory: "),
    "memory too small to plan": (
        "small_here:pair --sparsity 0.5 --memory 10 --plan",
        1,
        "memory: ",
    ),
    "sensitivity of nothing": (
        f"{PAIR} --sparsity 0.5 --sensitivity fisher",
        2,
        "sensitivity: 'fisher'; expected one of auto, output, bound",
    ),
    "sensitivity without rows to compare": (
        f"{PAIR} --sparsity 0.5 --sensitivity output --scope row",
        2,
        "sensitivity: 'output' weighs rows against each other, which needs method 'auto'",
    ),
    "a budget that nothing shares": (
        f"{PAIR} --sparsity 0.5 --budget flops",
        2,
        "budget: 'flops' is shared among layers; use scope 'model' with it",
    ),
    "unknown budget": (f"{PAIR} --sparsity 0.5 --budget bytes", 2, "argument --budget: invalid"),
    "unknown blocks": (f"{PAIR} --sparsity 0.5 --blocks all", 2, "blocks: 'all'; expected one of"),
    "unknown token mask": (f"{PAIR} --sparsity 0.5 --token-mask no", 2, "--token-mask: 'no'; exp"),
    "spread above 1": (f"{PAIR} --sparsity 0.5 --scope model --spread 2", 2, "spread: 2; it is a"),
    "unknown backend": (
        f"{PAIR} --sparsity 0.5 --backend quantum",
        2,
        "backend: there is none called 'quantum'",
    ),
    "unknown device": (
        f"{PAIR} --sparsity 0.5 --device warp",
        2,
        "device: 'warp' is not a torch device",
    ),
    "seed a word": (f"{PAIR} --sparsity 0.5 --seed x", 2, "argument --seed: invalid int value"),
    "unknown option": (f"{PAIR} --sparsity 0.5 --fast", 2, "unrecognized arguments: --fast"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_is_named_and_nothing_is_written(here, wrong, capsys):
    arguments, code, message = WRONG[wrong]
    before = names(here)
    assert cli.main(["prune", *arguments.split()]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.splitlines()[-1]
    assert captured.err.startswith(("lobs-native: ", "usage: lobs-native"))
    assert captured.err.startswith("usage") or len(captured.err.splitlines()) == 1
    assert names(here) == before


# ---- errors --------------------------------------------------------------------------------------


def test_an_error_of_the_package_gives_one_printable_line_and_code_1(monkeypatch, tmp_path, capsys):
    def fail(**_):
        raise LobsError("layer 'a\nb\x1b[31m': no")

    monkeypatch.setattr(demo, "compare", fail)
    assert cli.main(["demo", "--out", str(tmp_path)]) == cli.FAILED
    captured = capsys.readouterr()
    assert captured.err == "lobs-native: layer 'a\\nb\\x1b[31m': no\n"
    assert captured.out == ""


@pytest.mark.parametrize("error", [OSError(13, "Permission denied", "x"), MemoryError("too big")])
def test_so_does_an_error_of_the_system(monkeypatch, tmp_path, capsys, error):
    def fail(**_):
        raise error

    monkeypatch.setattr(demo, "compare", fail)
    assert cli.main(["demo", "--out", str(tmp_path)]) == cli.FAILED
    assert capsys.readouterr().err == f"lobs-native: {error}\n"


def test_ctrl_c_exits_with_130_and_no_traceback(monkeypatch, tmp_path, capsys):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "compare", interrupt)
    assert cli.main(["demo", "--out", str(tmp_path)]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "lobs-native: interrupted\n"


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_reader_that_has_closed_the_pipe_ends_it_quietly(forks):
    read, write = os.pipe()
    os.close(read)
    try:
        done = forks.run(["-m", "lobs_native", "doctor"], stdout=write)
    finally:
        os.close(write)
    assert done.returncode == cli.READER_GONE
    assert done.stderr == ""


def test_the_module_runs_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "lobs_native", "--version"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"lobs-native {lobs_native.__version__}\n"


def test_notes_of_a_kind_share_a_line():
    layer, report = reports.layer, reports.report
    found = report_table(
        report(
            layer("a", notes=("same for all", "7 rows were padding")),
            layer("b", notes=("same for all", "12 rows were padding", "only here")),
            layer("c", notes=("same for all",)),
        )
    ).splitlines()
    assert found[4:7] == [
        "3 layers (a to c): same for all",
        "2 layers (a to b): for example, 7 rows were padding",
        "b: only here",
    ]
