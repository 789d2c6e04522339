"""What a detector file says of itself: part, origin, images, thresholds, acceptance, and the history of its changes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from inspection.detector import FewShotDetector
from inspection.detector_file import tensors_sha256
from inspection.threshold import NormalScores
from inspection.tiles import describe_tiling
from utils.files import sha256
from utils.records import who_and_when

MOST_LISTED = 20  # images of an entry that are printed


def record_change(detector: FewShotDetector, change: str, images: Iterable[Path] = ()) -> None:
    """Adds an entry to the history of a detector: who, when, with which versions, and the id that results."""
    files = [{"path": str(path), "sha256": sha256(path)} for path in images]
    threshold = detector.threshold and detector.threshold._asdict()
    entry = {"change": change, **who_and_when(), "threshold": threshold, "id": detector.decision_identity()}
    detector.document.setdefault("history", []).append(entry | ({"images": files} if files else {}))


def settings(detector: FewShotDetector) -> dict:
    """How a detector scores and decides, for JSON: in a description and in scores.json."""
    return {
        "part": detector.document.get("part"),
        "scorer": detector.scorer.name,
        "backbone": getattr(detector.network, "backbone", None),
        "img_size": detector.size,
        "bits": detector.bits,
        "tiles": describe_tiling(detector.tiling),
        "has_region": detector.region is not None,
        "threshold": detector.threshold and detector.threshold._asdict(),
        "min_area": detector.min_area,
        "quality_limits": detector.gate and detector.gate.limits(),
    }


def listed(normal: NormalScores | None) -> list[dict]:
    """Path and score of each normal image, highest score first, for JSON."""
    return [{"path": name, "score": score} for name, score in normal.by_score()] if normal else []


def describe(detector: FewShotDetector, file: Path) -> dict:
    """All that a detector file holds but its tensors, for JSON."""
    return {
        "file": str(file),
        "id": detector.decision_identity(),
        "features_id": detector.identity(),
        **settings(detector),
        "weights": detector.origin.get("network"),
        "weights_sha256": tensors_sha256(detector.network.state_dict()),
        "support": detector.origin.get("support", []),
        "calibration": listed(detector.calibration),
        "acceptance": detector.document.get("acceptance"),
        "history": detector.document.get("history", []),
    }


def as_text(described: dict) -> str:
    """The description for people: a line per fact, the images of the support, and the history."""
    threshold, accepted = described["threshold"], described["acceptance"]
    facts = {
        "part": described["part"] or "not named",
        "id": f"{described['id']} (in results: {described['features_id']})",
        "scorer": described["scorer"],
        "network": f"{described['backbone']}, {described['weights']}, {described['img_size']} pixels",
        "weights": f"SHA-256 {described['weights_sha256']}",
        "tiles": described["tiles"],
        "threshold": "none" if threshold is None else f"{threshold['value']:.4g} ({threshold['how']})",
        "review from": "" if threshold is None or threshold["review"] is None else f"{threshold['review']:.4g}",
        "calibration": f"{len(described['calibration'])} images" if described["calibration"] else "none",
        "acceptance": "none" if not accepted else _accepted(accepted, described["id"]),
    }
    lines = [f"{name + ':':13}{value}" for name, value in facts.items() if value]
    lines.append(f"support images: {len(described['support'])}")
    lines += _files(described["support"])
    for entry in described["history"]:
        lines.append(f"{entry['date']}  {entry['change']}, by {entry['user']} on {entry['host']}, id {entry['id']}")
        if entry["change"] != "fitted":
            lines += _files(entry.get("images", ()))
    return "\n".join(lines)


def _files(files: Iterable[dict]) -> list[str]:
    files = list(files)
    lines = [f"  {one['sha256'][:16]}  {one['path']}" for one in files[:MOST_LISTED]]
    return lines + ([f"  and {len(files) - MOST_LISTED} more"] if len(files) > MOST_LISTED else [])


def _accepted(accepted: dict, own: str) -> str:
    counts, good = accepted["confusion"]["known_defects"], accepted["confusion"]["normal_images"]
    was = "" if accepted["decision_id"] == own else f"before the last change, id {accepted['decision_id']}, "
    return (
        f"{was}{accepted['date']}: of {len(accepted['known_defects'])} known defects {counts['defective']} defective, "
        f"{counts['review']} for review, {counts['normal']} missed; of {len(accepted['normal_images'])} normal images "
        f"{good['defective']} defective"
    )
