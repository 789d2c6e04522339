"""The process of a run: waits for the run's lock and performs the run. Imports PyTorch when it has the lock."""

from __future__ import annotations

import sys
from functools import partial

from filelock import FileLock

from experiments.config import ExperimentConfig
from utils.config import Parser
from utils.errors import run_command


def main() -> None:
    """Performs the run on the standard input while the file that the first argument names is locked."""
    run_command(_locked, partial(Parser, ExperimentConfig, __doc__))


def _locked(_argv: object) -> None:
    with FileLock(sys.argv[1], mode=0o666):
        _perform(sys.stdin.buffer.read().decode())


def _perform(run: str) -> None:
    from experiments.runs import from_json, perform

    perform(from_json(run))
