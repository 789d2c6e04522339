"""Scores unlabelled images with a fitted detector: one result row per image, with its output files."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from inspection.detector import SCORE_GROUP, FewShotDetector, as_tensor
from inspection.inputs import InputImage, absolute, full_name, read_inputs
from inspection.threshold import Threshold
from inspection.tiles import shrink_warning
from reports.drawing import CALLED, HOT, beside, colour_limits, outline, overlay, save_image
from reports.page import NO_PREVIEW, Preview, make_preview
from utils.errors import UserError
from utils.files import whole_file
from utils.stages import in_threads

CSV_COLUMNS = ("path", "score", "decision", "error")
HEAT_PANEL = "heat map"  # title of the panel that thumbnails show
UNBOUNDED_MAP_SCALE = 256  # 16-bit PNG maps store score times a scale: up to a score of 255.99 where there is no bound


class Prediction(NamedTuple):
    """The result of one image.

    path: from `inspection.inputs.full_name`. score: a distance, at least 0; None if the image cannot be read. decision:
    `defective`, `normal`, or None without a threshold or score. error: why the image cannot be read, or its files
    cannot be written. warning: why the score may mislead.
    """

    path: str
    score: float | None
    decision: str | None
    error: str | None
    warning: str | None = None
    preview: Preview = NO_PREVIEW  # for the report


class Outputs(NamedTuple):
    """Which files are written per image: in `folder`, as pictures/ and maps/, with the paths relative to `root`."""

    folder: Path
    root: Path
    images: bool
    maps: str  # "none", "png" or "npy"

    def place(self, kind: str, path: Path, ending: str) -> Path:
        """The output file of `kind` for the image `path`. Its suffix is kept, to distinguish a.png from a.jpg."""
        return self.folder / kind / absolute(path).relative_to(self.root).with_name(path.name + ending)


def predict(
    detector: FewShotDetector, paths: Iterable[Path], outputs: Outputs, workers: int, previews: int
) -> Iterator[Prediction]:
    """Yields results in the order of `paths`; memory does not grow with their number.

    workers: threads that decode and draw. previews: largest number of previews.
    """
    groups = _scored_groups(detector, paths, workers)
    finish = partial(_finish, detector, outputs, previews)
    if detector.clock.device.type != "cpu":  # drawing overlaps with the network pass of the next group
        return in_threads(finish, chain.from_iterable(groups), workers, ahead=SCORE_GROUP)
    # CPU: no overlap. The threads of the network wait for each other, so drawing would slow down all of them
    return (row for group in groups for row in in_threads(finish, group, workers))


def _scored_groups(detector: FewShotDetector, paths: Iterable[Path], workers: int) -> Iterator[list[tuple]]:
    """Yields groups of (number, input, score, map), at most SCORE_GROUP images each."""
    size, keep_aspect, bits = detector.size, detector.keep_aspect, detector.bits
    inputs = enumerate(read_inputs(paths, size, keep_aspect, workers, detector.clock, bits))
    for group in _groups(detector, inputs):
        readable = [item for _, item in group if item.error is None]
        results = zip(*detector.score([_to_score(detector, item) for item in readable]), strict=True)
        yield [(number, item, *(next(results) if item.error is None else (None, None))) for number, item in group]


def _groups(detector: FewShotDetector, inputs: Iterable[tuple[int, InputImage]]) -> Iterator[list]:
    """Groups of at most SCORE_GROUP images; an image that is cut ends its group, as it is large.

    Says once per image size on standard error how such images are cut, or how much they shrink.
    """
    group, said = [], set()
    for number, item in inputs:
        group.append((number, item))
        layout, note = None, None
        if item.image:
            layout = detector.layout_of(*item.image.size)
            note = f"tiles: {layout}" if layout else shrink_warning(*item.image.size, detector.size)
        if note and note not in said:
            print(note, file=sys.stderr)
            said.add(note)
        if layout or len(group) == SCORE_GROUP:
            yield group
            group = []
    if group:
        yield group


def _to_score(detector: FewShotDetector, item: InputImage) -> Image.Image | torch.Tensor:
    return item.image if detector.layout_of(*item.image.size) else as_tensor(item.square)


def _finish(detector: FewShotDetector, outputs: Outputs, previews: int, scored: tuple) -> Prediction:
    """Writes the files of an image and returns its row."""
    number, item, score, scores = scored
    if item.error is not None:
        return Prediction(full_name(item.path), None, None, item.error)
    decision = _decide(float(score), detector.threshold)
    row = Prediction(full_name(item.path), float(score), decision, None, item.warning)
    try:
        with detector.clock("pictures"):
            return row._replace(preview=_write(detector, outputs, item, scores, number < previews))
    except OSError as error:  # disk full, or too wide for a JPEG; the score is kept
        return row._replace(error=f"scored, but its files cannot be written: {item.path} ({error})")


def _write(
    detector: FewShotDetector, outputs: Outputs, item: InputImage, scores: np.ndarray, with_preview: bool
) -> Preview:
    """Writes the files of an image from its score map; returns the preview, empty unless asked for."""
    restored = detector.restore(scores, *item.image.size)
    if outputs.maps != "none":
        _save_map(outputs.place("maps", item.path, f".{outputs.maps}"), restored, map_scale(detector))
    if not (outputs.images or with_preview):
        return NO_PREVIEW
    panels = draw_panels(item.image, restored, detector.threshold)
    if outputs.images:
        save_image(outputs.place("pictures", item.path, ".jpg"), beside(list(panels.values())))
    return make_preview(panels, HEAT_PANEL) if with_preview else NO_PREVIEW


def draw_panels(image: Image.Image, scores: np.ndarray, threshold: Threshold | None) -> dict[str, Image.Image]:
    """The panels by title: the image, the heat map over it, outlines of regions above `region` and the threshold.

    scores: the score map (H, W). Without a threshold, there are no outlines, and each heat map has its own colour
    scale.
    """
    image = image.convert("RGB")
    if threshold is None:  # the colours are not comparable between images
        return {"input": image, HEAT_PANEL: overlay(image, scores, (float(scores.min()), float(scores.max())))}
    outlined = outline(outline(image, scores > threshold.region, HOT), scores > threshold.value, CALLED)
    return {"input": image, HEAT_PANEL: overlay(image, scores, colour_limits(threshold.typical)), "outlines": outlined}


def map_scale(detector: FewShotDetector) -> int:
    """The factor of 16-bit PNG maps: the largest power of two at which the scorer's largest score fits."""
    largest = detector.scorer.largest
    return UNBOUNDED_MAP_SCALE if largest is None else 2 ** int(np.floor(np.log2(65535 / largest)))


