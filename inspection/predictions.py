"""Unlabelled images through a fitted detector: a stream of images in, one row of results and its files each."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets.images import restore_map
from inspection.detector import SCORE_GROUP, FewShotDetector
from inspection.inputs import InputImage, absolute, full_name, read_inputs
from inspection.threshold import Threshold
from reports.drawing import CALLED, HOT, beside, colour_limits, outline, overlay, save_image
from reports.page import as_data_uri
from utils.errors import UserError
from utils.files import whole_file
from utils.stages import in_threads

CSV_COLUMNS = ("path", "score", "decision", "error")
MAP_SCALE_16BIT = 256  # a 16-bit PNG map holds score * 256, so scores up to 255.99; .npy holds the scores themselves


class Prediction(NamedTuple):
    """One image's result. decision: defective, normal, or None without a threshold. error: why there is no score."""

    path: str
    score: float | None
    decision: str | None
    error: str | None
    preview: str = ""  # for the page: the panels, small, as a data URI


class Outputs(NamedTuple):
    """What is written per image, and where: images/ and maps/ in `folder`, named as below `root`."""

    folder: Path
    root: Path
    images: bool
    maps: str  # "none", "png" or "npy"

    def place(self, kind: str, path: Path, ending: str) -> Path:
        """The file of `kind` for the image `path`; its whole name stays, as a.png and a.jpg may lie together."""
        return self.folder / kind / absolute(path).relative_to(self.root).with_name(path.name + ending)


def predict(
    detector: FewShotDetector, paths: Iterable[Path], outputs: Outputs, workers: int, previews: int
) -> Iterator[Prediction]:
    """Results in the order of `paths`; memory does not grow with their number. At most `previews` previews."""
    groups = _scored_groups(detector, paths, workers)
    finish = partial(_finish, detector, outputs, previews)
    if detector.clock.device.type != "cpu":  # a group is kept, and drawn while the network works on the next one
        return in_threads(finish, chain.from_iterable(groups), workers, ahead=SCORE_GROUP)
    # on the CPU one after the other: the network's threads wait for each other, so drawing would hold up all of them
    return (row for group in groups for row in in_threads(finish, group, workers))


def _scored_groups(detector: FewShotDetector, paths: Iterable[Path], workers: int) -> Iterator[list[tuple]]:
    """Inputs with number, score and map, in groups as the detector takes them."""
    inputs = enumerate(read_inputs(paths, detector.size, detector.keep_aspect, workers, detector.clock))
    while group := list(islice(inputs, SCORE_GROUP)):
        results = zip(*detector.score([item.square for _, item in group if item.error is None]), strict=True)
        yield [(number, item, *(next(results) if item.error is None else (None, None))) for number, item in group]


def _finish(detector: FewShotDetector, outputs: Outputs, previews: int, scored: tuple) -> Prediction:
    """Writes an image's files and makes its row."""
    number, item, score, scores = scored
    if item.error is not None:
        return Prediction(full_name(item.path), None, None, item.error)
    row = Prediction(full_name(item.path), float(score), _decide(float(score), detector.threshold), None)
    try:
        with detector.clock("pictures"):
            return row._replace(preview=_write(detector, outputs, item, scores, number < previews))
    except OSError as error:  # no room, or too wide for a JPEG; the score stays
        return row._replace(error=f"scored, but its files cannot be written: {item.path} ({error})")


def _write(
    detector: FewShotDetector, outputs: Outputs, item: InputImage, scores: np.ndarray, with_preview: bool
) -> str:
    """Writes an image's files from its score map (S, S); returns the preview, or nothing."""
    restored = restore_map(scores, *item.image.size, detector.keep_aspect)
    if outputs.maps != "none":
        _save_map(outputs.place("maps", item.path, f".{outputs.maps}"), restored)
    if not (outputs.images or with_preview):
        return ""
    panels = beside(draw_panels(item.image, restored, detector.threshold))
    preview = as_data_uri(panels) if with_preview else ""
    if outputs.images:
        save_image(outputs.place("pictures", item.path, ".jpg"), panels)
    return preview


def draw_panels(image: Image.Image, scores: np.ndarray, threshold: Threshold | None) -> list[Image.Image]:
    """Input, heat-map over it, outlines of what is hot and of what lies above the threshold; scores: (H, W)."""
    image = image.convert("RGB")
    if threshold is None:  # colours cannot be compared between images then
        return [image, overlay(image, scores, (float(scores.min()), float(scores.max())))]
    outlined = outline(outline(image, scores > threshold.region, HOT), scores > threshold.value, CALLED)
    return [image, overlay(image, scores, colour_limits(threshold.typical)), outlined]


def _save_map(path: Path, scores: np.ndarray) -> None:
    """The raw map as .npy (float32) or 16-bit .png."""
    if path.suffix == ".npy":
        with whole_file(path) as aside, open(aside, "wb") as stream:
            np.save(stream, scores)
    else:
        save_image(path, Image.fromarray(np.clip(np.rint(scores * MAP_SCALE_16BIT), 0, 65535).astype(np.uint16)))


def read_scores(path: Path, threshold: Threshold | None) -> list[Prediction]:
    """The rows in a table of `ScoreTable`, decided anew by `threshold`; none where there is no such file.

    Raises:
        UserError: the file is not such a table.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = [[row[name] for name in ("path", "score", "error")] for row in csv.DictReader(stream)]
            scores = [float(score) if score else None for _, score, _ in rows]
    except (KeyError, TypeError, ValueError, csv.Error) as fault:
        raise UserError(f"{path} is not a table of scores by predict.py; give another --output") from fault
    return [
        Prediction(name, score, _decide(score, threshold), error or None)
        for (name, _, error), score in zip(rows, scores, strict=True)
    ]


def _decide(score: float | None, threshold: Threshold | None) -> str | None:
    if score is None or threshold is None:
        return None
    return "defective" if score > threshold.value else "normal"


class ScoreTable:
    """scores.csv, written row by row, so that nothing computed is lost; `append` goes on with a file that exists."""

    def __init__(self, path: Path, append: bool) -> None:
        is_new = not (append and path.is_file())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("w" if is_new else "a", newline="", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        self._writer = csv.writer(self._stream)
        if is_new:
            self._writer.writerow(CSV_COLUMNS)

    def add(self, row: Prediction) -> None:
        """Writes one row, at once."""
        score = "" if row.score is None else f"{row.score:.9g}"  # 9 digits give a float32 back exactly
        self._writer.writerow((row.path, score, row.decision or "", row.error or ""))
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()
