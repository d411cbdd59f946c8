"""The command line that host_obc.py and host_fisher.py share."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import paired
import torch
from pairings import Case


def run(doc: str, cases: Callable[[Path, bool], Iterator[Case]], pairs: int) -> None:
    """The command line of a comparison: arguments, table, JSON."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of clones of the originals")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--pairs", type=int, default=pairs, help="default %(default)s")
    parser.add_argument("--threads", type=int, help="for both sides; default torch's")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    about = paired.machine()
    load = about["load_at_start"][0]
    print(f"{about['cpu']}; torch {about['torch']}; {arguments.pairs} pairs; load {load:.1f}\n")
    print("| " + " | ".join(paired.HEADINGS) + " |")
    print("|" + " --- |" * len(paired.HEADINGS))
    rows = []
    for case in cases(arguments.folder, arguments.quick):
        for row in paired.run_case(case, arguments.pairs):
            print(paired.table_row(row), flush=True)
            rows.append(row)
    if arguments.json:
        about["load_at_end"] = os.getloadavg()
        result = {"machine": about, "quick": arguments.quick, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
