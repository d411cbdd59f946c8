"""The documentation: its Python examples run, its numbers are those that were measured, and the
files, options and public names that it speaks of exist."""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pages import blocks, rows_of_table

import lobs_native
from lobs_native.cli.arguments import add_prune
from lobs_native.layers import LAYERS
from lobs_native.network.inference.export import export

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MADE = {"benchmarks.md", "paper"}  # by programs, from measurements
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md")),
    *(p for p in sorted(DOCS.rglob("*.md")) if p.relative_to(DOCS).parts[0] not in MADE),
]
WITH_EXAMPLES = [p for p in PAGES if p.is_relative_to(DOCS) and blocks(p.read_text(), "python")]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def registered() -> Iterator[None]:
    """Layer types that an example registers are forgotten afterwards."""
    before = list(LAYERS)
    yield
    LAYERS[:] = before


def run_page(path: str) -> dict[str, Any]:
    """Run all examples of a page in the current folder, one after another; what they define."""
    page, names = ROOT / path, {"torch": torch}
    for code in blocks(page.read_text(), "python"):
        exec(compile(code, page.name, "exec"), names)
    return names


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=name_of)
@pytest.mark.usefixtures("registered")
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(name_of(page))


def test_the_guide_has_examples():
    assert len([p for p in WITH_EXAMPLES if p.parent.name == "guide"]) >= 9


def test_the_example_of_one_layer_keeps_its_promises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page("docs/guide/one_layer.md")
    assert names["half"].error <= names["out"].error * 1.001
    assert int((names["two_of_four"].weight == 0).sum()) == 32 * 32
    fields = re.findall(r"`(\w+)`", (DOCS / "guide/one_layer.md").read_text().split("## ")[0])
    named = set(fields) - {"prune_weight", "True"}
    assert named <= set(lobs_native.PrunedWeight.__dataclass_fields__)


def test_the_training_example_keeps_the_zeros(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page("docs/guide/saving.md")
    removed = ~names["report"].masks["0"]
    assert int(removed.sum()) > 0
    assert not bool(names["model"][0].weight[removed].any())


def test_the_example_of_torch_prune_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer = run_page("docs/guide/pytorch.md")["model"][0]
    assert int((layer.weight_orig == 0).sum()) == int((layer.weight_mask == 0).sum()) == 1024


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_the_reader_of_compressed_rows_gives_the_weights_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page("docs/guide/faster.md")
    layer = torch.nn.Linear(40, 30)
    with torch.no_grad():
        layer.weight.masked_fill_(torch.rand(30, 40) < 0.9, 0)
    report = export(layer, torch.ones(1, 40), tmp_path, to="torch-csr")
    state = names["load_csr"](str(tmp_path / report.file))
    weight, x = state["weight"], torch.randn(5, 40)
    assert weight.layout == torch.sparse_csr
    assert torch.equal(weight.to_dense(), layer.weight)
    torch.testing.assert_close((weight @ x.T).T + state["bias"], layer(x).detach())


# ---- numbers -------------------------------------------------------------------------------------


def test_the_table_of_layer_errors_is_what_was_measured():
    summary = json.loads((ROOT / "bench/results/encoder.json").read_text())["summary"]
    rows = rows_of_table((DOCS / "results/quality.md").read_text(), "| | magnitude | Wanda | sweep")
    assert [row[0] for row in rows] == list(summary)
    for setting, *shown, ratio in rows:
        measured = summary[setting]["relative_error"]
        for method, text in zip(
            ("magnitude", "wanda", "sweep", "exact", "exchange"), shown, strict=True
        ):
            assert float(text) == pytest.approx(measured[method], rel=5e-3)
        found = summary[setting]["exact/sweep"]
        expected = [found["geometric_mean"], found["lowest"], found["highest"]]
        assert [float(x) for x in re.findall(r"[\d.]+", ratio)] == pytest.approx(expected, abs=5e-3)


def test_the_table_of_convolutional_networks_is_what_was_measured():
    measured = json.loads((ROOT / "bench/results/convnets.json").read_text())["rows"]
    rows = rows_of_table((DOCS / "results/quality.md").read_text(), "| | magnitude | lobs | sweep")
    means = {
        round(sum(row[kind]) / len(row[kind]), 2)
        for row in measured
        for kind in ("error", "reestimated")
        if row[kind]
    }
    for _, *shown in rows:
        for value in (float(x) for text in shown for x in text.split(", ")):
            assert any(math.isclose(value, mean, abs_tol=0.011) for mean in means), value


def test_the_table_of_tuned_convolutional_networks_is_what_was_measured():
    def cell(values: list[float]) -> str:
        each = f" ({', '.join(f'{x:.2f}' for x in values)})" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.2f}{each}"

    measured = json.loads((ROOT / "bench/results/convnets-two-calls.json").read_text())["rows"]
    found = {(cell(x["error"]), cell(x["differing"])): f"{x['sparsity']:.0%}" for x in measured}
    for label, error, differing, _ in rows_of_table(
        (DOCS / "results/quality.md").read_text(), "| ResNet, tuned |"
    ):
        assert found[error, differing] == label.split(",")[0]


