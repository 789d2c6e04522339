"""The engines that execute runs: processes on this machine, or a cluster through submitit."""

from __future__ import annotations

import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from experiments.config import SLURM_NUMBERS
from experiments.runs import BUSY, Report, Run, end_processes, execute, is_finished, log_file
from utils.errors import UserError
from utils.files import PROJECT_ROOT, whole_file
from utils.fingerprint import FileDigests
from utils.interrupts import Interrupts

if TYPE_CHECKING:
    import submitit

SLURM = "slurm"  # submitit's name of the cluster
POLL_SECONDS = 10  # between queries of the cluster's queue


def visible_gpus(device: str) -> list[str]:
    """The GPUs that jobs may use, as in CUDA_VISIBLE_DEVICES; none with --device cpu."""
    if device == "cpu" or not torch.cuda.is_available():
        return []
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return listed.split(",") if listed else [str(number) for number in range(torch.cuda.device_count())]


def cores_per_job(jobs: int) -> int:
    """OMP_NUM_THREADS if it is set, else the number of cores that the process may use, divided by `jobs`."""
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return int(os.environ["OMP_NUM_THREADS"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // jobs)


def run_local(output: Path, runs: Sequence[Run], jobs: int, gpus: Sequence[str], report: Report) -> None:
    """Executes the runs, `jobs` at a time. Each has its share of the cores, and its own GPU if there are enough.

    Runs of another driver are waited for at the end.
    """
    slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for number in range(jobs):
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
        slots.put({"OMP_NUM_THREADS": str(cores_per_job(jobs)), **gpu})

    def execute_in_slot(run: Run, gives_up: Callable[[], bool]) -> str | None:
        """`execute` with the environment of a free slot."""
        environment = slots.get()
        try:
            return execute(output, run, environment, gives_up)
        finally:
            slots.put(environment)

    busy, ended = [], threading.Event()
    with Interrupts(), ThreadPoolExecutor(jobs) as pool:  # each thread waits for a process
        try:
            for gives_up, now in ((lambda: True, runs), (ended.is_set, busy)):
                running = {pool.submit(execute_in_slot, run, gives_up): run for run in now}
                for future in as_completed(running):
                    if future.result() == BUSY:
                        print(f"{running[future].name}: {BUSY}; waiting for it at the end", flush=True)
                        busy.append(running[future])
                    else:
                        report(running[future], future.result())
        except KeyboardInterrupt:
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)
            end_processes()
            raise


class _OnNode:
    """A run as submitit pickles it. A job that exceeds its time limit is queued again and resumes."""

    def __init__(self, output: Path, run: Run) -> None:
        self.output, self.run = output, run

    def __call__(self) -> str | None:
        return execute(self.output, self.run, {})

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_on_cluster(
    output: Path, runs: Sequence[Run], jobs: int, options: Sequence[str], report: Report, cluster: str = SLURM
) -> None:
    """Submits the runs as one job array with at most `jobs` at a time, and waits for them.

    Runs that are still in the queue from an earlier call are not submitted again.

    options: the values of --slurm, see experiments.config.slurm_option. cluster: the name that submitit has for it;
    tests use "local".

    Raises:
        UserError: submitit or the cluster's commands are missing.
    """
    executor = _executor(output, jobs, options, cluster)
    queued = _queued_ids() if cluster == SLURM else set()
    id_files = {run: output / "jobs" / f"{run.name}.slurm" for run in runs}
    waiting = {
        run: job_id for run, file in id_files.items() if file.is_file() and (job_id := file.read_text()) in queued
    }
    fresh = [run for run in runs if run not in waiting]
    submitted = executor.submit_array([_OnNode(output, run) for run in fresh]) if fresh else []
    handles = dict(zip(fresh, submitted, strict=True))
    for run, job in handles.items():
        with whole_file(id_files[run]) as aside:
            aside.write_text(job.job_id)
        waiting[run] = job.job_id
    print(f"{len(fresh)} submitted, {len(waiting) - len(fresh)} in the queue from before", flush=True)
    while waiting:
        time.sleep(POLL_SECONDS if cluster == SLURM else 1)
        queued = (
            _queued_ids() if cluster == SLURM else {handles[run].job_id for run in waiting if not handles[run].done()}
        )
        for run in [run for run, job_id in waiting.items() if job_id not in queued]:
            logs = f"{log_file(output, run)}, and {output / 'slurm'} for the job's own log"
            unfinished = f"job {waiting.pop(run)} left it unfinished ({logs})"
            report(run, None if is_finished(run, FileDigests()) else unfinished)


def _executor(output: Path, jobs: int, options: Sequence[str], cluster: str) -> submitit.AutoExecutor:
    try:
        import submitit
    except ImportError as error:
        raise UserError("--engine slurm needs submitit: pip install -r requirements-cluster.txt") from error
    paths = [str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # jobs import this module from any folder
    pairs = [option.split("=", 1) for option in options]
    numbers = SLURM_NUMBERS | {key: int(value) for key, value in pairs if key in SLURM_NUMBERS}
    texts = {f"slurm_{key}": value for key, value in pairs if key not in SLURM_NUMBERS and key != "setup"}
    setup = [value for key, value in pairs if key == "setup"]
    try:
        executor = submitit.AutoExecutor(output / "slurm", cluster=cluster, slurm_max_num_timeout=numbers["requeue"])
    except RuntimeError as error:
        raise UserError(
            f"no Slurm on this machine ({error}); submit from a login node, or use --engine local"
        ) from error
    executor.update_parameters(
        name="regad",
        timeout_min=numbers["minutes"],
        cpus_per_task=numbers["cpus"],
        slurm_array_parallelism=jobs,
        **({"gpus_per_node": numbers["gpus"]} if numbers["gpus"] else {}),
        **texts,
        **({"slurm_setup": setup} if setup else {}),
    )
    return executor


def _queued_ids() -> set[str]:
    """The ids of the user's waiting and running jobs, one per array task; UserError if squeue fails."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    for attempt in range(5):  # the controller may be busy or restarting
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return set(done.stdout.split())
        time.sleep(POLL_SECONDS * attempt)
    raise UserError(
        f"squeue failed ({done.stderr.strip()}); the submitted jobs continue, run the same command again later"
    )
