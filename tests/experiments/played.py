"""Runs whose test.py is played: it needs no data, takes no time, and locks its record as the real one."""

from __future__ import annotations

from pathlib import Path

from evaluation.config import ScoringConfig
from experiments import runs
from experiments.runs import Run, Scoring

TEST = """
import json, os, signal, sys, time
from pathlib import Path
from filelock import FileLock
sys.path.insert(0, {root!r})
from utils.naming import lock_file
config = json.loads(Path(sys.argv[2]).read_text())["config"]
output, name, how = Path(config["output"]), config["obj"], config["weights"]
record = output / f"{{name}}.json"
with FileLock(lock_file(record), timeout=0):
    with open(output / f"{{name}}.runs", "a") as runs:
        runs.write(f"{{os.environ.get('CUDA_VISIBLE_DEVICES')}} {{os.environ.get('OMP_NUM_THREADS')}}\\n")
    print("working on", name, flush=True)
    end = time.monotonic() + 20  # so that a failed test ends
    first = len((output / f"{{name}}.runs").read_text().splitlines()) == 1
    if how == "fails":
        sys.exit("error: no such luck")
    if how == "is killed once" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "takes a moment":
        time.sleep(0.2)
    while how == "waits" and not (output / "go").exists() and time.monotonic() < end:
        time.sleep(0.02)
    record.write_text(name)
"""


def play(folder: Path) -> None:
    """Lets the runs of this process use the played commands in `folder`; a run is finished when its records exist."""
    root, runs.PROJECT_ROOT = runs.PROJECT_ROOT, folder
    (folder / "test.py").write_text(TEST.format(root=str(root)))
    runs._outdated = lambda scoring, digests: [record for record in scoring.records if not record.is_file()]


def make_run(output: Path, name: str, how: str = "works") -> Run:
    """A run that does `how` and leaves the record <name>.json."""
    config = ScoringConfig(obj=name, output=output, weights=how)
    return Run(name, None, (Scoring("best", config, (output / f"{name}.json",)),))
