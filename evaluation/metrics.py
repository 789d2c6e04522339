"""Ranking metrics, computed exactly: ties are handled, and thresholds are not sampled.

`rank` counts, for each positive, the negatives with a higher score and those with an equal score. All metrics are
computed from these counts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import label

from utils.devices import download, upload

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

    scores: floats of any shape, higher is more anomalous; a tensor is sorted on its own device. positive: bool, the
    same shape.

    Raises:
        ValueError: only one class is present, or a score is NaN.
    """
    return rank_kinds([(scores, positive)])[0]


def rank_kinds(
    parts: Sequence[tuple[np.ndarray | torch.Tensor, np.ndarray]], places: Sequence[torch.Tensor] | None = None
) -> tuple[Ranking, list[Ranking | None]]:
    """The ranking of all parts together, and of each part but the first together with the first one.

    The first part holds negatives that the others share: the normal images. Each further part holds one kind of
    positives, with negatives of its own. All values are sorted once: what is counted for a part counts in both. Only
    values are sorted, without indices, and only those not below the lowest positive. For pixels, this is often a third.

    parts: scores and positive of each part, as for `rank`. With several parts the first has no positives. places: from
    `places_on`, for scores on a device; computed if not given.

    Returns:
        The ranking of all, its positives in the order of the parts, and one ranking per further part; None where a part
        and the first one have one class only.

    Raises:
        ValueError: all parts together have only one class, or a score is NaN.
    """
    truths = [np.ravel(positive) for _, positive in parts]
    found = [int(np.count_nonzero(truth)) for truth in truths]
    lacking = [truth.size - count for truth, count in zip(truths, found, strict=True)]
    if not sum(found) or not sum(lacking):
        raise ValueError(f"a ranking needs both classes, got {sum(found)} positive and {sum(lacking)} negative")
    if any(isinstance(scores, torch.Tensor) and scores.device.type != "cpu" for scores, _ in parts):
        flat = [scores.flatten() for scores, _ in parts]
        values, ordered, counts = _count_on_device(flat, places or places_on(flat[0].device, truths))
    else:
        values, ordered, counts = _count([np.ravel(scores) for scores, _ in parts], truths)
    own = np.split(values, np.cumsum(found)[:-1])
    kinds = [
        _kind_ranking(own[part], ordered, counts[0] + counts[part], lacking[0] + lacking[part])
        for part in range(1, len(parts))
    ]
    return _ranking(values, ordered, sum(counts), sum(lacking)), kinds


def _kind_ranking(own: np.ndarray, ordered: np.ndarray, counts: np.ndarray, negatives: int) -> Ranking | None:
    """The ranking of one kind's positives `own`, from what was counted for all positives `ordered`."""
    if not len(own) or not negatives:
        return None
    own_ordered = np.sort(own)
    return _ranking(own, own_ordered, counts[:, np.searchsorted(ordered, own_ordered)], negatives)


def _ranking(values: np.ndarray, ordered: np.ndarray, counts: np.ndarray, negatives: int) -> Ranking:
    """counts: (2, P), per ascending positive the scores below it and not above it, the positives' own included."""
    below = counts[0] - np.searchsorted(ordered, ordered, "left")
    not_above = counts[1] - np.searchsorted(ordered, ordered, "right")
    return Ranking(values, ordered, negatives - not_above, not_above - below, negatives)


def _count(
    parts: Sequence[np.ndarray], positive: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The positives (P,) in their order and ascending; for each part (2, P), its scores below each and not above.

    parts: (N,) each. Chunks are sorted on all cores. With many positives there are fewer chunks, as each positive is
    looked up in every chunk.
    """
    values = np.concatenate([scores[truth] for scores, truth in zip(parts, positive, strict=True)])
    ordered = np.sort(values)
    size = max(SORT_CHUNK, 4 * len(ordered))
    chunks = [np.array_split(scores, max(1, -(-scores.size // size))) for scores in parts]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # sorting releases the interpreter lock
        counted = [pool.map(lambda chunk: _count_in_chunk(chunk, ordered), of_part) for of_part in chunks]
        return values, ordered, [sum(of_part) for of_part in counted]


def _count_in_chunk(chunk: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    below_all = chunk < ordered[0]
    others = np.sort(chunk[~below_all])
    _refuse_nan(others[-1:])  # NaN sorts last
    lower = len(chunk) - len(others)
    return np.stack([np.searchsorted(others, ordered, side) for side in ("left", "right")]) + lower


def places_on(device: torch.device, positive: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """The indices of the positives of each part, on `device`; `positive`: bool of any shape."""
    return [upload(torch.from_numpy(np.flatnonzero(truth)), device) for truth in positive]


def _count_on_device(
    parts: Sequence[torch.Tensor], places: Sequence[torch.Tensor]
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The same as `_count`, for tensors (N,) on their own device, with the indices of the positives of each part.

    Everything is sorted, so that the host waits once, for the results.
    """
    values = torch.cat([scores[place] for scores, place in zip(parts, places, strict=True)])
    ordered = values.sort().values
    in_order = [scores.sort().values for scores in parts]
    counts = [
        torch.stack([torch.searchsorted(others, ordered, right=right) for right in (False, True)])
        for others in in_order
    ]
    highest = torch.cat([others[-1:] for others in in_order])
    found = download((highest, values, ordered, torch.stack(counts)))
    _refuse_nan(found[0])
    return found[1], found[2], list(found[3])


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


def region_sizes(masks: np.ndarray) -> tuple[np.ndarray, int]:
    """The number of pixels of each defective pixel's region, (P,) in the order of `masks`, and the number of regions.

    masks: (B, S, S) bool. Regions are 8-connected within an image, as in the evaluation code of MVTec AD.
    """
    regions, count = label(masks, EIGHT_CONNECTED)
    of_pixel = regions[masks]
    return np.bincount(of_pixel)[of_pixel], count


def region_weights(masks: np.ndarray) -> np.ndarray:
    """The contribution (P,) of each defective pixel to the mean overlap: 1 / (pixels of its region x regions)."""
    sizes, count = region_sizes(masks)
    return 1 / (sizes * count)


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
