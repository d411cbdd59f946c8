"""Plans before the start, and limits on memory that are kept."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError
from lobs_native.layers.conv import PATCH_BYTES
from lobs_native.network.peak import LayerPeak, Peak
from lobs_native.solvers.extent import Extent
from lobs_native.solvers.methods import TABLE

CHILD = """
import itertools, json, sys
import torch, lobs_native as lobs
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
options, widths = map(json.loads, sys.argv[1:])
layers = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
model = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())])
data = [torch.randn(64, widths[0]) for _ in range(4)]
# Libraries allocate their own memory at first use.
small = nn.Sequential(nn.Linear(widths[0], 64), nn.ReLU(), nn.Linear(64, 8))
lobs.prune(small, data, progress=False, **{**options, "sparsity": 0.05, "memory": None})
model(data[0])
report = lobs.prune(model, data, progress=False, **options)
print(json.dumps({
    "plan": report.settings["plan"], "peak": report.settings["peak memory"],
    "weights": [float(layer.weight.double().abs().sum()) for layer in layers],
}))
"""


# Six layers whose second moments take 6 * 1153**2 * 8 = 64 MB together, and six with small ones.
SIX = [1152, 288] * 6 + [1152]
WEIGHTS = 12 * 1152 * 288


def run(widths: list[int], **options: Any) -> dict[str, Any]:
    # With a limit, prune does this itself. Without one, what glibc keeps varies between runs.
    tight = {} if "memory" in options else {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(options), json.dumps(widths)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={**os.environ, **tight},
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("inputs", ["dense", "corrected"])
def test_a_model_whose_second_moments_exceed_the_limit_is_pruned_within_it(inputs):
    options = {"sparsity": 0.5, "method": "sweep", "inputs": inputs}
    free = run(SIX, **options)
    limit = round(free["plan"]["layer"] + 8e6) + WEIGHTS  # masks, and some slack
    bound = run(SIX, **options, memory=limit)
    moments = 6 * 1153 * 1153 * 8
    if inputs == "dense":
        assert free["plan"]["memory"] > moments
    assert bound["plan"]["memory"] <= limit
    assert bound["plan"]["disk"] > WEIGHTS * 4 - 8e6  # weights that did not fit into memory
    assert bound["weights"] == free["weights"]
    for result in (free, bound):
        assert result["peak"] <= 1.1 * result["plan"]["memory"] + 64e6
    assert bound["peak"] < free["peak"]


def test_a_plan_of_admm_is_at_most_half_above_its_peak_and_can_be_the_limit():
    options = {"sparsity": 0.5, "method": "admm"}
    free = run([1280, 640], **options)
    plan = free["plan"]["memory"]
    bound = run([1280, 640], **options, memory=plan)
    assert bound["weights"] == free["weights"]
    for result in (free, bound):
        assert result["peak"] <= 1.05 * plan + 8e6
    assert free["peak"] >= plan / 1.5


def test_measuring_the_output_is_in_the_plan_and_within_the_limit():
    model, rows = nn.Sequential(nn.Linear(4, 3000)), [torch.randn(500, 4) for _ in range(2)]
    options = {"sparsity": 0.5, "method": "sweep"}
    plan = lobs.plan_prune(model, rows, **options)
    assert plan.output == 500 * 3000 * 4 + 4 * 8 * (1 << 18)
    assert plan.memory == plan.output + plan.kept + plan.masks  # the layer takes less
    bound = lobs.plan_prune(model, rows, **options, memory=12_000_000)
    assert bound.memory <= 12_000_000
    assert bound.output_limit == bound.output - 4 * 8 * (1 << 18) < 500 * 3000 * 4
    with pytest.raises(MemoryError, match=r"measuring the output needs 8,388,608 .* smaller batch"):
        lobs.plan_prune(model, rows, **options, memory=8_000_000)


def test_patches_of_a_batch_are_in_the_plan_in_both_networks():
    model, images = nn.Sequential(nn.Conv2d(8, 4, 3)), [torch.randn(8, 8, 130, 130)]
    options = {"sparsity": 0.5, "method": "sweep"}
    copied = PATCH_BYTES  # of 8 * 128**2 rows of 72 inputs, which take more
    pruned = lobs.plan_prune(model, images, **options, inputs="pruned").layer
    corrected = lobs.plan_prune(model, images, **options).layer
    assert copied < pruned < copied + 2e6
    kept = images[0].numel() * 4
    assert 2 * copied + kept < corrected < 2 * copied + kept + 4e6


def test_fewer_rows_than_inputs_are_planned_to_be_inverted_in_float64():
    enough = Extent(1, 64, 513, 0.5, torch.float32, samples=513)
    few = dataclasses.replace(enough, samples=512)
    assert TABLE["admm"].matrices(few) - TABLE["admm"].matrices(enough) == 8 * 513**2
    assert TABLE["sweep"].matrices(few) == TABLE["sweep"].matrices(enough)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30))


def data() -> list[torch.Tensor]:
    return [torch.randn(50, 20, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def test_the_plan_is_that_of_the_run():
    before = [p.clone() for p in network().parameters()]
    model = network()
    plan = lobs.plan_prune(model, data(), sparsity=0.5, inputs="dense")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    report = lobs.prune(model, data(), sparsity=0.5, inputs="dense", progress=False)
    planned = {**report.settings["plan"], "seconds": plan.seconds}
    assert planned == plan.to_dict()
    assert plan.largest == "2"
    assert plan.seconds > 0
    assert plan.masks == 20 * 30 / 8 + (30 * 30 + 4) / 8  # a bit for each weight
    assert plan.kept == 2 * 4 * (21 * 30 + 31 * 30)
    assert plan.statistics == 2 * 8 * 21**2  # of the chunk at hand, and of those before


def test_the_original_network_s_outputs_wait_only_where_no_bound_holds():
    covered, other = network(), network()
    other[1] = nn.SiLU()
    for measure, outputs in (("sample", 4 * 3 * 50 * 30), ("all", 0)):
        kept, more = (
            lobs.plan_prune(model, data(), sparsity=0.5, measure=measure).kept
            for model in (covered, other)
        )
        assert more - kept == outputs


def test_the_norms_of_the_bound_are_in_the_plan():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 300), nn.Linear(300, 300))
    x = [torch.randn(4, 2)]
    with_norms = lobs.plan_prune(model, x, sparsity=0.5, include="0")
    assert with_norms.output >= (4 + 16) * 300**2
    model[1] = nn.SiLU()
    assert lobs.plan_prune(model, x, sparsity=0.5, include="0").output < 300**2


@pytest.mark.parametrize(
    ("backward", "settings"),
    [
        (False, {}),
        (False, {"scope": "model", "sensitivity": "bound"}),
        (True, {"scope": "model"}),
        (True, {"token_weights": "output"}),
    ],
)
def test_the_plan_says_that_it_does_not_count_a_backward_pass(backward, settings):
    plan = lobs.plan_prune(network(), data(), sparsity=0.5, **settings)
    assert plan.backward == backward
    assert ("a forward and a backward pass (" in str(plan)) == backward


@pytest.mark.parametrize("method", ["exact", "admm"])
def test_a_limit_that_is_too_low_is_refused_with_one_that_is_enough(method):
    options = {"sparsity": 0.5, "method": method}
    with pytest.raises(MemoryError, match="memory: layer '2' needs") as caught:
        lobs.plan_prune(network(), data(), **options, memory=1000)
    (needed,) = re.findall(r": ([\d,]+) together", str(caught.value))
    enough = int(needed.replace(",", ""))
    plan = lobs.plan_prune(network(), data(), **options, memory=enough)
    assert plan.memory == enough
    assert plan.disk > 0
    with pytest.raises(MemoryError):
        lobs.plan_prune(network(), data(), **options, memory=enough - 1)
    free, within = network(), network()
    lobs.prune(free, data(), **options, progress=False)
    lobs.prune(within, data(), **options, memory=enough, progress=False)
    assert all(
        torch.equal(a, b) for a, b in zip(free.parameters(), within.parameters(), strict=True)
    )


@pytest.mark.parametrize("inputs", ["corrected", "pruned", "dense"])
def test_a_limit_that_is_too_low_for_corrected_inputs_suggests_pruned_ones(inputs):
    with pytest.raises(MemoryError) as caught:
        lobs.plan_prune(network(), data(), sparsity=0.5, inputs=inputs, memory=1000)
    assert ("use inputs='pruned'" in str(caught.value)) == (inputs == "corrected")


def test_inverting_for_the_correction_is_in_the_estimate_of_the_time():
    layer = nn.Sequential(nn.Linear(2000, 2))  # little to calibrate, much to invert
    batches = [torch.randn(4, 2000)]

    def seconds(inputs: str) -> float:
        options = {"sparsity": 0.5, "method": "magnitude", "inputs": inputs}
        return lobs.plan_prune(layer, batches, **options).seconds

    assert seconds("corrected") > 10 * seconds("pruned")


def test_one_budget_within_a_limit_is_the_same_budget():
    options = {"sparsity": 0.6, "scope": "model", "progress": False}
    free, within = network(), network()
    lobs.prune(free, data(), **options)
    with pytest.raises(MemoryError) as caught:
        lobs.plan_prune(network(), data(), sparsity=0.6, scope="model", memory=1000)
    (needed,) = re.findall(r": ([\d,]+) together", str(caught.value))
    report = lobs.prune(within, data(), memory=int(needed.replace(",", "")), **options)
    assert report.settings["plan"]["statistics"] == 0
    assert all(
        torch.equal(a, b) for a, b in zip(free.parameters(), within.parameters(), strict=True)
    )


@pytest.mark.parametrize(("method", "power"), [("exact", 3), ("admm", 2)])
def test_arithmetic_grows_with_the_square_of_a_row_s_width_for_admm_and_the_cube_for_exact(
    method, power
):
    def flops(width: int) -> float:
        spent = TABLE[method].flops(Extent(1, 10**9, width, 0.5, torch.float32))
        return spent.single + spent.removal

    assert flops(8192) / flops(4096) == pytest.approx(2**power, rel=0.01)


def test_a_search_with_admm_keeps_the_inverse_of_every_penalty():
    once = Extent(1, 4096, 4096, 0.5, torch.float32)
    searched = dataclasses.replace(once, searched=True)
    more = TABLE["admm"].matrices(searched) - TABLE["admm"].matrices(once)
    assert more >= 2 * 4 * 4096**2  # two more matrices
    assert TABLE["exact"].matrices(searched) == TABLE["exact"].matrices(once)


def test_an_unknown_argument_is_named():
    with pytest.raises(ArgumentError, match="sparsty: prune has no such argument"):
        lobs.plan_prune(network(), data(), sparsty=0.5)


def test_the_plan_can_be_read_as_text():
    text = str(lobs.plan_prune(network(), data(), sparsity=0.5, memory=10**9))
    assert re.fullmatch(
        r"plan: \d+ MB of 1,000 MB allowed besides the model, the data and a forward pass "
        r"\(\d+ MB for 2, \d+ MB other second moments, \d+ MB states, \d+ MB weights, "
        r"\d+ MB masks; then \d+ MB to measure the output\); "
        r"0 MB on disk; about \d+ s",
        text,
    )


def test_the_peak_of_a_layer_is_its_own_and_the_run_s_is_the_highest():
    size = 64 << 20
    with Peak().measuring() as whole:
        if whole.bytes() is None:
            pytest.skip("this system has no /proc/self/clear_refs that can be written")
        large = LayerPeak(torch.device("cpu"))
        bytearray(size)[:] = bytes(1) * size
        assert large.bytes() >= size
        small = LayerPeak(torch.device("cpu"))
        assert small.bytes() < size
        assert small.device_bytes() is None
        assert whole.bytes() >= size
        whole.reset()
        assert whole.before_reset >= size
        assert whole.bytes() < size
    assert LayerPeak(torch.device("cpu")).bytes() is None  # outside of a run


def test_every_layer_of_a_report_has_its_peak():
    report = lobs.prune(network(), data(), sparsity=0.5, progress=False)
    whole = report.settings["peak memory"]
    for layer in report.layers:
        assert layer.peak_memory_device is None
        assert whole is None or 0 <= layer.peak_memory <= whole
