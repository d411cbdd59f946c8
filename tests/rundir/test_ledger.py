"""Run directories: whatever ends a run, resuming it gives the bits of an uninterrupted run."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import features
from helpers.faults import Counter, failing, installed, refusal
from helpers.stacks import batches as block_batches
from helpers.stacks import made
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.calibration.session import Session
from lobs_native.cli import commands as cli
from lobs_native.errors import ArgumentError, CheckpointError
from lobs_native.files import fs
from lobs_native.network import layerwise, pruning
from lobs_native.report import records
from lobs_native.rundir import inspection
from lobs_native.rundir.directory import RunDirectory
from lobs_native.rundir.ledger import Ledger
from lobs_native.rundir.underway import StoppedError, UnderWay, stop
from stress import crash_prune

pytestmark = pytest.mark.usefixtures("one_thread")


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 16, bias=False), nn.ReLU(), nn.Linear(16, 5)
    )


def rows() -> list[Tensor]:
    return [features(40, 20, seed=i).float() for i in range(3)]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Tensor]], int]] = {
    "chain": (chain, rows, 3),
    "blocks": (made, block_batches, 17),
}


class EndError(Exception):
    """Stands for whatever ends a run."""


def after(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """End pruning after this many layers have been committed."""
    keep = Ledger.keep

    def counting(self: Ledger, *arguments: Any) -> None:
        if len(self) == layers:
            raise EndError
        keep(self, *arguments)

    monkeypatch.setattr(Ledger, "keep", counting)


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def plain(report: lobs.Report) -> list[dict[str, Any]]:
    """The layers of a report without time and memory, which differ from run to run."""
    layers = [dataclasses.asdict(layer) for layer in report.layers]
    measured = ("seconds", "peak_memory")
    return [{k: v for k, v in layer.items() if not k.startswith(measured)} for layer in layers]


def spying(calibrated: list[str]) -> Callable[..., Any]:
    """The calibration of pruning, which also records the names of its layers."""
    calibrate = layerwise.calibrate

    def spy(layers: Any, *rest: Any, **named: Any) -> Any:
        calibrated.extend(layer.name for layer in layers)
        return calibrate(layers, *rest, **named)

    return spy


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"inputs": "pruned"}, (0, 2, 7)),
        ({"inputs": "dense"}, (1, 4, 11)),
        ({"inputs": "corrected"}, (0, 2, 7, 16)),
        ({"inputs": "corrected", "scope": "model"}, (1, 4, 11)),
        ({"inputs": "pruned", "scope": "model", "sensitivity": None}, (4, 11, 16)),
        ({"inputs": "dense", "sensitivity": "output"}, (0, 7, 16)),
    ],
    ids=str,
)
def test_a_resumed_run_gives_what_an_uninterrupted_run_gives(
    tmp_path, monkeypatch, model, options, ends
):
    """Ended after each number of layers that there is, or in the longer model after some."""
    make, data, count = MODELS[model]
    options = {"sparsity": 0.6, "progress": False, **options}
    whole = make()
    expected = lobs.prune(whole, data(), **options)
    for k in range(count) if count < 5 else ends:
        folder = tmp_path / str(k)
        ended = make()
        with monkeypatch.context() as patched:
            after(patched, k)
            with pytest.raises(EndError) as caught:
                lobs.prune(ended, data(), run_dir=folder, **options)
        assert same(ended, make())
        if sys.version_info >= (3, 11):
            assert f"{k} of {count} layers are kept in {folder}" in caught.value.__notes__[0]
        again, calibrated = make(), []
        with monkeypatch.context() as patched:
            patched.setattr(layerwise, "calibrate", spying(calibrated))
            report = lobs.prune(again, data(), run_dir=folder, **options)
        assert same(again, whole)
        assert plain(report) == plain(expected)
        assert report.settings["resumed layers"] == k
        assert report.error_bound == expected.error_bound
        assert all(torch.equal(report.masks[n], m) for n, m in expected.masks.items())
        done = {layer.name for layer in expected.layers[:k]}
        assert model == "blocks" or not done & set(calibrated)


class Noisy(nn.Module):
    """Draws random numbers in eval mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.net = chain()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x + 0.1 * torch.randn_like(x))
        return result


