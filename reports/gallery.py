"""A scored category for the eye: panels of each test image, a contact sheet, curves, and one page with all of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import roc_curve

from datasets.mvtec import LabelledDataset, LabelledImage
from evaluation.metrics import auroc, rank
from reports.drawing import CALLED, GAP, beside, captioned, colour_limits, heat_map, outline, overlay, save_image
from reports.page import PAGE_IMAGES, PageRow, as_data_uri, write_page
from utils.files import whole_file
from utils.stages import in_threads

SHEET_IMAGES, SHEET_COLUMNS = 40, 4
TILE = 180  # pixels, of either image of a tile of the contact sheet
NORMAL_COLOUR, DEFECTIVE_COLOUR = "#5b7a99", "#c4420a"  # in curves, as in page.html
WRONG_COLOUR = DEFECTIVE_COLOUR  # of captions


class Scored(NamedTuple):
    """Test images with what one round gave them.

    scores: (B,), maps: (B, S, S), labels: (B,) bool. threshold: where the share of defects found exceeds that of false
    alarms most on these very images (Youden), for want of another; it sorts right from wrong in captions, and is too
    good to be expected of new images.
    """

    dataset: LabelledDataset
    maps: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    threshold: float

    @property
    def wrong(self) -> np.ndarray:
        """Which images are missed or false alarms, (B,) bool."""
        return (self.scores > self.threshold) != self.labels

    @property
    def limits(self) -> tuple[float, float]:
        """The scores at which colours begin and end, the same for all images."""
        return colour_limits(float(np.median(self.scores[~self.labels])))

    def worst_first(self) -> np.ndarray:
        """Indices by how far the score lies on the wrong side of the threshold."""
        excess = self.scores - self.threshold
        return np.argsort(np.where(self.labels, excess, -excess), kind="stable")

    def name(self, index: int) -> str:
        """Folder and file of an image."""
        item = self.dataset.items[index]
        return f"{item.defect}/{item.image.name}"

    def caption(self, index: int) -> str:
        """Name, score, label and mistake."""
        truth, mistake = ("defective", ", missed") if self.labels[index] else ("normal", ", false alarm")
        mistake = mistake if self.wrong[index] else ""
        return f"{self.name(index)}  {self.scores[index]:.2f}  {truth}{mistake}"


def with_own_threshold(dataset: LabelledDataset, maps: np.ndarray) -> Scored:
    """`Scored` from the score maps (B, S, S) of a data set with normal and defective images."""
    scores, labels = maps.max(axis=(1, 2)), np.array([item.label for item in dataset.items], bool)
    false_alarms, found, thresholds = roc_curve(labels, scores)
    lowest_called = thresholds[1:][(found - false_alarms)[1:].argmax()]
    return Scored(dataset, maps, scores, labels, float(np.nextafter(np.float32(lowest_called), np.float32(-np.inf))))


def choose_examples(items: Sequence[LabelledImage], count: int) -> list[int]:
    """Indices of `count` test images, taken in turn from each defect and the normal ones; -1: all."""
    if count < 0:
        return list(range(len(items)))
    folders: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        folders.setdefault(item.defect, []).append(index)
    in_turn = [index for turn in zip_longest(*folders.values()) for index in turn if index is not None]
    return sorted(in_turn[:count])


def save_gallery(folder: Path, title: str, scored: Scored, count: int, workers: int) -> None:
    """Writes contact_sheet.jpg, curves.png, report.html and the panels of `count` images (-1: all) into `folder`."""
    worst = scored.worst_first().tolist()
    written = set(choose_examples(scored.dataset.items, count))
    shown, tiled = set(worst[:PAGE_IMAGES]), worst[:SHEET_IMAGES]
    indices = sorted(written | shown | set(tiled))
    draw = partial(_draw, folder, scored, written, shown, set(tiled))
    drawn = dict(zip(indices, in_threads(draw, indices, max(1, workers)), strict=True))
    missed, alarms = (scored.wrong & scored.labels).sum(), (scored.wrong & ~scored.labels).sum()
    verdict = f"threshold {scored.threshold:.2f} (best of these very images): {missed} missed, {alarms} false alarms"
    sheet = _sheet([drawn[index].tile for index in tiled])
    save_image(folder / "contact_sheet.jpg", captioned(sheet, f"{title}, worst first; {verdict}"))
    _save_curves(folder / "curves.png", scored)
    notes = (f"At the start: {verdict}", "Images: input, ground truth, heat-map, heat-map over the input")
    rows = [_page_row(scored, index, drawn) for index in range(len(scored.scores))]
    write_page(folder / "report.html", title, notes, rows, scored.threshold)


class _Drawn(NamedTuple):
    preview: str  # data URI of all panels, for the page
    tile: Image.Image | None  # for the contact sheet


def _draw(folder: Path, scored: Scored, written: set[int], shown: set[int], tiled: set[int], index: int) -> _Drawn:
    """Draws an image: into its file, for the page and for the contact sheet, wherever it is asked for."""
    of_item = scored.dataset[index]
    image, mask = Image.fromarray(of_item["image"].permute(1, 2, 0).numpy()), of_item["mask"].numpy()
    limits = scored.limits
    truth, over = outline(image, mask, CALLED), overlay(image, scored.maps[index], limits)
    panels = beside([image, truth, heat_map(scored.maps[index], limits), over])
    caption, colour = scored.caption(index), WRONG_COLOUR if scored.wrong[index] else "black"
    if index in written:
        save_image(folder / f"{scored.name(index)}.jpg", captioned(panels, caption, colour))
    tile = captioned(beside([_small(truth), _small(over)]), caption, colour) if index in tiled else None
    return _Drawn(as_data_uri(panels) if index in shown else "", tile)


def _small(panel: Image.Image) -> Image.Image:
    return panel.resize((TILE, TILE), Image.Resampling.LANCZOS)


def _page_row(scored: Scored, index: int, drawn: dict[int, _Drawn]) -> PageRow:
    kind = scored.dataset.items[index].defect if scored.labels[index] else "good"
    preview = drawn[index].preview if index in drawn else ""
    return PageRow(scored.name(index), float(scored.scores[index]), kind, preview)


def _sheet(tiles: Sequence[Image.Image]) -> Image.Image:
    """Tiles of one size row by row."""
    width, height = tiles[0].width + GAP, tiles[0].height
    rows = math.ceil(len(tiles) / SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * width - GAP, rows * height), "white")
    for number, tile in enumerate(tiles):
        row, column = divmod(number, SHEET_COLUMNS)
        sheet.paste(tile, (column * width, row * height))
    return sheet


def _save_curves(path: Path, scored: Scored) -> None:
    """ROC curve of the image scores and histogram of normal and defective ones."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    roc, histogram = figure.subplots(1, 2)
    false_alarms, found, _ = roc_curve(scored.labels, scored.scores, drop_intermediate=False)
    roc.plot([0, 1], [0, 1], color="0.8", linewidth=1)
    roc.plot(false_alarms, found, color=DEFECTIVE_COLOUR)
    area = auroc(rank(scored.scores, scored.labels))
    roc.set(title=f"image AUROC {area:.4f}", xlabel="normal images called", ylabel="defective images called")
    roc.set_aspect("equal")
    bins = np.histogram_bin_edges(scored.scores, 30)
    histogram.hist(scored.scores[~scored.labels], bins, color=NORMAL_COLOUR, alpha=0.7, label="normal")
    histogram.hist(scored.scores[scored.labels], bins, color=DEFECTIVE_COLOUR, alpha=0.6, label="defective")
    histogram.axvline(scored.threshold, color="black", linestyle="--", linewidth=1, label="their best threshold")
    histogram.set(title="image scores", xlabel="score (distance)", ylabel="pictures")
    histogram.legend()
    with whole_file(path) as aside:
        figure.savefig(aside, format="png", dpi=100)
