"""Runs and engines with played commands: once each, through failures, kills and second drivers."""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import os
import random
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import filelock
import pytest

from experiments import engines, runs
from experiments.config import ExperimentConfig, slurm_option
from experiments.engines import run_local, run_on_cluster
from experiments.runs import BUSY, execute, is_finished, log_file, require_locks
from tests.experiments.played import make_run, play, processes_of
from utils.errors import UserError
from utils.fingerprint import FileDigests
from utils.naming import lock_file

# Drivers are forked, which newer versions of Python warn of in a process with threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def output(tmp_path, monkeypatch):
    for name in ("PROCESS", "_outdated"):
        monkeypatch.setattr(runs, name, getattr(runs, name))
    play()
    return tmp_path


def starts(output, name):
    file = output / f"{name}.runs"
    return file.read_text().splitlines() if file.exists() else []


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def finished(run):
    return is_finished(run, FileDigests())


def test_a_finished_run_is_not_repeated(output):
    """In a folder whose name is no text, too."""
    output /= os.fsdecode(b"gr\xfcn")
    output.mkdir()
    run = make_run(output, "a")
    assert not finished(run)
    for _ in range(2):
        assert execute(output, run, {}) is None
        assert finished(run)
    assert len(starts(output, "a")) == 1 and "working on a" in log_file(output, run).read_text()
    (output / "a.json").unlink()
    assert execute(output, run, {}) is None and len(starts(output, "a")) == 2


def test_failed_and_killed_runs_are_reported_and_the_others_go_on(output):
    three = [make_run(output, name, how) for name, how in (("a", "fails"), ("b", "is killed once"), ("c", "works"))]
    said = {}
    run_local(output, three, 2, [], lambda run, reason: said.update({run.name: reason}))
    assert said["c"] is None and finished(three[2])
    assert said["a"] == f"ended with code 1: error: no such luck ({output}/logs/a.log)"
    assert "ended with code -9: working on b" in said["b"]
    run_local(output, three, 2, [], lambda run, reason: said.update({run.name: reason}))
    assert said["b"] is None and [len(starts(output, name)) for name in "abc"] == [2, 2, 1]


