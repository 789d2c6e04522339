"""The runs of a table. A run may be killed at any time and is continued by the next driver.

A run is a training, where there is one, and the scorings of its weights. It is finished when its records have the
fingerprints that are computed now. Its files in the results folder, next to the records:
jobs/<name>.train.json, ...    the configuration of each command, for its --config, with the fingerprint of a training
jobs/<name>.lock               locked by the driver that executes the run
logs/<name>.log                the output of the commands

train.py and test.py lock their own files. The command of a killed driver goes on, and the next driver waits for it.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from datasets.mvtec import category_folder, list_test_items
from evaluation.config import ScoringConfig
from evaluation.run import make_plan
from training.config import TrainingConfig
from training.run import checkpoint_files, read_inputs
from utils.errors import UserError
from utils.files import PROJECT_ROOT, temporary_name, write_json
from utils.fingerprint import FileDigests
from utils.naming import lock_file

BUSY = "another process works on it"


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


def is_begun(run: Run) -> bool:
    """Whether there is the state of an interrupted training to resume from."""
    return run.training is not None and checkpoint_files(run.training).state.is_file()


def execute(
    output: Path,
    run: Run,
    environment: Mapping[str, str],
    wait: bool = True,
    digests: FileDigests | None = None,
) -> str | None:
    """Executes what is not finished of a run. Returns None when it is finished, else a sentence on why not.

    With `wait`, another process that executes the run is waited for; without, BUSY is returned. digests: known digests
    of data files.
    """
    try:
        with _locked([output / "jobs" / f"{run.name}.lock"], wait):
            with _locked(_locks_of_commands(run), wait):
                pass  # the command of a killed driver has ended; no other driver starts one now
            return _execute(output, run, environment, digests or FileDigests())
    except Timeout:
        return BUSY
    except (OSError, NotImplementedError, UserError) as error:  # only this run fails
        return f"{error} ({log_file(output, run)})"


def require_locks(output: Path) -> None:
    """Raises UserError where files in `output` cannot be locked."""
    file = output / "jobs" / temporary_name(Path("locks"))
    try:
        with _locked([file], wait=False):
            pass
    except (OSError, NotImplementedError) as error:  # also Timeout: the name is unique
        raise UserError(
            f"files in {output} cannot be locked ({error}), which keeps two commands from executing one run; "
            "give a folder of another file system"
        ) from error
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def _execute(output: Path, run: Run, environment: Mapping[str, str], digests: FileDigests) -> str | None:
    if run.training:
        current = read_inputs(run.training, digests=digests).fingerprint
        if not _is_trained(run.training, current):
            _prepare_training(output, run, current)
            file = _config_file(output, run, "train")
            write_json(file, {"config": run.training.plain(), "fingerprint": current})
            if failure := _command("train.py", file, log_file(output, run), environment):
                return failure
    outdated = {scoring: _outdated(scoring, digests) for scoring in run.scorings}
    for record in itertools.chain(*outdated.values()):
        record.unlink(missing_ok=True)  # else a table would show it if this run fails
    for scoring in run.scorings:
        if outdated[scoring]:
            file = _config_file(output, run, scoring.weights)
            write_json(file, {"config": scoring.config.plain()})
            if failure := _command("test.py", file, log_file(output, run), environment):
                return failure
    return None


def _config_file(output: Path, run: Run, name: str) -> Path:
    return output / "jobs" / f"{run.name}.{name}.json"


def _locks_of_commands(run: Run) -> list[Path]:
    """The files that the commands of a run lock, as far as they exist."""
    written = run.records + ([checkpoint_files(run.training).state] if run.training else [])
    return [lock for lock in map(lock_file, written) if lock.is_file()]


def _read(file: Path) -> dict:
    """A JSON file; empty if there is none or it is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_trained(config: TrainingConfig, current: dict) -> bool:
    """Whether the training with the fingerprint `current` is finished, with all its files."""
    files = checkpoint_files(config)
    needed = [files.selected, files.last, *([files.source] if config.held_out and config.select == "best" else [])]
    whole = all(file.is_file() for file in needed) and not files.state.is_file()
    return whole and _read(files.record).get("fingerprint") == current


def _outdated(scoring: Scoring, digests: FileDigests) -> list[Path]:
    """The records of a scoring that do not exist or do not have the fingerprints of now."""
    config = scoring.config
    items = list_test_items(category_folder(config.data_path, config.data_type, config.obj), need_both=False)
    try:
        current = {job.files.record: job.fingerprint for job in make_plan(config, items, digests).jobs}
    except UserError:  # no checkpoint yet; where there is another reason, test.py gives it
        return list(scoring.records)
    return [file for file in scoring.records if file not in current or _read(file).get("fingerprint") != current[file]]


def _prepare_training(output: Path, run: Run, current: dict) -> None:
    """Removes the records and moves the weights aside that an earlier training with another fingerprint left."""
    if _read(_config_file(output, run, "train")).get("fingerprint") == current:
        return
    for record in run.records:
        record.unlink(missing_ok=True)
    folder, number = checkpoint_files(run.training).state.parent, 1
    if folder.is_dir():
        while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
            number += 1
        os.rename(folder, aside)


@contextmanager
def _locked(files: Iterator[Path] | Sequence[Path], wait: bool) -> Iterator[None]:
    """Holds the locks of all `files`. Raises filelock.Timeout if another process holds one and `wait` is False."""
    with ExitStack() as stack:
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(file, timeout=-1 if wait else 0, mode=0o666))
        yield


def _command(script: str, file: Path, log: Path, environment: Mapping[str, str]) -> str | None:
    """Runs a command of the project with the configuration in `file`. Returns None, or why it failed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as stream:
        stream.write(f"\n$ python {script} --config {file}\n".encode(errors="backslashreplace"))
        stream.flush()
        code = _run([script, "--config", str(file)], stream, environment)
    return f"{script} ended with code {code}: {_last_line(log)} ({log})" if code else None


def _run(command: Sequence[str], stream: object, environment: Mapping[str, str]) -> int:
    """The exit code of a script of the project, whose output goes to the file `stream`."""
    script, *arguments = command
    with subprocess.Popen(
        [sys.executable, str(PROJECT_ROOT / script), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
    ) as process:
        try:
            return process.wait()
        except BaseException:  # Ctrl-C, or the end of a cluster's job
            process.kill()
            raise


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.rsplit("\r", 1)[-1] for line in reversed(lines) if line.strip()), "")
    return ""
