"""Scores unlabelled images with a fitted detector: one result row per image, with its output files."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from inspection.config import PANELS
from inspection.detector import FewShotDetector
from inspection.images import Decoded
from inspection.inputs import InputImage, absolute, full_name, read_inputs
from inspection.results import Box, Prediction, as_far_as_read, decide, find_boxes, now, relative_score
from inspection.threshold import Threshold
from inspection.tiles import shrink_warning
from reports.drawing import (
    DECISION_COLOURS,
    ELEVATED,
    FLAGGED,
    add_titles,
    boxed,
    colour_limits,
    hstack,
    outline,
    overlay,
    save_image,
    sheet,
    split_panels,
)
from reports.page import NO_PREVIEW, PANEL_SIDE, Preview, make_preview
from utils.files import whole_file
from utils.stages import in_threads

IMAGE_PANEL, HEAT_PANEL, OUTLINE_PANEL = "input", "heat map", "outlines"  # titles; thumbnails show the heat map
PANELS_FOLDER, MAPS_FOLDER = "images", "maps"  # in the output folder; panels were in pictures/ until version 0.1
PANELS_SUFFIX = ".jpg"  # of the panels; maps have another
UNBOUNDED_MAP_SCALE = 256  # 16-bit PNG maps store score times a scale: up to a score of 255.99 where there is no bound


class Outputs(NamedTuple):
    """Which files are written per image: in `folder`, as images/ and maps/, with the paths relative to `root`.

    panels: one of PANELS, or None. detector: its identity, for the rows. taken: files of earlier rows, relative to
    `folder`, which are kept.
    """

    folder: Path
    root: Path
    panels: str | None
    maps: str  # "none", "png" or "npy"
    detector: str
    taken: Container[str] = ()

    def names(self, path: Path, titles: Iterable[str]) -> list[str]:
        """The output files of the image `path`, relative to `folder`: its map, then its panels with these titles."""
        files = [(MAPS_FOLDER, f".{self.maps}")] if self.maps != "none" else []
        if self.panels == PANELS[0]:
            files.append((PANELS_FOLDER, PANELS_SUFFIX))
        elif self.panels is not None:
            files += [(PANELS_FOLDER, f".{title.replace(' ', '_')}{PANELS_SUFFIX}") for title in titles]
        return [self._place(folder, path, suffix) for folder, suffix in files]

    def _place(self, folder: str, path: Path, suffix: str) -> str:
        """The suffix of the image is kept, to distinguish a.png from a.jpg.

        If an earlier row has the file, because the image is new under an old name, a number is added.
        """
        stem = Path(folder, absolute(path).relative_to(self.root)).as_posix()
        names = (f"{stem}{suffix}" if number == 1 else f"{stem}.{number}{suffix}" for number in itertools.count(1))
        return next(name for name in names if name not in self.taken)


def predict(
    detector: FewShotDetector, paths: Iterable[Path], outputs: Outputs, workers: int, previews: int
) -> Iterator[tuple[Prediction, Preview]]:
    """Yields rows and previews in the order of `paths`; memory does not grow with their number.

    workers: threads that decode and draw. previews: largest number of previews; further ones are empty.
    """
    groups = _scored_groups(detector, paths, workers)
    finish = partial(_finish, detector, outputs, previews)
    if detector.clock.device.type != "cpu":  # drawing overlaps with the network pass of the next group
        return in_threads(finish, itertools.chain.from_iterable(groups), workers, ahead=detector.group_images)
    # CPU: no overlap. The threads of the network wait for each other, so drawing would slow down all of them
    return (row for group in groups for row in in_threads(finish, group, workers))


def _scored_groups(detector: FewShotDetector, paths: Iterable[Path], workers: int) -> Iterator[list[tuple]]:
    """Yields groups of (number, input, result), at most `group_images` each; result: as of `inspect`."""
    size, keep_aspect, bits = detector.size, detector.keep_aspect, detector.bits
    is_cpu = detector.clock.device.type == "cpu"
    ahead = None if is_cpu else detector.group_images  # the next group, while the device works
    inputs = enumerate(read_inputs(paths, size, keep_aspect, workers, detector.clock, bits, ahead))
    for group in _groups(detector, inputs):
        readable = [item for _, item in group if item.error is None]
        results = zip(*detector.inspect([Decoded(item.image, item.square) for item in readable]), strict=True)
        yield [(number, item, next(results) if item.error is None else None) for number, item in group]


def _groups(detector: FewShotDetector, inputs: Iterable[tuple[int, InputImage]]) -> Iterator[list]:
    """Groups of at most `group_images`; an image that is cut ends its group, as it is large.

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
        if layout or len(group) == detector.group_images:
            yield group
            group = []
    if group:
        yield group


