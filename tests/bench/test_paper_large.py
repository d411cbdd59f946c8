"""The experiments on large networks, on the theorem and on the defaults: on tiny data, and their
parts on cases whose answers are known."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import time

import numpy as np
import pytest
import torch
from helpers import hf_folders
from safetensors.torch import save_file
from torch import nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError
from paper.__main__ import main
from paper.defaults import experiment as defaults
from paper.defaults import subjects as defaults_subjects
from paper.defaults.page import Row, best_damping, defaults_page, regrets
from paper.large import experiment as large
from paper.large import networks as imagenet_networks
from paper.large.images import FolderImages, GeneratedImages
from paper.large.networks import NETWORKS, load_weights
from paper.large.printed import kept_shares
from paper.large.rates import Rates, Work, measured_rates, wide_layer
from paper.large.stages import Stages
from paper.theorem.chains import ChainRun, chain_run

pytestmark = pytest.mark.usefixtures("one_thread")

# Tensors, parameters, and sha256 of the lines "name (shape)" of torchvision 0.28.0's state dicts.
PUBLISHED = {
    "alexnet": (16, 61100840, "9c198ebdae1863e4ec78a1c045e362fca5950285bfb6ae81c4f5627e216cbcbb"),
    "vgg16": (32, 138357544, "35c4623e0cd4a39d764245620458692bdde46e98a422e65f0794d679138ab391"),
    "resnet50": (320, 25557032, "d7e4f8bb0a5363446a59c81c3887ccf66900a11651a0ae2dec96d1bb1eb6ea81"),
}


# ---- the networks --------------------------------------------------------------------------------


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return NETWORKS[name]()


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(name):
    model = on_meta(name)
    state = model.state_dict()
    lines = "\n".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
    parameters = sum(p.numel() for p in model.parameters())
    assert (len(state), parameters) == PUBLISHED[name][:2]
    assert hashlib.sha256(lines.encode()).hexdigest() == PUBLISHED[name][2]


@pytest.mark.parametrize("name", PUBLISHED)
def test_torchvision_s_network_computes_the_same(name):
    try:
        models = importlib.import_module("torchvision.models")
    except Exception as error:  # a build for another torch fails in its own ways
        pytest.skip(f"torchvision cannot be imported: {error}")
    theirs, ours = getattr(models, name)(weights=None).eval(), NETWORKS[name]().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


class Tiny(nn.Sequential):
    """A stand-in for a large network: 224 x 224 images, two convolutions and two linear layers."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3, stride=8), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=4), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 20), nn.ReLU(), nn.Linear(20, 10),
        )  # fmt: skip


def test_weights_load_by_name_and_those_that_do_not_fit_are_refused(tmp_path):
    torch.manual_seed(1)
    model, other = Tiny(), Tiny()
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    load_weights(other, tmp_path / "tiny.safetensors")
    assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))
    with pytest.raises(ArgumentError, match=r"(?s)does not fit.*weight"):
        load_weights(nn.Sequential(nn.Linear(3, 3)), tmp_path / "tiny.safetensors")
    (tmp_path / "old.pth").write_bytes(b"PK\x03\x04 a pickle in a zip")
    with pytest.raises(ArgumentError, match=r"not a safetensors file.*convert"):
        load_weights(other, tmp_path / "old.pth")
    with pytest.raises(ArgumentError, match="there is no file"):
        load_weights(other, tmp_path / "nothing")


def test_random_weights_keep_the_size_of_activations():
    model = nn.Sequential(*(m for _ in range(12) for m in (nn.Linear(256, 256), nn.ReLU())))
    imagenet_networks.random_weights(model)
    x = torch.randn(200, 256)
    with torch.no_grad():
        assert 0.3 < float(model(x).square().mean() / x.square().mean()) < 3


def test_every_layer_has_its_share():
    layers = [str(i) for i in range(16)]
    shares = kept_shares("vgg16", layers, None)
    assert (shares["0"], shares["13"], shares["15"]) == (0.70, 0.08, 0.30)
    assert set(kept_shares("resnet50", layers, None).values()) == {0.5}
    assert set(kept_shares("vgg16", layers, 0.25).values()) == {0.25}


# ---- images --------------------------------------------------------------------------------------


