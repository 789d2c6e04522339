"""The variation of metrics over test images, by a stratified bootstrap.

A drawn test set has as many normal and as many defective images as the original, drawn with replacement. Images are
drawn whole, as the pixels of an image depend on each other. A drawn test set is a number of copies per image.
Therefore the scores are counted once, by image and by bins of the score, and each metric is computed from sums of these
counts, weighted by the copies. Image scores have a bin for each value and are exact; the scores of pixels are rounded
to PIXEL_BINS values.

With the same draws, two methods are compared paired by test image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from evaluation.metrics import PRO_FPR_LIMIT, ramp_areas

DRAWS = 1000  # test sets; the error of the ends of a 95 % interval is then about 5 % of its width
PIXEL_BINS = 512  # on bottle, K = 2, AP changes by 1.2e-3 (its interval is 0.12 wide), other metrics by 1e-4
INTERVAL = (2.5, 97.5)  # percentiles


class Counts(NamedTuple):
    """Counts of B images in N bins of ascending score, all (B, N).

    positives, negatives: defective and normal images or pixels. regions: the shares of defective regions, for PRO;
    None for image scores.
    """

    positives: np.ndarray
    negatives: np.ndarray
    regions: np.ndarray | None = None


def draw_copies(labels: np.ndarray, draws: int = DRAWS, seed: int | Sequence[int] = 0) -> np.ndarray:
    """The number of copies of each image in each drawn test set, (draws, B) float32. labels: (B,) bool."""
    generator, copies = np.random.default_rng(seed), np.zeros((draws, len(labels)), np.float32)
    for label in (False, True):
        indices = np.flatnonzero(labels == label)
        if len(indices):
            copies[:, indices] = generator.multinomial(len(indices), np.full(len(indices), 1 / len(indices)), draws)
    return copies


def count_images(scores: np.ndarray, labels: np.ndarray) -> Counts:
    """The counts of image scores (B,) with labels (B,) bool."""
    values, bins = np.unique(scores, return_inverse=True)
    counts = np.zeros((len(scores), len(values)), np.float32)
    counts[np.arange(len(scores)), bins] = 1
    return Counts(counts * labels[:, None], counts * ~labels[:, None])


def count_pixels(maps: np.ndarray, masks: np.ndarray, valid_mask: np.ndarray | None, weights: np.ndarray) -> Counts:
    """The counts of score maps (B, S, S) with the ground truth of evaluation.round_metrics.GroundTruth.

    weights: (P,) from evaluation.metrics.region_weights of the masks.
    """
    low, high = maps[masks].min(), maps.max()
    scale = np.float32((PIXEL_BINS - 2) / max(high - low, 1e-12))
    counts, begin = np.zeros((3, len(maps), PIXEL_BINS), np.float32), 0
    for number, (scores, mask) in enumerate(zip(maps, masks, strict=True)):  # one image at a time fits the cache
        levels = np.clip((scores - low) * scale + 1, 0, PIXEL_BINS - 1)  # bin 0: below all defective pixels
        bins = levels.astype(np.intp)
        positive = bins[mask]
        image_weights = weights[begin : (begin := begin + len(positive))]
        valid = bins.ravel() if valid_mask is None else bins[valid_mask[number]]
        counts[0, number] = np.bincount(positive, minlength=PIXEL_BINS)
        counts[1, number] = np.bincount(valid, minlength=PIXEL_BINS) - counts[0, number]
        counts[2, number] = np.bincount(positive, image_weights, minlength=PIXEL_BINS)
    return Counts(*counts)


def metrics_of(counts: Counts, copies: np.ndarray) -> dict[str, np.ndarray]:
    """AUROC, AP and F1-max, and with regions PRO, of each drawn test set, (draws,) each; see evaluation.metrics.

    copies: (draws, B), from `draw_copies`.
    """
    defective = counts.positives.any(axis=1)
    positives = copies[:, defective] @ counts.positives[defective]
    negatives = copies @ counts.negatives
    # true and false positives, with the score of each bin as the threshold
    true, false = (np.cumsum(one[:, ::-1], axis=1)[:, ::-1] for one in (positives, negatives))
    all_positives, all_negatives = true[:, :1], false[:, :1]
    above = false - negatives  # negatives with a higher score
    flagged = np.maximum(true + false, 1)
    metrics = {
        "auroc": 1 - (positives * (above + negatives / 2)).sum(axis=1) / (all_positives * all_negatives)[:, 0],
        "ap": (positives * true / flagged).sum(axis=1) / all_positives[:, 0],
        "f1_max": (2 * true / (flagged + all_positives)).max(axis=1),
    }
    if counts.regions is not None:
        regions = copies[:, defective] @ counts.regions[defective]
        areas = ramp_areas(above / all_negatives, negatives / all_negatives)  # as in evaluation.metrics.pro
        metrics["pro"] = (regions * areas).sum(axis=1) / regions.sum(axis=1) / PRO_FPR_LIMIT
    return metrics


def resample(rounds: Iterable[Counts], copies: np.ndarray, level: str) -> dict[str, np.ndarray]:
    """The deviations of each metric, (draws,) by key of METRIC_NAMES.

    A deviation is the mean over rounds in a drawn test set minus that in the original one. level: "image" or "pixel".
    """
    with_original = np.concatenate([np.ones_like(copies[:1]), copies])
    by_round = [metrics_of(counts, with_original) for counts in rounds]
    means = {name: np.mean([of_round[name] for of_round in by_round], axis=0, dtype=float) for name in by_round[0]}
    keys = {name: name if name == "pro" else f"{level}_{name}" for name in means}
    return {keys[name]: values[1:] - values[0] for name, values in means.items()}


def percentile_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval: the 2.5th and the 97.5th percentile of resampled values."""
    low, high = np.percentile(values, INTERVAL)
    return float(low), float(high)
