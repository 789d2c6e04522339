"""The engines that execute runs: processes on this machine, or a cluster through submitit."""

from __future__ import annotations

import os
import queue
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch

from experiments.config import SLURM_NUMBERS
from experiments.runs import BUSY, Report, Run, execute, is_finished, log_file
from utils.errors import UserError
from utils.files import PROJECT_ROOT, whole_file
from utils.fingerprint import FileDigests

if TYPE_CHECKING:
    import submitit

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


def job_environment(cores: int, gpu: str | None) -> dict[str, str]:
    """The environment variables of a job: its threads, and its GPU as in CUDA_VISIBLE_DEVICES."""
    return {"OMP_NUM_THREADS": str(cores)} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})


def run_local(output: Path, runs: Sequence[Run], jobs: int, gpus: Sequence[str], report: Report) -> None:
    """Executes the runs, `jobs` at a time. Each has its share of the cores, and its own GPU if there are enough.

    Runs of another driver are waited for at the end.
    """
    slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for number in range(jobs):
        slots.put(job_environment(cores_per_job(jobs), gpus[number % len(gpus)] if gpus else None))

    def execute_in_slot(run: Run, wait: bool) -> str | None:
        environment = slots.get()
        try:
            return execute(output, run, environment, wait)
        finally:
            slots.put(environment)

    busy = []
    with ThreadPoolExecutor(jobs) as pool:  # each thread waits for a process
        try:
            for wait, now in ((False, runs), (True, busy)):
                running = {pool.submit(execute_in_slot, run, wait): run for run in now}
                for future in as_completed(running):
                    if future.result() == BUSY:
                        print(f"{running[future].name}: {BUSY}; waiting for it at the end", flush=True)
                        busy.append(running[future])
                    else:
                        report(running[future], future.result())
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


class Cluster(NamedTuple):
    """What is requested from the cluster. `name` is submitit's: `slurm`, or `local` for tests on this machine.

    texts: further parameters of submitit, such as `account`. setup: shell lines that a job runs first, as they are.
    """

    name: str
    minutes: int
    gpus: int
    cpus: int
    requeue: int
    texts: Mapping[str, str] = MappingProxyType({})
    setup: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, options: Sequence[str]) -> Cluster:
        """The cluster of the values of --slurm, see experiments.config.slurm_option."""
        pairs = [option.split("=", 1) for option in options]
        numbers = {**SLURM_NUMBERS, **{key: int(value) for key, value in pairs if key in SLURM_NUMBERS}}
        texts = {key: value for key, value in pairs if key not in SLURM_NUMBERS and key != "setup"}
        return cls(name, **numbers, texts=texts, setup=tuple(value for key, value in pairs if key == "setup"))


class _OnNode:
    """A run as submitit pickles it. A job that exceeds its time limit is queued again and resumes."""

    def __init__(self, output: Path, run: Run) -> None:
        self.output, self.run = output, run

    def __call__(self) -> str | None:
        return execute(self.output, self.run, {})

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_on_cluster(output: Path, runs: Sequence[Run], jobs: int, cluster: Cluster, report: Report) -> None:
    """Submits the runs as one job array with at most `jobs` at a time, and waits for them.

    Runs that are still in the queue from an earlier call are not submitted again.

    Raises:
        UserError: submitit or the cluster's commands are missing.
    """
    executor = _executor(output, jobs, cluster)
    queued = _queued_ids() if cluster.name == "slurm" else set()
    waiting = {run: kept for run in runs if (kept := _read_id(output, run)) in queued}
    fresh = [run for run in runs if run not in waiting]
    submitted = executor.submit_array([_OnNode(output, run) for run in fresh]) if fresh else []
    handles = dict(zip(fresh, submitted, strict=True))
    for run, job in handles.items():
        with whole_file(_id_file(output, run)) as aside:
            aside.write_text(job.job_id)
        waiting[run] = job.job_id
    print(f"{len(fresh)} submitted, {len(waiting) - len(fresh)} in the queue from before", flush=True)
    while waiting:
        time.sleep(POLL_SECONDS if cluster.name == "slurm" else 1)
        queued = (
            _queued_ids()
            if cluster.name == "slurm"
            else {handles[run].job_id for run in waiting if not handles[run].done()}
        )
        for run in [run for run, job_id in waiting.items() if job_id not in queued]:
            job_id = waiting.pop(run)
            report(run, None if is_finished(run, FileDigests()) else _what_happened(output, run, job_id))


def _executor(output: Path, jobs: int, cluster: Cluster) -> submitit.AutoExecutor:
    try:
        import submitit
    except ImportError as error:
        raise UserError("--engine slurm needs submitit: pip install -r requirements-cluster.txt") from error
    paths = [str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # jobs import this module from any folder
    try:
        executor = submitit.AutoExecutor(output / "slurm", cluster=cluster.name, slurm_max_num_timeout=cluster.requeue)
    except RuntimeError as error:
        raise UserError(
            f"no Slurm on this machine ({error}); submit from a login node, or use --engine local"
        ) from error
    executor.update_parameters(
        name="regad",
        timeout_min=cluster.minutes,
        cpus_per_task=cluster.cpus,
        slurm_array_parallelism=jobs,
        **({"gpus_per_node": cluster.gpus} if cluster.gpus else {}),
        **{f"slurm_{name}": value for name, value in cluster.texts.items()},
        **({"slurm_setup": list(cluster.setup)} if cluster.setup else {}),
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
    raise UserError(f"squeue fails ({done.stderr.strip()}); the jobs continue, run the same command again later")


def _id_file(output: Path, run: Run) -> Path:
    return output / "jobs" / f"{run.name}.slurm"


def _read_id(output: Path, run: Run) -> str | None:
    file = _id_file(output, run)
    return file.read_text() if file.is_file() else None


def _what_happened(output: Path, run: Run, job_id: str) -> str:
    return f"job {job_id} left it unfinished ({log_file(output, run)}, and {output / 'slurm'} for the job's own log)"
