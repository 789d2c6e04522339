"""Ranking metrics, computed exactly: ties are handled, and thresholds are not sampled.

`rank` counts, for each positive, the negatives with a higher score and those with an equal score. All metrics are
computed from these counts.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import label

SORT_CHUNK = 2**19  # scores per sorted chunk: enough chunks for all cores, each small enough for the caches
METRIC_NAMES = {  # key in the records -> display name
    **{"image_auroc": "image AUROC", "image_ap": "image AP", "image_f1_max": "image F1-max"},
    **{"pixel_auroc": "pixel AUROC", "pixel_ap": "pixel AP", "pixel_f1_max": "pixel F1-max", "pro": "PRO"},
}
PRO_FPR_LIMIT = 0.3  # MVTec AD paper: area up to a false-positive rate of 30 %
EIGHT_CONNECTED = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])  # within an image, not across images


class Ranking(NamedTuple):
    """The ranks of P positives among N negatives."""

    values: np.ndarray  # (P,) scores of the positives, in the order of scores[positive]
    ordered: np.ndarray  # (P,) the same, ascending; `above` and `ties` refer to this order
    above: np.ndarray  # (P,) integers, number of negatives with a higher score
    ties: np.ndarray  # (P,) integers, number of negatives with the same score
    negatives: int

    def true_positives(self) -> np.ndarray:
        """(P,) number of true positives with each score in `ordered` as the threshold (score >= threshold)."""
        return len(self.ordered) - np.searchsorted(self.ordered, self.ordered, "left")


def rank(scores: np.ndarray | torch.Tensor, positive: np.ndarray) -> Ranking:
    """Computes the counts that all metrics use.

    Only values are sorted, without indices, and only those not below the lowest positive. For pixels, this is often a
    third of the values.

    scores: floats of any shape, higher is more anomalous; a tensor is sorted on its own device. positive: bool, the
    same shape.

    Raises:
        ValueError: only one class is present, or a score is NaN.
    """
    positives = int(np.count_nonzero(positive))
    negatives = positive.size - positives
    if not positives or not negatives:
        raise ValueError(f"a ranking needs both classes, got {positives} positive and {negatives} negative")
    if isinstance(scores, torch.Tensor) and scores.device.type != "cpu":
        values, ordered, below, not_above = _count_on_device(scores.flatten(), torch.from_numpy(positive.ravel()))
    else:
        values, ordered, below, not_above = _count(np.ravel(scores), np.ravel(positive))
    # the counts include all scores; subtract the positives
    below = below - np.searchsorted(ordered, ordered, "left")
    not_above = not_above - np.searchsorted(ordered, ordered, "right")
    return Ranking(values, ordered, negatives - not_above, not_above - below, negatives)


def _count(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, ...]:
    """The positives in their original order and ascending; per ascending positive, the scores below it and not above.

    Chunks are sorted on all cores. With many positives there are fewer chunks, as each positive is looked up in every
    chunk.
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
    """The same as `_count`, for a tensor (N,) on its own device."""
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
    """Area under the ROC curve, in [0, 1]: the share of correctly ordered (positive, negative) pairs; ties count half.

    The pairs are counted in integers and divided once.
    """
    pairs = 2 * len(ranking.ordered) * ranking.negatives
    return (pairs - 2 * int(ranking.above.sum()) - int(ranking.ties.sum())) / pairs


def average_precision(ranking: Ranking) -> float:
    """Average precision, in [0, 1]: mean precision with each positive's score as the threshold (scikit-learn's AP)."""
    found = ranking.true_positives()
    return float(np.mean(found / (found + ranking.above + ranking.ties)))


def f1_max(ranking: Ranking) -> float:
    """The highest F1 score over all thresholds, in [0, 1].

    Only the scores of positives are tried: other thresholds add false positives but no true positives.
    """
    found = ranking.true_positives()
    return float(np.max(2 * found / (found + ranking.above + ranking.ties + len(found))))


def region_weights(masks: np.ndarray) -> np.ndarray:
    """The contribution (P,) of each defective pixel to the mean overlap: 1 / (pixels of its region x regions).

    masks: (B, S, S) bool. Regions are 8-connected within an image, as in the evaluation code of MVTec AD.
    """
    regions, count = label(masks, EIGHT_CONNECTED)
    of_pixel = regions[masks]
    return 1 / (np.bincount(of_pixel)[of_pixel] * count)


def pro(ranking: Ranking, weights: np.ndarray) -> float:
    """Area under the per-region-overlap (PRO) curve up to PRO_FPR_LIMIT, divided by that limit; in [0, 1].

    The curve gives the mean detected share of the regions as a function of the false-positive rate of the pixels, with
    linear interpolation between thresholds. It is the sum of one ramp per defective pixel. A ramp starts at the
    false-positive rate of the normal pixels with a higher score. It ends where those with an equal score are included.
    Its height is the pixel's weight. The area is computed as the sum of the areas below the ramps.

    weights: (P,) from `region_weights`, in the order of `ranking.values`.
    """
    place = np.searchsorted(ranking.ordered, ranking.values)
    begin, length = ranking.above[place] / ranking.negatives, ranking.ties[place] / ranking.negatives
    inside = np.clip(PRO_FPR_LIMIT - begin, 0, None)
    climbed = np.minimum(inside, length)  # width of the ramp below the limit: a triangle, then a rectangle
    triangle = np.divide(climbed**2, 2 * length, out=np.zeros_like(length), where=length > 0)
    return float(weights @ (triangle + inside - climbed) / PRO_FPR_LIMIT)
