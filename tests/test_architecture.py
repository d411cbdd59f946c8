"""Promises about the tree itself: who may include or import what, and that every operation has all
its parts."""

from __future__ import annotations

import ast
import dataclasses
import enum
import re
from pathlib import Path

import lobs_native
from lobs_native.network.settings import NetworkSettings

ROOT = Path(__file__).resolve().parents[1]
SHARED_HEADERS = {"types", "errors", "parallel", "dispatch", "exact_policy"}
STEMS = sorted(p.stem for p in (ROOT / "csrc").glob("*.h") if p.stem not in SHARED_HEADERS)

# From the ground up. A wing may import its own files and wings that stand on an earlier line, and
# a new file needs no entry.
WINGS = [
    {"errors", "version"},
    {"checks"},
    {"layers"},
    {"ops", "files"},
    {"solvers"},
    {"report"},
    {"rundir"},
    {"calibration"},
    {"network"},
    {"huggingface", "compat"},
    {"__init__"},
    {"cli", "run"},
    {"__main__"},
]
PACKAGE = ROOT / "python/lobs_native"

# Files of more than 400 lines, and why each is not divided.
LONG_FILES = {
    "csrc/bindings.cpp": "one module: each operation's way from Python",
    "csrc/cpu/admm.cpp": "one class; its passes share keys and cuts",
    "csrc/cpu/column_layer.h": "one class that keeps a layer's state through every removal",
    "csrc/cpu/exact.cpp": "one class that keeps a row's state through every step of the removal",
    "csrc/cpu/exchange.cpp": "one search; its passes share the packed inverse",
    "csrc/cpu/sweep.cpp": "one kernel in two forms, with and without groups, that share its tiles",
    "cuda/columns.cu": "one removal; its kernels share the state of all layers",
    "cuda/exact.cu": "one kernel; its steps share a block's shared memory",
    "cuda/hessian.cu": "one product for four types and two kinds of tensor-core instructions",
    "python/lobs_native/ops/reference.py": "the slow twins of all operations",
    "tests/bench/test_paper.py": "one run on tiny data that most of its tests look at",
    "tests/bench/test_paper_large.py": "one run on tiny networks that most of its tests look at",
    "tests/compat/test_llmcompressor.py": "one host, one model",
    "tests/compat/test_obc.py": "one host, one class",
    "tests/compat/test_sparsegpt.py": "one host, one class",
    "tests/compat/test_torch_prune.py": "one host",
    "tests/emulator/emulator.h": "one header that stands for the CUDA runtime",
    "tests/huggingface/test_checkpoint.py": "one table of all that can be wrong with a folder",
    "tests/layers/test_layer_types.py": "one list of layer types and what each must do",
    "tests/native/test_kernels.cpp": "one program for all operations, run under the sanitizers",
    "tests/network/test_bad_input.py": "one table of wrong arguments of every public function",
    "tests/network/test_pruner.py": "one function, each of its arguments on small networks",
    "tests/ops/test_device.py": "every operation on one pretend device",
    "tests/ops/test_exact.py": "one contract",
    "tests/ops/test_hessian.py": "one contract",
    "tests/rundir/test_crash.py": "one program that is killed, and what must be left",
    "tests/rundir/test_hostile_files.py": "one table of damaged files",
    "tests/rundir/test_ledger.py": "one run that ends in every way",
    "tests/rundir/test_rundir.py": "one contract",
}


def native_files() -> list[Path]:
    return [
        p for folder in ("csrc", "cuda") for p in sorted((ROOT / folder).rglob("*")) if p.is_file()
    ]


def test_there_are_operations():
    assert STEMS == [
        "admm",
        "columns",
        "conjugate",
        "exact",
        "exchange",
        "hessian",
        "inverse",
        "ranking",
        "saliency",
        "sliced",
        "solve",
        "static_order",
        "sweep",
    ]


def test_every_operation_has_kernel_test_bench_and_reference():
    reference = (ROOT / "python/lobs_native/ops/reference.py").read_text()
    for stem in STEMS:
        for path in (
            f"csrc/cpu/{stem}.cpp",
            f"python/lobs_native/ops/{stem}.py",
            f"tests/ops/test_{stem}.py",
            f"bench/speed/bench_{stem}.py",
            f"bench/speed/cases/{stem}.py",
        ):
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


# x * x / y in C++, whatever x is: a name with members, subscripts and empty calls.
SQUARE_OVER = re.compile(
    r"(?<![\w.\])>])(\w(?:[\w.]|->|::|\[[^\]\n]*\]|\(\))*)\s*\*\s*\1\s*\)?\s*/(?![/*])"
)


def squares_over(tree: ast.AST) -> list[str]:
    """The same in Python: ``x * x / y``, ``x**2 / y`` and ``x.square() / y``.

    ``x**2 / y**2`` is SparseGPT's score, another formula."""

    def is_square(node: ast.expr) -> bool:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return ast.dump(node.left) == ast.dump(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            return isinstance(node.right, ast.Constant) and node.right.value == 2
        called = node.func if isinstance(node, ast.Call) else None
        return isinstance(called, ast.Attribute) and called.attr in ("square", "square_")

    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Div)
        and is_square(node.left)
        and not is_square(node.right)
    ]


