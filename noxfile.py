"""Short commands for people who work on the code: ``nox -l`` lists them.

Each session has an environment of its own, which is kept. ``nox --no-venv -s fast`` uses the
current one as it is.
"""

from __future__ import annotations

import os

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "fast"]

LINTERS = ("ruff==0.17.6", "mypy==2.4.1", "clang-format==23.1.5", "codespell==2.4.3")
FAST = (  # 75 s of one core together: the other files run long, or compile
    *("tests/files", "tests/report", "tests/cli/test_cli.py", "tests/cli/test_job.py"),
    *("tests/cli/test_doctor.py", "tests/layers/test_layers.py"),
    *("tests/solvers/test_patterns.py", "tests/solvers/test_weight.py"),
    *("tests/network/test_pruner.py", "tests/network/test_masks.py"),
    *("tests/ops/test_saliency.py", "tests/ops/test_ranking.py", "tests/ops/test_library.py"),
    *("tests/ops/test_inverse.py", "tests/rundir/test_rundir.py", "tests/test_architecture.py"),
    *("tests/test_checks.py", "tests/test_readme.py", "tests/test_docs.py"),
)


def install(session: nox.Session, *what: str) -> None:
    """Install, unless the session runs in an environment that is taken as it is."""
    if session.virtualenv.is_sandboxed:
        session.install(*what)


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting, types, spelling."""
    install(session, "-e.[test]", *LINTERS)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    native = "ls-files", "-co", "--exclude-standard", "--", "*.h", "*.cpp", "*.cu", "*.cuh"
    files = session.run("git", *native, external=True, silent=True).split()
    session.run("clang-format", "--dry-run", "--Werror", *files)
    session.run("codespell")


@nox.session
def fast(session: nox.Session) -> None:
    """Tests that take under two minutes together."""
    install(session, "-e.[test]")
    session.run("pytest", "-q", "-k", "not emulated", *FAST, *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests."""
    install(session, "-e.[test]")
    session.run("pytest", "-q", "-n", "auto", "tests", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, with warnings as errors, in build/docs."""
    install(session, "-e.[docs]")
    session.run("sphinx-build", "-W", "--keep-going", "-n", "-q", "docs", "build/docs")
    session.log(f"open {os.path.join('build', 'docs', 'index.html')}")


@nox.session
def examples(session: nox.Session) -> None:
    """The scripts in examples/."""
    install(session, "-e.[test]")
    session.run("pytest", "-q", "tests/test_examples.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Speed against rivals; ``nox -s bench -- --quick`` for toy sizes."""
    install(session, "-e.[test]")
    session.run("python", "bench/speed/paired.py", *session.posargs)