def test_every_job_has_its_device_and_its_share_of_the_cores(output, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_local(output, [make_run(output, str(number)) for number in range(6)], 3, ["4", "6"], lambda *_: None)
    lines = [line for number in range(6) for line in starts(output, str(number))]
    assert len(lines) == 6 and set(lines) == {"4 2", "6 2"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert engines.cores_per_job(2) == 3


def test_two_drivers_do_no_run_twice(output):
    eight, said = [make_run(output, str(number)) for number in range(8)], []
    drivers = [
        threading.Thread(target=run_local, args=(output, order, 2, [], lambda run, reason: said.append(reason)))
        for order in (eight, eight[::-1])
    ]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert said == [None] * 16
    assert [len(starts(output, run.name)) for run in eight] == [1] * 8


def start_driver(output, driven) -> multiprocessing.Process:
    """A driver with two workers."""

    def drive() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests are a background job, it is ignored
        run_local(output, driven, 2, [], lambda *_: None)

    driver = multiprocessing.get_context("fork").Process(target=drive)
    driver.start()
    return driver


def test_a_killed_drivers_command_is_waited_for(output):
    """The command goes on and keeps its lock; no other driver starts the run before it has ended."""
    run = make_run(output, "a", "waits")
    driver = start_driver(output, [run])
    wait_for(lambda: starts(output, "a"))
    driver.kill()
    driver.join()
    assert execute(output, run, {}, lambda: True) == BUSY
    (output / "go").touch()
    assert execute(output, run, {}) is None
    assert finished(run) and len(starts(output, "a")) == 1  # what the command wrote is whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_is_ended_ends_its_runs(number, output):
    """The signal comes to the driver alone, as from a job scheduler, not to its group as from a terminal."""
    driver = start_driver(output, [make_run(output, name, "waits") for name in "abc"])
    wait_for(lambda: starts(output, "a") and starts(output, "b"))
    os.kill(driver.pid, number)
    driver.join(60)
    assert driver.exitcode == 1 and not processes_of(output) and not starts(output, "c")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_waits_for_another_ones_run_can_be_ended(number, output):
    """The run of the other one goes on."""
    (output / "jobs").mkdir()
    with filelock.FileLock(lock_file(output / "jobs" / "a")):
        driver = start_driver(output, [make_run(output, name) for name in "ab"])
        wait_for(lambda: starts(output, "b"))
        time.sleep(0.1)
        os.kill(driver.pid, number)
        driver.join(20)
        assert driver.exitcode == 1 and not starts(output, "a")


@pytest.mark.slow
def test_killed_at_random(output):
    """Two drivers and four workers: after kills and restarts, every record is whole."""
    rng, twelve = random.Random(1), [make_run(output, str(number), "takes a moment") for number in range(12)]
    drivers = [start_driver(output, twelve) for _ in range(2)]
    for _ in range(6):
        time.sleep(rng.uniform(0.05, 0.4))
        with suppress(ProcessLookupError):
            os.kill(rng.choice([*(driver.pid for driver in drivers), *processes_of(output)]), signal.SIGKILL)
        time.sleep(0.05)
        drivers = [driver if driver.is_alive() else start_driver(output, twelve) for driver in drivers]
    for driver in [*drivers, start_driver(output, twelve)]:
        driver.join()
    last = start_driver(output, twelve)
    last.join()
    assert last.exitcode == 0 and not processes_of(output)
    assert [(output / f"{run.name}.json").read_text() for run in twelve] == [run.name for run in twelve]


def test_without_locks(output, monkeypatch):
    """A file system without locks, such as some NFS."""

    def fails(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "_acquire", fails)
    assert "No locks available" in execute(output, make_run(output, "a"), {}) and not starts(output, "a")
    with pytest.raises(UserError, match=r"cannot be locked \(.*No locks available\)"):
        require_locks(output)


class OnNode(engines._OnNode):
    """A job whose commands are played, in the process that submitit starts."""

    def __call__(self) -> str | None:
        play()
        return super().__call__()


@pytest.mark.slow
def test_on_a_cluster(output, monkeypatch):
    """Through submitit on this machine: the job array, a failure, and what is already finished."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(engines, "_OnNode", OnNode)
    two, said = [make_run(output, name, how) for name, how in (("a", "works"), ("b", "fails"))], {}
    options = ["minutes=5", "gpus=0", "cpus=1", "requeue=0"]
    run_on_cluster(output, two, 2, options, lambda run, reason: said.update({run.name: reason}), "local")
    assert said["a"] is None and finished(two[0])
    assert f"left it unfinished ({output}/logs/b.log" in said["b"]


def test_without_slurm(output, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no Slurm on this machine"):
        run_on_cluster(output, [make_run(output, "a")], 1, [], lambda *_: None)


def test_runs_in_the_queue_are_not_submitted_again(output, monkeypatch):
    """A restarted driver waits for the jobs of the first one; `squeue` is played."""
    pytest.importorskip("submitit")
    run = make_run(output, "a")
    (output / "jobs").mkdir()
    (output / "jobs" / "a.slurm").write_text("12_0")
    answers = iter([{"12_0", "99"}, {"12_0"}, set()])
    monkeypatch.setattr(engines, "_queued_ids", lambda: next(answers))
    monkeypatch.setattr(engines, "POLL_SECONDS", 0)
    monkeypatch.setattr(engines, "_executor", lambda *_: None)  # nothing may be submitted
    said = {}
    run_on_cluster(output, [run], 1, [], lambda run, reason: said.update({run: reason}))
    assert "job 12_0 left it unfinished" in said[run]
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
    setup = ["module load 'cuda/12'", 'source "$HOME/venv/bin/activate"']
    options = ["account=lab; rm -rf x", "qos=high", "constraint=a100|h100", "mem=32G", "minutes=5", "cpus=2"]
    config = ExperimentConfig.from_plain({"slurm": [*options, *(f"setup={line}" for line in setup)]})
    run_on_cluster(output, [make_run(output, "a")], 1, config.slurm, lambda *_: None)
    lines = (output / "script.sh").read_text().splitlines()
    assert "#SBATCH --account='lab; rm -rf x'" in lines and "#SBATCH --constraint='a100|h100'" in lines
    asked = {"--qos=high", "--mem=32G", "--gpus-per-node=1", "--time=5", "--cpus-per-task=2"}
    assert {*(f"#SBATCH {option}" for option in asked), *setup} <= set(lines)
    assert not any("partition" in line for line in lines)


@pytest.mark.parametrize(
    "text", ["partition", "nodes=2", "account=a\n#SBATCH x", "minutes=0", "gpus=2", "cpus=many", "mem="]
)
def test_refused_slurm_options(text):
    with pytest.raises(argparse.ArgumentTypeError):
        slurm_option(text)
    with pytest.raises(UserError, match=r"--slurm: .* is not valid"):
        ExperimentConfig.from_plain({"slurm": [text]})
