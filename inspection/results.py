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
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import NamedTuple, TextIO

import numpy as np
from PIL import Image
from skimage.measure import label, regionprops

from datasets.images import HOW_READ, SEVERAL
from inspection.config import CSV_KINDS
from inspection.inputs import Identity, current_name
from inspection.threshold import Threshold
from utils.errors import UserError, WriteError
from utils.files import locked, whole_file, write_line
from utils.text import path_text, text_path

NORMAL, REVIEW, DEFECTIVE = DECISIONS = ("normal", "review", "defective")
REVIEW_BEFORE = "unusual"  # the decision, and the name of `reason`, in files of earlier versions
EXCEL_COMMA = CSV_KINDS[-1]  # decimal commas, between semicolons
EXCEL_COLUMNS = ("part", "file")
ISO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
RECORD, SCORES, BOXES, SUMMARY, PAGE = "results.jsonl", "scores.csv", "boxes.csv", "scores.json", "report.html"
ROW_BEGIN = b'{"time": '
MOST_BOXES = 100  # of an image; those with the highest peaks


class Box(NamedTuple):
    """The smallest upright rectangle around one region of a score map above the threshold.

    area: pixels of the region itself, at most width * height. peak: its highest score.

    Convention: pixels of the image as it is displayed (after its EXIF orientation), origin at the top left, x to the
    right and y down. The box covers the columns x .. x + width - 1 and the rows y .. y + height - 1.
    """

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float


def find_boxes(scores: np.ndarray, limit: float) -> list[Box]:
    """The boxes of the regions of a score map (H, W) above `limit`, highest peak first, at most MOST_BOXES.

    A region is a set of pixels with scores above `limit` that touch each other at a side or a corner.
    """
    boxes = []
    for region in regionprops(label(scores > limit, connectivity=2), intensity_image=scores):
        top, left, bottom, right = region.bbox
        boxes.append(Box(left, top, right - left, bottom - top, int(region.area), float(region.intensity_max)))
    return sorted(boxes, key=lambda box: -box.peak)[:MOST_BOXES]  # equal peaks: from top to bottom


class Prediction(NamedTuple):
    """The result of one image.

    time: when it was scored, ISO 8601 with the zone. path, bytes, modified: see `inspection.inputs.Identity`; the last
    two are None for a file that does not exist or changed while it was read. score: a distance, at least 0; None if the
    image cannot be read. relative: the score as a multiple of a typical normal score, None where none is known.
    decision: one of DECISIONS, or None without a threshold or score. reason: why a person should look at the image, for
    the decision `review`, or why regions do not count, for `normal`. threshold, review_threshold: those that the
    decision was made with. detector: see `FewShotDetector.identity`. error: why the image cannot be read, or its files
    cannot be written. warning: why the score may mislead. boxes: regions above the threshold. files: what was written
    for the image, relative to the output folder. quality: measures of the image by name, see inspection/quality.py.
    """

    time: str
    path: str
    bytes: int | None
    modified: str | None
    score: float | None
    relative: float | None
    decision: str | None
    reason: str | None
    threshold: float | None
    detector: str
    error: str | None = None
    warning: str | None = None
    review_threshold: float | None = None
    boxes: Sequence[Box] = ()
    files: Sequence[str] = ()
    quality: Mapping[str, float] = MappingProxyType({})

    @property
    def identity(self) -> Identity:
        return Identity(self.path, self.bytes, self.modified)

    @property
    def is_flagged(self) -> bool:
        """Whether somebody should look at the image: its decision is another than normal."""
        return self.decision not in (NORMAL, None)

    @property
    def is_undecided(self) -> bool:
        """Whether the image has a score and no decision."""
        return self.score is not None and self.decision is None

    def plain(self) -> dict:
        """The row as it stands in JSON files."""
        return self._asdict() | {
            "boxes": [box._asdict() for box in self.boxes],
            "files": list(map(path_text, self.files)),
            "quality": dict(self.quality),
        }


def now() -> str:
    """The time as it stands in rows and printed lines."""
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


CSV_COLUMNS = Prediction._fields[: Prediction._fields.index("boxes")]
BOX_COLUMNS = ("time", "path", *Box._fields)
TABLES = {SCORES: CSV_COLUMNS, BOXES: BOX_COLUMNS}


