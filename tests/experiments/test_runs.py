"""Cells and engines with commands made for the purpose: once each, through failures, kills and second drivers."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from experiments import engines
from experiments import runs as cells_module
from experiments.engines import Cluster, run_local, run_on_cluster
from experiments.runs import BUSY, Cell, is_begun, is_finished, log_file, require_locks, run_cell
from utils.errors import UserError
from utils.files import PROJECT_ROOT

WORK = """
import os, signal, sys, time
from pathlib import Path
output, name, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with open(output / f"{name}.runs", "a") as runs:
    runs.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {os.environ.get('OMP_NUM_THREADS')}\\n")
print("working on", name, flush=True)
end = time.monotonic() + 20  # so that a failed test ends
first = len((output / f"{name}.runs").read_text().splitlines()) == 1
if how == "fails":
    sys.exit("error: no such luck")
if how == "is killed once" and first:
    os.kill(os.getpid(), signal.SIGKILL)
if how == "takes a moment":
    time.sleep(0.2)
while how == "waits" and not (output / "go").exists() and time.monotonic() < end:
    time.sleep(0.02)
(output / f"{name}.json").write_text(name)
"""


@pytest.fixture
def output(tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    return tmp_path


def make_cell(output, name, how="works", key="k", trained=None):
    command = (str(output / "work.py"), str(output), name, how)
    return Cell(name, name, (2,), (command,), key, trained, (f"{name}.json",))


def runs(output, name):
    file = output / f"{name}.runs"
    return file.read_text().splitlines() if file.exists() else []


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_finished_cell_is_not_repeated(output):
    cell = make_cell(output, "a")
    assert not is_finished(output, cell) and not is_begun(output, cell)
    for _ in range(2):
        assert run_cell(output, cell, {}) is None
        assert is_finished(output, cell) and is_begun(output, cell)
    assert len(runs(output, "a")) == 1 and "working on a" in log_file(output, cell).read_text()


@pytest.mark.parametrize("damage", ["deleted", "changed", "other key", "stamp cut off"])
def test_what_is_not_finished_any_more(output, damage):
    cell = make_cell(output, "a")
    run_cell(output, cell, {})
    if damage == "deleted":
        (output / "a.json").unlink()
    elif damage == "changed":
        (output / "a.json").write_text("something else")
    elif damage == "stamp cut off":
        stamp = output / "jobs" / "a.done"
        stamp.write_text(stamp.read_text()[:20])
    else:
        cell = cell._replace(key="other")
    assert not is_finished(output, cell)
    assert run_cell(output, cell, {}) is None and len(runs(output, "a")) == 2


def test_failed_and_killed_cells_are_reported_and_the_others_go_on(output):
    cells = [make_cell(output, name, how) for name, how in (("a", "fails"), ("b", "is killed once"), ("c", "works"))]
    said = {}
    run_local(output, cells, 2, [], lambda cell, reason: said.update({cell.name: reason}))
    assert said["c"] is None and is_finished(output, cells[2])
    assert said["a"] == f"{output}/work.py ended with code 1: error: no such luck ({output}/logs/a.log)"
    assert "ended with code -9: working on b" in said["b"]
    run_local(output, cells, 2, [], lambda cell, reason: said.update({cell.name: reason}))
    assert said["b"] is None and [len(runs(output, name)) for name in "abc"] == [2, 2, 1]


def test_every_job_has_its_device_and_its_share_of_the_cores(output, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cells = [make_cell(output, str(number)) for number in range(6)]
    run_local(output, cells, 3, ["4", "6"], lambda *_: None)
    lines = [line for cell in cells for line in runs(output, cell.name)]
    assert len(lines) == 6 and set(lines) == {"4 2", "6 2"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert engines.cores_per_job(2) == 3


def test_weights_of_another_cell_are_moved_aside_and_those_of_this_one_stay(output):
    trained = output / "weights" / "ring"
    trained.mkdir(parents=True)
    (trained / "state.pt").write_text("old")
    cell = make_cell(output, "a", "is killed once", trained=trained)
    run_cell(output, cell, {})
    assert not trained.exists() and (output / "weights" / "ring.old1" / "state.pt").read_text() == "old"
    trained.mkdir()  # by the killed command
    assert run_cell(output, cell, {}) is None and trained.exists()
    (output / "work.py").write_text("raise SystemExit(1)")
    run_cell(output, cell._replace(key="other"), {})
    assert not trained.exists() and (output / "weights" / "ring.old2").exists()
    assert not (output / "a.json").exists()


def test_two_drivers_do_no_cell_twice(output):
    cells = [make_cell(output, str(number)) for number in range(8)]
    said = []
    drivers = [
        threading.Thread(target=run_local, args=(output, order, 2, [], lambda cell, reason: said.append(reason)))
        for order in (cells, cells[::-1])
    ]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert said == [None] * 16
    assert [len(runs(output, cell.name)) for cell in cells] == [1] * 8


def test_a_killed_drivers_command_is_waited_for(output):
    """The command lives on and keeps the lock; only when it has ended is the cell begun again."""
    cell = make_cell(output, "a", "waits")
    code = f"from pathlib import PosixPath\nfrom experiments.runs import *\nrun_cell({output!r}, {cell!r}, {{}})"
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT_ROOT)
    wait_for(lambda: runs(output, "a"))
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert run_cell(output, cell, {}, wait=False) == BUSY
    (output / "go").touch()
    assert run_cell(output, cell, {}) is None
    assert is_finished(output, cell) and len(runs(output, "a")) == 2


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks, such as some NFS."""
    monkeypatch.setattr(cells_module.fcntl, "flock", _no_locks)


