"""The demo: the files of a complete run, kills at any moment, missing extras and bad folders."""

import contextlib
import dataclasses
import io
import json
import random
import shutil
import sys
import time

import pytest
import torch

from lobs_native.cli import commands as cli
from lobs_native.cli import demo, digits
from lobs_native.errors import CheckpointError, LobsError

pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")

FILES = ("demo.json", "report.html", "demo.png")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder and the printed text of a complete run."""
    out = tmp_path_factory.mktemp("demo") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["demo", "--out", str(out)]) == cli.OK
    return out, printed.getvalue()


@pytest.fixture
def short(monkeypatch):
    """A demo of a badly trained network, for tests that do not depend on the training."""
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "SPARSITIES", (0.5, 0.8))


def is_complete(path):
    content = path.read_bytes()
    if path.suffix == ".json":
        return bool(json.loads(content)["runs"])
    if path.suffix == ".html":
        return content.startswith(b"<!DOCTYPE html>") and content.endswith(b"</html>\n")
    return content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")


def test_it_writes_three_complete_files_and_no_others(finished):
    out, _ = finished
    assert sorted(p.name for p in out.iterdir()) == sorted(FILES)
    assert all(is_complete(out / name) for name in FILES)


def test_the_page_is_self_contained(finished):
    page = (finished[0] / "report.html").read_text()
    for word in ("http://", "https://", "src=", "href=", "url(", "@import"):
        assert word not in page


def test_the_table_has_a_line_for_every_run(finished):
    lines = [line.split() for line in finished[1].splitlines() if line.split()]
    runs = [(words[0], float(words[1])) for words in lines if words[0] in demo.SCOPES]
    assert runs == [(method, s) for s in demo.SPARSITIES for method in demo.SCOPES]
    assert lines[0][:2] == ["method", "sparsity"]


def test_layer_errors_rank_the_methods_and_repair_beats_magnitude(finished):
    runs = json.loads((finished[0] / "demo.json").read_text())["runs"]
    after = {(run["method"], run["sparsity"]): run["error_after"] for run in runs}
    for sparsity in (0.5, 0.7):  # at higher sparsities, one network proves little
        assert after["lobs", sparsity] <= after["magnitude", sparsity]
    first = {(run["method"], run["sparsity"]): run["relative_errors"]["fc1"] for run in runs}
    assert all(
        first["exact", s]
        < first["sweep", s]
        < first["lobs", s]
        < first["wanda", s]
        < first["magnitude", s]
        for s in demo.SPARSITIES
    )
    assert all(after["exact", s] <= after["magnitude", s] for s in demo.SPARSITIES)
    assert after["lobs", 0.5] <= runs[0]["error_before"] + 0.02
    assert runs[0]["error_before"] < 0.05


def test_every_run_reaches_its_sparsity_and_stays_within_both_bounds(finished):
    for run in json.loads((finished[0] / "demo.json").read_text())["runs"]:
        assert run["sparsity_reached"] == pytest.approx(run["sparsity"], abs=0.01)
        assert run["measured"] <= run["spectral"] <= run["frobenius"]


def test_two_runs_are_equal_for_any_number_of_threads(short):
    def results(threads):
        torch.set_num_threads(threads)
        runs = demo.compare(progress=False).runs
        assert torch.get_num_threads() == threads
        return [dataclasses.replace(run, seconds=0.0) for run in runs]

    before = torch.get_num_threads()
    state = torch.random.get_rng_state()
    try:
        assert results(2) == results(1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_json_is_printed_instead_of_the_table_on_request(short, tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path), "--json"]) == cli.OK
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "demo.json").read_text())


def test_quiet_prints_nothing(short, tmp_path, capfd):
    assert cli.main(["demo", "--out", str(tmp_path), "--quiet"]) == cli.OK
    assert capfd.readouterr() == ("", "")


def test_no_progress_bars_unless_standard_error_is_a_terminal(short, capfd):
    demo.compare(progress=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_a_missing_extra_is_named_before_any_training(missing, monkeypatch, tmp_path, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(digits, "train", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(LobsError, match=r'pip install "lobs-native\[demo\]"'):
        demo.compare()
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == cli.FAILED
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_that_cannot_be_created_is_refused_before_any_training(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(demo, "compare", lambda **_: pytest.fail("it began"))
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == cli.FAILED
    with pytest.raises(CheckpointError, match="cannot create the folder"):
        demo.check_folder(tmp_path / "file" / "below")


# ---- kill -9 -------------------------------------------------------------------------------------


class Victim:
    """A demo in its own process, which is killed as soon as ``due(victim)`` is true."""

    def __init__(self, forks, command, out, due):
        self.out, self.due = out, due
        out.mkdir(exist_ok=True)
        self.old = {path.name: path.stat().st_ino for path in out.iterdir()}
        self.begun = time.monotonic()
        arguments = ["demo", "--out", str(out), "--quiet"]
        self.process = forks.start([*command, *arguments])

    def writes(self, name):
        """Whether the temporary file for this final name exists."""
        return any(self.out.glob(f".{name}.*.tmp"))

    def new(self, name):
        """Whether the run has written its own file under this final name."""
        path = self.out / name
        return path.exists() and path.stat().st_ino != self.old.get(name)

    def poll(self):
        """Kill it if it is due. True while it is running."""
        if self.process.poll() is None and self.due(self):
            self.process.kill()
            self.process.wait()
        return self.process.returncode is None


# The whole command, and one that does less work before it writes.
WHOLE = ("-m", "lobs_native")
LESS = "demo.EPOCHS, demo.SPARSITIES = 1, (0.8,)"
CODE = f"from lobs_native.cli import demo, main; {LESS}; raise SystemExit(main())"
SHORT = ("-c", CODE)


def after(seconds):
    return lambda run: time.monotonic() - run.begun > seconds


def test_kill_9_at_any_moment_leaves_only_complete_files(finished, tmp_path, forks):
    forks.preload("sklearn.datasets", "matplotlib.pyplot")
    chance = random.Random(0)
    moments = [
        (WHOLE, after(chance.uniform(0.1, 2))),
        (WHOLE, after(chance.uniform(2, 6))),
        (SHORT, lambda run: run.writes("demo.json")),
        (SHORT, lambda run: run.new("demo.json")),
        (SHORT, lambda run: run.writes("report.html")),
        (SHORT, lambda run: run.writes("demo.png")),
    ]
    victims = []
    for k, (command, due) in enumerate(moments):
        out = tmp_path / str(k)
        if k % 2:  # every second one overwrites the files of an earlier run
            shutil.copytree(finished[0], out)
        victims.append(Victim(forks, command, out, due))
    try:
        alive = victims
        while alive:
            alive = [victim for victim in alive if victim.poll()]
            time.sleep(0.001)
    finally:
        for victim in victims:
            victim.process.kill()
            victim.process.wait()
    killed = sum(victim.process.returncode == -9 for victim in victims)
    assert killed >= 3  # a file is written quickly: a kill may come too late
    for victim in victims:
        assert victim.process.returncode in (0, -9)
        for path in victim.out.iterdir():
            if path.name in FILES:
                assert is_complete(path), path
            else:
                assert path.name.startswith("."), path
                assert path.name.endswith(".tmp"), path
