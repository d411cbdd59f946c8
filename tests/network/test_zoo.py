"""Networks of transformers that multiply their weights in different ways: nothing is missed but
what is expected, and everything is counted."""

from __future__ import annotations

import json

import pytest

from quality import chosen_models, shrink_zoo, small_models, zoo

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
    "llava_next",
    "m2m_100",
    "minicpmv4_6",
    "mobilevit",
    "opt",
    "phi3",
    "pvt_v2",
    "qwen2_moe",
    "qwen2_vl",
    "qwen3_asr",
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

# Those whose small networks get images or sounds beside text, in forms of their own.
WITH_TOWERS = {
    "llava_next": ["image_sizes", "input_ids", "pixel_values"],
    "minicpmv4_6": ["input_ids", "pixel_values", "target_sizes"],
    "qwen2_vl": ["image_grid_thw", "input_ids", "mm_token_type_ids", "pixel_values"],
    "qwen3_asr": ["input_features", "input_features_mask", "input_ids"],
}

# What is left out of some networks, though it is no table and no router.
EXPECTED: dict[str, set[str]] = {}


def skip_with_older_versions():
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("the configurations of older versions are made differently")


@pytest.mark.parametrize("name", TYPES)
def test_small_networks_of_all_kinds_are_pruned_and_counted(name):
    skip_with_older_versions()
    model, batches = small_models.made(name)
    assert sorted(batches[0]) == WITH_TOWERS.get(name, sorted(batches[0]))
    total = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    report = zoo.pruned(model, batches, method="magnitude", inputs="pruned")
    missed = {x.name for x in report.skipped if not x.on_purpose and x.weights}
    assert missed == EXPECTED.get(name, set())
    if not any("parametrizations" in name for name, _ in model.named_parameters()):
        assert report.coverage.total == total
    for layer in report.layers:
        size = report.masks[layer.name].numel()
        assert abs(layer.sparsity - 0.5) * size <= 1


def test_a_file_keeps_the_rows_of_types_that_were_not_run_again(tmp_path):
    def row(name, said):
        return {"type": name, "outcome": "not made", "said": said}

    out = tmp_path / "zoo.json"
    zoo.kept(out, "transformers", {"torch": "1"}, [row("b", "first"), row("c", "first")])
    zoo.kept(out, "timm", {"torch": "1"}, [row("b", "first")])
    zoo.kept(out, "transformers", {"torch": "2"}, [row("c", "second"), row("a", "second")])
    found = json.loads(out.read_text())
    inside = [(x["type"], x["said"]) for x in found["transformers"]["rows"]]
    assert inside == [("a", "second"), ("b", "first"), ("c", "second")]
    assert found["transformers"]["about"] == {"torch": "2"}
    assert found["transformers"]["all"]["types"] == 3
    assert found["timm"]["all"]["types"] == 1
    assert sum('"type"' in line for line in out.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("bert", ["neurons"]),
        ("ernie4_5_moe", ["experts", "neurons"]),
        ("gemma", ["heads", "neurons"]),
        ("mllama", ["neurons"]),  # the images' part is reached by no data
    ],
)
def test_small_networks_get_smaller_and_their_classes_load_them(name, kinds):
    skip_with_older_versions()
    row = shrink_zoo.shrunk(*small_models.made(name))
    assert row["outcome"] == "loads"
    assert row["kinds"] == kinds
    assert row["parameters"][1] < row["parameters"][0]


def test_a_network_that_stays_is_left_with_the_reason():
    skip_with_older_versions()
    row = shrink_zoo.shrunk(*small_models.made("bitnet"))  # normalized between neurons and reader
    assert row["outcome"] == "left"
    assert "whose units can be removed" in row["said"]
    summed = shrink_zoo.summary([row, {"type": "a", "outcome": "not made"}])
    assert (summed["types"], summed["made"], summed["left"], summed["loads"]) == (2, 1, 1, 0)
