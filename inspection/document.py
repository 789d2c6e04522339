"""What a detector file says of itself: origin, images, thresholds, history, and its acceptance with known defects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv

from inspection.detector import FewShotDetector
from inspection.detector_file import hash_tensors
from inspection.results import DECISIONS, DEFECTIVE, NORMAL, decide
from inspection.threshold import NormalScores
from inspection.tiles import describe_tiling
from utils.files import sha256
from utils.records import who_and_when

MOST_LISTED = 20  # images of an entry that are printed
CONFIDENCE = 0.95


class KnownDefect(NamedTuple):
    """A defective image that is known: its path, its score, and the decision on it with its reason."""

    name: str
    score: float
    decision: str | None
    reason: str | None

    @property
    def is_missed(self) -> bool:
        """Whether nobody would look at the image."""
        return self.decision in (NORMAL, None)


class Proposal(NamedTuple):
    """The threshold that separates known defects from normal images best, and how many of each lie above it."""

    threshold: float
    found: int
    defects: int
    rejected: int
    normal: int

    def __str__(self) -> str:
        return (
            f"{self.threshold:.3f}: {_share(self.found, self.defects)} known defects and "
            f"{_share(self.rejected, self.normal)} normal images above it"
        )


def propose(normal: np.ndarray, defects: np.ndarray) -> Proposal:
    """The threshold with the highest share of defects minus share of normal images above it.

    Of equally good ones, that in the middle of the widest gap between scores. normal (n,), defects (m,): scores.
    """
    values = np.unique(np.concatenate([normal, defects]).astype(np.float64))
    middles = np.append((values[1:] + values[:-1]) / 2, values[-1])
    widths = np.append(np.diff(values), 0)
    gains = [(defects > middle).mean() - (normal > middle).mean() for middle in middles]
    _, _, best = max(zip(gains, widths, middles, strict=True))
    return Proposal(float(best), int((defects > best).sum()), len(defects), int((normal > best).sum()), len(normal))


def interval(count: int, total: int) -> tuple[float, float]:
    """The exact (Clopper-Pearson) 95 % confidence interval of a share."""
    tail = (1 - CONFIDENCE) / 2
    low = betaincinv(count, total - count + 1, tail) if count else 0.0
    high = betaincinv(count + 1, total - count, 1 - tail) if count < total else 1.0
    return float(low), float(high)


def _share(count: int, total: int) -> str:
    low, high = interval(count, total)
    return f"{count} of {total} (95 % {100 * low:.0f} to {100 * high:.0f} %)"


def acceptance(detector: FewShotDetector, defects: Sequence[KnownDefect]) -> dict:
    """Names, hashes, scores and decisions of known defects and normal images, and their confusion table, for JSON.

    Leave-one-out scores stand for new normal images where the detector was not calibrated with further ones.
    """
    threshold = detector.threshold
    seen = detector.normal_scores
    normal = [
        {"name": name, "score": score, "decision": decide(score, threshold)[0]}
        for name, score in (seen.by_score() if seen else ())
    ]
    return {
        **who_and_when(),
        "part": detector.document.get("part"),
        "detector_id": detector.identity(),
        "decision_id": detector.decision_identity(),
        "threshold": threshold and threshold.value,
        "review_threshold": threshold and threshold.review_value,
        "confusion": {
            "known_defects": _outcomes([defect.decision for defect in defects], NORMAL, "missed"),
            "normal_images": _outcomes([row["decision"] for row in normal], DEFECTIVE, "rejected"),
        },
        "known_defects": [defect._asdict() | {"sha256": sha256(Path(defect.name))} for defect in defects],
        "normal_images": normal,
        "normal_scores": "calibration" if detector.calibration else "leave-one-out" if seen else None,
    }


def _outcomes(decisions: list[str | None], wrong: str, name: str) -> dict:
    """The number of images by decision, and the share of the wrong ones with its interval."""
    counts, total = Counter(decisions), len(decisions)
    outcomes = {decision: counts[decision] for decision in DECISIONS}
    if total:
        outcomes |= {name: counts[wrong] / total, f"{name}_interval": list(interval(counts[wrong], total))}
    return outcomes


def worse_than(new: Mapping | None, old: Mapping | None) -> str:
    """Why a detector with the acceptance `new` should not replace one with `old`, as a phrase; "" if it may."""
    if not old:
        return ""
    if not new:
        return "it was accepted with known defects, and this one was not compared with any"
    before, after = (accepted["confusion"]["known_defects"].get("missed", 0.0) for accepted in (old, new))
    return f"it misses {before:.0%} of its known defects, this one {after:.0%}" if after > before else ""


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
        "weights_sha256": hash_tensors(detector.network.state_dict()).hexdigest(),
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


def _files(files: Sequence[dict]) -> list[str]:
    lines = [f"  {file['sha256'][:16]}  {file['path']}" for file in files[:MOST_LISTED]]
    return lines + ([f"  and {len(files) - MOST_LISTED} more"] if len(files) > MOST_LISTED else [])


def _accepted(accepted: dict, own: str) -> str:
    counts, good = accepted["confusion"]["known_defects"], accepted["confusion"]["normal_images"]
    was = "" if accepted["decision_id"] == own else f"before the last change, id {accepted['decision_id']}, "
    return (
        f"{was}{accepted['date']}: of {len(accepted['known_defects'])} known defects {counts['defective']} defective, "
        f"{counts['review']} for review, {counts['normal']} missed; of {len(accepted['normal_images'])} normal images "
        f"{good['defective']} defective"
    )