def _finish(detector: FewShotDetector, outputs: Outputs, previews: int, scored: tuple) -> tuple[Prediction, Preview]:
    """Writes the files of an image and returns its row and preview."""
    number, item, result = scored
    threshold = detector.threshold
    name, size, modified = item.identity or (full_name(item.path), None, None)
    limits = {"threshold": threshold and threshold.value, "review_threshold": threshold and threshold.review_value}
    unknown = dict.fromkeys(("score", "relative", "decision", "reason"))
    row = Prediction(now(), name, size, modified, **unknown, **limits, detector=outputs.detector, error=item.error)
    if result is None:
        return row, NO_PREVIEW
    score, scores, reason, quality = result
    with detector.clock.on_host()("drawing"):
        restored = detector.restore(scores, *item.image.size)
        decided = decide(float(score), threshold, reason, restored, detector.min_area)
        decision, reason = as_far_as_read(item.image, decided)
        row = row._replace(
            score=float(score),
            relative=relative_score(float(score), threshold),
            decision=decision,
            reason=reason,
            warning=detector.doubts(item.image, item.square, item.path),
            boxes=[] if threshold is None else find_boxes(restored, threshold.value),
            files=outputs.names(item.path, panel_titles(threshold)),
            quality=quality,
        )
        places = [outputs.folder / name for name in row.files]
        try:
            return row, _write(detector, row, places, item.image, restored, number < previews)
        except OSError as error:  # disk full, or too wide for a JPEG; the score is kept
            written = [name for name, place in zip(row.files, places, strict=True) if os.path.isfile(place)]
            fault = f"scored, but its files cannot be written: {item.path} ({error})"
            return row._replace(files=written, error=fault), NO_PREVIEW


def _write(
    detector: FewShotDetector,
    row: Prediction,
    places: Sequence[Path],
    image: Image.Image,
    scores: np.ndarray,
    with_preview: bool,
) -> Preview:
    """Writes the map and the panels of a row from its score map (H, W); returns the preview, empty unless asked for.

    places: as `Outputs.names` lists them.
    """
    files = [place for place in places if place.suffix == PANELS_SUFFIX]
    for place in places:
        if place not in files:
            _save_map(place, scores, map_scale(detector))
    panels = draw_panels(image, scores, detector.threshold, row.boxes) if with_preview or files else {}
    drawn = [_sheet(row, panels, scores, detector.threshold)] if len(files) == 1 else panels.values()
    for place, panel in zip(files, drawn, strict=bool(files)):
        save_image(place, panel)
    return make_preview(panels, HEAT_PANEL) if with_preview else NO_PREVIEW


def _sheet(
    row: Prediction, panels: Mapping[str, Image.Image], scores: np.ndarray, threshold: Threshold | None
) -> Image.Image:
    """The panels side by side, with name, time, decision, scores and the scale of the colours."""
    limits = "" if threshold is None else f", threshold {threshold.value:.3g}"
    reason = f" ({row.reason})" if row.reason else ""
    verdict = f"{(row.decision or 'no decision').upper()}{reason}  score {row.score:.3g}{limits}"
    name = f"{row.path}  {row.time[:19].replace('T', ' ')}"
    colour = DECISION_COLOURS.get(row.decision, (0, 0, 0))
    scale = _colour_scale(scores, threshold)
    return sheet(hstack(add_titles(panels)), name, verdict, colour, scale, threshold and threshold.value)


def _colour_scale(scores: np.ndarray, threshold: Threshold | None) -> tuple[float, float]:
    """The scores of the first and last colour. Without a threshold, each map has its own."""
    if threshold is None:
        return float(scores.min()), float(scores.max())
    return colour_limits(threshold.value, threshold.typical)


def read_preview(folder: Path, row: Prediction) -> Preview:
    """The preview of a row from the panels in the output folder; empty if they are not there."""
    places = [folder / name for name in row.files if name.endswith(PANELS_SUFFIX)]
    titles = panel_titles(row.threshold)
    in_each = len(titles) if len(places) == 1 else 1
    try:
        panels = [panel for place in places for panel in split_panels(place, in_each, PANEL_SIDE)]
    except (OSError, Image.DecompressionBombError):
        panels = []
    if len(panels) != len(titles):
        return NO_PREVIEW
    return make_preview(dict(zip(titles, panels, strict=True)), HEAT_PANEL)


def panel_titles(threshold: Threshold | float | None) -> tuple[str, ...]:
    """The titles of `draw_panels`."""
    return (IMAGE_PANEL, HEAT_PANEL) if threshold is None else (IMAGE_PANEL, HEAT_PANEL, OUTLINE_PANEL)


def draw_panels(
    image: Image.Image, scores: np.ndarray, threshold: Threshold | None, boxes: Sequence[Box] = ()
) -> dict[str, Image.Image]:
    """The panels by title: the image, the heat map over it, outlines of regions above `region` and the threshold.

    scores: the score map (H, W). boxes: framed and numbered in the panel of the outlines. Without a threshold, there
    are no outlines, and each heat map has its own colour scale.
    """
    image = image.convert("RGB")
    panels = {IMAGE_PANEL: image, HEAT_PANEL: overlay(image, scores, _colour_scale(scores, threshold))}
    if threshold is None:
        return panels
    outlined = outline(outline(image, scores > threshold.region, ELEVATED), scores > threshold.value, FLAGGED)
    return panels | {OUTLINE_PANEL: boxed(outlined, boxes)}


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
