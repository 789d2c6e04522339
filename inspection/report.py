"""The report page of predict.py: what it says of the detector, and its rows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from inspection.detector import FewShotDetector
from inspection.flags import describe_threshold
from inspection.inputs import full_name
from inspection.results import SUMMARY, Prediction
from reports.drawing import CALLED, HOT, colour_limits, css_colour
from reports.page import Page, PageRow

MOST_WARNINGS = 10
OUTLINES = [
    (css_colour(CALLED), "above the threshold"),
    (css_colour(HOT), "hotter than the hottest part of a typical normal image; normal images have such regions too"),
]


def report_page(
    detector: FewShotDetector, identity: str, file: Path | None, results: Sequence[Prediction], root: Path
) -> Page:
    """The page of a run, which names images relative to `root`.

    It shows the results that were made with this detector and threshold, as the page has one threshold for all.

    identity: of the detector. file: where the detector was loaded from or saved to.
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
        typical=threshold and threshold.typical,
        colours=threshold and colour_limits(threshold.typical),
        outlines=OUTLINES if threshold else (),
    )


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