def test_generated_images_are_the_same_in_every_pass_and_like_natural_ones():
    images = GeneratedImages(5, batch=2, seed=3, size=64)
    first, again = torch.cat(list(images)), torch.cat(list(images))
    assert torch.equal(first, again)
    assert first.shape == (5, 3, 64, 64)
    assert len(images) == 3
    assert torch.allclose(first.mean((1, 2, 3)), torch.zeros(5), atol=1e-5)
    assert torch.allclose(first.std((1, 2, 3)), torch.ones(5), atol=1e-5)
    neighbours = (first[..., 1:] * first[..., :-1]).mean()
    assert float(neighbours) > 0.6  # of pixels of variance 1: noise alone would have none
    assert not torch.equal(first, torch.cat(list(GeneratedImages(5, batch=2, seed=9, size=64))))


@pytest.fixture
def folder(tmp_path):
    """Three classes of two single-coloured images each, in different sizes."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for k, name in enumerate(("n01", "n02", "n03")):
        where = tmp_path / "images" / name
        where.mkdir(parents=True)
        for i in range(2):
            made = image.new("RGB", (300 + 50 * i, 260 + 10 * k), (60 * k, 0, 255))
            made.save(where / f"{i}.png")
        (where / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def test_images_of_a_folder_have_the_class_of_their_folder(folder):
    images = FolderImages(folder, 6, batch=4)
    batches = list(images)
    assert [len(b) for b in batches] == [4, 2]
    assert sorted(images.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    for pixels, label in zip(torch.cat(batches), images.labels.tolist(), strict=True):
        assert pixels.shape == (3, 224, 224)
        red = (60 * label / 255 - 0.485) / 0.229
        assert torch.allclose(pixels[0], torch.full((224, 224), red), atol=1e-5)
        assert torch.allclose(pixels[2], torch.full((224, 224), (1 - 0.406) / 0.225), atol=1e-5)


def test_images_without_classes_have_no_labels_and_too_few_are_refused(folder):
    assert FolderImages(folder / "n01", 2, batch=1).labels is None
    with pytest.raises(ArgumentError, match=r"6 images.*7 were asked for"):
        FolderImages(folder, 7, batch=1)
    with pytest.raises(ArgumentError, match="is not a folder"):
        FolderImages(folder / "nothing", 1, batch=1)


# ---- time, memory and rates ----------------------------------------------------------------------


def test_a_stage_within_another_is_not_counted_twice():
    stages = Stages()
    with stages("outer"):
        time.sleep(0.02)
        with stages("inner"):
            time.sleep(0.2)
    assert stages.spent["inner"].seconds >= 0.2
    assert 0.02 <= stages.spent["outer"].seconds < 0.2


def test_memory_is_that_of_the_stage_that_took_it():
    stages = Stages()
    with stages("small"):
        torch.ones(10)
    with stages("large"):
        torch.ones(1 << 25)  # 128 MB
    with stages("small"):
        torch.ones(10)
    if not stages.spent["small"].peak:
        pytest.skip("the system does not say how much memory a process has")
    assert stages.spent["large"].peak - stages.spent["small"].peak > 100e6


def test_a_function_is_replaced_for_a_while_only():
    stages, original = Stages(), large.kept_shares
    with stages.replacing((large, "kept_shares", lambda old, *args: ("seen", old(*args)))):
        assert large.kept_shares("resnet50", ["a"], None) == ("seen", {"a": 0.5})
    assert large.kept_shares is original


def test_exact_operations_are_those_of_the_sum():
    work = Work("layer", rows=3, columns=500, patches=10, kept=0.4)
    assert work.removed == 300
    # Removal j of a row brings one column up to date with the j before it, and repairs the rest.
    summed = 3 * sum(2 * j * (500 - j) for j in range(300))
    assert work.exact == pytest.approx(summed, rel=0.01)
    assert work.moment_bytes == 8 * 500**2


def test_a_layer_that_does_not_fit_is_estimated():
    rates = measured_rates(64)
    assert all(rate > 0 for rate in dataclasses.astuple(rates))
    work = Work("wide", rows=128, columns=300, patches=4, kept=0.5)
    nothing = wide_layer(work, Rates(1e9, 1e9, 1e9, 1e9), memory=1 << 20, images=5)
    assert nothing.measured == ()
    assert nothing.seconds["calibration"] == pytest.approx(5 * 4 * 300**2 / 1e9)
    assert nothing.seconds["inverse"] == pytest.approx(2 * 300**3 / 1e9)
    assert nothing.seconds["lobs"] == pytest.approx(2 * 128 * 150 * 300 / 1e9)
    some = wide_layer(work, rates, memory=4 << 30, images=5)
    assert some.measured == ("calibration", "lobs")
    assert some.seconds["inverse"] == pytest.approx(2 * 300**3 / rates.inverse)


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(NETWORKS, "resnet50", Tiny)


def test_large_prunes_and_reports_the_cost_of_every_stage(tiny, tmp_path):
    arguments = ["large", "--network", "resnet50", "--short", "--count", "6", "--batch", "2"]
    assert main([*arguments, "--out", str(tmp_path), "--memory", "1", "--kept", "0.3"]) == 0
    found = json.loads((tmp_path / "paper-large.json").read_text())
    assert [r["method"] for r in found["runs"]] == ["lobs", "exact"]
    for r in found["runs"]:
        assert r["sparsity"] == pytest.approx(0.7, abs=0.01)
        assert set(r["stages"]) == {"calibration", "inverse", "pruning", "check"}
        for unit in ("seconds", "core_seconds"):
            assert 0 < sum(s[unit] for s in r["stages"].values()) < r[unit]
        assert [layer["patches"] for layer in r["layers"][-2:]] == [6, 6]
        assert r["after"]["relative distance"] > 0
    lobs_run, exact_run = found["runs"]
    assert all(
        a["error"] <= b["error"]
        for a, b in zip(exact_run["layers"], lobs_run["layers"], strict=True)
    )
    page = (tmp_path / "paper-large.md").read_text()
    assert "| ResNet-50 | lobs | 6 |" in page
    assert "33 h" in page
    again = [*arguments, "--method", "lobs", "--kept", "0.6", "--out", str(tmp_path)]
    assert main([*again, "--memory", "1"]) == 0  # beside what is there already, or in its place
    page = (tmp_path / "paper-large.md").read_text()
    assert page.count("| ResNet-50 | lobs | 6 | 60.") == 1
    assert page.count("| ResNet-50 | exact | 6 | 30.") == 1


@pytest.mark.parametrize("content", ["", "[]", '{"runs": [{}], "too large": {}}'])
def test_a_file_with_other_content_is_refused(tiny, tmp_path, capsys, content):
    (tmp_path / "paper-large.json").write_text(content)
    assert main(["large", "--network", "resnet50", "--short", "--out", str(tmp_path)]) == 1
    assert "not what this command writes" in capsys.readouterr().err
    assert (tmp_path / "paper-large.json").read_text() == content


def test_exact_runs_on_some_rows_of_a_layer_that_would_take_too_long(tiny, tmp_path):
    arguments = ["large", "--network", "resnet50", "--method", "exact", "--short", "--longest", "0"]
    assert main([*arguments, "--out", str(tmp_path), "--memory", "1"]) == 0
    (r,) = json.loads((tmp_path / "paper-large.json").read_text())["runs"]
    for layer in r["layers"]:
        assert layer["method"] == "lobs"
        assert layer["sampled"]["rows"] == min(8, layer["rows"])
        assert layer["sampled"]["exact"] <= layer["sampled"]["lobs"]


def test_a_layer_that_does_not_fit_into_memory_is_left_out_and_estimated(tiny, tmp_path, capsys):
    arguments = ["large", "--network", "resnet50", "--method", "lobs", "--short", "--count", "2"]
    assert main([*arguments, "--out", str(tmp_path), "--memory", "0.0004"]) == 0
    found = json.loads((tmp_path / "paper-large.json").read_text())
    (r,), (wide,) = found["runs"], found["too large"]["resnet50"]
    assert r["left_out"] == ["6"] == [wide["work"]["name"]]
    assert [layer["name"] for layer in r["layers"]] == ["0", "2", "8"]
    assert wide["measured"] == []
    assert "layer '6' needs" in capsys.readouterr().out


def test_your_weights_and_images_give_errors_before_and_after(tiny, tmp_path, folder):
    model = Tiny()
    nn.init.zeros_(model[8].weight)
    with torch.no_grad():
        model[8].bias[:] = torch.tensor([0.0, 9, 8, 7, 6, 5, 4, 3, 2, 1])  # always class 1, 0 last
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    arguments = ["large", "--network", "resnet50", "--method", "lobs", "--out", str(tmp_path)]
    arguments += ["--weights", str(tmp_path / "w.safetensors"), "--images", str(folder)]
    arguments += ["--tested", str(folder), "--count", "4", "--tests", "6", "--short"]
    assert main([*arguments, "--memory", "1"]) == 0
    (r,) = json.loads((tmp_path / "paper-large.json").read_text())["runs"]
    assert r["before"]["top-1 error"] == pytest.approx(100 * 4 / 6)
    assert r["before"]["top-5 error"] == pytest.approx(100 * 2 / 6)
    assert r["after"]["top-1 error"] == pytest.approx(100 * 4 / 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "x"], "weights: they are of one network"),
        (["--kept", "0"], "kept: 0"),
        (["--count", "0"], "count: 0"),
        (["--tested", "x"], "tested: errors of random weights"),
        (["--network", "alexnet", "--weights", "nothing.safetensors"], "there is no file"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, message, tmp_path, capsys):
    assert main(["large", "--short", "--out", str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- the theorem ---------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_the_bound_holds_over_random_chains(inputs):
    """Other chains than the hundred of the experiment."""
    runs = [chain_run(seed, inputs) for seed in range(1000, 1025)]
    assert [r for r in runs if r.violated] == []
    assert len({r.activation for r in runs}) > 4
    assert max(len(r.widths) for r in runs) > 5
    single = [r for r in runs if len(r.widths) == 2]
    assert all(r.measured == pytest.approx(r.spectral, rel=1e-9) for r in single)


def test_a_violation_would_be_detected():
    held = ChainRun("a", (2, 2), "ReLU", "lobs", "dense", (0.5,), 1.0, 1.0, 2.0, 3.0, 1.0)
    assert not held.violated
    assert dataclasses.replace(held, measured=1.0001).violated
    assert dataclasses.replace(held, frobenius=0.9).violated


def test_theorem_writes_its_page_and_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the figure, is not installed")
    assert main(["theorem", "--seeds", "4", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "paper-theorem.json").read_text())
    assert found["violated"] == 0
    assert len(found["runs"]) == 8
    assert "| 4 random chains | dense | 0 |" in (tmp_path / "paper-theorem.md").read_text()
    assert (tmp_path / "paper-theorem.png").read_bytes().startswith(b"\x89PNG")


# ---- the defaults --------------------------------------------------------------------------------


def row(damping, heldout, output=1.0, rows=10.0, method="exact"):
    network = {"output": output}
    return Row("net", rows, method, damping, damping, heldout, heldout, {}, network, 0.0)


def test_the_best_damping_is_the_one_with_the_least_regret():
    rows = [row(0.01, 4.0), row(0.1, 1.0), row(1.0, 2.0)]
    rows += [row(0.01, 1.0, rows=20), row(0.1, 1.5, rows=20), row(1.0, 9.0, rows=20)]
    rows += [row(0.01, 7.0, rows=30)]  # tried with one damping only: says nothing
    assert regrets(rows) == {
        ("net", 10.0, "exact"): [4.0, 1.0, 2.0],
        ("net", 20.0, "exact"): [1.0, 1.5, 9.0],
    }
    assert best_damping(rows) == 0.1


def test_the_rows_that_are_enough_are_the_fewest_near_the_lowest_error():
    rows = [row(0.01, e, rows=n) for n, e in ((10, 9.0), (100, 2.1), (1000, 2.0), (5000, 2.3))]
    page = defaults_page({"net": "a network"}, rows, [], 0.01)
    assert "lowest error of their column: exact from 100 rows" in page


def small_subject():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    data, other = torch.randn(40, 6), torch.randn(30, 6)

    def measure(pruned):
        with torch.no_grad():
            return {"output": float((pruned(other) - model(other)).norm() / model(other).norm())}

    return defaults_subjects.Subject(
        name="small", model=model, kept={"0": 0.5, "2": 0.5}, largest=40, swept=(20,),
        batches=lambda count: iter(data[:count].split(7)), heldout=[other], measure=measure,
        forward=lambda network, batch: network(batch), description="a small network",
    ), data, other  # fmt: skip


def test_held_out_errors_are_those_of_the_layer_on_other_data():
    subject, data, other = small_subject()
    moments = defaults._moments(subject, subject.batches(20))
    assert moments["0"].rows == 20
    heldout = defaults._moments(subject, subject.heldout)
    found = defaults._prune(subject, moments, heldout, "lobs", 0.01)
    out = lobs.prune_weight(
        subject.model[0].weight.detach(), lobs.Hessian(6, bias=True).update(data[:20]),
        sparsity=0.5, method="lobs", bias=subject.model[0].bias.detach(),
    )  # fmt: skip
    with torch.no_grad():
        before = subject.model[0](other).double()
        after = (other @ out.weight.T + out.bias).double()
    expected = float((after - before).square().sum() / before.square().sum())
    assert found.layers["0"] == pytest.approx(expected, rel=1e-4)
    assert subject.measure(subject.model)["output"] == 0  # the original was not touched


def test_shifted_images_are_the_same_pixels_elsewhere():
    images = torch.zeros(50, 784)
    images[:, 14 * 28 + 14] = 1.0
    moved = defaults_subjects._shifted(images, 1)
    assert torch.equal(moved.sum(1), torch.ones(50))
    places = moved.argmax(1)
    assert int(places.unique().numel()) > 10
    assert int((places // 28 - 14).abs().max()) <= 2
    assert int((places % 28 - 14).abs().max()) <= 2


def test_lenet_is_calibrated_on_the_requested_number_of_rows(shared_data):
    subject = defaults_subjects.lenet(shared_data)
    for count in (10, 1000, 5000, 7300):
        batches = torch.cat(list(subject.batches(count)))
        assert batches.shape == (count, 784)
    assert torch.equal(batches[:5000], torch.cat(list(subject.batches(5000))))
    assert subject.measure(subject.copy())["error, %"] == pytest.approx(1.04, abs=0.005)


def test_lenet_is_calibrated_on_training_images_if_there_are_any(shared_data, tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "lenet300-100").symlink_to(shared_data / "lenet300-100")
    for path in (shared_data / "mnist").glob("t10k-*"):
        (tmp_path / "mnist" / path.name).symlink_to(path)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 28, 28))
    for kind, values in (("images-idx3", pixels), ("labels-idx1", pixels[:, 0, 0] % 10)):
        head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
        path = tmp_path / "mnist" / f"train-{kind}-ubyte"
        path.write_bytes(head + values.astype(np.uint8).tobytes())
    subject = defaults_subjects.lenet(tmp_path)
    seen = torch.cat(list(subject.batches(70)))
    assert torch.equal((seen * 255).round().long(), torch.from_numpy(pixels.reshape(70, 784)))
    assert sum(map(len, subject.heldout)) == 10_000
    assert subject.measure(subject.copy())["error, %"] == pytest.approx(1.61, abs=0.005)
    assert "training images" in subject.description


def test_an_encoder_is_calibrated_on_the_requested_number_of_tokens(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr(defaults_subjects, "_HELDOUT_ROWS", 200)
    folder = hf_folders.save(tmp_path / "encoder", max_position_embeddings=128)
    (tmp_path / "text").write_text(hf_folders.text())
    subject = defaults_subjects.encoder(folder, tmp_path / "text", [1], 0.5)
    assert len(subject.kept) == 6
    assert set(subject.layers(subject.model)) == set(subject.kept)
    for count in (1, 30, 333, subject.largest):
        seen = defaults._moments(subject, subject.batches(count))
        assert {moment.rows for moment in seen.values()} == {count}
    lines = {tuple(line) for batch in subject.heldout for line in batch["input_ids"].tolist()}
    for batch in subject.batches(subject.largest):
        assert not lines & {tuple(line) for line in batch["input_ids"].tolist()}
    same = subject.measure(subject.copy())
    assert same["output"] == 0
    assert abs(same["1 - cosine"]) < 1e-12
    with pytest.raises(ArgumentError, match="no linear layer"):
        defaults_subjects.encoder(folder, tmp_path / "text", [7], 0.5)
    monkeypatch.setattr(defaults_subjects, "_HELDOUT_ROWS", 100_000)
    with pytest.raises(ArgumentError, match="more than 100,000 are needed"):
        defaults_subjects.encoder(folder, tmp_path / "text", [1], 0.5)


def test_defaults_writes_its_page(monkeypatch, tmp_path):
    monkeypatch.setattr(defaults, "lenet", lambda folder: small_subject()[0])
    arguments = ["defaults", "--data", str(tmp_path), "--short", "--method", "exact", "lobs"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "paper-defaults.json").read_text())
    dampings = (1e-4, 1e-2, 1.0)
    assert [(r["rows"], r["method"], r["damping"]) for r in found["rows"]] == [
        (40, method, damping) for method in ("exact", "lobs") for damping in dampings
    ]
    assert [(r["rows"], r["inputs"], r["damping"]) for r in found["whole"]] == [
        (40, inputs, damping) for inputs in ("pruned", "corrected") for damping in dampings
    ]
    page = (tmp_path / "paper-defaults.md").read_text()
    assert "the default is 0.01" in page
    assert page.count("| 40 |") == 7  # rows, the network as a whole twice, costs of two methods


def test_defaults_needs_a_subject(tmp_path, capsys):
    assert main(["defaults", "--out", str(tmp_path)]) == 1
    assert "give at least one" in capsys.readouterr().err
    assert main(["defaults", "--encoder", "x", "--out", str(tmp_path)]) == 1
    assert "go together" in capsys.readouterr().err
