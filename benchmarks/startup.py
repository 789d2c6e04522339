"""Measures the start of the commands: CPU seconds of `--help`, of importing a command, and of importing its work.

python -m benchmarks.startup    prints a table; --output FILE also writes JSON
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.config import script_parser
from utils.errors import UserError, run_command
from utils.files import PROJECT_ROOT, require_writable, write_json
from utils.text import read_text

COMMANDS = ("train", "test", "predict", "export", "make_support", "check_data", "reproduce")
WORK = ("training.run", "evaluation.run", "inspection.run", "experiments.run")


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = script_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, of which the median counts")
    parser.add_argument("--tree", type=Path, default=PROJECT_ROOT, help="the working tree to measure")
    parser.add_argument("--output", type=Path, help="a JSON file of the times (default: none, they are printed)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures everything and prints a table."""
    args = get_args_parser().parse_args(argv)
    known = read_earlier(args.output) if args.output else {}
    calls = {f"{name}.py --help": [f"{name}.py", "--help"] for name in COMMANDS}
    calls |= {f"import {name}": ["-c", f"import {name}"] for name in ("torch", "test", *WORK)}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.repeats):  # in turn, so that other load affects all
        for name, call in calls.items():
            found[name].append(cpu_seconds([sys.executable, *call], args.tree))
    seconds = {name: statistics.median(values) for name, values in found.items()}
    for name, value in seconds.items():
        print(f"{name:24}{value:7.2f} s CPU")
    if args.output:
        write_json(args.output, known | {args.tree.resolve().name: seconds})


def read_earlier(output: Path) -> dict:
    """What the JSON file holds of other trees; {} where there is none. It can be written."""
    require_writable(output, "--output")
    try:
        known = json.loads(read_text(output)) if output.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {output} (--output): {error}") from error
    if not isinstance(known, dict):
        raise UserError(f"{output} (--output) is not a file of this benchmark")
    return known


def cpu_seconds(call: Sequence[str], folder: Path) -> float:
    """User and system seconds of a process that succeeds."""
    before = os.times()
    subprocess.run(call, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    run_command(main)