def _no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_only_cells_of_ones_own_run(output, no_locks):
    cell = make_cell(output, "a")
    assert "No locks available" in run_cell(output, cell, {}) and not runs(output, "a")
    with pytest.raises(UserError, match=r"has no file locks \(No locks available\).* --shard I/N, or --shard 0/1"):
        require_locks(output)
    assert run_cell(output, cell, {}, alone=True) is None
    assert is_finished(output, cell) and len(runs(output, "a")) == 1


def test_without_fcntl(output, monkeypatch):
    """As on Windows."""
    monkeypatch.setattr(cells_module, "fcntl", None)
    with pytest.raises(UserError, match="has no file locks"):
        require_locks(output)
    assert run_cell(output, make_cell(output, "a"), {}, alone=True) is None


def test_without_locks_a_killed_drivers_command_ends_with_it(output):
    """Else the next driver would start the cell beside it."""
    cell = make_cell(output, "a", "waits")
    code = "import errno, fcntl\nfrom pathlib import PosixPath\n"
    code += "def fails(*_): raise OSError(errno.ENOLCK, '')\nfcntl.flock = fails\n"
    code += f"from experiments.runs import *\nrun_cell({output!r}, {cell!r}, {{}}, alone=True)"
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT_ROOT)
    wait_for(lambda: runs(output, "a"))
    assert working(output)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    wait_for(lambda: not working(output))
    assert not (output / "a.json").exists()


