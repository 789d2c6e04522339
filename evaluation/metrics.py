"""Ranking metrics, computed exactly: ties are handled, and thresholds are not sampled.

`rank` counts, for each positive, the negatives with a higher score and those with an equal score. All metrics are
computed from these counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import label

from utils.devices import download

METRIC_NAMES = {  # key in the records -> display name
    **{"image_auroc": "image AUROC", "image_ap": "image AP", "image_f1_max": "image F1-max"},
    **{"pixel_auroc": "pixel AUROC", "pixel_ap": "pixel AP", "pixel_f1_max": "pixel F1-max", "pro": "PRO"},
}
PRO_FPR_LIMIT = 0.3  # MVTec AD paper: area up to a false-positive rate of 30 %
EIGHT_CONNECTED = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])  # within an image, not across images


class Ranking(NamedTuple):
    """The ranks of P positives among N negatives."""

    order: np.ndarray  # (P,) indices that sort the positives by ascending score; the counts have this order
    detected: np.ndarray  # (P,) number of true positives with each score as the threshold (score >= threshold)
    above: np.ndarray  # (P,) number of negatives with a higher score
    ties: np.ndarray  # (P,) number of negatives with the same score
    negatives: int


def rank(scores: np.ndarray | torch.Tensor, positive: np.ndarray) -> Ranking:
    """The ranking of the scores where `positive` is True among the others.

    scores: floats of any shape, higher is more anomalous. positive: bool, the same shape.

    Raises:
        ValueError: only one class is present, or a score is NaN.
    """
    flat, truth = torch.as_tensor(scores).flatten(), torch.from_numpy(np.ravel(positive))
    if truth.all() or not truth.any():
        raise ValueError("a ranking needs both classes, positive and negative")
    positives, negatives = flat[truth.to(flat.device)], flat[~truth.to(flat.device)]
    counting = Counting(positives)
    counting.add(ascending(negatives, positives), len(negatives))
    return rankings([counting])[0]


def ascending(negatives: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Sorts scores (N,). On the CPU, those below all `positives` are dropped; for pixels, this is often two thirds."""
    if negatives.device.type != "cpu":
        return negatives.sort().values
    not_below = negatives.numpy()[~(negatives < positives.min()).numpy()]
    return torch.from_numpy(np.sort(not_below))  # faster than torch, which also sorts the indices


class Counting:
    """Counts the negatives above and equal to each of P positive scores; the negatives come in any number of parts."""

    def __init__(self, positives: torch.Tensor) -> None:
        self.values, self.order = positives.sort()
        self.highest = [self.values[-1]]  # NaN if any score is
        self.above, self.ties, self.negatives = torch.zeros_like(self.order), torch.zeros_like(self.order), 0

    def add(self, part: torch.Tensor, count: int) -> None:
        """Counts negatives from `ascending`. count: their number, including those that `ascending` dropped."""
        self.negatives += count
        if len(part):
            below, not_above = (torch.searchsorted(part, self.values, right=right) for right in (False, True))
            self.above += len(part) - not_above
            self.ties += not_above - below
            self.highest.append(part[-1].clone())  # a view would keep the part in memory


def rankings(countings: Sequence[Counting]) -> list[Ranking]:
    """The rankings of several countings; the host waits for the device once.

    Raises:
        ValueError: a score is NaN.
    """
    tensors = []
    for counting in countings:
        lower = torch.searchsorted(counting.values, counting.values)
        tensors += [torch.stack(counting.highest), torch.stack([counting.order, lower, counting.above, counting.ties])]
    arrays = download(tuple(tensors)) if tensors else ()
    if any(np.isnan(highest).any() for highest in arrays[::2]):
        raise ValueError("a ranking of NaN scores is not defined")
    return [
        Ranking(order, len(order) - lower, above, ties, counting.negatives)
        for (order, lower, above, ties), counting in zip(arrays[1::2], countings, strict=True)
    ]


def auroc(ranking: Ranking) -> float:
    """Area under the ROC curve, in [0, 1]: the share of correctly ordered (positive, negative) pairs; ties count half.

    The pairs are counted in integers and divided once.
    """
    pairs = 2 * len(ranking.order) * ranking.negatives
    return (pairs - 2 * int(ranking.above.sum()) - int(ranking.ties.sum())) / pairs


def average_precision(ranking: Ranking) -> float:
    """Average precision, in [0, 1]: mean precision with each positive's score as the threshold (scikit-learn's AP)."""
    return float(np.mean(ranking.detected / (ranking.detected + ranking.above + ranking.ties)))


def f1_max(ranking: Ranking) -> float:
    """The highest F1 score over all thresholds, in [0, 1].

    Only the scores of positives are tried: other thresholds add false positives but no true positives.
    """
    flagged = ranking.detected + ranking.above + ranking.ties
    return float(np.max(2 * ranking.detected / (flagged + len(ranking.order))))


def region_weights(masks: np.ndarray) -> np.ndarray:
    """1 / (pixels of its region) for each defective pixel, (P,) in the order of `masks`, (B, S, S) bool.

    Regions are 8-connected within an image, as in the evaluation code of MVTec AD.
    """
    region_of_pixel = label(masks, EIGHT_CONNECTED)[0][masks]
    return 1 / np.bincount(region_of_pixel)[region_of_pixel]


def ramp_areas(begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The areas, up to PRO_FPR_LIMIT, below ramps that rise from 0 at `begin` to 1 at `begin` + `length`."""
    inside = np.clip(PRO_FPR_LIMIT - begin, 0, None)
    rise = np.minimum(inside, length)  # width of the ramp's rise below the limit: a triangle, then a rectangle
    triangle = np.divide(rise**2, 2 * length, out=np.zeros_like(length), where=length > 0)
    return triangle + inside - rise


def pro(ranking: Ranking, weights: np.ndarray) -> float:
    """Area under the per-region-overlap (PRO) curve up to PRO_FPR_LIMIT, divided by that limit; in [0, 1].

    The curve gives the mean detected share of the regions as a function of the false-positive rate of the pixels, with
    linear interpolation between thresholds. It is the sum of one ramp per defective pixel. A ramp starts at the
    false-positive rate of the normal pixels with a higher score. It ends where those with an equal score are included.
    Its height is the pixel's weight; all weights sum to the number of regions. The area is computed as the sum of the
    areas below the ramps.

    weights: (P,) from `region_weights`, in the order of the positives.
    """
    areas = ramp_areas(ranking.above / ranking.negatives, ranking.ties / ranking.negatives)
    return min(1.0, float(weights[ranking.order] @ areas / weights.sum() / PRO_FPR_LIMIT))  # 1 + 1e-15 is possible
