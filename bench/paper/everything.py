"""All experiments but the large networks: small, theorem and defaults, each in a process.

The folder --out receives the pages of small, in one folder for MNIST and one for the other images,
paper-theorem.md and paper-defaults.md. Parts that need data which is not named are left out. A
second call keeps the rows of small that are there.

All of it takes nearly four hours of one core (about two with --jobs 2 --threads 1 on two cores),
and --short half an hour of one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lobs_native.errors import ArgumentError
from paper.data import FASHION, has_idx
from paper.defaults import experiment as defaults
from paper.small import experiment as small
from paper.theorem import experiment as bound_experiment

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "all"
HELP = "the following ones but large, into one folder"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this experiment, besides the common ones."""
    add = command.add_argument
    text = "folder with mnist/ (t10k-*, and train-* if you have them) and lenet300-100/"
    add("--data", type=Path, metavar="DIR", help=text)
    text = "folder with other images to train on, train-* and t10k-* (default: %(default)s)"
    add("--images", type=Path, default=FASHION, metavar="DIR", help=text)
    text = "what to call them (default: %(default)s)"
    add("--images-name", default="Fashion-MNIST", metavar="NAME", help=text)
    add("--encoder", type=Path, metavar="DIR", help="folder of a BERT-like encoder, with --text")
    add("--text", type=Path, metavar="FILE", help="running text to calibrate and measure on")
    text = "experiments at a time (default: %(default)s); best one for each core, with --threads 1"
    add("--jobs", type=int, default=1, metavar="N", help=text)


def run(options: argparse.Namespace) -> int:
    """Carry out all of them and return the exit code: 1 if any of theirs is not 0."""
    if options.jobs < 1:
        raise ArgumentError(f"jobs: {options.jobs}; at least 1 is needed")
    if bool(options.encoder) != bool(options.text):
        raise ArgumentError("encoder, text: they go together")
    parts = list(_parts(options))
    with ThreadPoolExecutor(options.jobs) as pool:
        codes = list(pool.map(_run, parts))
    for part, code in zip(parts, codes, strict=True):
        if code:
            print(f"exit code {code}: {' '.join(part)}", file=sys.stderr)
    return int(any(codes))


def _run(part: list[str]) -> int:
    print(f"+ {' '.join(part)}\n", end="", flush=True)  # one write: there are several threads
    return subprocess.run([sys.executable, str(Path(__file__).parent), *part]).returncode


def _parts(options: argparse.Namespace) -> Iterator[list[str]]:
    """The arguments of each part, the longest first."""
    common = {"short": options.short, "threads": options.threads}
    trains = common | {"seeds": options.seeds, "cache": options.cache}
    out, data = options.out, options.data
    if has_idx(options.images, "train"):
        name = options.images_name
        arguments = {"images": options.images, "images-name": name, "out": out / name.lower()}
        yield [small.NAME, *_arguments(trains | arguments)]
    else:
        print(f"left out: networks trained here: no training images in {options.images} (--images)")
    if data is not None:
        arguments = {
            "released": data / "lenet300-100",
            "mnist": data / "mnist",
            "out": out / "mnist",
        }
        arguments |= {"images": data / "mnist", "images-name": "MNIST", "network": "lenet5"}
        if options.cache:
            arguments["cache"] = f"{options.cache}-mnist"
        yield [small.NAME, *_arguments(trains | arguments)]
    else:
        print("left out: the authors' LeNet-300-100 and MNIST (--data)")
    if data is not None or options.encoder is not None:
        arguments = {"data": data, "encoder": options.encoder, "text": options.text, "out": out}
        yield [defaults.NAME, *_arguments(common | arguments)]
    yield [bound_experiment.NAME, *_arguments(common | {"data": data, "out": out})]


def _arguments(options: dict[str, object]) -> Iterator[str]:
    for name, value in options.items():
        if value is True:
            yield f"--{name}"
        elif value:
            yield from (f"--{name}", str(value))
