"""Networks of transformers that multiply their weights in different ways: nothing is missed but
what is expected, and everything is counted."""

from __future__ import annotations

import pytest

from quality import chosen_models, small_models, zoo

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
    report = chosen_models.report_on(name)
    coverage = report.coverage
    assert coverage.not_understood == 0
    assert len(report.layers) == layers
    assert {round(x.sparsity, 2) for x in report.layers} == {0.5}
    if name != "wav2vec2":  # whose normalized weight is two parameters
        matrices = (p for p in chosen_models.network(name).parameters() if p.ndim > 1)
        assert coverage.total == sum(p.numel() for p in matrices)


def test_weights_that_are_rearranged_are_pruned_and_unused_ones_named():
    report = chosen_models.report_on("xlnet")
    reasons = {x.name: x.reason for x in report.skipped if not x.on_purpose}
    assert "layer.0.rel_attn.o" in {layer.name for layer in report.layers}
    assert set(reasons.values()) == {"it is not used on the calibration data"}
    assert reasons["mask_emb"] == "it is not used on the calibration data"


def test_the_routers_of_a_mixture_are_left_alone():
    for name in ("dbrx", "jetmoe", "llama4"):
        report = chosen_models.report_on(name)
        routers = [x for x in report.skipped if "router of a mixture" in x.reason]
        assert len(routers) == (4 if name == "jetmoe" else 2)
        assert all(x.on_purpose for x in routers)


# One of every kind of architecture, among those whose small networks take little time.
TYPES = [
    "albert",
    "altclip",
    "bart",
    "big_bird",
    "bitnet",
    "chinese_clip",
    "clip",
    "cohere2_moe",
    "convbert",
    "convnextv2",
    "data2vec-audio",
    "deberta",
    "deepseek_vl",
    "deit",
    "diffllama",
    "doge",
    "dpt",
    "electra",
    "ernie4_5_moe",
    "falcon_mamba",
    "flex_olmo",
    "fnet",
    "fsmt",
    "gemma2",
    "git",
    "glm4_moe",
    "gpt_neox",
    "gptj",
    "granitemoeshared",
    "helium",
    "hubert",
    "idefics3",
    "ijepa",
    "internvl",
    "lasr_ctc",
    "layoutlm",
    "lfm2",
    "llava",
    "m2m_100",
    "mobilevit",
    "opt",
    "phi3",
    "pvt_v2",
    "qwen2_moe",
    "regnet",
    "segformer",
    "siglip",
    "poolformer",
    "t5",
    "timesformer",
    "videomae",
    "vilt",
    "vit",
    "whisper",
    "xglm",
    "yolos",
]

# What is left out of some networks, though it is no table and no router.
EXPECTED: dict[str, set[str]] = {}


@pytest.mark.parametrize("name", TYPES)
def test_small_networks_of_all_kinds_are_pruned_and_counted(name):
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("the configurations of older versions are made differently")
    model, batches = small_models.made(name)
    total = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    report = zoo.pruned(model, batches, method="magnitude", inputs="pruned")
    missed = {x.name for x in report.skipped if not x.on_purpose and x.weights}
    assert missed == EXPECTED.get(name, set())
    if not any("parametrizations" in name for name, _ in model.named_parameters()):
        assert report.coverage.total == total
    for layer in report.layers:
        size = report.masks[layer.name].numel()
        assert abs(layer.sparsity - 0.5) * size <= 1
