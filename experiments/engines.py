"""The engines that run cells: processes on this machine, or a cluster through submitit."""

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

from experiments.runs import BUSY, Cell, Report, is_finished, log_file, run_cell
from utils.errors import UserError
from utils.files import PROJECT_ROOT, whole_file

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


def run_local(
    output: Path, cells: Sequence[Cell], jobs: int, gpus: Sequence[str], report: Report, alone: bool = False
) -> None:
    """Runs the cells, `jobs` at a time. Each has its share of the cores, and its own GPU if there are enough.

    Cells that another driver runs are waited for at the end. `alone`: no other driver has these cells, see `run_cell`.
    """
    slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for number in range(jobs):
        slots.put(job_environment(cores_per_job(jobs), gpus[number % len(gpus)] if gpus else None))

    def run(cell: Cell, wait: bool) -> str | None:
        environment = slots.get()
        try:
            return run_cell(output, cell, environment, wait, alone)
        finally:
            slots.put(environment)

    busy = []
    with ThreadPoolExecutor(jobs) as pool:  # each thread waits for a process
        try:
            for wait, now in ((False, cells), (True, busy)):
                running = {pool.submit(run, cell, wait): cell for cell in now}
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
    """The resources requested from the cluster. `name` is submitit's: `slurm`, or `local` for tests on this machine.

    options: further parameters of submitit, such as `account`; None where the cluster's default is taken.
    """

    name: str
    minutes: int
    gpus: int
    cpus: int
    requeues: int
    options: Mapping[str, str | list[str] | None] = MappingProxyType({})


class _OnNode:
    """A cell as submitit pickles it. A job that exceeds its time limit is queued again and resumes."""

    def __init__(self, output: Path, cell: Cell, alone: bool) -> None:
        self.output, self.cell, self.alone = output, cell, alone

    def __call__(self) -> str | None:
        return run_cell(self.output, self.cell, {}, alone=self.alone)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_on_cluster(
    output: Path, cells: Sequence[Cell], jobs: int, cluster: Cluster, report: Report, alone: bool = False
) -> None:
    """Submits the cells as one job array with at most `jobs` running, and waits for them.

    Cells that are still in the queue from an earlier call are not submitted again. `alone`: as for `run_local`.

    Raises:
        UserError: submitit or the cluster's commands are missing.
    """
    executor = _executor(output, jobs, cluster)
    queued = _queued_ids() if cluster.name == "slurm" else set()
    waiting = {cell: kept for cell in cells if (kept := _read_id(output, cell)) in queued}
    fresh = [cell for cell in cells if cell not in waiting]
    submitted = executor.submit_array([_OnNode(output, cell, alone) for cell in fresh]) if fresh else []
    for cell, job in zip(fresh, submitted, strict=True):
        with whole_file(_id_file(output, cell)) as aside:
            aside.write_text(job.job_id)
        waiting[cell] = job.job_id
    handles = dict(zip(fresh, submitted, strict=True))
    print(f"{len(fresh)} submitted, {len(waiting) - len(fresh)} in the queue from before", flush=True)
    while waiting:
        time.sleep(POLL_SECONDS if cluster.name == "slurm" else 1)
        queued = (
            _queued_ids()
            if cluster.name == "slurm"
            else {handles[cell].job_id for cell in waiting if not handles[cell].done()}
        )
        for cell in [cell for cell, job_id in waiting.items() if job_id not in queued]:
            job_id = waiting.pop(cell)
            report(cell, None if is_finished(output, cell) else _what_happened(output, cell, job_id))


def _executor(output: Path, jobs: int, cluster: Cluster) -> submitit.AutoExecutor:
    try:
        import submitit
    except ImportError as error:
        raise UserError("--engine slurm needs submitit: pip install -r requirements-cluster.txt") from error
    paths = [str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # jobs import this module from any folder
    try:
        executor = submitit.AutoExecutor(output / "slurm", cluster=cluster.name, slurm_max_num_timeout=cluster.requeues)
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
        **{f"slurm_{name}": value for name, value in cluster.options.items() if value},
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


def _id_file(output: Path, cell: Cell) -> Path:
    return output / "jobs" / f"{cell.name}.slurm"


def _read_id(output: Path, cell: Cell) -> str | None:
    file = _id_file(output, cell)
    return file.read_text() if file.is_file() else None


def _what_happened(output: Path, cell: Cell, job_id: str) -> str:
    return f"job {job_id} left it unfinished ({log_file(output, cell)}, and {output / 'slurm'} for the job's own log)"
