"""Ranking metrics: scores in, numbers out. Exact, ties handled, no approximation by thresholds."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

SORT_CHUNK = 2**19  # scores sorted at a time: enough chunks for all cores, each small enough to stay in cache


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, a tie counting one half.

    scores: any shape, floats, higher is more anomalous. positive: bool of the same shape. Result in [0, 1].

    Counted in integers and divided once, so it is exact however many ties there are. Only values are sorted, in chunks
    and without their indices, and of those only the ones that reach the lowest of the smaller class (of pixels, often a
    third); each value of the smaller class is then looked up in every chunk.

    Raises:
        ValueError: only one class, or a NaN score.
    """
    scores, positive = np.ravel(scores), np.ravel(positive)
    positives = np.count_nonzero(positive)
    negatives = positive.size - positives
    if not positives or not negatives:
        raise ValueError(f"AUROC needs both classes, got {positives} positive and {negatives} negative")
    few_are_positive = positives <= negatives
    few = np.sort(scores[positive if few_are_positive else ~positive])
    chunks = np.array_split(scores, -(-scores.size // SORT_CHUNK))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # sorting releases the interpreter lock
        twice_above_all = sum(pool.map(lambda chunk: _twice_below(chunk, few), chunks))
    twice_above = twice_above_all - _twice_below(few, few)  # against the other class only
    pairs = 2 * positives * negatives
    return float((twice_above if few_are_positive else pairs - twice_above) / pairs)


def _twice_below(chunk: np.ndarray, few: np.ndarray) -> int:
    """Twice the pairs (a of `few`, b of `chunk`) with a > b, a tie counting one half; `few` is sorted."""
    below_all = chunk < few[0]
    others = np.sort(chunk[~below_all])
    if len(others) and np.isnan(others[-1]):  # NaN sorts last
        raise ValueError("AUROC of NaN scores is not defined")
    ties_below, ties_above = (int(np.searchsorted(others, few, side).sum()) for side in ("left", "right"))
    return 2 * len(few) * (len(chunk) - len(others)) + ties_below + ties_above
