"""Known defects against a detector: the threshold that separates best, and the acceptance, a record to be signed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv

from inspection.detector import FewShotDetector
from inspection.results import DECISIONS, DEFECTIVE, NORMAL, decide
from utils.files import sha256
from utils.records import who_and_when

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


def acceptance(detector: FewShotDetector, defects: Iterable[KnownDefect]) -> dict:
    """Names, hashes, scores and decisions of known defects and normal images, and their confusion table, for JSON.

    Leave-one-out scores stand for new normal images where the detector was not calibrated with further ones.
    """
    defects, threshold = list(defects), detector.threshold
    rows = [one._asdict() | {"sha256": sha256(Path(one.name))} for one in defects]
    seen = detector.calibration or detector.loo_scores
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
            "known_defects": _outcomes([one.decision for one in defects], NORMAL, "missed"),
            "normal_images": _outcomes([row["decision"] for row in normal], DEFECTIVE, "rejected"),
        },
        "known_defects": rows,
        "normal_images": normal,
        "normal_scores": "calibration" if detector.calibration else "leave-one-out" if seen else None,
    }


def _outcomes(decisions: list[str | None], wrong: str, name: str) -> dict:
    """The number of images by decision, and the share of the wrong ones with its interval."""
    counts, total = Counter(decisions), len(decisions)
    found = {decision: counts[decision] for decision in DECISIONS}
    if not total:
        return found
    low, high = interval(counts[wrong], total)
    return found | {name: counts[wrong] / total, f"{name}_interval": [low, high]}


def worse_than(new: Mapping | None, old: Mapping | None) -> str:
    """Why a detector with the acceptance `new` should not replace one with `old`, as a phrase; "" if it may."""
    if not old:
        return ""
    if not new:
        return "it was accepted with known defects, and this one was not compared with any"
    shares = [(one["confusion"]["known_defects"].get("missed", 0.0)) for one in (old, new)]
    if shares[1] > shares[0]:
        return f"it misses {shares[0]:.0%} of its known defects, this one {shares[1]:.0%}"
    return ""
