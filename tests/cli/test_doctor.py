"""The command doctor: a complete report, and a self-check that can fail."""

import dataclasses
import json

import pytest

import lobs_native
from lobs_native.cli import commands as cli
from lobs_native.cli import doctor

MAPS = """\
7f01-7f02 r-xp 00000000 08:01 11 /opt/site packages/torch/lib/libgomp.so.1
7f02-7f03 r--p 00000000 08:01 11 /opt/site packages/torch/lib/libgomp.so.1
7f03-7f04 r-xp 00000000 08:01 12 /usr/lib/libc.so.6
7f04-7f05 rw-p 00000000 00:00 0
7f05-7f06 r-xp 00000000 08:01 13 /usr/lib/libiomp5.so
7f06-7f07 r-xp 00000000 08:01 14 /usr/lib/libompanion.so
7f07-7f08 rw-p 00000000 00:00 0 [heap]
"""


def test_every_topic_is_reported_once_with_a_value():
    topics = [topic for topic, _ in doctor.examine()]
    assert len(set(topics)) == len(topics)
    assert {"lobs_native", "torch", "CPU", "CPU level", "OpenMP runtimes", "CUDA object"} <= set(
        topics
    )
    assert all(value for _, value in doctor.examine())


def test_the_level_that_the_environment_forces_is_named(monkeypatch):
    level = dict(doctor.examine())["CPU levels usable here"].split(", ")[-1]
    monkeypatch.setenv("LOBS_CPU_LEVEL", level.removeprefix("cpu_"))
    facts = dict(doctor.examine())
    assert facts["LOBS_CPU_LEVEL"] == level.removeprefix("cpu_")
    assert facts["CPU level"].startswith(f"{level} (")


def test_each_openmp_runtime_is_listed_once_and_nothing_else():
    assert doctor.openmp_runtimes(MAPS) == [
        "/opt/site packages/torch/lib/libgomp.so.1",
        "/usr/lib/libiomp5.so",
    ]


def test_the_self_check_passes_here():
    good, verdict = doctor.self_check()
    assert good, verdict
    assert verdict.startswith("ok: c")
    for name, ready, _ in lobs_native.backends():
        assert (name in verdict) == ready, verdict


@pytest.mark.parametrize("change", [1e-2, float("nan")])
def test_the_self_check_fails_when_a_kernel_is_wrong(change, monkeypatch, capsys):
    right = doctor.prune_weight

    def wrong(*arguments, backend, **options):
        out = right(*arguments, backend=backend, **options)
        return (
            out if backend == "reference" else dataclasses.replace(out, weight=out.weight + change)
        )

    monkeypatch.setattr(doctor, "prune_weight", wrong)
    assert cli.main(["doctor"]) == cli.FAILED
    assert "disagree" in capsys.readouterr().out


def test_json_holds_every_topic_and_the_verdict(capsys):
    assert cli.main(["doctor", "--json"]) == cli.OK
    facts = json.loads(capsys.readouterr().out)
    assert facts.pop("ok") is True
    assert facts.pop("self-check").startswith("ok")
    assert list(facts) == [topic for topic, _ in doctor.examine()]