def working(output) -> list[int]:
    """The processes that run work.py in this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and f"{output}/work.py".encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def start_driver(output, cells, locks: bool) -> subprocess.Popen:
    """A driver with two workers; without locks, of a file system that has none."""
    code = "import errno, fcntl\nfrom pathlib import PosixPath\nfrom experiments.runs import *\n"
    code += "from experiments.engines import *\n"
    if not locks:
        code += "def fails(*_): raise OSError(errno.ENOLCK, '')\nfcntl.flock = fails\n"
    code += f"run_local({output!r}, {cells!r}, 2, [], lambda cell, why: print(cell.name, why), alone={not locks})"
    return subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL)


def test_killed_at_random_with_and_without_locks(output):
    """Two drivers and four workers, one driver's locks fail: after kills and restarts, every record is whole."""
    rng = random.Random(1)
    cells = [make_cell(output, str(number), "takes a moment") for number in range(12)]
    shards = {True: cells[::2], False: cells[1::2]}
    drivers = {locks: start_driver(output, shard, locks) for locks, shard in shards.items()}
    for _ in range(6):
        time.sleep(rng.uniform(0.05, 0.4))
        alive = working(output)
        victim = rng.choice([drivers[True].pid, drivers[False].pid, *alive])
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        for locks, driver in drivers.items():
            if driver.poll() is not None:
                drivers[locks] = start_driver(output, shards[locks], locks)
    for driver in drivers.values():
        driver.wait()
    for locks, shard in shards.items():
        assert start_driver(output, shard, locks).wait() == 0
    assert all(is_finished(output, cell) for cell in cells)
    assert [(output / f"{cell.name}.json").read_text() for cell in cells] == [cell.name for cell in cells]


def test_on_a_cluster(output, monkeypatch):
    """Through submitit on this machine: the job array, a failure, and what is already finished."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    cells = [make_cell(output, name, how) for name, how in (("a", "works"), ("b", "fails"))]
    said = {}
    run_on_cluster(
        output, cells, 2, Cluster("local", 5, 0, 1, 0), lambda cell, reason: said.update({cell.name: reason})
    )
    assert said["a"] is None and is_finished(output, cells[0])
    assert f"left it unfinished ({output}/logs/b.log" in said["b"]


def test_without_slurm(output, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no Slurm on this machine"):
        run_on_cluster(output, [make_cell(output, "a")], 1, Cluster("slurm", 5, 0, 1, 0), lambda *_: None)


def test_cells_in_the_queue_are_not_submitted_again(output, monkeypatch):
    """A restarted driver waits for the jobs of the first one; `squeue` is played."""
    pytest.importorskip("submitit")
    cell = make_cell(output, "a")
    (output / "jobs").mkdir()
    (output / "jobs" / "a.slurm").write_text("12_0")
    answers = iter([{"12_0", "99"}, {"12_0"}, set()])
    monkeypatch.setattr(engines, "_queued_ids", lambda: next(answers))
    monkeypatch.setattr(engines, "POLL_SECONDS", 0)
    monkeypatch.setattr(engines, "_executor", lambda *_: None)  # nothing may be submitted
    said = {}
    run_on_cluster(output, [cell], 1, Cluster("slurm", 5, 0, 1, 0), lambda c, reason: said.update({c: reason}))
    assert "job 12_0 left it unfinished" in said[cell]
    assert Path(output / "jobs" / "a.slurm").read_text() == "12_0"


SBATCH = """#!/bin/sh
cp "$1" "{folder}/script.sh"
echo Submitted batch job 12
"""


def test_what_the_cluster_is_asked_for(output, monkeypatch):
    """sbatch and squeue are played: the script has every option, quoted, and the setup lines as they were given."""
    pytest.importorskip("submitit")
    tools = output / "tools"
    tools.mkdir()
    for name, text in (("sbatch", SBATCH.format(folder=output)), ("squeue", "#!/bin/sh\n"), ("srun", "#!/bin/sh\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(engines, "POLL_SECONDS", 0)
    options = {"account": "lab; rm -rf x", "qos": "high", "constraint": "a100|h100", "mem": "32G", "partition": None}
    options["setup"] = ["module load 'cuda/12'", 'source "$HOME/venv/bin/activate"']
    cluster = Cluster("slurm", 5, 1, 2, 0, options)
    run_on_cluster(output, [make_cell(output, "a")], 1, cluster, lambda *_: None)
    lines = (output / "script.sh").read_text().splitlines()
    assert "#SBATCH --account='lab; rm -rf x'" in lines and "#SBATCH --constraint='a100|h100'" in lines
    assert {"#SBATCH --qos=high", "#SBATCH --mem=32G", "#SBATCH --gpus-per-node=1", *options["setup"]} <= set(lines)
    assert not any("partition" in line for line in lines)
