"""The cells of a results table: which are finished, and how one is run so that it may be killed at any time.

A cell is a few commands in turn, usually train.py and then test.py. In the results folder, beside the records:
jobs/<name>.started, .done     stamps, JSON: the key of what was begun and of what is finished
jobs/<name>.lock               locked (flock) by whoever works on the cell, and by its commands
logs/<name>.log                what the commands print
"""

from __future__ import annotations

import fcntl
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

from utils.files import PROJECT_ROOT, sha256, write_json

BUSY = "another process works on it"


class Cell(NamedTuple):
    """One unit of work, for one category and some shots.

    commands: each a script of the project and its arguments. key: a digest of all that decides the numbers: arguments,
    data, code. trained: the folder that train.py fills, None where nothing is trained. records: names of the files in
    the results folder that are there when the cell is finished.
    """

    name: str
    category: str
    shots: tuple[int, ...]
    commands: tuple[tuple[str, ...], ...]
    key: str
    trained: Path | None
    records: tuple[str, ...]


class Fingerprints:
    """SHA-256 of files, each read once."""

    def __init__(self) -> None:
        self.known: dict[Path, str] = {}

    def read(self, files: Sequence[Path]) -> None:
        """Hashes the files that are not known yet, several at a time."""
        unknown = sorted(set(files) - set(self.known))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter lock
            self.known.update(zip(unknown, pool.map(sha256, unknown), strict=True))

    def of(self, files: Sequence[Path]) -> list[tuple[str, str]]:
        """(folder's name and file's name, SHA-256) of each file: the same wherever the data lie."""
        self.read(files)
        return [(f"{file.parent.name}/{file.name}", self.known[file]) for file in files]


def log_file(output: Path, cell: Cell) -> Path:
    """Where a cell's commands print to."""
    return output / "logs" / f"{cell.name}.log"


def is_finished(output: Path, cell: Cell) -> bool:
    """Whether this very cell is done and its records are as it left them."""
    stamp = _read_stamp(_job_file(output, cell, "done"))
    if stamp.get("key") != cell.key:
        return False
    return all((output / name).is_file() and sha256(output / name) == stamp["records"][name] for name in cell.records)


def is_begun(output: Path, cell: Cell) -> bool:
    """Whether this very cell was begun before."""
    return _read_stamp(_job_file(output, cell, "started")).get("key") == cell.key


def run_cell(output: Path, cell: Cell, environment: Mapping[str, str], wait: bool = True) -> str | None:
    """Runs a cell's commands unless it is finished. None: finished. Otherwise a sentence that says what is wrong.

    Its lock is inherited by the commands: while one of them lives on after a killed driver, the cell is not begun anew.
    wait: whether to wait for another process that works on the cell; if not, BUSY is given.
    """
    with _locked(_job_file(output, cell, "lock"), wait) as lock:
        if lock is None:
            return BUSY
        try:
            return None if is_finished(output, cell) else _run_commands(output, cell, environment, lock)
        except OSError as error:  # no space, no permission: this cell fails, the others go on
            return f"{error} ({log_file(output, cell)})"


def _run_commands(output: Path, cell: Cell, environment: Mapping[str, str], lock: int) -> str | None:
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


@contextmanager
def _locked(file: Path, wait: bool) -> Iterator[int | None]:
    """An open file that is locked; None if another process has it and `wait` is off."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield lock if _lock(lock, wait) else None
    finally:
        os.close(lock)


def _lock(lock: int, wait: bool) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _begin(output: Path, cell: Cell) -> None:
    """Notes that the cell is begun. Of an earlier, different one of that name, weights are moved aside, records go."""
    if is_begun(output, cell):
        return
    for name in cell.records:
        (output / name).unlink(missing_ok=True)  # or a table would show them if this cell fails
    if cell.trained is not None and cell.trained.is_dir():
        number = 1
        while (aside := cell.trained.with_name(f"{cell.trained.name}.old{number}")).exists():
            number += 1
        os.rename(cell.trained, aside)
    write_json(_job_file(output, cell, "started"), {"key": cell.key, "commands": cell.commands})


def _run(command: Sequence[str], log: Path, environment: Mapping[str, str], lock: int) -> int:
    """The exit code of a script of the project; what it prints is appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    script, *arguments = command
    with open(log, "ab") as stream:
        stream.write(f"\n$ python {shlex.join(command)}\n".encode())
        stream.flush()
        return subprocess.run(
            [sys.executable, str(PROJECT_ROOT / script), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            pass_fds=[lock],
            check=False,
        ).returncode


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.rsplit("\r", 1)[-1] for line in reversed(lines) if line.strip()), "")
    return ""


Report = Callable[[Cell, str | None], None]  # called for each cell that has ended, with run_cell's answer
