"""Runs that are played: they need no data, take no time, and import no PyTorch in their process."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path


def work(record: Path, how: str) -> None:
    """Does `how`, and writes the record <name>.json where there is none; <name>.runs has a line for each start."""
    if record.exists():
        return
    starts = record.with_suffix(".runs")
    with open(starts, "a") as runs:
        runs.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {os.environ.get('OMP_NUM_THREADS')}\n")
    print("working on", record.stem, flush=True)
    end = time.monotonic() + 20  # so that a failed test ends
    if how == "fails":
        sys.exit("error: no such luck")
    if how == "is killed once" and len(starts.read_text().splitlines()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "takes a moment":
        time.sleep(0.2)
    while how == "waits" and not (record.parent / "go").exists() and time.monotonic() < end:
        time.sleep(0.02)
    record.write_text(record.stem)


def play() -> None:
    """Lets the runs of this process be played; a run is finished when its records exist."""
    from experiments import runs  # slow: imports torch

    runs.PROCESS = "import sys; sys.path[:] = {path}; from tests.experiments.played import main; main()"
    runs._outdated = lambda scoring, digests: [record for record in scoring.records if not record.is_file()]


def main() -> None:
    """The process of a run that is played."""
    from experiments import job

    job._perform = _perform
    job.main()


def _perform(run: str) -> None:
    ((_, config, (record,)),) = json.loads(run)[2]
    work(Path(record), config["weights"])


def make_run(output: Path, name: str, how: str = "works"):
    """A run that does `how` and leaves the record <name>.json."""
    from evaluation.config import ScoringConfig
    from experiments.runs import Run, Scoring

    config = ScoringConfig(obj=name, output=output, weights=how)
    return Run(name, None, (Scoring("best", config, (output / f"{name}.json",)),))


def processes_of(output: Path) -> list[int]:
    """The processes of runs of this results folder."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdecimal() else []
            if b"-c" in words and str(output).encode() in words:
                found.append(int(entry.name))
    return found