MODELS_AND_NOISE = {**MODELS, "noisy": (Noisy, lambda: rows() * 4, 3)}


@pytest.mark.parametrize("model", MODELS_AND_NOISE)
@pytest.mark.parametrize(
    "options",
    [
        {"inputs": "pruned"},
        {"inputs": "dense", "scope": "model"},
        {"inputs": "corrected", "sensitivity": "output"},
    ],
    ids=str,
)
def test_unfinished_work_is_saved_and_resumed(tmp_path, monkeypatch, model, options):
    """Ended after any of its saved states, a run is resumed to the same bits, and no batch that is
    in the sums already is run for them again."""
    make, data, _ = MODELS_AND_NOISE[model]
    options = {"sparsity": 0.6, "progress": False, **options}
    whole = make()
    expected = lobs.prune(whole, data(), **options)
    assert expected.settings.keys().isdisjoint({"seconds of keeping"})
    monkeypatch.setattr(UnderWay, "due", lambda self, key, size: True)
    save, ends, started = UnderWay.save, [10**9], list[tuple[str, int]]()

    def ending(self: UnderWay, key: str, *rest: Any) -> None:
        save(self, key, *rest)
        saved.append(key)
        if len(saved) == ends[0]:
            raise EndError

    saved: list[str] = []
    monkeypatch.setattr(UnderWay, "save", ending)
    lobs.prune(make(), data(), run_dir=tmp_path / "whole", **options)
    assert os.listdir(tmp_path / "whole" / "state") == []
    all_saved = list(saved)
    assert "statistics" in all_saved
    through = model == "blocks" and options["inputs"] != "dense"
    assert any(key.startswith("inputs of ") for key in all_saved) == through
    assert ("costs" in all_saved) == (options.get("scope") == "model")
    each = Session.each

    def starting(self: Any, what: str, start: int = 0, *among: Any) -> Any:
        started.append((what, start))
        return each(self, what, start, *among)

    monkeypatch.setattr(Session, "each", starting)
    moments = range(1, len(all_saved) + 1)
    for k in moments[:: max(1, len(moments) // 8)]:
        folder = tmp_path / str(k)
        saved.clear()
        ends[0] = k
        with pytest.raises(EndError):
            lobs.prune(make(), data(), run_dir=folder, **options)
        ends[0] = 10**9
        saved.clear()
        started.clear()
        again = make()
        report = lobs.prune(again, data(), run_dir=folder, **options)
        assert same(again, whole)
        assert plain(report) == plain(expected)
        assert report.error_bound == expected.error_bound
        assert os.listdir(folder / "state") == []
        assert saved == all_saved[k:] or model == "blocks"  # nothing was done twice
        if all_saved[k - 1].startswith("inputs of "):
            assert not any(what.startswith("inputs of") for what, _ in started)


def test_states_of_another_run_are_not_used(tmp_path, monkeypatch):
    """resume="anyway" uses the committed layers, but not sums over other data."""
    monkeypatch.setattr(UnderWay, "due", lambda self, key, size: True)
    options = {"sparsity": 0.5, "progress": False, "run_dir": tmp_path / "run"}
    save = UnderWay.save

    def ending(self: UnderWay, *rest: Any) -> None:
        save(self, *rest)
        raise EndError

    with monkeypatch.context() as patched:
        patched.setattr(UnderWay, "save", ending)
        with pytest.raises(EndError):
            lobs.prune(chain(), rows(), **options)
    other, alone = chain(), chain()
    lobs.prune(other, rows()[1:], resume="anyway", **options)
    lobs.prune(alone, rows()[1:], **{**options, "run_dir": None})
    assert same(other, alone)


def test_a_state_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(UnderWay, "due", lambda self, key, size: self.given_up is None)
    monkeypatch.setattr(
        RunDirectory, "put_state", lambda *_: (_ for _ in ()).throw(CheckpointError("disk: full"))
    )
    report = lobs.prune(chain(), rows(), sparsity=0.5, run_dir=tmp_path / "run", progress=False)
    assert report.settings["not kept"] == "unfinished work between two layers: disk: full"
    assert report.settings["seconds of keeping"] > 0


@pytest.mark.parametrize("damage", ["batches", "sums", "block"])
def test_an_intact_state_with_wrong_values_is_refused(tmp_path, monkeypatch, damage):
    """The hashes are right and the values are not, as if an attacker had written it."""
    monkeypatch.setattr(UnderWay, "due", lambda self, key, size: True)
    save, key = UnderWay.save, "inputs of" if damage == "block" else "statistics"

    def ending(self: UnderWay, name: str, tensors: Any, info: Any) -> None:
        if name.startswith(key):
            wrong = {"batches": -1, "sums": {"?": 0}, "block": 99}
            save(self, name, tensors, {**info, damage: wrong[damage]})
            raise EndError
        save(self, name, tensors, info)

    options = {"sparsity": 0.5, "run_dir": tmp_path / "run", "progress": False}
    with monkeypatch.context() as patched:
        patched.setattr(UnderWay, "save", ending)
        with pytest.raises(EndError):
            lobs.prune(made(), block_batches(), **options)
    model = made()
    with pytest.raises(CheckpointError, match=r"the saved .* cannot be read"):
        lobs.prune(model, block_batches(), **options)
    assert same(model, made())


def test_saving_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lobs_native.rundir.underway.time.monotonic", lambda: now[0])
    with RunDirectory.create(tmp_path / "run", {}) as run:
        states = UnderWay(run, trusted=True)
        assert not states.due("statistics", 0)
        now[0] += 10
        assert states.due("statistics", 0)
        assert not states.due("statistics", 100_000_000)  # about a second
        now[0] += 11
        assert states.due("statistics", 100_000_000)
        states.largest = 1000
        assert not states.due("statistics", 1001)
        states.largest, states.reserved = None, run.free_bytes()
        assert not states.due("statistics", 0)  # no room besides the layers


FAULTS = {
    "EIO": failing(errno.EIO),
    "ENOSPC": failing(errno.ENOSPC),
    "short write": None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whichever_call_fails_pruning_ends_cleanly_and_can_be_resumed(tmp_path, monkeypatch, fault):
    """With layers and states being saved; a short write is completed at once."""
    monkeypatch.setattr(UnderWay, "due", lambda self, key, size: self.given_up is None)
    options = {"sparsity": 0.6, "scope": "model", "inputs": "corrected", "progress": False}
    whole = chain()
    lobs.prune(whole, rows(), **options)
    step = int(os.environ.get("LOBS_FAULT_STEP", "29"))
    ended = k = 0
    while True:
        k += step
        folder, model = tmp_path / str(k), chain()
        with installed(counter := Counter(k, FAULTS[fault])):
            message = refusal(lambda: lobs.prune(model, rows(), run_dir=folder, **options))  # noqa: B023
        assert same(model, whole if message is None else chain())
        assert message is None or str(folder) in message
        ended += message is not None
        if not counter.fired:
            break
        again = chain()
        lobs.prune(again, rows(), run_dir=folder, **options)
        assert same(again, whole)
        with RunDirectory.open(folder, write=False) as run:
            assert run.check() == []
    assert (ended > 0) == (fault != "short write")
    assert k > 300


def test_another_limit_on_memory_is_the_same_run(tmp_path):
    options = {"sparsity": 0.5, "progress": False, "run_dir": tmp_path / "run"}
    lobs.prune(chain(), rows(), **options)
    report = lobs.prune(chain(), rows(), memory=1 << 30, **options)
    assert report.settings["resumed layers"] == 3


def test_a_finished_run_is_loaded_and_nothing_is_calibrated(tmp_path, monkeypatch):
    first, second = chain(), chain()
    lobs.prune(first, rows(), sparsity=0.5, run_dir=tmp_path / "run", progress=False)
    monkeypatch.setattr(layerwise, "calibrate", None)
    lobs.prune(second, rows(), sparsity=0.5, run_dir=tmp_path / "run", progress=False)
    assert same(first, second)


def test_another_run_is_refused_with_all_differences(tmp_path):
    run = tmp_path / "run"
    lobs.prune(chain(), rows(), sparsity=0.5, run_dir=run, progress=False)
    other = chain()
    with torch.no_grad():
        other[0].bias[0] += 1
    before = {k: v.clone() for k, v in other.state_dict().items()}
    changed = {"sparsity": 0.5, "damping": 0.02, "run_dir": run, "progress": False}
    with pytest.raises(CheckpointError, match="this is another run") as caught:
        lobs.prune(other, rows()[:2], **changed)
    for word in ("damping", "model", "calibration", "batches", "resume='anyway'"):
        assert word in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with pytest.raises(ArgumentError, match=r"run_dir: .* holds a run, and resume is 'never'"):
        lobs.prune(chain(), rows(), resume="never", **{**changed, "damping": 0.01})
    report = lobs.prune(chain(), rows(), resume="anyway", **changed)
    assert any("damping" in line for line in report.settings["resumed despite"])
    with pytest.raises(ArgumentError, match="resume: 'yes'; expected one of auto, never, anyway"):
        lobs.prune(chain(), rows(), resume="yes", **changed)


def test_a_damaged_layer_is_named_and_the_model_is_unchanged(tmp_path):
    run = tmp_path / "run"
    lobs.prune(chain(), rows(), sparsity=0.5, run_dir=run, progress=False)
    (file,) = (run / "layers").glob("00001-*")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    model = chain()
    with pytest.raises(CheckpointError, match=f"layers/{file.name}: .*repair"):
        lobs.prune(model, rows(), sparsity=0.5, run_dir=run, progress=False)
    assert same(model, chain())
    RunDirectory.open(run, write=True, repair=True).close()
    lobs.prune(model, rows(), sparsity=0.5, run_dir=run, progress=False)
    whole = chain()
    lobs.prune(whole, rows(), sparsity=0.5, progress=False)
    assert same(model, whole)


def test_a_full_disk_is_noticed_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("lobs_native.files.fs.free_bytes", lambda _: 1000)
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes, but 1000 are free there"):
        lobs.prune(chain(), rows(), sparsity=0.5, run_dir=tmp_path / "run", progress=False)


@pytest.fixture
def stopping() -> Iterator[None]:
    yield
    stop.clear()


@pytest.mark.usefixtures("stopping")
def test_a_request_to_stop_while_pruning_ends_the_run_after_the_layer(tmp_path, monkeypatch):
    prune = layerwise.prune_groups
    monkeypatch.setattr(layerwise, "prune_groups", lambda *a, **k: (stop.set(), prune(*a, **k))[1])
    with pytest.raises(StoppedError):
        lobs.prune(chain(), rows(), sparsity=0.5, run_dir=tmp_path / "run", progress=False)
    with RunDirectory.open(tmp_path / "run", write=False) as run:
        assert [record.name for record in run.records] == ["0"]


@pytest.mark.usefixtures("stopping")
@pytest.mark.parametrize("worthwhile", [True, False])
def test_a_request_to_stop_while_calibrating_ends_the_run_after_the_batch(
    tmp_path, monkeypatch, worthwhile
):
    """The sums are saved if writing them takes less time than computing them took."""
    run = tmp_path / "run"
    seen = []
    clock = "lobs_native.rundir.underway.time.monotonic"
    monkeypatch.setattr(clock, lambda: float(len(seen)) if worthwhile else 0.0)

    def forward(model: nn.Module, batch: Tensor) -> Any:
        seen.append(len(batch))
        if len(seen) == before + 2:
            stop.set()
        return model(batch)

    before = 1 + len(rows())  # the look at the first batch, and the original network's outputs
    options = {"sparsity": 0.5, "run_dir": run, "progress": False, "forward": forward}
    with pytest.raises(StoppedError):
        lobs.prune(chain(), rows(), inputs="pruned", **options)
    assert len(seen) == before + 2
    with RunDirectory.open(run, write=False) as opened:
        assert opened.records == ()
        assert bool(opened.state_keys()) == worthwhile


def test_an_unfinished_run_can_be_inspected(tmp_path, monkeypatch, capsys):
    run, page = tmp_path / "run", tmp_path / "report.html"
    with monkeypatch.context() as patched:
        after(patched, 2)
        with pytest.raises(EndError):
            lobs.prune(chain(), rows(), sparsity=0.5, run_dir=run, progress=False)
    assert cli.main(["inspect", str(run)]) == cli.OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["0", "0.5000"], ["2", "0.5000"]]
    assert lines[3].startswith("auto, sparsity 0.5, pattern unstructured, inputs corrected; ")
    assert lines[4] == f"2 of 3 layers are done in {run}"
    assert cli.main(["inspect", str(run), "--json"]) == cli.OK
    state = json.loads(capsys.readouterr().out)
    assert state["missing"] == ["4"]
    assert state["config"]["sparsity"] == 0.5
    assert cli.main(["report", str(run), "--html", str(page)]) == cli.OK
    assert "unfinished: 2 of 3 layers" in page.read_text()
    assert cli.main(["report", str(run), "--html", str(tmp_path / "a.json")]) == cli.OK
    assert json.loads((tmp_path / "a.json").read_text())["removed"] == 300 + 240
    (file,) = (run / "layers").glob("00001-*")
    file.unlink()
    capsys.readouterr()
    assert cli.main(["inspect", str(run)]) == cli.FAILED
    assert f"layers/{file.name}: " in capsys.readouterr().out
    assert cli.main(["inspect", str(run), "--repair"]) == cli.OK
    output = capsys.readouterr().out
    assert "1 of 3 layers are done" in output
    assert f"record 1 (layer '2'): dropped: layers/{file.name}: is missing" in output
    assert cli.main(["inspect", str(tmp_path / "gone")]) == cli.FAILED
    assert "gone" in capsys.readouterr().err


MODULE = """
import torch
from torch import nn
torch.set_num_threads(1)

def pair():
    torch.manual_seed(0)
    layers = [m for _ in range(12) for m in (nn.Linear(96, 96), nn.ReLU())]
    return nn.Sequential(*layers), [torch.randn(64, 96) for _ in range(4)]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a module that makes a network."""
    (tmp_path / "made_here.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("made_here", None)


def command(out: str, *more: str) -> list[str]:
    line = f"-m lobs_native prune made_here:pair --sparsity 0.5 --out {out} --no-progress --json"
    return [*line.split(), *more]


def test_kills_and_terminations_lose_nothing(tmp_path, forks):
    (tmp_path / "made_here.py").write_text(MODULE)
    # The whole command, in a fresh interpreter; those to be ended, which are many, are forked.
    plain = subprocess.run(
        [sys.executable, *command("plain")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert plain.returncode == 0, plain.stderr
    generator = random.Random(0)
    acknowledged = 0
    for attempt in range(30):
        running = forks.start(
            command("out", "--run-dir", "run"),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        manifest = tmp_path / "run" / "manifest.jsonl"
        limit = time.monotonic() + 60
        more = acknowledged + generator.randint(1, 3)
        while running.poll() is None and time.monotonic() < limit:
            if manifest.exists() and len(manifest.read_bytes().splitlines()) >= more:
                time.sleep(generator.random() * 0.01)
                break
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL if attempt % 2 else signal.SIGTERM)
        _, errors = running.communicate(timeout=60)
        if running.returncode == 0:
            break
        assert running.returncode in (-signal.SIGKILL, cli.STOPPED), errors
        if running.returncode == cli.STOPPED and sys.version_info >= (3, 11):
            assert "of 12 layers are kept in" in errors
        with RunDirectory.open(tmp_path / "run", write=False) as run:
            assert len(run.records) >= acknowledged
            acknowledged = len(run.records)
        assert not (tmp_path / "out").exists()
    else:
        pytest.fail("it never finished")
    assert attempt > 2
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "plain" / weights).read_bytes()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["resumed layers"] == acknowledged
    assert os.listdir(tmp_path / "run" / "state") == []


def test_kills_at_random_moments_lose_no_layer_and_change_no_bit(tmp_path, forks):
    forks.preload("stress.crash_prune")
    counts = crash_prune.kills(5, tmp_path, "chain", forks)
    assert counts["kills"] == 5
    assert counts["runs completed"] > 0
    assert 0 < counts["layers acknowledged"] <= 10 * counts["runs completed"]
    for name in (
        "layers lost",
        "layers pruned twice",
        "damaged files",
        "other bytes than undisturbed",
    ):
        assert counts[name] == 0, name


SLOW = """
import time
import torch
from torch import nn

def forward(model, batch):
    print("calibrating", flush=True)
    time.sleep(0.2)
    return model(batch)

def slow():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), [torch.randn(9, 8)] * 50, forward
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, cli.TERMINATED), (signal.SIGINT, cli.INTERRUPTED)]
)
def test_without_a_run_directory_a_signal_ends_it_at_once_and_nothing_is_written(
    tmp_path, forks, number, code
):
    (tmp_path / "made_here.py").write_text(SLOW)
    line = "-m lobs_native prune made_here:slow --sparsity 0.5 --out out --no-progress"
    running = forks.start(line.split(), cwd=tmp_path, stderr=subprocess.PIPE)
    assert running.stderr is not None
    assert running.stderr.readline() == "calibrating\n"
    running.send_signal(number)
    begun = time.monotonic()
    _, errors = running.communicate(timeout=60)
    assert time.monotonic() - begun < 8  # a pass over the data takes ten seconds
    assert running.returncode == code, errors
    assert "lobs-native: " in errors.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} <= {"made_here.py", "__pycache__"}


def test_the_handler_of_sigterm_is_restored(here, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    line = ["prune", "made_here:pair", "--sparsity", "0.5", "--no-progress", "--out"]
    assert cli.main([*line, "a"]) == cli.OK
    assert cli.main([*line, "b", "--run-dir", "run"]) == cli.OK
    assert signal.getsignal(signal.SIGTERM) is before


def test_failing_files_and_another_run_have_their_own_exit_codes(here, monkeypatch, capsys):
    line = ["prune", "made_here:pair", "--no-progress", "--run-dir", "run", "--out", "out"]
    sync, count = fs.sync, 0

    def failing_later(handle: int) -> None:
        nonlocal count
        count += 1
        if count == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(fs, "sync", failing_later)
        assert cli.main([*line, "--sparsity", "0.5"]) == cli.IO_FAILED
    errors = capsys.readouterr().err
    assert "No space left on device" in errors
    if sys.version_info >= (3, 11):
        assert "of 12 layers are kept in" in errors
    assert not (here / "out").exists()
    assert cli.main([*line, "--sparsity", "0.6"]) == cli.USAGE
    assert "this is another run: " in capsys.readouterr().err
    assert cli.main([*line, "--sparsity", "0.5"]) == cli.OK
    assert "run.json" in os.listdir("run")


def test_help_lists_every_exit_code(capsys):
    assert cli.main(["--help"]) == cli.OK
    text = capsys.readouterr().out
    for code in (cli.IO_FAILED, cli.STOPPED, cli.INTERRUPTED, cli.READER_GONE, cli.TERMINATED):
        assert f"\n  {code:<4} " in text


def test_resume_repeats_the_command_of_the_run(here, monkeypatch, capsys):
    line = ["prune", "made_here:pair", "--sparsity", "0.5", "--no-progress", "--json", "--out"]
    assert cli.main([*line, "whole"]) == cli.OK
    with monkeypatch.context() as patched:
        after(patched, 5)
        with pytest.raises(EndError):
            cli.main([*line, "out", "--run-dir", "run"])
    os.rename("run", "moved")
    capsys.readouterr()
    assert cli.main(["resume", "moved"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["settings"]["resumed layers"] == 5
    first, second = (Path(name) / "model.safetensors" for name in ("whole", "out"))
    assert first.read_bytes() == second.read_bytes()

    assert cli.main(["resume", "moved"]) == cli.OK  # out exists by now
    assert "nothing is left to do" in capsys.readouterr().out
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert cli.main(["resume", "../moved"]) == cli.USAGE
    assert f"was begun in {here}" in capsys.readouterr().err


def test_resume_accepts_differences_only_on_request(here, monkeypatch, capsys):
    line = "prune made_here:pair --sparsity 0.5 --no-progress --json --out out --run-dir run"
    with monkeypatch.context() as patched:
        after(patched, 2)
        with pytest.raises(EndError):
            cli.main(line.split())
    monkeypatch.setattr(pruning, "versions", lambda: {"torch": "0.0"})
    assert cli.main(["resume", "run"]) == cli.USAGE
    assert "versions.torch" in capsys.readouterr().err
    assert cli.main(["resume", "run", "--anyway"]) == cli.OK
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert any("versions.torch" in line for line in settings["resumed despite"])


def test_the_command_resumes_only_runs_that_it_began(tmp_path, capsys):
    run = tmp_path / "run"
    lobs.prune(chain(), rows(), sparsity=0.5, run_dir=run, progress=False)
    assert cli.main(["resume", str(run)]) == cli.USAGE
    assert "call prune or shrink with run_dir" in capsys.readouterr().err
    assert cli.main(["resume", str(tmp_path / "gone")]) == cli.IO_FAILED
    assert "gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "forged",
    [
        *(5, {}, {"folder": 5, "arguments": []}, {"folder": "/", "arguments": ["a", 5]}),
        *({"folder": "/", "name": x, "arguments": []} for x in ("demo", ["prune"])),
    ],
)
def test_a_malformed_command_is_refused(tmp_path, capsys, forged):
    RunDirectory.create(tmp_path / "run", {"command": forged}).close()
    assert cli.main(["resume", str(tmp_path / "run")]) == cli.IO_FAILED
    assert "no command" in capsys.readouterr().err


def test_another_value_of_an_unsaved_buffer_is_another_model(tmp_path):
    def made(value: float) -> nn.Module:
        model = chain()
        model.register_buffer("table", torch.tensor([value]), persistent=False)
        return model

    run = tmp_path / "run"
    lobs.prune(made(1.0), rows(), sparsity=0.5, run_dir=run, progress=False)
    with pytest.raises(CheckpointError, match=r"fingerprints\.model"):
        lobs.prune(made(2.0), rows(), sparsity=0.5, run_dir=run, progress=False)


ODD = (5, None, True, "x", [1], [[1]], {"a": 1})


def inspected(run: Path, capsys: pytest.CaptureFixture[str]) -> list[tuple[int, str]]:
    """Exit codes and error output of the commands that read a run."""
    results = []
    for line in (["inspect", str(run)], ["report", str(run), "--html", f"{run}.html"]):
        code = cli.main(line)
        results.append((code, capsys.readouterr().err))
    return results


@pytest.mark.parametrize("key", ["layers", "config", "versions"])
def test_malformed_headers_are_refused(tmp_path, capsys, key):
    for i, value in enumerate(ODD):
        if key != "layers" and isinstance(value, dict):
            continue
        run = tmp_path / str(i)
        RunDirectory.create(run, {key: value}).close()
        for code, errors in inspected(run, capsys):
            assert (code, errors.count("\n")) == (cli.FAILED, 1), value
            assert f"{run}: its header has no {key}" in errors


def test_malformed_reports_of_layers_are_refused(tmp_path, capsys):
    run = tmp_path / "run"
    lobs.prune(chain(), rows(), sparsity=0.5, run_dir=run, progress=False)
    with RunDirectory.open(run, write=False) as opened:
        header, good = opened.header, opened.records[0].info
    forged = [{k: v for k, v in good.items() if k != "kind"}, {**good, "more": 1}]
    forged += [{**good, name: {"a": 1}} for name in good]
    forged += [{**good, "shape": [1, "x"]}, {**good, "error": "x"}, {**good, "swaps": True}]
    for i, info in enumerate(forged):
        with RunDirectory.create(tmp_path / str(i), header) as made:
            made.commit("0", {"weight": torch.ones(1)}, info)
        for code, errors in inspected(tmp_path / str(i), capsys):
            assert (code, errors.count("\n")) == (cli.FAILED, 1), info
            assert "the report of a layer cannot be read" in errors


@pytest.mark.parametrize("info", [{}, {"shares": 5}, {"shares": {"0": "x"}}])
def test_a_malformed_budget_is_refused_and_the_model_is_unchanged(tmp_path, monkeypatch, info):
    options = {"sparsity": 0.5, "scope": "model", "sensitivity": None, "progress": False}
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "keep_shares", lambda *_: (_ for _ in ()).throw(EndError))
        with pytest.raises(EndError):
            lobs.prune(chain(), rows(), run_dir=tmp_path / "run", **options)
    with RunDirectory.open(tmp_path / "run", write=True) as run:
        run.commit("shares", {}, info, kind="budget")
    model = chain()
    with pytest.raises(CheckpointError, match="the budget cannot be read"):
        lobs.prune(model, rows(), run_dir=tmp_path / "run", **options)
    assert same(model, chain())


def test_another_forward_is_another_run(tmp_path):
    def plainly(model: nn.Module, batch: Tensor) -> Any:
        return model(batch)

    def doubled(model: nn.Module, batch: Tensor) -> Any:
        return model(2 * batch)

    options = {"sparsity": 0.5, "run_dir": tmp_path / "run", "progress": False}
    lobs.prune(chain(), rows(), forward=plainly, **options)
    lobs.prune(chain(), rows(), forward=plainly, **options)
    with pytest.raises(CheckpointError, match=r"forward: .*plainly.* in the run, .*doubled.* now"):
        lobs.prune(chain(), rows(), forward=doubled, **options)


NEWER = (
    *("pattern", "dtype", "predicted", "energy", "condition", "curve_sparsity", "curve_error"),
    *("peak_memory", "peak_memory_device"),
)  # fields of a layer that older runs lack


def test_a_layer_is_read_as_written_and_without_newer_fields(tmp_path):
    made = lobs.prune(chain(), rows(), sparsity=0.5, run_dir=tmp_path / "run", progress=False)
    assert inspection.report_of(tmp_path / "run").layers == made.layers
    assert made.layers[0].curve_error
    for layer in made.layers:
        info = json.loads(json.dumps(dataclasses.asdict(layer)))
        old = records.report_of_layer({k: v for k, v in info.items() if k not in NEWER})
        assert old == dataclasses.replace(layer, **dict.fromkeys(NEWER))
        for name, wrong in (
            ("curve_error", [0.0, "x"]),
            ("curve_error", [0.0]),
            ("curve_error", None),
            ("curve_sparsity", 0.5),
            ("pattern", 3),
            ("peak_memory", 1 << 63),
        ):
            with pytest.raises(CheckpointError, match=name):
                records.report_of_layer({**info, name: wrong})


def test_a_report_of_a_run_has_what_was_left_alone(tmp_path):
    made = lobs.prune(
        chain(), rows(), sparsity=0.5, exclude="4", run_dir=tmp_path / "run", progress=False
    )
    read = inspection.report_of(tmp_path / "run")
    assert read.skipped == made.skipped != ()
    assert read.coverage == made.coverage
    entry = dataclasses.asdict(made.skipped[0])
    for wrong in (
        [],
        {"pruned": 3},
        {"pruned": 0.5, "skipped": []},
        {"pruned": 3, "skipped": [3]},
        {"pruned": 3, "skipped": [{**entry, "weights": "many"}]},
        {"pruned": 3, "skipped": [{**entry, "other": 1}]},
    ):
        with pytest.raises(CheckpointError, match="what was left alone cannot be read"):
            records.coverage_of(wrong)


def test_a_report_of_a_run_names_the_layers_that_are_missing(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        after(patched, 2)
        with pytest.raises(EndError):
            lobs.prune(chain(), rows(), sparsity=0.5, run_dir=tmp_path / "run", progress=False)
    report = inspection.report_of(tmp_path / "run")
    assert report.missing == ("4",)
    assert report.to_dict()["missing"] == ["4"]
    assert report.to_dict()["checks"][0] == {
        "name": "Layers", "good": False, "said": "unfinished: 2 of 3 are done", "layers": [],
    }  # fmt: skip
    lobs.prune(chain(), rows(), sparsity=0.5, run_dir=tmp_path / "run", progress=False)
    assert inspection.report_of(tmp_path / "run").missing == ()
