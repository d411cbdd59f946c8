"""``python bench/paper``: the whole of it on tiny data, and its parts on cases whose
answers are known."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from torch import nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError
from paper import data, everything, networks
from paper.__main__ import _parser, main
from paper.data import Images
from paper.small import curves, figures, tables
from paper.small import experiment as small
from paper.small.budgets import prune_layers_to, prune_network_to
from paper.small.retrain import retrain
from paper.small.rivals import obd_masks, random_masks
from paper.small.ways import WAYS, prune_by

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = small.Extent(
    1, 1, ("L-OBS as printed", "exact, model, corrected"),
    dict.fromkeys(("LeNet-300-100", "LeNet-5", "CIFAR-Net"), 10), (0.3, 0.05), longer=True,
    epochs=1, halvings=1,
)  # fmt: skip


def write_idx(path, values, packed=True):
    content = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    content += values.astype(np.uint8).tobytes()
    if packed:
        content, path = gzip.compress(content), path.with_name(path.name + ".gz")
    path.write_bytes(content)


def write_images(folder, which, count, seed):
    """Ten classes: each a bright bar at its own height, in noise."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 10, count)
    pixels = generator.integers(0, 90, (count, 28, 28))
    for image, label in zip(pixels, labels, strict=True):
        image[2 * label + 3 : 2 * label + 5] += 120
    folder.mkdir(exist_ok=True)
    write_idx(folder / f"{which}-images-idx3-ubyte", pixels)
    write_idx(folder / f"{which}-labels-idx1-ubyte", labels, packed=False)


def narrow():
    """LeNet-300-100 with fewer units, so that it takes no time."""
    return networks._named(
        flat=nn.Flatten(), fc1=nn.Linear(784, 24), relu1=nn.ReLU(), fc2=nn.Linear(24, 16),
        relu2=nn.ReLU(), fc3=nn.Linear(16, 10),
    )  # fmt: skip


def narrow_convolutions():
    """CIFAR-Net with fewer channels, so that it takes no time."""
    return networks._named(
        conv1=nn.Conv2d(1, 4, 3, padding=1), norm1=nn.BatchNorm2d(4), pool1=nn.MaxPool2d(4),
        relu1=nn.ReLU(), conv2=nn.Conv2d(4, 6, 3, padding=1), norm2=nn.BatchNorm2d(6),
        relu2=nn.ReLU(), conv3=nn.Conv2d(6, 6, 3, padding=1), pool3=nn.MaxPool2d(2),
        flat=nn.Flatten(), drop=nn.Dropout(0.3), fc1=nn.Linear(54, 16), relu4=nn.ReLU(),
        fc2=nn.Linear(16, 10),
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _narrow():
    shape = dataclasses.replace(networks.LENET300, make=narrow)
    convolutions = dataclasses.replace(networks.CIFARNET, make=narrow_convolutions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "lenet300", narrow)
        patch.setattr(networks, "LENET300", shape)
        patch.setitem(networks.SHAPES, "lenet300", shape)
        patch.setitem(networks.SHAPES, "cifarnet", convolutions)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, "train", 300, 0)
    write_images(folder, "t10k", 200, 1)
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory, images):
    """Weights in the authors' files."""
    folder = tmp_path_factory.mktemp("released")
    case = networks.trained("lenet300", images, "bars", 5, None, 4)
    for i in (1, 2, 3):
        layer = case.model.get_submodule(f"fc{i}")
        np.save(folder / f"w_layer{i}.npy", layer.weight.detach().numpy().T)
        np.save(folder / f"b_layer{i}.npy", layer.bias.detach().numpy())
    return folder


