"""The results of images: one row each, appended to the files of an output folder as they come.

results.jsonl   one JSON object per line, written first; the other tables are made again from it after an interruption
scores.csv      the same rows without boxes and files
boxes.csv       one line per box, with the row's time and path

A row is never changed: it keeps the decision, the threshold and the detector that it was made with. predict.py writes
scores.json and report.html from the same rows.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from inspection.boxes import Box
from inspection.inputs import Identity
from inspection.threshold import Threshold
from utils.errors import UserError
from utils.files import whole_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NORMAL, DEFECTIVE, UNUSUAL = DECISIONS = ("normal", "defective", "unusual")
RECORD, SCORES, BOXES, SUMMARY, PAGE = "results.jsonl", "scores.csv", "boxes.csv", "scores.json", "report.html"


class Prediction(NamedTuple):
    """The result of one image.

    time: when it was scored, ISO 8601 with the zone. path, bytes, modified: see `inspection.inputs.Identity`; the last
    two are None for a file that does not exist or changed while it was read. score: a distance, at least 0; None if the
    image cannot be read. relative: the score as a multiple of a typical normal score, None where none is known.
    decision: one of DECISIONS, or None without a threshold or score. unusual: why the image is unlike the support as a
    whole, for the decision `unusual`. threshold: the one that the decision was made
    with. detector: see `FewShotDetector.identity`. error: why the image cannot be read, or its files cannot be written.
    warning: why the score may mislead. boxes: regions above the threshold. files: what was written for the image,
    relative to the output folder.
    """

    time: str
    path: str
    bytes: int | None
    modified: str | None
    score: float | None
    relative: float | None
    decision: str | None
    unusual: str | None
    threshold: float | None
    detector: str
    error: str | None = None
    warning: str | None = None
    boxes: Sequence[Box] = ()
    files: Sequence[str] = ()

    @property
    def identity(self) -> Identity:
        return Identity(self.path, self.bytes, self.modified)

    @property
    def is_flagged(self) -> bool:
        """Whether somebody should look at the image: its decision is another than normal."""
        return self.decision not in (NORMAL, None)

    def plain(self) -> dict:
        """The row as it stands in JSON files."""
        return self._asdict() | {"boxes": [box._asdict() for box in self.boxes], "files": list(self.files)}


CSV_COLUMNS = Prediction._fields[: Prediction._fields.index("boxes")]
BOX_COLUMNS = ("time", "path", *Box._fields)


def decide(score: float, threshold: Threshold | None, unusual: str = "") -> str | None:
    """The decision on a score; None without a threshold. unusual: why the score means nothing, or ""."""
    if unusual:
        return UNUSUAL
    if threshold is None:
        return None
    return DEFECTIVE if score > threshold.value else NORMAL


def relative_score(score: float, threshold: Threshold | None) -> float | None:
    """The score as a multiple of the median score of the normal images; None where no normal scores are known."""
    if threshold is None or threshold.typical <= 0:
        return None
    if threshold.typical == threshold.region == threshold.value:  # a threshold given without any normal image
        return None
    return score / threshold.typical


def count_decisions(rows: Iterable[Prediction]) -> dict[str, int]:
    """The number of rows by outcome: scored, each of DECISIONS, and failed (with an error)."""
    rows = list(rows)
    decisions = Counter(row.decision for row in rows)
    scored, failed = sum(row.score is not None for row in rows), sum(row.error is not None for row in rows)
    return {"scored": scored, **{name: decisions[name] for name in DECISIONS}, "failed": failed}


def has_results(folder: Path) -> bool:
    """Whether the output folder holds results of an earlier run."""
    record = folder / RECORD
    return _is_of_earlier_version(folder) or (record.is_file() and record.stat().st_size > 0)


def _is_of_earlier_version(folder: Path) -> bool:
    return not (folder / RECORD).exists() and any((folder / name).exists() for name in (SCORES, SUMMARY))


class ResultFiles:
    """The tables of an output folder: earlier rows are kept, or removed with the files that were written for them.

    rows: earlier ones first. done: their identities. taken: the files written for them, relative to the folder.

    Raises:
        UserError: the folder cannot be written, another process writes to it, or its results cannot be continued.
    """

    def __init__(self, folder: Path, overwrite: bool = False) -> None:
        self.folder = folder
        if not overwrite and _is_of_earlier_version(folder):
            raise UserError(
                f"{folder} holds results without {RECORD}, as earlier versions wrote them; give another folder",
                options=("output", "overwrite"),
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._record = open(folder / RECORD, "ab", buffering=0)  # noqa: SIM115, unbuffered: one write per row
        except OSError as error:
            raise UserError(f"cannot write {folder / RECORD}: {error.strerror}") from error
        try:
            self._prepare(overwrite)
        except BaseException:
            self._record.close()
            raise

    def _prepare(self, overwrite: bool) -> None:
        self._lock()
        self.rows: list[Prediction] = [] if overwrite else self._read_record()
        self.done = {row.identity for row in self.rows}
        self.taken = {name for row in self.rows for name in row.files}
        try:
            if overwrite:
                _remove_results(self.folder)
                self._record.truncate(0)
            self._write_tables()
            self._tables = [_open_table(self.folder / name, "a") for name in (SCORES, BOXES)]
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}") from error

    def _lock(self) -> None:
        try:
            if fcntl:
                fcntl.flock(self._record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another predict.py writes to {self.folder}; give another folder", ("output",)) from error
        except OSError:  # a file system without locks
            return

    def _read_record(self) -> list[Prediction]:
        """The earlier rows. A last line that was cut off when the process was killed is removed."""
        content = (self.folder / RECORD).read_bytes()
        whole = content.rfind(b"\n") + 1
        self._record.truncate(whole)
        try:
            return [_row(json.loads(line)) for line in content[:whole].splitlines()]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.folder / RECORD} is not a record of predict.py", ("output",)) from error

    def _write_tables(self) -> None:
        """Writes the tables from the rows: after a kill, they may lack some."""
        for name, columns, lines in ((SCORES, CSV_COLUMNS, _score_lines), (BOXES, BOX_COLUMNS, _box_lines)):
            with whole_file(self.folder / name) as aside, _open_table(aside, "w") as stream:
                stream.write(_csv([columns]))
                stream.writelines(_csv(lines(row)) for row in self.rows)

    def add(self, row: Prediction) -> None:
        """Appends a row to all tables. The caller holds back interruptions.

        Raises:
            UserError: a file cannot be written; the row may be missing in some of the tables.
        """
        try:
            line = json.dumps(row.plain(), allow_nan=False).encode() + b"\n"
            if self._record.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for stream, lines in zip(self._tables, (_score_lines(row), _box_lines(row)), strict=True):
                stream.write(_csv(lines))
                stream.flush()
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}") from error
        self.rows.append(row)
        self.done.add(row.identity)
        self.taken.update(row.files)

    def close(self) -> None:
        for stream in (*self._tables, self._record):
            stream.close()


def _row(values: dict) -> Prediction:
    """A row from its JSON object. Unknown entries are ignored."""
    known = {name: values[name] for name in CSV_COLUMNS}
    return Prediction(**known, boxes=[Box(**box) for box in values["boxes"]], files=[str(f) for f in values["files"]])


def _score_lines(row: Prediction) -> list[tuple]:
    return [tuple(getattr(row, name) for name in CSV_COLUMNS)]


def _box_lines(row: Prediction) -> list[tuple]:
    return [(row.time, row.path, *box) for box in row.boxes]


def _csv(lines: Iterable[Sequence]) -> str:
    """Lines of a CSV file. Numbers have all their digits, as in JSON; None is empty."""
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows(lines)
    return stream.getvalue()


def _open_table(path: Path, mode: str) -> io.TextIOBase:
    return open(path, mode, newline="", encoding="utf-8", errors="backslashreplace")


def _remove_results(folder: Path) -> None:
    """Removes the results of an earlier run and the files that its record lists, and no other file."""
    for name in _listed_files(folder / RECORD):
        place = PurePosixPath(name)
        if not place.is_absolute() and ".." not in place.parts:
            (folder / place).unlink(missing_ok=True)
    for name in (SCORES, BOXES, SUMMARY, PAGE):
        (folder / name).unlink(missing_ok=True)


def _listed_files(record: Path) -> list[str]:
    """The files in the lines of a record that can be read."""
    names = []
    for line in record.read_bytes().splitlines():
        try:
            names += [str(name) for name in json.loads(line)["files"]]
        except (ValueError, TypeError, KeyError):  # a damaged record is overwritten, too
            continue
    return names