@pytest.mark.parametrize(
    ("file", "head"),
    [
        ("speed-encoder-1-thread", "| network | runtime | dense |"),
        ("speed-encoder-2-threads", "| two threads | runtime | dense |"),
    ],
)
def test_the_table_of_four_networks_is_what_was_measured(file, head):
    found = json.loads((ROOT / f"bench/results/{file}.json").read_text())
    rows = rows_of_table((DOCS / "results/runtimes.md").read_text(), head)
    measured = [
        (
            name,
            e["engine"],
            1e3 * e["dense_seconds"],
            1e3 * e["pruned_seconds"],
            e["ratio"],
            e["interval"],
        )
        for name, report in found["networks"].items()
        for e in report["engines"]
    ]
    for (name, engine, *times, ratio, interval), row in zip(measured, rows, strict=True):
        stated, runtime, *cells = row
        assert name == stated
        assert engine.rpartition(".")[2][:4] in runtime.lower().replace(" ", "")
        numbers = [float(x) for x in re.findall(r"[\d.]+", " ".join(cells))]
        assert numbers[:2] == pytest.approx(times, abs=0.051)
        assert numbers[2:] == pytest.approx([ratio, *interval], abs=0.0051)


# ---- the format of a run directory ---------------------------------------------------------------


def documented_fields(heading: str) -> set[str]:
    page = (DOCS / "developers/run_directory_format.md").read_text()
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))


def unsealed(data: bytes) -> dict[str, Any]:
    """An object as the page says that it is to be read: its hash first."""
    stem, _, check = data.rpartition(b',"check":')
    assert check == b'"' + hashlib.sha256(stem).hexdigest().encode() + b'"}'
    return json.loads(data)


def test_a_run_directory_can_be_read_by_its_description_alone(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    run, data = tmp_path / "run", [torch.rand(50, 8)]
    lobs_native.prune(model, data, sparsity=0.5, scope="model", run_dir=run, progress=False)

    header = unsealed((run / "run.json").read_bytes().removesuffix(b"\n"))
    assert set(header) == documented_fields("run.json") - {"command"}
    assert header["format"] == 1
    before, kinds = header["check"], set()
    for seq, line in enumerate((run / "manifest.jsonl").read_bytes().splitlines()):
        record = unsealed(line)
        assert set(record) == documented_fields("manifest.jsonl")
        assert (record["seq"], record["prev"]) == (seq, before)
        name = hashlib.sha256(record["name"].encode()).hexdigest()[:12]
        assert record["file"] == f"layers/{seq:05d}-{name}.safetensors"
        file = (run / record["file"]).read_bytes()
        assert (len(file), hashlib.sha256(file).hexdigest()) == (record["bytes"], record["sha256"])
        before = record["check"]
        kinds.add((record["kind"], record["name"]))
    assert kinds == {
        ("budget", "sensitivity"),
        ("budget", "shares"),
        ("layer", "0"),
        ("layer", "2"),
    }


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_files_that_a_page_names_exist(page):
    text = page.read_text()
    named = re.findall(
        r"`((?:csrc|cuda|python|docs|bench|tests|examples|findings|\.github|\.ci)/[\w./-]*)`", text
    )
    named += re.findall(r"(?:python|pytest [\w -]*) ((?:bench|tests|examples)/[\w./]+)", text)
    for path in named:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_options_that_a_page_gives_to_a_command_exist(page):
    commands = argparse.ArgumentParser().add_subparsers()
    known = set(re.findall(r"--[\w-]+", add_prune(commands).format_help()))
    known |= {"--help", "--html", "--repair", "--json"}
    for command in re.findall(r"lobs-native (?:prune|inspect|report)\b[^`#\n]*", page.read_text()):
        assert set(re.findall(r"--[\w-]+", command)) <= known, command


def test_every_public_name_is_in_the_api():
    text = "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"(?:auto\w+|py:\w+)::\s+(?:[\w.]+\.)?(\w+)", text))
    assert set(lobs_native.__all__) <= documented


def test_every_argument_of_prune_that_the_guide_uses_exists():
    known = set(inspect.signature(lobs_native.prune).parameters)
    for page in WITH_EXAMPLES:
        for code in blocks(page.read_text(), "python"):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "lobs.prune":
                    assert {word.arg for word in node.keywords} <= known


def test_every_page_is_part_of_a_table_of_contents():
    listed = set()
    for page in [*DOCS.rglob("*.md")]:
        for toctree in re.findall(r"^```\{toctree\}\n(.*?)^```$", page.read_text(), re.M | re.S):
            for line in toctree.splitlines():
                if line and not line.startswith(":"):
                    listed.add((page.parent / f"{line}.md").resolve())
    assert {p.resolve() for p in DOCS.rglob("*.md")} - listed == {(DOCS / "index.md").resolve()}


def test_the_site_asks_for_nothing_from_the_network():
    text = (DOCS / "conf.py").read_text() + (DOCS / "_static/site.css").read_text()
    assert "intersphinx" not in text
    assert not re.search(r"https?://", text)
