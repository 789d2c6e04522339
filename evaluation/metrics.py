"""Ranking metrics: scores in, numbers out. Exact, ties handled, no approximation by thresholds.

All of them follow from one count, made once: how many negatives lie above each positive, and how many tie with it.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import label

SORT_CHUNK = 2**19  # scores sorted at a time: enough chunks for all cores, each small enough to stay in cache
METRIC_NAMES = {  # in the records -> for people
    **{"image_auroc": "image AUROC", "image_ap": "image AP", "image_f1_max": "image F1-max"},
    **{"pixel_auroc": "pixel AUROC", "pixel_ap": "pixel AP", "pixel_f1_max": "pixel F1-max", "pro": "PRO"},
}
PRO_FPR_LIMIT = 0.3  # MVTec AD paper: the area up to 30 % false positives
EIGHT_CONNECTED = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])  # within an image, not across


class Ranking(NamedTuple):
    """Where P positives stand among N negatives."""

    values: np.ndarray  # (P,) the positives' scores, in the order of scores[positive]
    ordered: np.ndarray  # (P,) the same, ascending; `above` and `ties` belong to these
    above: np.ndarray  # (P,) integers, negatives with a higher score
    ties: np.ndarray  # (P,) integers, negatives with the same score
    negatives: int

    def true_positives(self) -> np.ndarray:
        """(P,) positives found when the threshold is each of `ordered`."""
        return len(self.ordered) - np.searchsorted(self.ordered, self.ordered, "left")


def rank(scores: np.ndarray | torch.Tensor, positive: np.ndarray) -> Ranking:
    """Counts what all metrics need.

    scores: any shape, floats, higher is more anomalous; a tensor is sorted on its own device. positive: bool of the
    same shape.

    Only values are sorted, without their indices, and of those only the ones that reach the lowest positive (of pixels,
    often a third).

    Raises:
        ValueError: only one class, or a NaN score.
    """
    positives = int(np.count_nonzero(positive))
    negatives = positive.size - positives
    if not positives or not negatives:
        raise ValueError(f"a ranking needs both classes, got {positives} positive and {negatives} negative")
    if isinstance(scores, torch.Tensor) and scores.device.type != "cpu":
        values, ordered, below, not_above = _count_on_device(scores.flatten(), torch.from_numpy(positive.ravel()))
    else:
        values, ordered, below, not_above = _count(np.ravel(scores), np.ravel(positive))
    # counted against all scores; the positives themselves are taken out again
    below = below - np.searchsorted(ordered, ordered, "left")
    not_above = not_above - np.searchsorted(ordered, ordered, "right")
    return Ranking(values, ordered, negatives - not_above, not_above - below, negatives)


def _count(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, ...]:
    """The positives as they come and ascending; for each of the latter the scores below it, and not above it.

    Sorted in chunks, on all cores; with many positives in fewer chunks, because each is looked up in every chunk.
    """
    values = scores[positive]
    ordered = np.sort(values)
    chunks = np.array_split(scores, -(-scores.size // max(SORT_CHUNK, 4 * len(ordered))))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # sorting releases the interpreter lock
        below, not_above = sum(pool.map(lambda chunk: _count_in_chunk(chunk, ordered), chunks))
    return values, ordered, below, not_above


def _count_in_chunk(chunk: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    below_all = chunk < ordered[0]
    others = np.sort(chunk[~below_all])
    _refuse_nan(others[-1:])  # NaN sorts last
    lower = len(chunk) - len(others)
    return np.stack([np.searchsorted(others, ordered, side) for side in ("left", "right")]) + lower


def _count_on_device(scores: torch.Tensor, positive: torch.Tensor) -> tuple[np.ndarray, ...]:
    """What `_count` gives, from a tensor (N,) on its own device."""
    values = scores[positive.to(scores.device)]
    ordered = values.sort().values
    others = scores[~(scores < ordered[0])].sort().values
    _refuse_nan(others[-1:].cpu().numpy())
    lower = len(scores) - len(others)
    counts = (torch.searchsorted(others, ordered, right=right) + lower for right in (False, True))
    return tuple(result.cpu().numpy() for result in (values, ordered, *counts))


def _refuse_nan(highest: np.ndarray) -> None:
    if np.isnan(highest).any():
        raise ValueError("a ranking of NaN scores is not defined")


def auroc(ranking: Ranking) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, a tie counting one half.

    Counted in integers and divided once.
    """
    pairs = 2 * len(ranking.ordered) * ranking.negatives
    return (pairs - 2 * int(ranking.above.sum()) - int(ranking.ties.sum())) / pairs


def average_precision(ranking: Ranking) -> float:
    """Mean over the positives of the precision at the threshold that just finds them (scikit-learn's AP)."""
    found = ranking.true_positives()
    return float(np.mean(found / (found + ranking.above + ranking.ties)))


def f1_max(ranking: Ranking) -> float:
    """The highest F1 score of any threshold. It lies at a positive: other thresholds only add false alarms."""
    found = ranking.true_positives()
    return float(np.max(2 * found / (found + ranking.above + ranking.ties + len(found))))


def region_weights(masks: np.ndarray) -> np.ndarray:
    """What each defective pixel adds to the mean overlap of all regions: 1 / (pixels of its region x regions), (P,).

    masks: (B, S, S) bool. A region is 8-connected within its image, as in MVTec AD's evaluation.
    """
    regions, count = label(masks, EIGHT_CONNECTED)
    of_pixel = regions[masks]
    return 1 / (np.bincount(of_pixel)[of_pixel] * count)


def pro(ranking: Ranking, weights: np.ndarray) -> float:
    """Area under the per-region-overlap curve up to PRO_FPR_LIMIT, over that limit: 1 is perfect.

    The curve: mean share found of each region, over the share of normal pixels found, a line between neighbouring
    thresholds. It is a sum of one ramp per defective pixel, `weights` high (see `region_weights`), which begins after
    the normal pixels above it and ends after those that tie with it; so is its area.
    """
    place = np.searchsorted(ranking.ordered, ranking.values)
    begin, length = ranking.above[place] / ranking.negatives, ranking.ties[place] / ranking.negatives
    inside = np.clip(PRO_FPR_LIMIT - begin, 0, None)
    climbed = np.minimum(inside, length)  # the part of the ramp before the limit: a triangle, then a rectangle
    triangle = np.divide(climbed**2, 2 * length, out=np.zeros_like(length), where=length > 0)
    return float(weights @ (triangle + inside - climbed) / PRO_FPR_LIMIT)
