"""The cells of a results table. A run of a cell may be killed at any time and is resumed by the next one.

A cell is a sequence of commands, usually train.py and test.py. Its files in the results folder, beside the records:
jobs/<name>.started, .done     JSON stamps: the key of the cell that was started or finished
jobs/<name>.lock               locked (flock) by the process that runs the cell, and by its commands
logs/<name>.log                the output of the commands

Locks keep two commands from running one cell. Where there are none (Windows, some network file systems), commands must
share no cell: --shard gives each its own, and a cell's commands end with the command that started them.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError
from utils.files import PROJECT_ROOT, sha256, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

BUSY = "another process works on it"


class Cell(NamedTuple):
    """One unit of work, for one category and some shots."""

    name: str
    category: str
    shots: tuple[int, ...]
    commands: tuple[tuple[str, ...], ...]  # each a script of the project and its arguments
    key: str  # a digest of everything that the numbers depend on: arguments, data, code
    trained: Path | None  # the folder that train.py writes to; None where nothing is trained
    records: tuple[str, ...]  # names of the files that a finished cell leaves in the results folder
    weights: tuple[str, ...] = ()  # the kinds of weights that are scored, keys of experiments.results.WEIGHTS
    training: str = ""  # a digest of what the weights depend on; the same weights may be scored in other ways


Report = Callable[[Cell, str | None], None]  # called with each cell that has ended and the answer of `run_cell`


class Fingerprints:
    """The SHA-256 of files; each file is read once."""

    def __init__(self) -> None:
        self.known: dict[Path, str] = {}

    def read(self, files: Sequence[Path]) -> None:
        """Computes the hashes that are not known yet, several at a time."""
        unknown = sorted(set(files) - set(self.known))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter lock
            self.known.update(zip(unknown, pool.map(sha256, unknown), strict=True))

    def of(self, files: Sequence[Path]) -> list[tuple[str, str]]:
        """(folder name/file name, SHA-256) of each file; independent of the path of the data."""
        self.read(files)
        return [(f"{file.parent.name}/{file.name}", self.known[file]) for file in files]


def log_file(output: Path, cell: Cell) -> Path:
    """The file with the output of a cell's commands."""
    return output / "logs" / f"{cell.name}.log"


def is_finished(output: Path, cell: Cell) -> bool:
    """Whether a cell with this key is finished and its records are unchanged since."""
    stamp = _read_stamp(_job_file(output, cell, "done"))
    if stamp.get("key") != cell.key:
        return False
    return all((output / name).is_file() and sha256(output / name) == stamp["records"][name] for name in cell.records)


def is_begun(output: Path, cell: Cell) -> bool:
    """Whether a cell with this key was started before."""
    return _read_stamp(_job_file(output, cell, "started")).get("key") == cell.key


def run_cell(
    output: Path, cell: Cell, environment: Mapping[str, str], wait: bool = True, alone: bool = False
) -> str | None:
    """Runs the commands of a cell unless it is finished. Returns None when it is finished, else a sentence on why not.

    With `wait`, another process that runs the cell is waited for; without, BUSY is returned. The commands inherit the
    lock: while a command is still running after its driver was killed, no other driver starts the cell. `alone`: no
    other driver has this cell, so that it also runs where locks fail; its commands then end with their driver.
    """
    try:
        with _locked(_job_file(output, cell, "lock"), wait, alone) as lock:
            return None if is_finished(output, cell) else _run_commands(output, cell, environment, lock)
    except _Busy:
        return BUSY
    except OSError as error:  # no space, no permission, no locks: only this cell fails
        return f"{error} ({log_file(output, cell)})"


def require_locks(output: Path) -> None:
    """Raises UserError where files in `output` cannot be locked."""
    try:
        with _locked(output / "jobs" / "locks.lock", wait=True, alone=False):
            pass
    except _NoLocksError as error:
        raise UserError(
            f"{output} has no file locks ({error}), which keep two commands from running one cell: "
            "give each command its own cells with --shard I/N, or --shard 0/1 if it is the only one"
        ) from error


def _run_commands(output: Path, cell: Cell, environment: Mapping[str, str], lock: int | None) -> str | None:
    _begin(output, cell)
    log = log_file(output, cell)
    for command in cell.commands:
        code = _run(command, log, environment, lock)
        if code:
            return f"{command[0]} ended with code {code}: {_last_line(log)} ({log})"
    records = {name: sha256(output / name) for name in cell.records}
    write_json(_job_file(output, cell, "done"), {"key": cell.key, "commands": cell.commands, "records": records})
    return None


def _job_file(output: Path, cell: Cell, kind: str) -> Path:
    return output / "jobs" / f"{cell.name}.{kind}"


def _read_stamp(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


class _Busy(Exception):
    """Another process holds the lock."""


class _NoLocksError(OSError):
    """Files cannot be locked: not on this system, or not on this file system."""


@contextmanager
def _locked(file: Path, wait: bool, alone: bool) -> Iterator[int | None]:
    """Yields a locked open file; with `alone`, None where locks fail.

    Raises:
        _Busy: another process holds the lock and `wait` is False.
        _NoLocksError: locks fail and `alone` is False.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield lock if _lock(lock, wait, alone) else None
    finally:
        os.close(lock)


def _lock(lock: int, wait: bool, alone: bool) -> bool:
    """Whether the open file is locked now; raises as `_locked`."""
    try:
        if fcntl is None:
            raise OSError("not on this system")
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise _Busy from error
    except OSError as error:
        if not alone:
            raise _NoLocksError(error.strerror or str(error)) from error
        return False
    return True


def _begin(output: Path, cell: Cell) -> None:
    """Writes the stamp of a started cell.

    If a cell of the same name and another key was started before, its records are removed. Its weights are moved aside,
    unless they depend on the same.
    """
    if is_begun(output, cell):
        return
    before = _read_stamp(_job_file(output, cell, "started"))
    outdated = _read_stamp(_job_file(output, cell, "done")).get("records", {})
    for name in {*cell.records, *outdated}:
        (output / name).unlink(missing_ok=True)  # else a table would show them if this cell fails
    same_weights = bool(cell.training) and before.get("training") == cell.training
    if cell.trained is not None and cell.trained.is_dir() and not same_weights:
        number = 1
        while (aside := cell.trained.with_name(f"{cell.trained.name}.old{number}")).exists():
            number += 1
        os.rename(cell.trained, aside)
    stamp = {"key": cell.key, "training": cell.training, "commands": cell.commands}
    write_json(_job_file(output, cell, "started"), stamp)


def _run(command: Sequence[str], log: Path, environment: Mapping[str, str], lock: int | None) -> int:
    """Runs a script of the project, appends its output to `log`, and returns the exit code.

    lock: the open lock file, which the script inherits; None: the script ends when this process does.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    script, *arguments = command
    leash = [] if lock is not None else [str(PROJECT_ROOT / "experiments" / "leash.py")]
    with open(log, "ab") as stream:
        stream.write(f"\n$ python {shlex.join(command)}\n".encode())
        stream.flush()
        with subprocess.Popen(
            [sys.executable, *leash, str(PROJECT_ROOT / script), *arguments],
            stdin=subprocess.PIPE if leash else subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            pass_fds=() if lock is None else (lock,),
        ) as process:  # the pipe stays open until the script has ended
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