def decide(
    score: float,
    threshold: Threshold | None,
    stopped: str = "",
    scores: np.ndarray | None = None,
    min_area: float = 0.0,
) -> tuple[str | None, str | None]:
    """The decision on a score and its reason, if it has one; (None, None) without a threshold.

    stopped: why the score means nothing, see `inspection.scoring.ImageResult`, or "". scores, min_area: the score map
    in the image's own size, and the area of the smallest defect in its pixels. An image whose regions above the lower
    threshold are all smaller is normal.
    """
    if stopped:
        return REVIEW, stopped
    if threshold is None:
        return None, None
    if score > threshold.review_value and min_area and scores is not None:
        regions = label(scores > threshold.review_value, connectivity=2)
        area = np.bincount(regions.ravel())[1:].max(initial=0)
        if 0 < area < min_area:  # 0: the score lies above the highest value of the map
            return NORMAL, f"largest region above the lower threshold: {area} of at least {min_area:.0f} pixels"
    if score > threshold.value:
        return DEFECTIVE, None
    if score > threshold.review_value:
        return REVIEW, f"score between {threshold.review_value:.3f} and the threshold {threshold.value:.3f}"
    return NORMAL, None


def as_far_as_read(image: Image.Image, decided: tuple[str | None, str | None]) -> tuple[str | None, str | None]:
    """What `decide` says of an image, which is not normal where only the first of several pages was scored."""
    unread = SEVERAL in image.info and decided[0] == NORMAL
    return (REVIEW, f"{SEVERAL}: {HOW_READ[SEVERAL]}") if unread else decided


