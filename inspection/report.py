"""The report page of predict.py: what it says of the detector, its normal images and its rows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.images import decode_image
from inspection.boxes import find_boxes
from inspection.detector import FewShotDetector
from inspection.flags import describe_threshold
from inspection.inputs import full_name
from inspection.predictions import HEAT_PANEL, draw_panels, read_preview
from inspection.results import SUMMARY, UNUSUAL, Prediction
from inspection.threshold import NormalScores, Threshold
from reports.drawing import CALLED, HOT, colour_limits, css_colour
from reports.page import KNOWN_PANELS, NO_PREVIEW, PAGE_IMAGES, Page, PageRow, Preview, Reference, make_preview
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
    rows = [row for row in results if is_made_with(row, identity, threshold)]
    others = len(results) - len(rows)
    support = detector.origin.get("support", [])
    facts = [
        ("Date", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")),
        ("Detector", (str(file) if file else "not saved") + f", support images: {len(support)}"),
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
        warnings=[*detector.warnings, *_shortened([row.warning for row in rows if row.warning])],
        notes=[f"{others} results of another detector or threshold are in {SUMMARY} only"] if others else (),
        references=references,
        typical=threshold and threshold.typical,
        colours=threshold and colour_limits(threshold.typical),
        outlines=OUTLINES if threshold else (),
    )


def is_made_with(row: Prediction, identity: str, threshold: Threshold | None) -> bool:
    """Whether this detector and this threshold decided on the image."""
    return (row.detector, row.threshold) == (identity, threshold and threshold.value)


def choose_previews(rows: list[Prediction], folder: Path, identity: str, threshold: Threshold | None) -> None:
    """Gives the PAGE_IMAGES rows of the page with the highest scores a preview, and all others none.

    Changes `rows`. Previews that are missing, such as those of earlier runs, are read from the files in `folder`.
    """
    own = [n for n, row in enumerate(rows) if row.score is not None and is_made_with(row, identity, threshold)]
    chosen = set(sorted(own, key=lambda number: -rows[number].score)[:PAGE_IMAGES])
    for number, row in enumerate(rows):
        if bool(row.preview.thumbnail) != (number in chosen):
            rows[number] = row._replace(preview=read_preview(folder, row) if number in chosen else NO_PREVIEW)


def known_images(detector: FewShotDetector) -> list[Reference]:
    """Support images, calibration images and known defects, with their scores, where these are known.

    Images whose files are still there, unchanged, have panels, at most the KNOWN_PANELS with the highest scores; of
    others, the detector keeps a thumbnail.
    """
    digests = {entry["path"]: entry["sha256"] for entry in detector.origin.get("support", [])}
    found = [] if detector.left_out else [Reference(Path(path).name, "support", None) for path in digests]
    for role, normal in (("support", detector.left_out), ("calibration", detector.calibration)):
        with_panels = {name for name, _ in normal.by_score()[:KNOWN_PANELS]} if normal else set()
        for number, name in enumerate(normal.names if normal else ()):
            path = _unchanged(Path(name), digests.get(name)) if name in with_panels else None
            preview = _preview(detector, path, normal.maps[number]) if path else _thumbnail(normal, number)
            found.append(Reference(Path(name).name, role, float(normal.scores[number, 0]), preview))
    for defect in detector.defects:
        path, decision = Path(defect.name), UNUSUAL if defect.unusual else None
        preview = _input(detector, path)
        found.append(Reference(path.name, "known defect", defect.score, preview, decision, defect.unusual))
    return found


def plain_known(detector: FewShotDetector) -> dict:
    """What scores.json says of the normal images and the known defects."""
    normal = {"left_out": detector.left_out, "calibration": detector.calibration}
    scores = {name: [{"path": n, "score": s} for n, s in one.by_score()] if one else [] for name, one in normal.items()}
    return {
        "normal_images": scores,
        "known_defects": [defect._asdict() for defect in detector.defects],
        "warnings": detector.warnings,
    }


def _preview(detector: FewShotDetector, path: Path, scores: np.ndarray) -> Preview:
    """The panels of a normal image; where `scores` are not a whole map (S, S), the image alone."""
    image, threshold = decode_image(path, detector.bits), detector.threshold
    if not scores.size or detector.layout_of(*image.size) or detector.region is not None:
        return _input(detector, path)
    restored = detector.restore(scores, *image.size)
    boxes = find_boxes(restored, threshold.value) if threshold else []
    return make_preview(draw_panels(image, restored, threshold, boxes), HEAT_PANEL)


def _input(detector: FewShotDetector, path: Path) -> Preview:
    """The image alone."""
    return make_preview({"input": decode_image(path, detector.bits).convert("RGB")}, "input")


def _thumbnail(normal: NormalScores, number: int) -> Preview:
    if normal.thumbnails is None:
        return NO_PREVIEW
    return make_preview({"input": Image.fromarray(normal.thumbnails[number])}, "input")


def _unchanged(path: Path, digest: str | None) -> Path | None:
    """The path, if the file is there and has the SHA-256 `digest`, if one is known."""
    try:
        return path if path.is_file() and digest in (None, sha256(path)) else None
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
    return PageRow(name, row.score, None, row.preview, row.decision, row.unusual, row.error, row.boxes)
