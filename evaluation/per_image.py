"""The scores of every test image in every round as a CSV file: what test.py writes and reproduce.py --import reads.

    file,label,defect,round_0,round_1
    good/000.png,0,good,11.25,10.5
    scratch/000.png,1,scratch,31.5,29.75

file: <defect>/<name>, the path below the category's test folder; see `image_name`. label: 1 for a defective image.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.layouts import GOOD, LabelledImage, short_name
from utils.errors import UserError
from utils.files import whole_file
from utils.text import read_table

FILE, LABEL, DEFECT, ROUND = "file", "label", "defect", "round_"  # columns; ROUND is followed by the round's number
LABELS = {"0": 0, "1": 1, "good": 0, "normal": 0, "defective": 1, "anomaly": 1}  # accepted values of column LABEL


def image_name(item: LabelledImage) -> str:
    """The name of a test image in the CSV file: <defect>/<file name>, in every layout."""
    return f"{item.defect}/{short_name(item.image)}"


def write_scores(path: Path, items: Sequence[LabelledImage], rounds: Sequence[np.ndarray]) -> None:
    """Writes the image scores of all rounds; rounds: one array (B,) per round, in the order of `items`."""
    with whole_file(path) as aside, open(aside, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.writer(stream)
        writer.writerow([FILE, LABEL, DEFECT, *(f"{ROUND}{number}" for number in range(len(rounds)))])
        for item, scores in zip(items, np.transpose(rounds).tolist(), strict=True):
            writer.writerow([image_name(item), item.label, item.defect, *scores])


def read_scores(path: Path, items: Sequence[LabelledImage], rounds: int) -> np.ndarray:
    """The scores in a CSV file as (rounds, B), in the order of `items`.

    Column LABEL or DEFECT may be missing, not both; other columns are ignored.

    Raises:
        UserError: the file cannot be read, lacks a column, or has another number of rounds; an image of `items` is
            missing, repeated or has another label; a row names another image; or a score is not a finite number.
    """
    rows = _read_rows(path)
    columns = _columns(path, rows)
    if len(columns) != rounds:
        raise UserError(f"{path} has {len(columns)} round(s), not {rounds}; give --inferences {len(columns)}")
    by_name = _by_name(path, rows, items)
    return np.array([_numbers(path, by_name[image_name(item)], columns) for item in items]).T


class LabelledScores(NamedTuple):
    """The content of a CSV file of scores, sorted by name. labels: (B,) bool. scores: (rounds, B)."""

    names: list[str]
    labels: np.ndarray
    scores: np.ndarray


def read_labelled_scores(path: Path) -> LabelledScores:
    """The scores in a CSV file whose data set is not needed.

    Raises:
        UserError: the file cannot be read, lacks a column, or has an invalid label or score.
    """
    rows = sorted(_read_rows(path), key=lambda row: _short(row[FILE]))
    columns, labels = _columns(path, rows), [_label(row) for row in rows]
    if wrong := [row[FILE] for row, label in zip(rows, labels, strict=True) if label not in (0, 1)]:
        raise UserError(f"{path}: {wrong[0]} has no label")
    scores = np.array([_numbers(path, row, columns) for row in rows]).T
    return LabelledScores([_short(row[FILE]) for row in rows], np.array(labels, bool), scores)


def _columns(path: Path, rows: Sequence[dict[str, str]]) -> list[str]:
    """The names of the columns of the rounds; UserError if they are not numbered from 0."""
    columns = [name for name in rows[0] if name and name.startswith(ROUND)]
    if columns != [f"{ROUND}{number}" for number in range(len(columns))] or not columns:
        raise UserError(
            f"{path} needs the columns {ROUND}0, {ROUND}1, ... in order; it has {', '.join(columns) or 'none'}"
        )
    return columns


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        rows = read_table(path, errors="surrogateescape")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the scores {path}: {error}") from error
    if not rows or FILE not in rows[0] or not {LABEL, DEFECT} & set(rows[0]):
        raise UserError(
            f"{path} is not a CSV file of scores with the columns {FILE}, {LABEL} or {DEFECT}, and {ROUND}0 ..."
        )
    return rows


def _by_name(path: Path, rows: Sequence[dict[str, str]], items: Sequence[LabelledImage]) -> dict[str, dict[str, str]]:
    """The rows by the name of their image; UserError unless each image has one row, with the label of the data set."""
    labels = {image_name(item): item.label for item in items}
    names = [_short(row[FILE]) for row in rows]
    if unknown := [name for name in names if name not in labels]:
        raise UserError(f"{path} names {unknown[0]}, which is not a test image ({len(unknown)} such row(s))")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UserError(f"{path} has {times} rows of {name}")
    if missing := [name for name in labels if name not in set(names)]:
        raise UserError(f"{path} lacks {len(missing)} of {len(labels)} test images, the first is {missing[0]}")
    for name, row in zip(names, rows, strict=True):
        if (label := _label(row)) != labels[name]:
            raise UserError(f"{path}: {name} has the label {label!r}, by its folder it is {labels[name]}")
    return dict(zip(names, rows, strict=True))


def _short(file: str | None) -> str:
    """<defect>/<name> of a path in any style."""
    return "/".join((file or "").replace("\\", "/").split("/")[-2:])


def _label(row: dict[str, str]) -> int | str | None:
    """0 or 1 from column LABEL, or from DEFECT if LABEL is empty; an unknown label as it is; None without both."""
    if row.get(LABEL):
        return LABELS.get(row[LABEL].strip().lower(), row[LABEL])
    return int(row[DEFECT] != GOOD) if row.get(DEFECT) else None


def _numbers(path: Path, row: dict[str, str], columns: Sequence[str]) -> list[float]:
    """The scores of a row; UserError names the column of one that is not a finite number."""
    for column in columns:
        try:
            valid = math.isfinite(float(row[column]))
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise UserError(
                f"{path}: {row[FILE]} has the score {row[column]!r} in {column}, which is not a finite number"
            )
    return [float(row[column]) for column in columns]
