"""One run on several processes: the bits of one process, and errors that reach all of them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.on_ranks import CASES, ENVIRONMENT, ROWS, pruned, seen, started
from torch import nn
from torch.distributed import TCPStore

import lobs_native as lobs
from lobs_native.calibration.moments import calibrate
from lobs_native.calibration.ranks import ALONE, Ranks
from lobs_native.calibration.session import Session
from lobs_native.calibration.tree import (
    CHUNKS,
    _lower,
    _put_lower,
    added,
    chunks,
    own_batches,
    ranks_of_chunks,
)
from lobs_native.errors import ArgumentError
from lobs_native.layers import layers_of
from lobs_native.network.pruning import Pruning
from lobs_native.network.settings import NetworkSettings
from stress.forks import Forks


@pytest.fixture(scope="module", autouse=True)
def _preloaded(forks: Forks) -> None:
    forks.preload("helpers.on_ranks", "lobs_native.cli.commands")


# ---- the tree ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 100])
def test_chunks_are_all_batches_in_order_and_alike(count):
    parts = chunks(count)
    assert [n for part in parts for n in part] == list(range(count))
    assert len(parts) == min(CHUNKS, count)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("size", [1, 2, 3, 5, 20])
def test_every_batch_is_that_of_one_rank(size):
    ranks = [Ranks() for _ in range(size)]
    for rank, of_rank in enumerate(ranks):
        of_rank.rank, of_rank.size = rank, size
    numbers = [n for of_rank in ranks for n in own_batches(33, of_rank)]
    assert sorted(numbers) == list(range(33))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16, 20])
def test_a_rank_has_one_chunk_of_each_round_and_about_as_many_batches_as_others(size):
    for count in range(1, 70):
        parts, ranks = chunks(count), ranks_of_chunks(count, size)
        rounds = [ranks[first : first + size] for first in range(0, len(parts), size)]
        assert all(len(set(some)) == len(some) for some in rounds)
        assert ranks[0] == 0, "it needs the first batch for more than its sums"
        loads = [0] * size
        for part, rank in zip(parts, ranks, strict=True):
            loads[rank] += len(part)
        assert sum(loads) == count
        if len(rounds[-1]) == size:
            assert max(loads) - min(loads) <= 1, count


def test_second_moments_are_those_of_the_stated_tree():
    """((S_0 + S_1) + S_2) + ..., with the sums of each chunk begun anew: to the bit."""
    model = nn.Sequential(nn.Linear(6, 4)).double()
    data = [torch.randn(9, 6, dtype=torch.float64) for _ in range(35)]
    session = Session(model, data, None, None, 0, False)
    (layer,) = layers_of(model)
    (moments,) = (calibrate([layer], session, "calibrate")[layer.name],)
    total = None
    for chunk in chunks(35):
        part = lobs.Hessian(6, bias=True)
        for number in chunk:
            part.update(data[number])
        total = part if total is None else total.merge(part)
    one = lobs.Hessian(6, bias=True)
    for x in data:
        one.update(x)
    assert torch.equal(moments[0].matrix(), total.matrix())
    assert moments[0].rows == total.rows == 9 * 35
    assert not torch.equal(one.matrix(), total.matrix())  # or the test would show nothing


@pytest.mark.parametrize("order", [1, 64, 65, 150])
def test_lower_triangles_are_sent_without_most_of_their_zeros(order):
    x, y = torch.randn(order, order).tril(), torch.zeros(order, order)
    entries = _lower(x)
    _put_lower(y, entries)
    assert torch.equal(x, y)
    assert len(entries) <= order * (order + 64) / 2


def test_values_are_added_by_their_kind():
    a = {"n": [1, 0.5], "flag": False, "why": "", "inside": {"x": 1}}
    b = {"n": [2, 0.25], "flag": True, "why": "b", "inside": {"x": 2}}
    assert added(a, b) == {"n": [3, 0.75], "flag": True, "why": "b", "inside": {"x": 3}}
    assert added({"why": "a"}, {"why": "b"}) == {"why": "a"}


def test_random_numbers_on_a_batch_do_not_depend_on_the_others():
    session = Session(nn.Linear(1, 1), [torch.zeros(1)] * 4, None, None, 7, False)
    every = [float(torch.rand(()) + torch.rand(())) for _ in session.each("all")]
    some = [float(torch.rand(()) + torch.rand(())) for _ in session.each("some", 0, {1, 3})]
    assert some == [every[1], every[3]]
    assert len(set(every)) == 4


def test_alone_everything_is_what_was_given():
    assert ALONE.value("it", {"a": 1}) == {"a": 1}
    assert ALONE.all_values("it", 2) == [2]
    assert (ALONE.first, ALONE.owner_of(1.0, [0.0]), ALONE.sent) == (True, 0, 0)


@pytest.mark.parametrize(
    ("group", "error", "match"),
    [("world", ArgumentError, "init_process_group"), (object(), ArgumentError, "init_process")],
)
def test_a_group_without_processes_is_refused(group, error, match):
    model = nn.Linear(3, 2)
    with pytest.raises(error, match=match):
        lobs.prune(model, [torch.randn(5, 3)], sparsity=0.5, progress=False, group=group)


def test_a_lack_of_memory_here_is_not_the_end_of_another_rank():
    def fails(text: str, kind: type[Exception] = RuntimeError) -> Any:
        def collective(*arguments: Any, group: Any) -> None:
            raise kind(text)

        return collective

    ranks = Ranks()
    with pytest.raises(MemoryError, match="rank 0 of 1 has too little memory"):
        ranks._carry_out(fails("DefaultCPUAllocator: can't allocate memory: 8 bytes"))
    with pytest.raises(MemoryError, match="too little memory"):
        ranks._carry_out(fails("CUDA out of memory", torch.OutOfMemoryError))
    with pytest.raises(lobs.RankError, match="another rank has ended"):
        ranks._carry_out(fails("Connection closed by peer"))


def test_own_errors_during_an_exchange_stay_what_they_are(monkeypatch):
    """And are not told: the others are at another step."""
    ranks = Ranks()
    monkeypatch.setattr(ranks, "_meet", lambda *_: [0])
    with pytest.raises(RuntimeError, match="of mine"), ranks._exchange("it", 0):
        raise RuntimeError("of mine")
    ranks.size = 2
    monkeypatch.setattr(ranks, "_meet", lambda *_: pytest.fail("it was told"))
    ranks.tell(RuntimeError("of mine"))


def test_a_plan_says_how_many_ranks_have_no_batches(monkeypatch):
    model = nn.Linear(3, 2)
    ranks = Ranks()
    ranks.size = 20
    monkeypatch.setattr(ranks, "from_one", lambda what, value, tensors, source: (value, {}))
    settings = NetworkSettings(sparsity=0.5)
    plan = Pruning(model, [torch.randn(5, 3)] * 40, settings, ranks=ranks).plan(stacklevel=1)
    assert plan.idle == 4
    assert "4 ranks have no batches" in str(plan)
    assert "ranks" not in str(lobs.plan_prune(model, [torch.randn(5, 3)], sparsity=0.5))


# ---- several processes ---------------------------------------------------------------------------


def test_any_number_of_ranks_gives_the_bits_of_one_process(forks, tmp_path):
    found = started(forks, tmp_path, 4, "equal")
    compared = set[tuple[str, int, int]]()
    for name in CASES:
        alone = found[0][f"{name} alone"]
        for rank, of_rank in enumerate(found):
            for n in range(1, 5):
                if (on_ranks := of_rank.get(f"{name} on {n}")) is not None:
                    assert on_ranks == alone, f"{name} on {n}"
                    compared.add((name, n, rank))
    assert {n for _, n, _ in compared} == {1, 2, 3, 4}
    assert all((name, n, n - 1) in compared for name, n, _ in compared)
    assert {name for name, _, _ in compared} == set(CASES)
    for entry in found[0]["ranks"]:
        assert entry["bytes sent"] > 0
        assert entry["seconds"] >= entry["seconds exchanging"] >= entry["seconds waiting"] > 0


def test_shared_rows_of_layers_have_the_bits_of_one_process(forks, tmp_path):
    found = started(forks, tmp_path, 3, "by_rows")
    for name in ROWS:
        for of_rank in found:
            assert of_rank[name] == found[0][f"{name} alone"], name
            assert of_rank[f"{name} divided"] > 0, name


def test_errors_reach_all_ranks_and_nothing_is_changed(forks, tmp_path):
    first, second = started(forks, tmp_path, 2, "failing")
    for name in first:
        if name.endswith("restored"):
            assert (first[name], second[name]) == (True, True), name
    for found in (first, second):
        kind, text, rank = found["other data"]
        assert (kind, rank) == ("ArgumentError", 0)
        assert "calibration (on rank 1)" in text
        assert "argument damping (on rank 1)" in found["other arguments"][1]
        assert "argument classes (on rank 1)" in found["other classes"][1]
        assert "original (on rank 1)" in found["another original network"][1]
        assert found["not finite"][0] == "NonFiniteError"
        assert "layer 'embed'" in found["not finite"][1]
    assert second["not finite"][2] is None
    assert first["not finite"][2] == 1
    assert first["not finite"][1].startswith("rank 1: ")
    assert second["of the model"] == ["ValueError", "a model's own error", None]
    assert first["of the model"][0] == "RankError"
    assert "ValueError: a model's own error" in first["of the model"][1]


def test_a_killed_rank_ends_all_and_the_run_goes_on_with_other_ranks(forks, tmp_path):
    first, second = started(forks, tmp_path, 2, "killed", CALLS="40")
    assert second is None
    assert first["error"][0] == "RankError"
    assert "has ended or does not answer" in first["error"][1]
    found = started(forks, tmp_path, 3, "resuming")
    alone = seen(*pruned(CASES["wanda"]))[0]
    for of_rank in found:
        assert of_rank["seen"] == alone
        assert 0 < of_rank["resumed"] < 12


NET = """
import os, signal, torch
from torch import nn

