"""``lobs-native prune module:function``: networks that a user's function returns."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn

import lobs_native as lobs
from lobs_native.cli import commands as cli
from lobs_native.cli import job
from lobs_native.network import carrying_out

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = """
import torch

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.ReLU(), torch.nn.Linear(9, 4))

batches = [torch.randn(30, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]

def pair():
    print("a word from the user's code")
    return network(), batches

def triple():
    return network(), [{"x": x} for x in batches], lambda model, batch: model(batch["x"])

def shared():
    model = network(); model.alias = model[2].bias
    return model, batches, lambda model, x: model[2](model[1](model[0](x)))

class Bilinear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.product, self.last = torch.nn.Bilinear(6, 6, 5), torch.nn.Linear(5, 4)

    def forward(self, x):
        return self.last(self.product(x, x))

def bilinear():
    return Bilinear(), batches

class makers:
    pair = pair

number = 3

def nothing():
    pass

def alone():
    return network()

def swapped():
    return batches, network()

def four():
    return network(), batches, None, None

def raises():
    raise KeyError("no such data")

def empty():
    return network(), []

def one_tensor():
    return network(), batches[0]

def not_callable():
    return network(), batches, 3

def unfit():
    return network(), [torch.zeros(3, 5)]

def poisoned():
    return network(), [torch.full((3, 6), float("nan"))]

def text_in_state():
    class Odd(torch.nn.Linear):
        def get_extra_state(self):
            return "words"
        def set_extra_state(self, state):
            pass
    return Odd(6, 4), batches

def overlapping():
    model = network()
    memory = torch.randn(60)
    model.register_buffer("a", memory[:40])
    model.register_buffer("b", memory[20:])
    return model, batches
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with MODULE in it."""
    (tmp_path / "made_here.py").write_text(MODULE)
    (tmp_path / "broken_here.py").write_text("import not_there_at_all\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    for name in ("made_here", "broken_here"):
        sys.modules.pop(name, None)
    assert sys.path == before


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))


def batches() -> list[torch.Tensor]:
    return [torch.randn(30, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.mark.parametrize(
    ("name", "flag"), [("pair", "--masks"), ("triple", "--mask-bits"), ("makers.pair", "--masks")]
)
def test_the_weights_are_those_of_pruning_in_python(here, name, flag):
    arguments = ["--sparsity", "0.5", "--method", "sweep", "--scope", "row", "--damping", "0.02"]
    code = cli.main(["prune", f"made_here:{name}", *arguments, "--out", "out", flag])
    assert code == cli.OK
    model = network()
    report = lobs.prune(
        model, batches(), sparsity=0.5, method="sweep", scope="row", damping=0.02, progress=False
    )
    written = load_file(here / "out" / "model.safetensors")
    assert set(written) == set(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(written[key], value)
    masks = load_file(here / "out" / "masks.safetensors")
    wanted = report.masks if flag == "--masks" else lobs.pack_masks(report.masks)
    assert all(torch.equal(masks[key], mask) for key, mask in wanted.items())
    assert len(masks) == 2
    assert json.loads((here / "out" / "report.json").read_text())["removed"] == report.removed
    assert (here / "out" / "report.html").is_file()


def test_every_argument_reaches_prune(here, monkeypatch):
    seen = {}

    def stop(model, batches, settings, places, group, offload):
        seen.update(dataclasses.asdict(settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(carrying_out, "carried_out", stop)
    line = (
        "prune made_here:pair --out out --max-error 0.25 --method lobs --pattern 1x4 --scope row "
        "--spread 0.3 --search 3 --search-seconds 60 --sensitivity none --token-weights output "
        "--budget flops --blocks none --token-mask none --tune blocks --tune-passes 5 --tune-rate "
        "0.004 --classes 7 --exclude 2 --inputs dense --include 0 --include 2 --strict --damping "
        "0.5 --prune-bias --device cpu --memory 1.5MiB --backend reference --seed 7 --run-dir "
        "kept --resume never --measure all --refine solve --held-back 0.25 --no-progress"
    )
    assert cli.main(line.split()) == cli.INTERRUPTED
    assert seen == {
        "sparsity": None,
        "threshold": None,
        "max_error": 0.25,
        "method": "lobs",
        "pattern": "1x4",
        "scope": "row",
        "spread": 0.3,
        "sensitivity": None,
        "budget": "flops",
        "blocks": None,
        "token_mask": None,
        "token_weights": "output",
        "tune": "blocks",
        "offload": None,
        "tune_passes": 5,
        "tune_rate": 0.004,
        "classes": 7,
        "search": 3,
        "search_seconds": 60.0,
        "measure": "all",
        "held_back": 0.25,
        "refine": "solve",
        "inputs": "dense",
        "include": ["0", "2"],
        "exclude": ["2"],
        "strict": True,
        "damping": 0.5,
        "prune_bias": True,
        "device": "cpu",
        "memory": 3 << 19,
        "backend": "reference",
        "run_dir": Path("kept"),
        "resume": "never",
        "seed": 7,
        "progress": False,
        "forward": None,
        "overrides": None,
    }


def test_tensors_with_several_names_are_written_once_and_load_again(here):
    line = "prune made_here:shared --sparsity 0.5 --include 0 --out out"
    assert cli.main(line.split()) == cli.OK
    sys.path.insert(0, str(here))
    import made_here

    sys.path.remove(str(here))
    model = made_here.shared()[0]
    missing, unexpected = load_model(model, here / "out" / "model.safetensors")
    assert not missing
    assert not unexpected
    assert int((model[0].weight == 0).sum()) == 27
    assert set(load_file(here / "out" / "model.safetensors")) == set(network().state_dict())


def test_a_plan_lists_what_would_be_pruned_and_writes_nothing(here, capsys):
    before = sorted(here.rglob("*"))
    arguments = ["prune", "made_here:pair", "--plan"]
    assert cli.main([*arguments, "--sparsity", "0.5", "--exclude", "2"]) == cli.OK
    captured = capsys.readouterr()
    lines = [line.split() for line in captured.out.splitlines()]
    assert lines[1][:7] == ["0", "Linear", "9", "x", "6", "sparsity", "0.5"]
    *_, count, plan = captured.out.splitlines()
    assert count == "1 layers with 54 weights"
    assert plan.startswith("plan: 0 MB besides the model, the data and a forward pass (0 MB for 0,")
    assert captured.err == "a word from the user's code\n"
    assert cli.main([*arguments, "--json", "--pattern", "2:3"]) == cli.OK
    planned = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in planned["layers"]] == ["0", "2"]
    expected = lobs.plan_memory(9, 6, sparsity=1 / 3, bias=True).total
    assert planned["layers"][0]["bytes"] == expected
    assert planned["run"]["memory"] > expected
    assert {p for p in here.rglob("*") if "__pycache__" not in p.parts} == set(before)


def test_the_plan_names_the_layers_that_prune_prunes(tmp_path):
    planned_job = job.Job(network(), batches(), None, "2", lambda *_: {})
    settings = lobs.NetworkSettings(sparsity=0.5, progress=False)
    planned = job.plan(planned_job, settings)
    assert [layer["name"] for layer in planned["layers"]] == ["0"]
    assert [layer["name"] for layer in planned["skipped"]] == ["2"]
    report = job.run(planned_job, settings, tmp_path / "out", overwrite=False, masks=False)
    assert [layer.name for layer in report.layers] == ["0"]
    assert [layer.name for layer in report.skipped] == ["2"]


@pytest.mark.filterwarnings("default:lobs_native")
def test_what_is_left_out_is_one_line_without_source_and_part_of_the_summary(here, capsys):
    line = ["prune", "made_here:bilinear", "--sparsity", "0.5", "--no-progress", "--out", "out"]
    assert cli.main(line) == cli.OK
    printed = capsys.readouterr()
    assert printed.err == (
        "lobs-native: warning: 180 of 200 weights (90 %) that were to be pruned are left as they "
        "are: 180 in product: it is used by aten::_trilinear, which is no product with one input\n"
    )
    assert "skipped product: it is used by aten::_trilinear" in printed.out
    assert (
        "of all 200 weights: 20 in the pruned layers, 0 left out on purpose, 180 not understood or "
        "impossible to prune; sparsity of the whole network 0.0500\n" in printed.out
    )
    assert cli.main([*line, "--overwrite", "--strict"]) == cli.USAGE
    assert capsys.readouterr().err.startswith("lobs-native: layer 'product': it is used by")
    assert cli.main([*line, "--plan", "--json"]) == cli.OK
    planned = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in planned["layers"]] == ["last"]
    assert planned["skipped"][0]["weights"] == 180


def test_a_network_with_nonzero_weights_that_its_report_calls_removed_is_not_written(
    here, monkeypatch, capsys
):
    prune = carrying_out.carried_out

    def losing(model, *rest, **group):
        report = prune(model, *rest, **group)
        with torch.no_grad():
            model[2].weight[~report.masks["2"]] = 1.0
        return report

    monkeypatch.setattr(carrying_out, "carried_out", losing)
    code = cli.main(["prune", "made_here:pair", "--sparsity", "0.5", "--out", "out"])
    assert code == cli.FAILED
    assert "layer '2' would be written with 18 weights that were removed" in capsys.readouterr().err
    assert not (here / "out").exists()


WRONG: dict[str, tuple[str, int, str]] = {
    "no such module": (
        "nowhere:pair",
        cli.USAGE,
        "MODEL: nowhere:pair cannot be imported: ModuleNotFoundError: No module named 'nowhere'",
    ),
    "no such function": ("made_here:x", cli.USAGE, "AttributeError: module 'made_here' has no"),
    "its import fails": (
        "broken_here:pair",
        cli.USAGE,
        "No module named 'not_there_at_all' (broken_here.py, line 1)",
    ),
    "no function": ("made_here:number", cli.USAGE, "made_here:number is a int, not a function"),
    "raises": (
        "made_here:raises",
        cli.FAILED,
        "made_here:raises() raised KeyError: 'no such data' (made_here.py, line ",
    ),
    "returns None": ("made_here:nothing", cli.FAILED, "returned NoneType, expected (model, batch"),
    "returns a model": ("made_here:alone", cli.FAILED, "returned Sequential, expected (model, ba"),
    "in the wrong order": ("made_here:swapped", cli.FAILED, "returned (list, Sequential), expect"),
    "returns four": ("made_here:four", cli.FAILED, "(Sequential, list, NoneType, NoneType), exp"),
    "no batches": ("made_here:empty", cli.USAGE, "calibration: empty"),
    "one tensor": ("made_here:one_tensor", cli.FAILED, "calibration: expected an iterable of"),
    "forward a number": ("made_here:not_callable", cli.FAILED, "forward: expected callable"),
    "NaN in a batch": ("made_here:poisoned", cli.FAILED, "layer '0': its input on the calibration"),
    "text in its state": ("made_here:text_in_state", cli.FAILED, "'_extra_state' in the state of"),
    "overlapping memory": ("made_here:overlapping", cli.FAILED, "safetensors cannot write this"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_job_is_refused_in_one_line_and_nothing_is_written(here, wrong, capsys):
    source, code, message = WRONG[wrong]
    assert cli.main(["prune", source, "--sparsity", "0.5", "--out", "deep/out"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    *told, line = captured.err.splitlines()
    assert line.startswith("lobs-native: ")
    assert message in line
    assert all(" of 2 layers after " in x for x in told)
    assert not (here / "deep").exists()


# ---- messages and finished runs ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sparsity 2 --out out", "--sparsity: 2; it is a fraction"),
        ("--max-error -1 --out out", "--max-error: -1"),
        ("--sparsity 0.5 --out full", "--out: "),
        ("--sparsity 0.5 --out full", "or pass --overwrite"),
        ("--sparsity 0.5 --out out --memory 10", "--memory: layer '0' needs"),
    ],
)
def test_messages_name_the_option(here, capsys, arguments, message):
    (here / "full").mkdir()
    (here / "full" / "note.txt").write_text("kept")
    assert cli.main(["prune", "made_here:pair", *arguments.split()]) != cli.OK
    assert message in capsys.readouterr().err


def test_a_finished_run_is_not_resumed_and_says_so(here, capsys):
    line = "prune made_here:pair --sparsity 0.5 --out out --run-dir kept"
    assert cli.main(line.split()) == cli.OK
    before = (here / "out" / "report.json").read_bytes()
    capsys.readouterr()
    assert cli.main(["resume", "kept"]) == cli.OK
    found = capsys.readouterr().out
    assert found.startswith("nothing is left to do: all 2 layers in ")
    assert found.endswith("the result is in out\n")
    assert (here / "out" / "report.json").read_bytes() == before
    # Without its result there is something to do.
    shutil.rmtree(here / "out")
    assert cli.main(["resume", "kept"]) == cli.OK
    assert (here / "out" / "report.json").is_file()


def test_the_result_of_another_run_is_not_taken_for_that_of_a_finished_one(here, capsys):
    line = "prune made_here:pair --sparsity 0.5 --run-dir"
    assert cli.main([*line.split(), "kept", "--out", "out"]) == cli.OK
    shutil.rmtree(here / "out")
    assert cli.main([*line.split(), "other", "--out", "out"]) == cli.OK
    capsys.readouterr()
    assert cli.main(["resume", "kept"]) == cli.USAGE
    assert "--out: " in capsys.readouterr().err


def test_the_seconds_of_all_stages_are_those_of_the_run(here, capsys):
    line = "prune made_here:pair --sparsity 0.5 --out out"
    assert cli.main(line.split()) == cli.OK
    report = json.loads((here / "out" / "report.json").read_text())
    stages = report["settings"]["seconds"]
    assert sum(stages.values()) == pytest.approx(report["seconds"])
    assert min(stages.values()) >= 0
    assert {"loading", "looking at the model", "measuring the output", "saving"} < set(stages)
    for stage, of_layer in (("calibrating", "calibrating"), ("removing weights", "pruning")):
        assert stages[stage] >= sum(x[f"seconds_{of_layer}"] for x in report["layers"]) - 0.01
    told = [x for x in capsys.readouterr().err.splitlines() if " of 2 layers" in x]
    assert [x.rpartition(": ")[2] for x in told] == ["0", "2"]
    assert told[0].startswith("lobs-native: 1 of 2 layers after ")
    assert cli.main([*line.split(), "--overwrite", "--no-progress"]) == cli.OK
    assert "of 2 layers" not in capsys.readouterr().err