def relative_score(score: float, threshold: Threshold | None) -> float | None:
    """The score as a multiple of the median score of the normal images; None where no normal scores are known."""
    if threshold is None or threshold.typical <= 0 or not threshold.knows_normal:
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

    kind: how the CSV files are written, one of CSV_KINDS; part: its name, for those of Excel. rows: earlier ones first.
    done: their identities. taken: the files written for them, relative to the folder.

    Raises:
        UserError: the folder cannot be written, another process writes to it, or its results cannot be continued.
    """

    def __init__(self, folder: Path, overwrite: bool = False, kind: str = CSV_KINDS[0], part: str = "") -> None:
        self.folder, self._open, self._kind, self._part = folder, ExitStack(), kind, part
        if not overwrite and _is_of_earlier_version(folder):
            raise UserError(
                f"{folder} holds results without {RECORD}, in the format of version 0.1; give another folder",
                options=("output", "overwrite"),
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._open.enter_context(locked([folder / RECORD]))
            self._record = self._open.enter_context((folder / RECORD).open("ab", buffering=0))  # one write per row
            if overwrite:
                _remove_results(folder)
                self._record.truncate(0)
            self.rows = self._read_record()
            self._tables = {name: self._open_table(name) for name in TABLES}
        except OSError as error:
            self.close()
            raise UserError(f"cannot write {error.filename or folder}: {error.strerror}") from error
        except UserError:
            self.close()
            raise
        # where the files of a row could not be written, --append tries again
        done = {row.identity for row in self.rows if row.score is None or not row.error}
        self.done = done | {identity._replace(path=current_name(identity.path)) for identity in done}
        self.taken = {name for row in self.rows for name in row.files}

    def _read_record(self) -> list[Prediction]:
        """The earlier rows. A last line that was cut off when the process was killed is removed.

        A last row that only lacks its line end, as an editor may leave it, stays.
        """
        file, rows = self.folder / RECORD, []
        lines = file.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                rows += [_row(json.loads(line))] if line.strip() else []
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                if number == len(lines) and _is_torn(line, error):
                    self._record.truncate(sum(map(len, lines[:-1])))
                    return rows
                reason = f"{file}, line {number} is not a row of predict.py ({type(error).__name__}: {error})"
                raise UserError(f"{reason}; mend it, or give another folder", ("output", "overwrite")) from error
        if lines and not lines[-1].endswith(b"\n"):
            self._record.write(b"\n")
        return rows

    def _open_table(self, name: str) -> TextIO:
        """Writes a table from the rows, as it may lack some after a kill, and opens it for more."""
        options = {"newline": "", "errors": "backslashreplace"}
        is_plain = self._kind == CSV_KINDS[0]
        with (
            whole_file(self.folder / name) as aside,
            open(aside, "w", encoding="utf-8" if is_plain else "utf-8-sig", **options) as stream,
        ):
            self._write(stream, name, self.rows, header=[*(() if is_plain else EXCEL_COLUMNS), *TABLES[name]])
        return self._open.enter_context((self.folder / name).open("a", encoding="utf-8", **options))

    def _write(self, stream: TextIO, name: str, rows: Iterable[Prediction], header: Sequence[str] = ()) -> None:
        """Writes the lines of rows. Numbers have all their digits, as in JSON; None is empty.

        For Excel, all times have one form, and numbers may have a decimal comma.
        """
        writer = csv.writer(stream, delimiter=";" if self._kind == EXCEL_COMMA else ",")
        writer.writerows([header] if header else [])
        for row in rows:
            lines = [row[: len(CSV_COLUMNS)]] if name == SCORES else [(row.time, row.path, *box) for box in row.boxes]
            if self._kind != CSV_KINDS[0]:
                more = self._part, re.split(r"[/\\]", row.path)[-1]
                lines = [[self._excel(value) for value in (*more, *line)] for line in lines]
            writer.writerows(lines)

    def _excel(self, value: object) -> object:
        """A value as Excel reads it: a time of a row in local time, a number with the comma that was asked for."""
        if isinstance(value, float) and self._kind == EXCEL_COMMA:
            return str(value).replace(".", ",")
        if not (isinstance(value, str) and ISO_TIME.fullmatch(value)):
            return value
        moment = datetime.fromisoformat(re.sub(r"(\.\d{6})\d*", r"\1", value).replace("Z", "+00:00"))
        return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")

    def add(self, row: Prediction) -> None:
        """Appends a row to all tables. The caller holds back interruptions.

        Raises:
            WriteError: a file cannot be written; the row may be missing in some of the tables.
        """
        try:
            if not os.fstat(self._record.fileno()).st_nlink:  # what is written would be lost
                raise FileNotFoundError(errno.ENOENT, "it was removed or replaced meanwhile")
            write_line(self._record, json.dumps(row.plain(), allow_nan=False))
            for name, stream in self._tables.items():
                self._write(stream, name, [row])
                stream.flush()
        except OSError as error:
            raise WriteError(error.errno, error.strerror, str(self.folder / RECORD)) from error
        self.rows.append(row)
        self.done.add(row.identity)
        self.taken.update(row.files)

    def close(self) -> None:
        self._open.close()


def _is_torn(line: bytes, error: Exception) -> bool:
    """Whether a last line that is no row begins like one, as a kill leaves it; NUL: a power failure."""
    is_part = ROW_BEGIN.startswith(line[: len(ROW_BEGIN)]) or not line.strip(b"\0")
    return is_part and not line.endswith(b"\n") and isinstance(error, json.JSONDecodeError | UnicodeDecodeError)


def _row(values: dict) -> Prediction:
    """A row from its JSON object. Unknown entries are ignored, those of later versions may be missing."""
    if REVIEW_BEFORE in values:
        values = values | {"reason": values[REVIEW_BEFORE]}
        values["decision"] = REVIEW if values["decision"] == REVIEW_BEFORE else values["decision"]
    known = {name: values[name] for name in CSV_COLUMNS if name in values or name not in Prediction._field_defaults}
    if known["decision"] not in (*DECISIONS, None) or not isinstance(known["path"], str):
        raise ValueError(f"decision {known['decision']}, path {known['path']}")
    numbers = (known.get(name) for name in ("score", "relative", "threshold", "review_threshold"))
    if not all(number is None or math.isfinite(number) for number in numbers):
        raise ValueError("a score or threshold is not finite")
    boxes, files = [Box(**box) for box in values["boxes"]], [text_path(str(file)) for file in values["files"]]
    return Prediction(**known, boxes=boxes, files=files, quality=dict(values.get("quality", {})))


def _remove_results(folder: Path) -> None:
    """Removes the results of an earlier run and the files that its record lists, and no other file."""
    for line in (folder / RECORD).read_bytes().splitlines():
        with suppress(ValueError, TypeError, KeyError):  # a damaged record is overwritten, too
            for place in (PurePosixPath(text_path(str(name))) for name in json.loads(line)["files"]):
                if not place.is_absolute() and ".." not in place.parts:
                    (folder / place).unlink(missing_ok=True)
    for name in (SCORES, BOXES, SUMMARY, PAGE):
        (folder / name).unlink(missing_ok=True)