@pytest.fixture(scope="module")
def test_images(tmp_path_factory, images):
    """The same images without a training set."""
    folder = tmp_path_factory.mktemp("tested")
    for path in images.glob("t10k-*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def run_tiny(out, images, mnist, released, kinds):
    return small.experiment(
        out, TINY, seeds=1, weights=released, mnist=mnist, images=images, data="bars",
        kinds=kinds, cache=str(out / "net"),
    )  # fmt: skip


@pytest.mark.parametrize("whole", [False, True])
def test_the_whole_experiment(tmp_path, images, test_images, released, capsys, monkeypatch, whole):
    shorter = dataclasses.replace(tables.LONGER, stages=2, between=20, last=20)
    monkeypatch.setattr(small, "LONGER", shorter)
    mnist = images if whole else test_images
    paths = run_tiny(tmp_path, images, mnist, released, ["cifarnet"])
    page = (tmp_path / "small.md").read_text()
    numbers = json.loads((tmp_path / "small.json").read_text())
    for path in paths:
        assert path.is_file()
        if path.suffix == ".svg":
            ElementTree.fromstring(path.read_text())
            assert f"({path.name})" in page
    for heading in ("LeNet-300-100, MNIST", "CIFAR-Net, bars", "L-OBS, printed"):
        assert heading in page
    ways = {(r["table"], r["network"], r["way"]) for r in numbers["rows"]}
    assert len(ways) == len(numbers["rows"]) == 2 * 2 + 1 + 1 + whole
    assert ("8 stages, taught, " in page, "16 stages, taught, longer" in page) == (True, whole)
    for row in numbers["rows"]:
        assert 0 <= min(row["retrained"]) <= 100
    capsys.readouterr()
    monkeypatch.setattr(small.plots, "draw", lambda *_: [])  # figures are drawn again at each call
    monkeypatch.setattr(small, "budgets_of", lambda *_: [])  # and so are budgets found
    run_tiny(tmp_path, images, mnist, released, ["cifarnet"])
    assert "seed" not in capsys.readouterr().out  # no network trained, no row made again


def test_without_any_data_it_says_what_to_name(tmp_path, capsys):
    arguments = ["small", "--out", str(tmp_path / "out"), "--images", str(tmp_path)]
    assert main(arguments) == 1
    assert "--images" in capsys.readouterr().err
    assert main([*arguments, "--mnist", str(tmp_path)]) == 1
    assert "--released and --mnist belong together" in capsys.readouterr().err


@pytest.fixture
def ran(monkeypatch):
    """The commands that "all" would have run."""
    commands = []
    monkeypatch.setattr(everything, "_run", lambda part: commands.append(part) or 0)
    return commands


def parsed(command):
    options = _parser().parse_args(command)
    return {name: value for name, value in vars(options).items() if name != "run"}


def test_all_runs_what_the_available_data_allow(tmp_path, images, ran):
    given = ["--images", str(images), "--images-name", "Bars", "--short", "--threads", "1"]
    given += ["--data", str(tmp_path), "--seeds", "3", "--cache", "net", "--out", str(tmp_path)]
    assert main([*given, "--encoder", "e", "--text", "t"]) == 0
    trained, released, defaults, theorem = map(parsed, ran)
    assert [command[0] for command in ran] == ["small", "small", "defaults", "theorem"]
    for options in (trained, released, defaults, theorem):
        assert options["short"]
        assert options["threads"] == 1
    assert len({tuple(options["out"].parts) for options in (trained, released, defaults)}) == 3
    assert (trained["images"], trained["images_name"], trained["network"]) == (images, "Bars", None)
    assert (trained["released"], released["released"]) == (None, tmp_path / "lenet300-100")
    assert released["mnist"] == released["images"] == tmp_path / "mnist"
    assert released["network"] == ["lenet5"]
    assert trained["seeds"] == released["seeds"] == 3
    assert defaults["seeds"] is theorem["seeds"] is None  # there it would be the number of chains
    assert trained["cache"] != released["cache"]  # networks of one name, trained on other images
    assert (defaults["data"], theorem["data"]) == (tmp_path, tmp_path)
    assert (defaults["encoder"].name, defaults["text"].name) == ("e", "t")


def test_all_without_data_is_the_theorem(tmp_path, ran, capsys):
    assert main(["all", "--images", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert [command[0] for command in ran] == ["theorem"]
    output = capsys.readouterr().out
    assert "(--images)" in output
    assert "(--data)" in output


def test_all_runs_each_command_in_a_process_and_names_those_that_failed(tmp_path, capfd):
    folder = tmp_path / "nothing"
    folder.mkdir()
    arguments = ["--images", str(folder), "--data", str(folder), "--short", "--jobs", "2"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    captured = capfd.readouterr()
    assert captured.out.count("+ ") == 3  # the others still run
    assert "exit code 1: small --short --released" in captured.err
    assert "nothing/lenet300-100/w_layer1.npy" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--jobs", "0"], "jobs: 0"), (["--text", "t"], "encoder, text")]
)
def test_all_refuses_wrong_arguments(arguments, message, tmp_path, ran, capsys):
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not ran


def test_a_seed_gives_the_same_network(images):
    a, b = (networks.trained("lenet300", images, "bars", 3, None, 1) for _ in range(2))
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(x, y)


def test_images_of_a_case_do_not_overlap(images, test_images, released):
    (only,) = networks.released(released, images).splits
    seen = data.idx_images(images, "train")
    assert (len(only.validation), len(only.training), len(only.test)) == (30, 270, 200)
    assert torch.equal(torch.cat([only.validation.x, only.training.x]), seen.x)
    assert torch.equal(only.calibration.x, only.training.x)  # there are fewer than 5,000 of them
    both = networks.released(released, test_images).splits
    assert len(both) == 2
    for split in both:
        assert len(split.training) + len(split.validation) == len(split.calibration) == 100
        assert torch.equal(torch.cat([split.training.x, split.validation.x]), split.calibration.x)
    assert torch.equal(both[0].test.x, both[1].calibration.x)
    assert torch.equal(both[1].test.x, both[0].calibration.x)


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x03\0\0\0\x01", b"\0\0\x0d\x01\0\0\0\0"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ArgumentError, match="train-images-idx3-ubyte: not an IDX file"):
        data.idx_images(tmp_path, "train")


@pytest.mark.parametrize("way", WAYS)
def test_every_way_keeps_the_requested_share(images, way):
    case = networks.trained("lenet300", images, "bars", 0, None, 1)
    kept = case.shape.once
    pruned = prune_by(way, case.model, kept, case.splits[0].calibration, 0)
    total = sum(share * pruned.masks[name].numel() for name, share in kept.items())
    count = sum(int(mask.sum()) for mask in pruned.masks.values())
    # Counts per row, and biases that count as weights, make the total slightly larger or smaller.
    slack = 60 if way in ("Wanda", "L-OBS as printed") else 3
    assert abs(count - total) <= slack
    for name, mask in pruned.masks.items():
        assert not (pruned.model.get_submodule(name).weight[~mask] != 0).any()


def test_random_and_obd_remove_zeros_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight[:, :4] = 0
    x = torch.rand(20, 8)
    for masks in (random_masks(model, {"0": 0.5}, 0), obd_masks(model, x, {"0": 0.5}, 0)):
        assert masks["0"][:, 4:].all()
        assert not masks["0"][:, :4].any()


def test_obd_agrees_with_gradients_taken_one_by_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.rand(7, 5)
    generator = torch.Generator().manual_seed(9)
    labels = torch.multinomial(model(x).softmax(1), 1, generator=generator)[:, 0]
    h = torch.zeros_like(model[0].weight)
    for sample, label in zip(x, labels, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(sample[None]), label[None]).backward()
        h += model[0].weight.grad ** 2
    scores = (h * model[0].weight.detach() ** 2).flatten()
    expected = torch.zeros(20, dtype=torch.bool)
    expected[scores.topk(8).indices] = True
    assert torch.equal(obd_masks(model, x, {"0": 0.4}, 9)["0"].flatten(), expected)


def learned(target, limit, every=5):
    """A linear network on two clouds, one weight removed."""
    torch.manual_seed(0)
    y = torch.arange(400) % 2
    x = torch.randn(400, 3) + 3 * y[:, None]
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([1.0, 0.0]))
    masks = {"0": torch.tensor([[True, True, False], [True, True, True]])}
    wrapped = nn.Sequential(model)
    images = Images(x, y)
    done = retrain(
        wrapped, masks, images.part(0, 300), images.part(300), target=target, limit=limit,
        every=every, rate=0.05,
    )  # fmt: skip
    return wrapped, done


def test_retraining_stops_at_the_target_and_keeps_zeros():
    model, done = learned(target=5.0, limit=500)
    assert done.reached
    assert 0 < done.iterations < 500
    assert done.curve[0] == (0, 50.0)
    assert all(error > 5 for _, error in done.curve[:-1])
    assert done.curve[-1][1] <= 5
    assert model[0].weight[0, 2] == 0


def test_retraining_that_misses_the_target_keeps_its_best_weights():
    model, done = learned(target=-1.0, limit=12)
    assert not done.reached
    assert done.iterations == 12
    assert [count for count, _ in done.curve] == [0, 5, 10, 12]
    torch.manual_seed(0)
    y = torch.arange(400) % 2
    x = torch.randn(400, 3) + 3 * y[:, None]
    error = networks.percent_wrong(model, Images(x, y).part(300))
    assert error == min(e for _, e in done.curve)


@pytest.mark.parametrize("temperature", [1.0, 8.0])
@pytest.mark.parametrize("right", [True, False])
def test_a_teacher_is_followed_where_it_is_right(temperature, right):
    torch.manual_seed(0)
    x = torch.randn(300, 6)
    teacher, student = nn.Linear(6, 4), nn.Sequential(nn.Linear(6, 4))
    y = teacher(x).argmax(1)
    labels = Images(x, y if right else 3 - y)  # never both
    masks = {"0": torch.ones(4, 6, dtype=torch.bool)}
    retrain(
        student, masks, labels, labels, target=-1.0, limit=600, rate=0.05, at_once=50,
        teacher=teacher, temperature=temperature,
    )  # fmt: skip
    assert networks.percent_wrong(student, labels) < 2
    with torch.no_grad():
        distance = (student(x).softmax(1) - teacher(x).softmax(1)).abs().max()
    assert (distance < 0.05) == right  # as unsure as the teacher, which labels do not teach


def test_retraining_does_not_start_where_the_target_is_met():
    _, done = learned(target=50.0, limit=100)
    assert done.reached
    assert done.iterations == 0


def test_a_curve_that_never_rises_bends_at_its_smallest_share():
    points = [(0.5, 1.0), (0.1, 1.0), (0.02, 1.0)]
    assert curves.inflection(points, 1.0) == pytest.approx(0.02)
    assert curves.inflection([(k, 0.0) for k, _ in points], 0.0) == pytest.approx(0.02)


@pytest.mark.parametrize("bend", [0.04, 0.11, 0.3])
def test_the_inflection_point_of_a_hinge_is_its_bend(bend):
    shares = [0.9, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.07, 0.05, 0.035, 0.025, 0.015, 0.01]
    points = [(k, min(90.0, 2.0 * max(1.0, (bend / k) ** 1.5))) for k in shares]
    assert curves.inflection(points, 2.0) == pytest.approx(bend, rel=0.02)


def test_sensitivities_are_the_cost_of_one_removal(images):
    case = networks.trained("lenet300", images, "bars", 0, None, 1)
    L = curves.sensitivities(case, "fc3")
    module = case.model.get_submodule("fc3")
    H = curves.second_moment(case, "fc3")
    mask = torch.ones_like(module.weight, dtype=torch.bool)
    mask[2, 7] = False
    damping = 1e-6 / float(H.diagonal().mean())
    out = lobs.prune_weight(
        module.weight.double(), H, mask=mask, bias=module.bias.double(), damping=damping
    )
    assert out.error == pytest.approx(2 * float(L[2, 7]), rel=1e-3)


def test_budgets_are_kept_and_used(images):
    case = networks.trained("lenet300", images, "bars", 0, None, 3)
    batches = case.splits[0].calibration.batches()
    _, report = prune_layers_to(case.model, batches, 0.01, ["fc1", "fc2", "fc3"])
    for layer in report.layers:
        assert 0.005 < layer.relative_error <= 0.01
    tried = {}
    for measure in ("measured", "spectral"):
        found = prune_network_to(case.model, batches, 0.2, measure, 6, tried)
        assert found.value <= 0.2
        assert found.report.sparsity > 0.05
    assert found.report.error_bound.measured <= found.report.error_bound.spectral
    assert 6 < len(tried) < 12  # the first halvings are shared


def test_an_unreachable_limit_is_an_error(images):
    case = networks.trained("lenet300", images, "bars", 0, None, 1)
    with pytest.raises(ArgumentError, match=r"limit: 1e-12; not even 0\.125"):
        prune_network_to(case.model, case.splits[0].calibration.batches(), 1e-12, "measured", 3)


def test_a_bound_is_refused_where_the_theorem_does_not_hold(images):
    case = networks.trained("cifarnet", images, "bars", 0, None, 1)
    with pytest.raises(ArgumentError, match="measure: 'spectral' is not known of this network"):
        prune_network_to(case.model, case.splits[0].calibration.batches(), 0.5, "spectral")


def test_plots_put_points_where_they_belong():
    svg = figures.line_plot(
        "a < b", figures.Axis("x", log=True), figures.Axis("y"),
        [figures.Line("one", [(1.0, 0.0), (10.0, 5.0), (100.0, 10.0)])],
    )  # fmt: skip
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"] == "a < b"
    circles = [c for c in root if c.tag.endswith("circle")][:3]
    xs = [float(c.attrib["cx"]) for c in circles]
    ys = [float(c.attrib["cy"]) for c in circles]
    assert math.isclose(xs[1] - xs[0], xs[2] - xs[1], abs_tol=0.15)
    assert xs[2] > xs[0] > 60
    assert ys[0] > ys[1] > ys[2]
