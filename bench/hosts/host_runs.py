"""The command line that the scripts for the single hosts share."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from speed import paired
from speed.case import Case

Cases = Callable[[Path, bool], Iterator[Case]]


def run(description: str, groups: Mapping[str, Cases], *, pairs: int, quick_pairs: int) -> None:
    """Parse the arguments, print the table as it grows, and write the JSON."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the hosts' clones are")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    default = f"default {pairs}, or {quick_pairs} with --quick"
    parser.add_argument("--pairs", type=int, help=default)
    parser.add_argument("--threads", type=int, help="for both sides; default torch's")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    if len(groups) > 1:
        parser.add_argument("--only", choices=groups, help="one group of cases")
    parser.set_defaults(only=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    pairs = arguments.pairs or (quick_pairs if arguments.quick else pairs)
    about = paired.machine()
    load = about["load_at_start"][0]
    print(f"{about['cpu']}; torch {about['torch']}; {pairs} pairs; load {load:.1f}\n")
    rows = paired.print_table(
        (
            case
            for name in ([arguments.only] if arguments.only else groups)
            for case in groups[name](arguments.folder, arguments.quick)
        ),
        pairs,
    )
    if arguments.json:
        about["load_at_end"] = os.getloadavg()
        result = {"machine": about, "quick": arguments.quick, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