def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    return model, [torch.randn(6, 8) for _ in range(6)], forward

calls = 0

def forward(model, batch):
    global calls
    calls += 1
    if os.environ.get("RANK") == "1" and calls == int(os.environ.get("KILLED", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("RANK") == "1" and calls == int(os.environ.get("STOPPED", "0")):
        os.kill(os.getpid(), signal.SIGTERM)
    return model(batch)
"""


def torchrun(forks: Forks, folder: Path, size: int, *more: str, **environment: str) -> list[Any]:
    """(exit code, standard output, standard error) of the ranks, as torchrun starts them: it keeps
    the store by which they find one another."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = str(store.port)
    arguments = ["-m", "lobs_native", "prune", "net:made", "--sparsity", "0.5", "--overwrite"]
    shared = {**ENVIRONMENT, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", **environment}
    shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [
        forks.start(
            [*arguments, *more],
            cwd=folder,
            env={**shared, "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **pipes,
        )
        for rank in range(size)
    ]
    texts = [process.communicate(120) for process in running]
    return [(p.wait(), *text) for p, text in zip(running, texts, strict=True)]


def test_the_command_under_torchrun(forks, tmp_path):
    """One result and one message; exit code 75 where a process is gone."""
    (tmp_path / "net.py").write_text(NET)
    (one,) = torchrun(forks, tmp_path, 1, "--out", "one")
    first, second = torchrun(forks, tmp_path, 2, "--out", "two")
    assert [one[0], first[0], second[0]] == [0, 0, 0]
    assert "wrote" in first[1]
    assert second[1:] == ("", "")
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two")]
    assert weights[0] == weights[1]
    assert len(json.loads((tmp_path / "two/report.json").read_text())["settings"]["ranks"]) == 2
    ends = torchrun(forks, tmp_path, 3, "--out", "three", "--run-dir", "run", KILLED="5")
    assert [code for code, _, _ in ends] == [75, -9, 75]
    assert "".join(errors for _, _, errors in ends).count("another rank has ended") == 1
    assert not (tmp_path / "three").exists()
    again = torchrun(forks, tmp_path, 2, "--out", "three", "--run-dir", "run")
    assert [code for code, _, _ in again] == [0, 0]
    assert (tmp_path / "three" / "model.safetensors").read_bytes() == weights[0]
    stopped = torchrun(forks, tmp_path, 2, "--out", "four", "--run-dir", "other", STOPPED="5")
    assert [code for code, _, _ in stopped] == [75, 75]
    assert "ended by SIGTERM; 1 of 2 layers are kept" in "".join(x for _, _, x in stopped)
