"""Networks of transformers that multiply their weights in different ways: nothing is missed but
what is expected, and everything is counted."""

from __future__ import annotations

import pytest

from quality import zoo

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Python's own, from packages that transformers imports.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]


@pytest.mark.parametrize(
    ("name", "layers"),
    [("beit", 13), ("dbrx", 10), ("ibert", 13), ("jetmoe", 10), ("llama4", 18), ("wav2vec2", 16)],
)
def test_every_prunable_weight_is_pruned(name, layers):
    report = zoo.report_on(name)
    coverage = report.coverage
    assert coverage.not_understood == 0
    assert len(report.layers) == layers
    assert {round(x.sparsity, 2) for x in report.layers} == {0.5}
    if name != "wav2vec2":  # whose normalized weight is two parameters
        matrices = (p for p in zoo.network(name).parameters() if p.ndim > 1)
        assert coverage.total == sum(p.numel() for p in matrices)


def test_weights_that_are_rearranged_or_unused_are_named():
    report = zoo.report_on("xlnet")
    reasons = {x.name: x.reason for x in report.skipped if not x.on_purpose}
    assert "aten::clone" in reasons["layer.0.rel_attn.o"]
    assert reasons["mask_emb"] == "it is not used on the calibration data"


def test_the_routers_of_a_mixture_are_left_alone():
    for name in ("dbrx", "jetmoe", "llama4"):
        report = zoo.report_on(name)
        routers = [x for x in report.skipped if "router of a mixture" in x.reason]
        assert len(routers) == (4 if name == "jetmoe" else 2)
        assert all(x.on_purpose for x in routers)