def test_the_saliency_formula_is_written_once_in_each_language():
    for text in ("w * w / d", "= w_[q] * w_[q] / diag_[q];", "s().w[i] * s().w[i] / 2", "(x*x)/y"):
        assert SQUARE_OVER.search(text), text
    for text in ("a * b / c", "a.w * w / d", "w * w  // d", "w * w2 / d", "w * w + d / 2"):
        assert not SQUARE_OVER.search(text), text
    found = {p: SQUARE_OVER.findall(p.read_text()) for p in native_files()}
    assert {p.name: x for p, x in found.items() if x} == {"saliency.h": ["w"]}

    sample = "w * w / d + w[q] ** 2 / A[q, q] + w.square_() / d"
    assert len(squares_over(ast.parse(sample))) == 3
    assert not squares_over(ast.parse("w * v / d + w**3 / d + w**2 / d**2 + w.square() * d"))
    trees = {p: ast.parse(p.read_text()) for p in PACKAGE.rglob("*.py")}
    formulas = {p.name: squares_over(tree) for p, tree in trees.items() if squares_over(tree)}
    assert formulas == {"reference.py": ["W * W / diag"]}


def module_of(path: Path) -> str:
    """Dotted, without ``__init__``: ``lobs_native.ops.exact``."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """The modules of this package that a file imports, dotted, down to the file. Imports inside
    functions and under ``if TYPE_CHECKING`` count as well."""
    known = {module_of(p) for p in PACKAGE.rglob("*.py")} | {"lobs_native._core"}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        for alias in node.names:
            whole = f"{module}.{alias.name}"
            found.add(whole if whole in known else module)
    return {name for name in found if name in known} - {"lobs_native._core"}


def wing_of(module: str) -> str:
    """The first part of its name below the package."""
    return [*module.split("."), "__init__"][1]


def test_there_are_few_wings_and_every_file_is_in_one():
    wings = {wing for line in WINGS for wing in line} - {"__init__", "__main__"}
    assert len(wings) <= 15
    there = {p.stem for p in PACKAGE.glob("*.py")}
    there |= {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    assert there == wings | {"__init__", "__main__"}
    for folder in {p.parent for p in PACKAGE.rglob("*.py")}:
        assert (folder / "__init__.py").is_file(), folder


def test_imports_only_go_down():
    rank = {wing: i for i, line in enumerate(WINGS) for wing in line}
    for path in PACKAGE.rglob("*.py"):
        own = wing_of(module_of(path))
        for module in imports_of(path):
            wing = wing_of(module)
            assert wing == own or rank[wing] < rank[own], f"{path} imports {module}"


def test_no_files_import_each_other_in_a_circle():
    arrows = {module_of(path): imports_of(path) for path in PACKAGE.rglob("*.py")}
    while leaves := {name for name, to in arrows.items() if not to}:
        arrows = {name: to - leaves for name, to in arrows.items() if name not in leaves}
    assert not arrows


def test_the_package_imports_nothing_of_the_benches_and_experiments():
    for path in PACKAGE.rglob("*.py"):
        found = re.search(
            r"^\s*(from|import) (hosts|paper|quality|speed|stress)\b", path.read_text(), re.M
        )
        assert not found, path


def test_files_are_short_or_say_why_not():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in ("python", "csrc", "cuda", "tests", "bench", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}
    }
    assert {name for name, lines in lengths.items() if lines > 400} == set(LONG_FILES)


def test_arguments_travel_as_settings():
    """Only ``prune`` spells out the arguments of a network; everything below it takes settings."""
    known = {field.name for field in dataclasses.fields(NetworkSettings)}
    spelled_out = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                names = {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
                if len(names & known) > len(known) / 2:
                    spelled_out.append(node.name)
            assert not (isinstance(node, ast.Name) and node.id == "locals"), path
    assert spelled_out == ["prune"]


def test_only_ops_imports_the_native_module():
    for path in (ROOT / "python/lobs_native").rglob("*.py"):
        imports = re.search(r"from lobs_native import _core|lobs_native\._core\b", path.read_text())
        assert bool(imports) == (path == PACKAGE / "ops/native.py"), path


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
    classes = {n.name: n for n in stub.body if isinstance(n, ast.ClassDef)}
    core = lobs_native.ops._core
    native = {n for n in dir(core) if callable(getattr(core, n)) and not n.startswith("_")}
    assert {*functions, *classes} == native
    for name, stated in classes.items():
        cls = getattr(core, name)
        if issubclass(cls, enum.IntEnum):
            values = {ast.unparse(n) for n in stated.body}
            assert values == {f"{member.name} = {member.value}" for member in cls}, name
        else:
            methods = {n.name: n for n in stated.body if isinstance(n, ast.FunctionDef)}
            fields = [a.arg for a in methods.pop("__init__").args.kwonlyargs]
            assert re.findall(r"(\w+): ", cls.__init__.__doc__) == ["self", *fields]
            assert {n for n in vars(cls) if not n.startswith("_")} == set(methods) == set(fields)
    for name, arguments in functions.items():
        signature = (getattr(core, name).__doc__ or "").splitlines()[0]
        assert re.findall(r"(\w+): ", signature.split(" -> ")[0]) == arguments, signature


def test_every_public_name_exists_and_is_documented():
    for name in lobs_native.__all__:
        assert (getattr(lobs_native, name).__doc__ or "").strip(), name


def test_no_absolute_paths_or_hosts_in_the_tree():
    here = re.compile(r"(?<![\w.])/(work|root|home|tmp)/\w|\bpypi\.org|\bnpmjs\.|\bdebian\.org")
    suffixes = {".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".sh", ".toml", ".yml", ".yaml", ".txt"}
    suffixes |= {".json"}
    folders = ("python", "csrc", "cuda", "tests", "bench", "docs", "examples", "findings")
    paths = [path for folder in (*folders, ".github") for path in (ROOT / folder).rglob("*")]
    for path in (*paths, *ROOT.glob("*.*")):
        if path.is_file() and path.suffix in suffixes and path.name != Path(__file__).name:
            assert not here.search(path.read_text()), path
