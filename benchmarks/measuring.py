"""What benchmarks on real categories share: flags, and the way from measuring to a JSON file and printed tables."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from benchmarks.reference import DATA
from benchmarks.scoring import RESULTS, command_line
from utils.config import script_parser
from utils.files import require_writable, write_json
from utils.records import provenance

CATEGORIES = [
    *("screw", "magnetic_tile", "solar_mono", "solar_poly", "bottle", "transistor", "grid", "pill", "toothbrush"),
]
Item = TypeVar("Item")


def measuring_parser(description: str) -> argparse.ArgumentParser:
    """A command line with the flags that all of these benchmarks have."""
    parser = script_parser(description)
    parser.add_argument("--obj", nargs="+", default=CATEGORIES, help="categories")
    parser.add_argument("--data_path", type=Path, default=DATA, help="folder of the categories")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--report", action="store_true", help="print the tables of the JSON file without measuring")
    return parser


def report_or_measure(
    module: str,
    args: argparse.Namespace,
    target: Path,
    device: torch.device,
    measure: Callable[[], dict],
    report: Callable[[dict], str],
) -> None:
    """Prints the tables of `target`, with --report of the file as it is, else of what `measure` returns and is written.

    module: of the benchmark, for the command in the file. report: makes the tables from the content of the file.
    """
    if args.report:
        print(report(json.loads(target.read_text())))
        return
    require_writable(args.output, "--output", folder=True)
    begin, command = time.perf_counter(), command_line(module, args)
    content = {"command": command, **provenance(device), **measure()}
    content["total_seconds"] = time.perf_counter() - begin
    write_json(target, content)
    print(report(content))
    print(f"{content['total_seconds']:.0f} s; written: {target}")


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` items, spread evenly from the first to the last."""
    return [items[number] for number in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]
