"""The report page of predict.py: what it says of the detector, its normal images and its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.images import ImageError, decode_image
from inspection.detector import FewShotDetector
from inspection.document import KnownDefect
from inspection.fitting import describe_threshold
from inspection.images import ImageFile
from inspection.inputs import full_name
from inspection.predictions import HEAT_PANEL, draw_panels, read_preview
from inspection.quality import LEAST_IMAGES, MEASURES, QualityGate
from inspection.results import SUMMARY, Prediction, decide, find_boxes
from inspection.threshold import Threshold
from reports.drawing import ELEVATED, FLAGGED, colour_limits, css_colour
from reports.page import (
    NO_PREVIEW,
    NORMAL_PANELS,
    PAGE_IMAGES,
    Chart,
    Page,
    PageRow,
    PageTable,
    Preview,
    Reference,
    make_preview,
)

MOST_WARNINGS = 10
CHART_VALUES = 120  # of a chart, at most about so many
DAY = len("2026-01-31")  # of a time in ISO 8601
OUTLINES = [
    (css_colour(FLAGGED), "above the threshold, with numbered frames, the highest score first"),
    (css_colour(ELEVATED), "above the highest scores of a typical normal image; normal images have such regions too"),
]


def report_page(
    detector: FewShotDetector,
    identity: str,
    file: Path | None,
    rows: Mapping[int, Prediction],
    others: int,
    previews: Mapping[int, Preview],
    root: Path,
    drift: Sequence[str],
) -> Page:
    """The page of a run, which names images relative to `root`.

    identity: of the detector. file: where the detector was loaded from or saved to. rows: of this detector and its
    threshold, by number, as are `previews`. others: the number of results that are not shown. drift: sentences of
    `QualityGate.drift`.
    """
    threshold, weights = detector.threshold, detector.origin.get("network", "unknown weights")
    backbone = getattr(detector.network, "backbone", type(detector.network).__name__)
    facts = [
        ("Date", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")),
        ("Detector", f"{file or 'not saved'}, support images: {len(detector.origin.get('support', []))}"),
        ("Detector id", identity),
        ("Scorer", detector.scorer.name),
        ("Network", f"{backbone}, {weights}, {detector.size} x {detector.size} pixels"),
        ("Threshold", describe_threshold(threshold)),
    ]
    doubts = [row.warning for row in rows.values() if row.warning]
    more = len(doubts) - MOST_WARNINGS
    doubts = doubts[:MOST_WARNINGS] + ([f"{more} more images with a warning, see {SUMMARY}"] if more > 0 else [])
    return Page(
        title=detector.document.get("part") or (file.stem if file else "Inspection"),
        subtitle="Inspection report",
        review=threshold and threshold.review_value,
        adopt=f"python predict.py --detector {file} --threshold {{}} --save {file}" if file else "",
        sign_off=True,
        threshold=threshold and threshold.value,
        rows=[_page_row(row, previews.get(number, NO_PREVIEW), root, threshold) for number, row in rows.items()],
        facts=facts,
        warnings=[*detector.warnings, *drift, *doubts],
        notes=[f"{others} results of another detector or threshold are in {SUMMARY} only"] if others else (),
        tables=_accepted_table(detector.learned),
        charts=quality_charts(detector.gate, [row for row in rows.values() if row.quality]) if detector.gate else (),
        typical=threshold and threshold.typical,
        colours=threshold and colour_limits(threshold.value, threshold.typical),
        outlines=OUTLINES if threshold else (),
    )


def _accepted_table(learned: Mapping) -> list[PageTable]:
    """The images that `--accept` added, with their scores before and after; no table without any."""
    if not learned:
        return []
    header = ["Name", "Score before", "Score after, learned from the others"]
    names = [Path(name).name for name in learned["names"]]
    scores = ([f"{score:.3f}" for score in learned[key]] for key in ("before", "after"))
    return [PageTable("Accepted images", header, list(zip(names, *scores, strict=True)))]


def quality_charts(gate: QualityGate, rows: Sequence[Prediction]) -> list[Chart]:
    """A chart of each measure of quality in the order of time; a value is the median of consecutive images of a day."""
    rows = [row for row in rows if row.quality.keys() >= MEASURES.keys()]
    if len(rows) < LEAST_IMAGES:
        return []
    per_value = -(-len(rows) // CHART_VALUES)
    by_day = [list(of_day) for _, of_day in groupby(rows, key=lambda row: row.time[:DAY])]
    groups = [[of_day[at : at + per_value] for at in range(0, len(of_day), per_value)] for of_day in by_day]
    days = list(accumulate(map(len, groups)))[:-1]
    charts = []
    for name, limits in gate.limits().items():
        values = [float(np.median([row.quality[name] for row in some])) for of_day in groups for some in of_day]
        title = f"{name} {values[-1]:.3g} ({limits['low']:.3g} to {limits['high']:.3g})"
        charts.append(Chart(title, values, limits["low"], limits["high"], days))
    return charts


def choose_previews(
    rows: Mapping[int, Prediction], previews: Mapping[int, Preview], folder: Path
) -> dict[int, Preview]:
    """The previews of the PAGE_IMAGES rows with the highest scores, by the number of the row.

    Those that are missing in `previews`, such as those of earlier runs, are read from the files in `folder`.
    """
    scored = [number for number, row in rows.items() if row.score is not None]
    chosen = sorted(scored, key=lambda number: -rows[number].score)[:PAGE_IMAGES]
    return {number: previews.get(number) or read_preview(folder, rows[number]) for number in chosen}


def known_images(
    detector: FewShotDetector, defects: Sequence[KnownDefect] = (), with_panels: bool = True
) -> list[Reference]:
    """Support images, calibration images and known defects, with their scores, where these are known.

    Of support and of calibration images, the NORMAL_PANELS with the highest scores have panels if `with_panels`, where
    their files are still there, unchanged.
    """
    digests = {entry["path"]: entry["sha256"] for entry in detector.origin.get("support", [])}
    images = [] if detector.loo_scores else [Reference(Path(path).name, "support", None) for path in digests]
    for role, normal in (("support", detector.loo_scores), ("calibration", detector.calibration)):
        shown = {name for name, _ in normal.by_score()[:NORMAL_PANELS]} if normal and with_panels else set()
        for number, name in enumerate(normal.names if normal else ()):
            image = _unchanged(name, digests.get(name), detector.bits) if name in shown else None
            preview = _preview(detector, image, normal.maps[number]) if image else NO_PREVIEW
            images.append(Reference(Path(name).name, role, float(normal.scores[number, 0]), preview))
    for defect in defects:
        preview = _input(decode_image(Path(defect.name), detector.bits)) if with_panels else NO_PREVIEW
        name = Path(defect.name).name
        images.append(Reference(name, "known defect", defect.score, preview, *_fixed(defect, detector.threshold)))
    return images


def _preview(detector: FewShotDetector, image: Image.Image, scores: np.ndarray) -> Preview:
    """The panels of a normal image; where `scores` are not a whole map (S, S), the image alone."""
    threshold = detector.threshold
    if not scores.size or detector.layout_of(*image.size) or detector.region is not None:
        return _input(image)
    restored = detector.restore(scores, *image.size)
    boxes = find_boxes(restored, threshold.value) if threshold else []
    return make_preview(draw_panels(image, restored, threshold, boxes), HEAT_PANEL)


def _input(image: Image.Image) -> Preview:
    """The image alone."""
    return make_preview({"input": image.convert("RGB")}, "input")


def _unchanged(name: str, digest: str | None, bits: int) -> Image.Image | None:
    """The decoded image of a path, if the file is there and has the SHA-256 `digest`, if one is known."""
    file = ImageFile(name)
    try:
        return file.decode(bits) if digest in (None, file.sha256) else None
    except (ImageError, UnicodeError):  # the name is of another locale
        return None


def _page_row(row: Prediction, preview: Preview, root: Path, threshold: Threshold | None) -> PageRow:
    """The row of the page; images outside `root`, which an earlier watch may have scored, keep their whole path."""
    name = row.path.removeprefix(f"{full_name(root).rstrip('/')}/")
    return PageRow(name, row.score, None, preview, *_fixed(row, threshold), row.error, row.boxes, row.time)


def _fixed(row: Prediction | KnownDefect, threshold: Threshold | None) -> tuple[str | None, str | None]:
    """Decision and reason of a row if they hold whatever threshold the reader of the page sets, else (None, None)."""
    decided = row.decision, row.reason
    by_score = row.score is None or decided == decide(row.score, threshold)
    return (None, None) if by_score else decided
