"""Images of a scored category: panels per test image, a contact sheet, ROC curve and histogram, and a report page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import auc, roc_curve

from datasets.mvtec import LabelledDataset, LabelledImage
from evaluation.metrics import METRIC_NAMES
from evaluation.per_image import image_name
from evaluation.statistics import format_interval, format_summary
from reports.drawing import (
    FLAGGED,
    GAP,
    add_titles,
    captioned,
    colour_limits,
    css_colour,
    heat_map,
    hstack,
    outline,
    overlay,
    save_image,
)
from reports.figures import save_figure
from reports.page import NO_PREVIEW, PAGE_IMAGES, Page, PageRow, PageTable, Preview, make_preview, write_page
from utils.stages import in_threads

SHEET_IMAGES, SHEET_COLUMNS = 40, 4
TILE = 180  # pixels; a tile of the contact sheet holds two images of this size
NORMAL_COLOUR, DEFECTIVE_COLOUR = "#46698c", "#b83c06"  # as in page.css
WRONG_COLOUR = DEFECTIVE_COLOUR  # of the captions of misses and false positives


class Scored(NamedTuple):
    """Test images and the scores that one round gave them.

    maps: (B, S, S) score maps. scores: (B,) their maxima. labels: (B,) bool, True for defective images. An image whose
    score exceeds `threshold` is classified as defective; None: images are not classified.
    """

    dataset: LabelledDataset
    maps: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    threshold: float | None

    @property
    def wrong(self) -> np.ndarray:
        """Missed defects and false positives, (B,) bool."""
        if self.threshold is None:
            return np.zeros(len(self.scores), bool)
        return (self.scores > self.threshold) != self.labels

    @property
    def limits(self) -> tuple[float, float]:
        """The scores of the first and the last colour of all heat maps."""
        return colour_limits(float(np.median(self.scores)) if self.threshold is None else self.threshold)

    def worst_first(self) -> np.ndarray:
        """Indices (B,), the score farthest on the wrong side of the threshold first."""
        excess = self.scores - (self.threshold or 0)
        return np.argsort(np.where(self.labels, excess, -excess), kind="stable")

    def name(self, index: int) -> str:
        """Folder and file name of an image."""
        return image_name(self.dataset.items[index])

    def caption(self, index: int) -> str:
        """Name, score and label of an image, and "missed" or "false positive" where the decision is wrong."""
        truth, mistake = ("defective", ", missed") if self.labels[index] else ("normal", ", false positive")
        mistake = mistake if self.wrong[index] else ""
        return f"{self.name(index)}  {self.scores[index]:.2f}  {truth}{mistake}"


def with_own_threshold(dataset: LabelledDataset, maps: np.ndarray) -> Scored:
    """Scores the images by the maxima of their maps (B, S, S) and chooses a threshold on these images.

    The threshold maximizes Youden's index, the true-positive rate minus the false-positive rate. As it is chosen by the
    test labels, its error rates are optimistic for new images. It is None if one class is missing.
    """
    scores, labels = maps.max(axis=(1, 2)), np.array([item.label for item in dataset.items], bool)
    if labels.all() or not labels.any():
        return Scored(dataset, maps, scores, labels, None)
    false_positives, true_positives, thresholds = roc_curve(labels, scores, drop_intermediate=False)
    lowest = thresholds[(true_positives - false_positives)[1:].argmax() + 1]  # the first threshold is infinite
    threshold = float(np.nextafter(np.float32(lowest), np.float32(-np.inf)))
    return Scored(dataset, maps, scores, labels, threshold)


def choose_examples(items: Sequence[LabelledImage], count: int) -> list[int]:
    """Sorted indices of `count` test images, taken in turn from each defect type; -1: all."""
    if count < 0:
        return list(range(len(items)))
    by_type: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        by_type.setdefault(item.defect, []).append(index)
    in_turn = [index for turn in zip_longest(*by_type.values()) for index in turn if index is not None]
    return sorted(in_turn[:count])


def metric_tables(entries: dict) -> list[PageTable]:
    """The page's tables for all rounds: every metric with its spread, and the metrics of each defect type.

    entries: those of evaluation.statistics.metric_entries, such as a record.
    """
    missing, rounds, defect_types = entries["not_available"], entries["rounds"], entries["defects"]
    rows = [
        (METRIC_NAMES[name], format_summary(entries[name]), missing.get(name) or format_interval(entries[name]))
        for name in rounds[0]
    ]
    header, title = ("metric", "one round"), "Each defect type against all normal images"
    if len(rounds) > 1:
        spread = f"mean +- SD of {len(rounds)} rounds"
        header, title = ("metric", spread, "95 % interval of the mean"), f"{title}, {spread}"
    elif any(reason for *_, reason in rows):
        header = (*header, "why not")
    tables = [PageTable("Metrics", header, [row[: len(header)] for row in rows])]
    if defect_types:
        names = [name for name in next(iter(defect_types.values())) if name in METRIC_NAMES]
        rows = [
            (defect_type, str(entry["images"]), *(format_summary(entry[name]) for name in names))
            for defect_type, entry in defect_types.items()
        ]
        header = ("defect type", "images", *(METRIC_NAMES[name] for name in names))
        tables.append(PageTable(title, header, rows))
    return tables


def save_gallery(
    folder: Path, title: str, scored: Scored, count: int, workers: int, tables: Sequence[PageTable] = ()
) -> None:
    """Writes contact_sheet.jpg, the curves, report.html and the panels of `count` images (-1: all) into `folder`.

    workers: threads that draw; 0 counts as 1. tables: for the page.
    """
    items, worst = scored.dataset.items, scored.worst_first().tolist()
    written, on_page, on_sheet = set(choose_examples(items, count)), set(worst[:PAGE_IMAGES]), worst[:SHEET_IMAGES]
    indices = sorted(written | on_page | set(on_sheet))
    draw = partial(_draw, folder, scored, written, on_page, set(on_sheet))
    drawn = dict(zip(indices, in_threads(draw, indices, workers), strict=True))
    verdict = _verdict(scored)
    sheet = _sheet([drawn[index][1] for index in on_sheet])
    save_image(folder / "contact_sheet.jpg", captioned(sheet, f"{title}, worst first; {verdict}"))
    _save_curves(folder / "curves.png", scored)
    types = [item.defect if is_defective else "good" for item, is_defective in zip(items, scored.labels, strict=True)]
    rows = [
        PageRow(scored.name(index), float(score), defect_type, drawn.get(index, (NO_PREVIEW, None))[0])
        for index, (score, defect_type) in enumerate(zip(scored.scores, types, strict=True))
    ]
    page = Page(
        title=title,
        threshold=scored.threshold,
        rows=rows,
        notes=[verdict if scored.threshold is None else f"Initial {verdict}"],
        tables=tables,
        colours=scored.limits,
        outlines=[(css_colour(FLAGGED), "ground truth")],
    )
    write_page(folder / "report.html", page)


def _verdict(scored: Scored) -> str:
    """The threshold and its errors, in words."""
    if scored.threshold is None:
        return "no threshold: choosing it needs normal and defective test images"
    missed, positives = int((scored.wrong & scored.labels).sum()), int((scored.wrong & ~scored.labels).sum())
    rate = positives / (~scored.labels).sum()
    counts = f"{missed} missed defect{'s' * (missed != 1)}, {positives} false positive{'s' * (positives != 1)}"
    errors = f"{counts} (false-positive rate {100 * rate:.0f} %)"
    return f"threshold {scored.threshold:.2f}, chosen on these test images by Youden's index: {errors}"


def _draw(
    folder: Path, scored: Scored, written: set[int], on_page: set[int], on_sheet: set[int], index: int
) -> tuple[Preview, Image.Image | None]:
    """The preview of an image for the page, and its tile of the contact sheet or None; writes its panels.

    written, on_page, on_sheet: the indices of the images with a file of panels, with a preview, and with a tile.
    """
    item = scored.dataset[index]
    image, mask = Image.fromarray(item["image"].permute(1, 2, 0).numpy()), item["mask"].numpy()
    limits = scored.limits
    truth, over = outline(image, mask, FLAGGED), overlay(image, scored.maps[index], limits)
    heat = heat_map(scored.maps[index], limits)
    panels = {"input": image, "ground truth": truth, "heat map": heat, "heat map over the input": over}
    caption, colour = scored.caption(index), WRONG_COLOUR if scored.wrong[index] else "black"
    if index in written:
        save_image(folder / f"{scored.name(index)}.jpg", captioned(hstack(add_titles(panels)), caption, colour))
    preview = make_preview(panels, "heat map over the input") if index in on_page else NO_PREVIEW
    if index not in on_sheet:
        return preview, None
    small = [panel.resize((TILE, TILE), Image.Resampling.LANCZOS) for panel in (truth, over)]
    return preview, captioned(hstack(small), caption, colour)


def _sheet(tiles: Sequence[Image.Image]) -> Image.Image:
    """Tiles of equal size, row by row."""
    width, height = tiles[0].size
    rows = [hstack(tiles[at : at + SHEET_COLUMNS]) for at in range(0, len(tiles), SHEET_COLUMNS)]
    sheet = Image.new("RGB", (SHEET_COLUMNS * (width + GAP) - GAP, len(rows) * height), "white")
    for number, row in enumerate(rows):
        sheet.paste(row, (0, number * height))
    return sheet


def _save_curves(path: Path, scored: Scored) -> None:
    """Draws the ROC curve of the image scores, and a histogram of each class."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    roc, histogram = figure.subplots(1, 2)
    roc.plot([0, 1], [0, 1], color="0.8", linewidth=1)
    title = "image AUROC n/a: one class only"
    if scored.threshold is not None:
        false_positives, true_positives, _ = roc_curve(scored.labels, scored.scores)
        roc.plot(false_positives, true_positives, color=DEFECTIVE_COLOUR)
        title = f"image AUROC {auc(false_positives, true_positives):.4f}"
    roc.set(title=title, xlabel="false-positive rate", ylabel="true-positive rate")
    roc.set_aspect("equal")
    bins = np.histogram_bin_edges(scored.scores, 30)
    histogram.hist(scored.scores[~scored.labels], bins, color=NORMAL_COLOUR, alpha=0.7, label="normal")
    histogram.hist(scored.scores[scored.labels], bins, color=DEFECTIVE_COLOUR, alpha=0.6, label="defective")
    if scored.threshold is not None:
        histogram.axvline(scored.threshold, color="black", linestyle="--", linewidth=1, label="chosen threshold")
    histogram.set(title="image scores", xlabel="score (distance)", ylabel="images")
    histogram.legend()
    save_figure(path, figure)
