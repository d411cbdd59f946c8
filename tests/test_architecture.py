"""Promises about the tree itself: who may include or import what, and that every operation has all
its parts."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import lobs_native

ROOT = Path(__file__).resolve().parents[1]
SHARED_HEADERS = {"types", "errors", "parallel", "patterns", "dispatch"}
STEMS = sorted(p.stem for p in (ROOT / "csrc").glob("*.h") if p.stem not in SHARED_HEADERS)

# Downwards only: a module may import what stands on a lower line.
LAYERS_OF_PYTHON = [
    {"__main__"},
    {"cli", "run"},
    {"demo", "doctor", "experiments", "job"},
    {"hf"},
    {"__init__"},
    {"compat"},
    {"pruner"},
    {"layerwise"},
    {"structure"},
    {"allocation", "replay", "run_plan"},
    {"batch_norm", "blocks", "calibration", "ledger", "sensitivity"},
    {"pairs"},
    {"partial"},
    {"bound", "masks", "running", "selection", "trace"},
    {"layers", "weight", "plan", "report"},
    {"html"},
    {"plots", "review", "runtimes"},
    {"greedy", "ranked", "sweep"},
    {"problem"},
    {"hessian", "inversion", "library", "patterns", "underway"},
    {"ops", "rundir"},
    {"upkeep"},
    {"state_store"},
    {"journal", "lock"},
    {"run_folder"},
    {"calls", "manifest"},
    {"safefile"},
    {"checks"},
    {"costs", "reference", "_core", "files", "page", "shelf"},
    {"errors", "fs"},
]


def native_files() -> list[Path]:
    return [
        p for folder in ("csrc", "cuda") for p in sorted((ROOT / folder).rglob("*")) if p.is_file()
    ]


def imports_at_run_time(path: Path) -> list[ast.Import | ast.ImportFrom]:
    """All imports of a file but those under ``if TYPE_CHECKING``."""
    found: list[ast.Import | ast.ImportFrom] = []
    rest: list[ast.AST] = [ast.parse(path.read_text())]
    while rest:
        node = rest.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        rest.extend(ast.iter_child_nodes(node))
    return found


def test_there_are_operations():
    assert STEMS == [
        "exact",
        "exchange",
        "hessian",
        "inverse",
        "ranking",
        "saliency",
        "solve",
        "static_order",
        "sweep",
    ]


def test_every_operation_has_kernel_test_bench_and_reference():
    reference = (ROOT / "python/lobs_native/reference.py").read_text()
    for stem in STEMS:
        for path in (f"csrc/cpu/{stem}.cpp", f"tests/test_{stem}.py", f"bench/bench_{stem}.py"):
            assert (ROOT / path).is_file(), path
        names = re.findall(r"using (\w+)Fn = ", (ROOT / f"csrc/{stem}.h").read_text())
        assert names, stem
        for name in names:
            function = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
            assert re.search(rf"def {function}_?\(", reference), function


def test_cuda_files_are_twins_of_contracts():
    for path in (ROOT / "cuda").glob("*.cu"):
        assert path.stem in {*STEMS, "backend"}, path


def test_only_the_bindings_know_python_and_nothing_native_knows_torch():
    for path in native_files():
        text = path.read_text()
        assert ("pybind11" in text) == (path.name == "bindings.cpp"), path
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", text), path
        if path.parent.name != "cuda":
            assert not re.search(r"#include\s*[<\"]cuda", text), path


def test_never_fast_math():
    for path in [ROOT / "CMakeLists.txt", *native_files()]:
        assert not re.search(r"-ffast-math|-Ofast|use_fast_math|funsafe", path.read_text()), path


def test_python_imports_point_downward():
    rank = {name: i for i, names in enumerate(LAYERS_OF_PYTHON) for name in names}
    package = ROOT / "python/lobs_native"
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        own = parts[0]
        for node in imports_at_run_time(path):
            modules = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            for module in modules:
                if not module.startswith("lobs_native"):
                    continue
                names = module.split(".")[1:] or [a.name for a in node.names]
                for name in names[:1] if module != "lobs_native" else names:
                    if name in rank and name != own:
                        assert rank[name] > rank[own], f"{own} imports {name}"


def test_every_module_has_its_line():
    package = ROOT / "python/lobs_native"
    modules = {p.stem for p in package.glob("*.py")}
    modules |= {"compat", "experiments", "layers", "_core"}
    assert set().union(*LAYERS_OF_PYTHON) == modules


def test_only_ops_imports_the_native_module():
    for path in (ROOT / "python/lobs_native").rglob("*.py"):
        imports = re.search(r"import _core|from lobs_native\._core", path.read_text())
        assert bool(imports) == (path.name == "ops.py"), path


def test_no_pickle_and_nothing_evaluated():
    for path in (ROOT / "python").rglob("*.py"):
        found = re.search(
            r"\bpickle\b|torch\.load|(?<!\.)\beval\(|\bexec\(|yaml\.load|shelve|allow_pickle",
            path.read_text(),
        )
        assert not found, (path, found)


def test_the_version_has_one_place():
    assert lobs_native.ops._core.__version__ == lobs_native.__version__
    for path in ("pyproject.toml", "CMakeLists.txt"):
        assert lobs_native.__version__ not in (ROOT / path).read_text().replace("0.0.0", ""), path


def test_the_stub_matches_the_native_module():
    stub = ast.parse((ROOT / "python/lobs_native/_core.pyi").read_text())
    functions = {
        n.name: [a.arg for a in n.args.args] for n in stub.body if isinstance(n, ast.FunctionDef)
    }
    core = lobs_native.ops._core
    native = {n for n in dir(core) if callable(getattr(core, n)) and not n.startswith("_")}
    assert set(functions) == native
    for name, arguments in functions.items():
        signature = (getattr(core, name).__doc__ or "").splitlines()[0]
        assert re.findall(r"(\w+): ", signature.split(" -> ")[0]) == arguments, signature


def test_every_public_name_exists_and_is_documented():
    for name in lobs_native.__all__:
        assert (getattr(lobs_native, name).__doc__ or "").strip(), name


def test_no_absolute_paths_or_hosts_in_the_tree():
    here = re.compile(r"(?<![\w.])/(work|root|home|tmp)/\w")
    for folder in ("python", "csrc", "cuda", "tests", "bench", "docs"):
        for path in (ROOT / folder).rglob("*"):
            if (
                path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh", ".md"}
                and path.name != Path(__file__).name
            ):
                assert not here.search(path.read_text()), path
