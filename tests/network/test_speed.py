"""Times of a pruned network against its dense counterpart: what is compared, and what is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError, DtypeError
from lobs_native.network.inference import engines, speed, speed_report, timing

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = ("torch", "lobs.to_sparse")


def network(sparsity: float = 0.8) -> nn.Module:
    model = nn.Sequential(nn.Linear(260, 270), nn.ReLU(), nn.Dropout(), nn.Linear(270, 8))
    with torch.no_grad():
        model[0].weight.masked_fill_(torch.rand(270, 260) < sparsity, 0)
    return model


def row(engine: str, ratio: float, low: float, seconds: float = 1.0) -> lobs.EngineSpeed:
    return lobs.EngineSpeed(engine, "1.0", ratio, seconds, ratio, (low, 9.0), 0.0)


def layer(rows: int) -> lobs.LayerSpeed:
    return lobs.LayerSpeed("fc", (8, 8), 0.5, rows, 1.0, 1.0, 1.0, (1.0, 1.0))


def test_the_report_holds_every_side_and_the_network_stays_as_it_is():
    model, x = network(), torch.randn(3, 260)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = lobs.measure_speed(model, x, runtimes=BOTH, pairs=3)
    assert model.training
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert [each.engine for each in report.engines] == [*BOTH]
    for each in report.engines:
        assert each.difference < 1e-5
        assert min(each.dense_seconds, each.pruned_seconds) > 0
        assert each.interval[0] <= each.ratio <= each.interval[1]
    (only,) = report.layers  # the last layer is too small for a row
    assert (only.name, only.shape, only.rows) == ("0", (270, 260), 3)
    zeros = int((model[0].weight == 0).sum())
    assert report.sparsity == pytest.approx(zeros / (270 * 260 + 8 * 270))
    assert report.parameters[0] == report.parameters[1]
    assert report.to_dict()["engines"][0]["engine"] == "torch"


def test_the_counterpart_has_no_zeros_and_is_as_large():
    model = network()
    speed._fill_zeros(model)
    assert not bool((model[0].weight == 0).any())
    other = nn.Sequential(nn.Linear(260, 4))
    report = lobs.measure_speed(
        other, torch.randn(1, 260), against=network(), runtimes=["torch"], pairs=1
    )
    assert report.counterpart == "the network given"
    assert report.parameters[1] < report.parameters[0]


def test_several_networks_are_compared_with_one_dense_network():
    dense, x = network(0.0), torch.randn(3, 260)
    smaller = nn.Sequential(nn.Linear(260, 80), nn.ReLU(), nn.Linear(80, 8))
    networks = {"90 %": network(0.9), "smaller": smaller}
    found = lobs.compare_speed(networks, x, against=dense, runtimes=BOTH, pairs=2)
    many, few = found.networks["90 %"], found.networks["smaller"]
    assert [each.engine for each in many.engines] == [*BOTH]
    assert [each.engine for each in few.engines] == ["torch"]
    assert "zeros" in few.left["lobs.to_sparse"]
    # Both were timed in the same rounds as the same dense network.
    assert many.engines[0].dense_seconds == few.engines[0].dense_seconds
    assert many.parameters[0] == few.parameters[0] > few.parameters[1]
    assert all(each.difference < 1e-5 for each in (*many.engines, *few.engines))
    assert found.advice == speed_report.overall(found.networks)
    assert [*found.to_dict()["networks"]] == [*networks]
    with pytest.raises(ArgumentError, match="networks: there is none"):
        lobs.compare_speed({}, x, against=dense)


def test_the_advice_about_several_names_the_fastest_and_what_it_must_beat():
    def report(*rows: lobs.EngineSpeed) -> lobs.SpeedReport:
        return lobs.SpeedReport(rows, {}, (), 0.9, (1, 1), "", "", 1, {})

    def timed(engine: str, dense: float, pruned: float, low: float) -> lobs.EngineSpeed:
        ratio = dense / pruned
        return lobs.EngineSpeed(engine, "1", dense, pruned, ratio, (low, 9.0), 0.0)

    slow = report(timed("torch", 0.040, 0.041, 0.9), timed("lobs.to_sparse", 0.040, 0.020, 1.9))
    fast = report(timed("torch", 0.040, 0.030, 1.3), timed("openvino", 0.030, 0.016, 1.8))
    said = speed_report.overall({"pruned": slow, "shrunk": fast})
    assert said == (
        "Fastest here: shrunk in openvino, 16 ms; the dense network takes 30 ms at best (openvino)."
    )
    assert "pruned in lobs.to_sparse, 20 ms" in speed_report.overall({"pruned": slow})
    assert "40 ms at best (torch)" in speed_report.overall({"pruned": slow})
    uncertain = report(timed("torch", 0.040, 0.038, 1.01))
    assert speed_report.overall({"a": uncertain}).startswith("None of them pays here")
    behind = report(timed("torch", 0.040, 0.020, 1.9), timed("openvino", 0.018, 0.018, 0.9))
    assert speed_report.overall({"a": behind}).startswith("None of them is faster")
    assert speed_report.overall({"a": report()}) == "Nothing could be measured."


def test_a_layer_that_the_batch_does_not_reach_has_no_row():
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.also, self.used = network()[0], nn.Linear(300, 260), network()[0]
            nn.init.zeros_(self.also.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    report = lobs.measure_speed(Partial(), torch.randn(3, 260), runtimes=["torch"], pairs=1)
    assert [(each.name, each.rows) for each in report.layers] == [("used", 3)]


def test_a_smaller_network_without_zeros_owes_nothing_to_sparse_kernels():
    def dense(inner: int) -> nn.Module:
        return nn.Sequential(nn.Linear(260, inner), nn.ReLU(), nn.Linear(inner, 260))

    small, x = dense(260), torch.randn(3, 260)
    report = lobs.measure_speed(small, x, against=dense(2600), runtimes=BOTH, pairs=1)
    assert [each.engine for each in report.engines] == ["torch"]
    assert "50% zeros" in report.left["lobs.to_sparse"]
    assert report.layers == ()
    assert report.sparsity == 0
    said = speed_report.advice([row("torch", 1.0, 0.97)], (), 0.0)
    assert "no linear weight is zero" in said
    assert "--against" in said
    said = speed_report.advice([row("torch", 1.0, 0.97)], (), 0.0, smaller=True)
    assert "is smaller, but no faster" in said
    said = speed_report.advice([row("torch", 1.5, 1.4)], (), 0.0, smaller=True)
    assert "torch runs the smaller network 1.50 times as fast" in said


def test_batches_may_be_tuples_and_dicts():
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, None]:
            return a + b, None

    a, b = torch.ones(2), torch.ones(2)
    for batch in ((a, b), {"b": b, "a": a}):
        subject = engines.Subject(Sum(), batch, None)  # type: ignore[arg-type]
        assert engines.ENGINES["torch"](subject)().tolist() == [2.0, 2.0]
    with pytest.raises(DtypeError, match="batch"):
        lobs.measure_speed(Sum(), (a, 1), runtimes=["torch"])


def test_an_engine_that_fails_is_named_with_its_reason(monkeypatch):
    def broken(_: Any) -> Any:
        raise RuntimeError("no kernel for this\nand a long trace")

    monkeypatch.setitem(engines.ENGINES, "openvino", broken)
    monkeypatch.setattr(engines, "_NEEDS", {"onnxruntime": ("a_module_that_is_not_there",)})
    monkeypatch.delitem(engines.ENGINES, "torch.compile")
    report = lobs.measure_speed(network(), torch.randn(1, 260), pairs=1)
    assert [each.engine for each in report.engines] == [*BOTH]
    assert report.left["openvino"] == "no kernel for this"
    assert "pip install a_module_that_is_not_there" in report.left["onnxruntime"]
    with pytest.raises(ArgumentError, match="onnxruntime needs"):
        lobs.measure_speed(network(), torch.randn(1, 260), runtimes=["onnxruntime"])
    with pytest.raises(ArgumentError, match="runtimes: 'tensorrt'"):
        lobs.measure_speed(network(), torch.randn(1, 260), runtimes=["tensorrt"])
    with pytest.raises(ArgumentError, match="pairs"):
        lobs.measure_speed(network(), torch.randn(1, 260), pairs=0)


def test_few_rows_need_fewer_zeros():
    model = network(0.6)
    for rows in (1, 4):
        for x in (torch.randn(rows, 260), torch.randn(1, rows, 260)):
            subject = engines.Subject(model, x, None)  # type: ignore[arg-type]
            assert subject.rows == rows
    tokens = engines.Subject(model, torch.ones(2, 3, dtype=torch.int64), None)  # type: ignore[arg-type]
    assert tokens.rows == 6
    assert (engines.least_sparsity(8), engines.least_sparsity(9)) == (0.5, 0.7)


def test_the_interval_is_that_of_the_ratios_in_pairs():
    slow, fast, ratio, (low, high) = timing.summarized([2.0, 4.0, 6.0], [1.0, 1.0, 2.0])
    assert (slow, fast, ratio) == (4.0, 1.0, 3.0)
    assert (low, high) == (2.0, 4.0)


def test_rounds_go_forth_and_back():
    order: list[str] = []
    runs = [lambda name=name: order.append(name) for name in "abc"]
    seconds = timing.interleaved(runs, 3, iter(range(99)).__next__)
    assert "".join(order) == "abccbaabc"
    assert seconds == [[1, 1, 1]] * 3


def test_seconds_of_the_processor_are_for_one_thread(monkeypatch):
    given = {"runtimes": ["torch"], "pairs": 1, "processor_time": True}
    report = lobs.measure_speed(network(), torch.randn(1, 260), **given)
    assert report.machine["seconds"] == "processor"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ArgumentError, match="processor_time: torch uses 2 threads"):
        lobs.measure_speed(network(), torch.randn(1, 260), **given)


def test_the_advice_follows_from_what_was_measured():
    gains = [row("torch", 1.0, 0.97), row("lobs.to_sparse", 2.0, 1.8, 0.5), row("other", 3.0, 2.0)]
    said = speed_report.advice(gains, [layer(100)], 0.9)
    assert "lobs.to_sparse (with sparsity=0.7) runs the pruned network 2.00 times" in said
    assert "other runs" in speed_report.advice([row("other", 3.0, 2.0)], [layer(1)], 0.9)
    uncertain = [row("torch", 1.0, 0.97), row("lobs.to_sparse", 1.5, 1.01)]
    few = speed_report.advice(uncertain, [layer(128)], 0.5)
    assert "does not pay" in few
    assert "50%" in few
    assert "(128 here)" in few
    assert "shrink" in few
    many = speed_report.advice(uncertain, [layer(4096)], 0.8)
    assert "4096 rows" in many
    assert "shrink" in many
