"""Cells and engines with commands made for the purpose: once each, through failures, kills and second drivers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grid import engines
from grid.cells import BUSY, Cell, is_begun, is_finished, log_file, run_cell
from grid.engines import Cluster, run_local, run_on_cluster
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
    code = f"from pathlib import PosixPath\nfrom grid.cells import *\nrun_cell({output!r}, {cell!r}, {{}})"
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT_ROOT)
    wait_for(lambda: runs(output, "a"))
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert run_cell(output, cell, {}, wait=False) == BUSY
    (output / "go").touch()
    assert run_cell(output, cell, {}) is None
    assert is_finished(output, cell) and len(runs(output, "a")) == 2


def test_on_a_cluster(output, monkeypatch):
    """Through submitit on this machine: the job array, a failure, and what is already finished."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    cells = [make_cell(output, name, how) for name, how in (("a", "works"), ("b", "fails"))]
    said = {}
    run_on_cluster(
        output, cells, 2, Cluster("local", None, 5, 0, 1, 0), lambda cell, reason: said.update({cell.name: reason})
    )
    assert said["a"] is None and is_finished(output, cells[0])
    assert f"left it unfinished ({output}/logs/b.log" in said["b"]


def test_without_slurm(output, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no Slurm on this machine"):
        run_on_cluster(output, [make_cell(output, "a")], 1, Cluster("slurm", None, 5, 0, 1, 0), lambda *_: None)


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
    run_on_cluster(output, [cell], 1, Cluster("slurm", None, 5, 0, 1, 0), lambda c, reason: said.update({c: reason}))
    assert "job 12_0 left it unfinished" in said[cell]
    assert Path(output / "jobs" / "a.slurm").read_text() == "12_0"
