"""The runs of a table. A run may be killed at any time and is continued by the next driver.

A run is a training, where there is one, and the scorings of its weights, all in one process (job.py). It is finished
when its records have the fingerprints that are computed now. Its files in the results folder, next to the records:
jobs/.<name>.lock    locked by the process of the run
logs/<name>.log      its output

The processes of a driver end with it on Ctrl-C and SIGTERM. If it is killed (SIGKILL), they go on, and the next driver
waits for them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

import evaluation.run
import training.run
from datasets.mvtec import category_folder, list_test_items
from evaluation.config import ScoringConfig
from training.config import TrainingConfig
from training.run import checkpoint_files, read_inputs
from training.state import earlier_run
from utils.errors import UserError
from utils.files import locked, temporary_name
from utils.fingerprint import FileDigests
from utils.naming import lock_file

_processes: set[subprocess.Popen] = set()  # of the runs that this driver executes now
LOCK_SECONDS = 0.1  # a lock is waited for before it counts as held
BUSY = "another process works on it"
PROCESS = "import sys; sys.path[:] = {path}; from {package}.job import main; main()"  # imports what this one can


class Scoring(NamedTuple):
    """A test.py of one kind of weights, a key of experiments.results.WEIGHTS, and the records that it writes."""

    weights: str
    config: ScoringConfig
    records: tuple[Path, ...]


class Run(NamedTuple):
    """One category and some shots: a training, None where nothing is trained, and the scorings of its weights."""

    name: str
    training: TrainingConfig | None
    scorings: tuple[Scoring, ...]

    @property
    def records(self) -> list[Path]:
        """The records of the finished run."""
        return [record for scoring in self.scorings for record in scoring.records]


Report = Callable[[Run, str | None], None]  # called with each run that has ended and the answer of `execute`


def log_file(output: Path, run: Run) -> Path:
    """The file with the output of a run's commands."""
    return output / "logs" / f"{run.name}.log"


def is_finished(run: Run, digests: FileDigests) -> bool:
    """Whether all records of a run have the fingerprints of now. digests: known digests of data files.

    Raises:
        UserError: data or a support set cannot be used.
    """
    if run.training and not _is_trained(run.training, read_inputs(run.training, digests=digests).fingerprint):
        return False
    return not any(_outdated(scoring, digests) for scoring in run.scorings)


def execute(
    output: Path, run: Run, environment: Mapping[str, str], gives_up: Callable[[], bool] = lambda: False
) -> str | None:
    """Executes what is not finished of a run, in a process. Returns None when it is finished, else why it is not.

    Another process that executes the run is waited for, and BUSY is returned when `gives_up` is true.
    """
    lock, log = lock_file(output / "jobs" / run.name), log_file(output, run)
    try:
        for file in (lock, log):
            file.parent.mkdir(parents=True, exist_ok=True)
        while not _is_free(lock):  # the process locks it again, and waits where another one was faster
            if gives_up():
                return BUSY
        code = _start([str(lock), str(output), run.name], to_json(run), log, environment)
    except (OSError, NotImplementedError) as error:  # only this run fails
        return f"{error} ({log})"
    return f"ended with code {code}: {_last_line(log)} ({log})" if code else None


def to_json(run: Run) -> str:
    """A run as text, for its process."""
    scorings = [(kind, config.plain(), [str(record) for record in records]) for kind, config, records in run.scorings]
    return json.dumps([run.name, run.training and run.training.plain(), scorings])


def from_json(text: str) -> Run:
    """The inverse of `to_json`."""
    name, training, scorings = json.loads(text)
    return Run(
        name,
        training and TrainingConfig.from_plain(training),
        tuple(
            Scoring(weights, ScoringConfig.from_plain(config), tuple(map(Path, records)))
            for weights, config, records in scorings
        ),
    )


def perform(run: Run) -> None:
    """Trains and scores what is not finished of a run, in this process.

    Raises:
        UserError: data, a support set, weights or settings cannot be used.
    """
    digests = FileDigests()
    if run.training:
        current = read_inputs(run.training, digests=digests).fingerprint
        if not _is_trained(run.training, current):
            _prepare_training(run, current)
            training.run.run(run.training, digests)
    outdated = [(scoring, records) for scoring in run.scorings if (records := _outdated(scoring, digests))]
    for _, records in outdated:
        for record in records:
            record.unlink(missing_ok=True)  # else a table would show it if this run fails
    for scoring, _ in outdated:
        evaluation.run.run(scoring.config, digests)


def _is_free(lock: Path) -> bool:
    """Whether a lock is free, or becomes so at once."""
    with suppress(Timeout), FileLock(lock, timeout=LOCK_SECONDS, mode=0o666):
        return True
    return False


def require_locks(output: Path) -> None:
    """Raises UserError where files in `output` cannot be locked."""
    file = output / "jobs" / temporary_name(Path("locks"))
    try:
        with locked([file]):
            pass
    finally:
        with suppress(OSError):
            lock_file(file).unlink(missing_ok=True)


def _is_trained(config: TrainingConfig, current: dict) -> bool:
    """Whether the training with the fingerprint `current` is finished, with all its files."""
    files = checkpoint_files(config)
    needed = [files.selected, files.last, *([files.source] if config.held_out and config.select == "best" else [])]
    whole = all(file.is_file() for file in needed) and not files.state.is_file()
    return whole and _is_current(files.record, current)


def _outdated(scoring: Scoring, digests: FileDigests) -> list[Path]:
    """The records of a scoring that do not exist or do not have the fingerprints of now."""
    config = scoring.config
    items = list_test_items(category_folder(config.data_path, config.data_type, config.obj), need_both=False)
    try:
        current = {job.files.record: job.fingerprint for job in evaluation.run.make_plan(config, items, digests).jobs}
    except UserError:  # no checkpoint yet; where there is another reason, test.py gives it
        return list(scoring.records)
    return [file for file in scoring.records if file not in current or not _is_current(file, current[file])]


def _is_current(record: Path, fingerprint: dict) -> bool:
    return record.is_file() and evaluation.run.difference(record, fingerprint) is None


def _prepare_training(run: Run, current: dict) -> None:
    """Removes the records and moves the weights aside of a training that cannot be resumed with the fingerprint."""
    files = checkpoint_files(run.training)
    with suppress(UserError):  # there is another one, or one that cannot be read
        earlier = earlier_run(files, True, False, current)
        if earlier and not earlier.finished:
            return
    for record in run.records:
        record.unlink(missing_ok=True)
    folder, number = files.state.parent, 1
    if any(file.exists() for file in files):
        while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
            number += 1
        os.rename(folder, aside)


def _start(words: list[str], run: str, log: Path, environment: Mapping[str, str]) -> int:
    """The exit code of a process of job.py, whose output is added to `log`.

    words: its arguments, shown by `ps`. run: from `to_json`.
    """
    code = PROCESS.format(path=sys.path, package=__package__)
    with (
        open(log, "ab") as stream,
        subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        ) as process,
    ):
        _processes.add(process)
        try:
            process.communicate(run.encode())
        finally:
            process.kill()  # after Ctrl-C, or at the end of a cluster's job
            _processes.discard(process)
        return process.returncode


def end_processes() -> None:
    """Ends the processes of the runs that this driver executes; where a signal came to the driver alone, they go on."""
    for process in list(_processes):
        process.kill()


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.rsplit("\r", 1)[-1] for line in reversed(lines) if line.strip()), "")
    return ""