def _save_map(path: Path, scores: np.ndarray, scale: int) -> None:
    """Saves the score map as .npy (float32), or as 16-bit .png times `scale`."""
    if path.suffix == ".npy":
        with whole_file(path) as aside, open(aside, "wb") as stream:
            np.save(stream, scores)
    else:
        save_image(path, Image.fromarray(np.clip(np.rint(scores * scale), 0, 65535).astype(np.uint16)))


def read_scores(path: Path, threshold: Threshold | None) -> list[Prediction]:
    """Reads the rows of a `ScoreTable` and applies `threshold` to their scores; empty if the file does not exist.

    Raises:
        UserError: the file is not a table of scores.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = [[row[name] for name in ("path", "score", "error")] for row in csv.DictReader(stream)]
            scores = [float(score) if score else None for _, score, _ in rows]
    except (KeyError, TypeError, ValueError, csv.Error) as fault:
        raise UserError(f"{path} is not a score table of predict.py; give another --output") from fault
    return [
        Prediction(name, score, _decide(score, threshold), error or None)
        for (name, _, error), score in zip(rows, scores, strict=True)
    ]


def _decide(score: float | None, threshold: Threshold | None) -> str | None:
    if score is None or threshold is None:
        return None
    return "defective" if score > threshold.value else "normal"


class ScoreTable:
    """The table scores.csv, written row by row, so that an interrupted run keeps its results.

    append: continue an existing file.

    Raises:
        UserError: the file cannot be written.
    """

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
        """Writes one row and flushes the file."""
        score = "" if row.score is None else f"{row.score:.9g}"  # 9 digits represent a float32 exactly
        self._writer.writerow((row.path, score, row.decision or "", row.error or ""))
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()
