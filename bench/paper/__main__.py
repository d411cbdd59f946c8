"""The command line: ``python bench/paper [COMMAND] [options]``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

# Threads that spin while they wait cost more than they gain on shared cores. torch reads this once.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if __name__ == "__main__":  # run as a folder: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from lobs_native.errors import LobsError
from paper import everything
from paper.defaults import experiment as defaults
from paper.large import experiment as large
from paper.small import experiment as small
from paper.theorem import experiment as bound_experiment

COMMANDS: tuple[ModuleType, ...] = (everything, small, bound_experiment, defaults, large)
DEFAULT = everything.NAME


def main(argv: Sequence[str] | None = None) -> int:
    """Run one experiment and return the exit code.

    0 for success, 1 if it could not be carried out, 2 for wrong usage. The default command is
    ``all``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, DEFAULT)
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        code: int = options.run(options)
    except (LobsError, OSError) as error:
        print(f"python bench/paper: {error}", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python bench/paper",
        description="The experiments of Dong, Chen & Pan (NIPS 2017), and what goes beyond them.",
        epilog=f"Without a COMMAND it is {DEFAULT}; COMMAND --help lists its options.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        command = commands.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_common(command)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    """Add the options of every experiment: where to write, how many networks, how long."""
    add = command.add_argument
    text = "folder for the page, the figures and the numbers (default: %(default)s)"
    add("--out", type=Path, default=Path("lobs-experiments"), metavar="DIR", help=text)
    text = "networks trained of each kind (default: what the experiment needs)"
    add("--seeds", type=_positive, metavar="N", help=text)
    add("--short", action="store_true", help="fewer seeds and settings, some minutes")
    add("--threads", type=_positive, metavar="N", help="default: torch's")
    text = "prefix of files that trained networks are kept in, and read from if they are there"
    add("--cache", metavar="PREFIX", help=text)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}; at least 1 is needed")
    return value


if __name__ == "__main__":
    sys.exit(main())
