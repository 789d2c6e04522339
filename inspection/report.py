"""The report page of predict.py: what it says of the detector, its normal images and its rows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from datasets.images import decode_image
from inspection.boxes import find_boxes
from inspection.detector import FewShotDetector
from inspection.flags import describe_threshold
from inspection.inputs import full_name
from inspection.predictions import HEAT_PANEL, draw_panels
from inspection.results import SUMMARY, Prediction
from inspection.threshold import NormalScores
from reports.drawing import CALLED, HOT, colour_limits, css_colour
from reports.page import NO_PREVIEW, Page, PageRow, Preview, Reference, make_preview
from utils.files import sha256

MOST_WARNINGS = 10
OUTLINES = [
    (css_colour(CALLED), "above the threshold, with numbered frames, the highest score first"),
    (css_colour(HOT), "hotter than the hottest part of a typical normal image; normal images have such regions too"),
]


def report_page(
    detector: FewShotDetector,
    identity: str,
    file: Path | None,
    results: Sequence[Prediction],
    root: Path,
    references: Sequence[Reference] = (),
) -> Page:
    """The page of a run, which names images relative to `root`.

    It shows the results that were made with this detector and threshold, as the page has one threshold for all.

    identity: of the detector. file: where the detector was loaded from or saved to. references: from
    `known_images`.
    """
    threshold = detector.threshold
    made_with = (identity, threshold and threshold.value)
    rows = [row for row in results if (row.detector, row.threshold) == made_with]
    others = len(results) - len(rows)
    support = detector.origin.get("support", [])
    facts = [
        ("Date", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")),
        ("Detector", f"fitted on {len(support)} support image(s)" + (f", {file}" if file else ", not saved")),
        ("Detector id", identity),
        ("Scorer", detector.scorer.name),
        ("Network", _network(detector)),
        ("Threshold", describe_threshold(threshold)),
    ]
    return Page(
        title="Predictions",
        threshold=threshold and threshold.value,
        rows=[_page_row(row, root) for row in rows],
        facts=facts,
        warnings=_shortened([row.warning for row in rows if row.warning]),
        notes=[f"{others} results of another detector or threshold are in {SUMMARY} only"] if others else (),
        references=references,
        typical=threshold and threshold.typical,
        colours=threshold and colour_limits(threshold.typical),
        outlines=OUTLINES if threshold else (),
    )


def known_images(detector: FewShotDetector, calibration: Sequence[Path]) -> list[Reference]:
    """The normal images that the detector was fitted on and, with `calibration`, those that set its threshold.

    Support images of a saved detector have a preview if their files are still there, unchanged.
    """
    paths = [_unchanged(Path(entry["path"]), entry["sha256"]) for entry in detector.origin.get("support", [])]
    names = [Path(entry["path"]).name for entry in detector.origin.get("support", [])]
    found = _references(detector, "support", names, paths, detector.left_out)
    if detector.calibration is not None:
        names = [path.name for path in calibration]
        found += _references(detector, "calibration", names, calibration, detector.calibration)
    return found


def _references(
    detector: FewShotDetector,
    role: str,
    names: Sequence[str],
    paths: Sequence[Path | None],
    normal: NormalScores | None,
) -> list[Reference]:
    """The images `names` with their scores, where these are known, and previews of their files."""
    found = []
    for number, (name, path) in enumerate(zip(names, paths, strict=True)):
        score = None if normal is None else float(normal.scores[number, 0])
        scores = None if normal is None else normal.maps[number]
        found.append(Reference(name, role, score, NO_PREVIEW if path is None else _preview(detector, path, scores)))
    return found


def _preview(detector: FewShotDetector, path: Path, scores: np.ndarray | None) -> Preview:
    """The panels of a normal image; without `scores`, or where these are not a whole map (S, S), the image alone."""
    image, threshold = decode_image(path, detector.bits), detector.threshold
    if scores is None or detector.layout_of(*image.size) or detector.region is not None:
        return make_preview({"input": image.convert("RGB")}, "input")
    restored = detector.restore(scores, *image.size)
    boxes = find_boxes(restored, threshold.value) if threshold else []
    return make_preview(draw_panels(image, restored, threshold, boxes), HEAT_PANEL)


def _unchanged(path: Path, digest: str) -> Path | None:
    """The path, if the file still has the SHA-256 `digest`."""
    try:
        return path if sha256(path) == digest else None
    except OSError:
        return None


def _shortened(warnings: list[str]) -> list[str]:
    """At most MOST_WARNINGS of the warnings of images, and how many more there are."""
    more = len(warnings) - MOST_WARNINGS
    return warnings[:MOST_WARNINGS] + ([f"{more} more images with a warning, see scores.json"] if more > 0 else [])


def _network(detector: FewShotDetector) -> str:
    backbone = getattr(detector.network, "backbone", type(detector.network).__name__)
    return f"{backbone}, {detector.origin.get('network', 'unknown weights')}, {detector.size} x {detector.size} pixels"


def _page_row(row: Prediction, root: Path) -> PageRow:
    """The row of the page; images outside `root`, which an earlier watch may have scored, keep their whole path."""
    name = row.path.removeprefix(f"{full_name(root).rstrip('/')}/")
    return PageRow(name, row.score, None, row.preview, row.decision, row.error, row.boxes)
