"""Computes a threshold from the scores of n normal images, without defective images.

The threshold for a false-positive rate a (the share of normal images that cause a false alarm):

- If (n + 1) a >= 1, it is the ceil((n + 1)(1 - a))-th smallest score of the images (split conformal prediction). This
  assumes no distribution.
- Otherwise n images are too few for the rate a. Each image is then scored in all views that the scorer uses (up to 22).
  The logarithms of these scores are modelled as a normal distribution with their mean and standard deviation. The
  threshold is the quantile 1 - a of this distribution, or the largest score of an image if that is higher.

The region threshold is usually lower. It is the quantile 1 - a of the pixels of a normal score map, as the median over
the normal images. Regions above it are outlined. Normal images contain such regions too, so the region threshold shows
where to look and does not affect the decision.

Limits: the views of an image are similar to each other. Two to eight images say little about the spread between images
and almost nothing about rare unusual images, which makes the threshold too low. Two effects make it too high: the score
of a support image is computed from the K - 1 others instead of K, and rotated or shifted views score slightly higher.
The rate can therefore hold on average over parts, but not for every part. benchmarks/threshold.py measures the actual
rate.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtri

from inspection.region import pixels
from scorers.base import Prepared, Scorer
from scorers.features import without_images
from scorers.maps import score_maps_at
from utils.errors import UserError
from utils.stages import StageClock


class NormalScores(NamedTuple):
    """Scores of normal images, from which a threshold is computed.

    scores: (n, views), at least 0; the first view is the image itself. maps: (n, S, S), the values of the score maps of
    the images: with a region or tiles, S x S of them (`inspection.region.pixels`), else the maps.
    """

    scores: np.ndarray
    maps: np.ndarray


def leave_one_out(
    scorer: Scorer, support: Prepared, size: int, clock: StageClock, inside: torch.Tensor | None = None
) -> NormalScores:
    """Leave-one-out scores of the support images: each image is scored by a fit to the views of the K - 1 others.

    support: prepared features of all views. size: side of the score maps in pixels. inside: the region in each view,
    (views, S, S) bool; None: everywhere.
    """
    scores, maps = [], []
    views = len(scorer.views)
    for start in range(0, len(support[0]), views):
        end = start + views
        own, others = [layer[start:end] for layer in support], without_images(support, start, end)
        distances = scorer.measure(others, own, clock)
        of_views, maps_of_views = score_maps_at(distances, size, inside)
        scores.append(of_views.cpu().numpy())
        of_image = maps_of_views[0].cpu().numpy()
        maps.append(of_image if inside is None else pixels(of_image, inside[0].cpu().numpy(), size))
    return NormalScores(np.stack(scores), np.stack(maps))


class Threshold(NamedTuple):
    """An image with a score above `value` is classified as defective.

    All values are distances. how: the origin of `value`, as text. typical: the median score of the normal images; sets
    the colour scale of the heat maps. region: regions above it are outlined. `typical` and `region` equal `value` if no
    normal scores are known.
    """

    value: float
    how: str
    typical: float
    region: float


def is_order_statistic(count: int, false_alarm: float) -> bool:
    """Whether `count` normal images are enough for a threshold from their scores alone, without views."""
    return _order(count, false_alarm) <= count


def normal_threshold(scores: np.ndarray, maps: np.ndarray, false_alarm: float, source: str) -> Threshold:
    """The threshold for a false-positive rate of `false_alarm`, by the rule in the module's docstring.

    scores: (n, views), above 0, of normal images; the first view is the image itself. maps: (n, S, S), score maps of
    the images. source: where the scores come from, as text for `Threshold.how`.

    Raises:
        UserError: fewer than two images that differ, or a rate outside (0, 1).
    """
    check_calibration(len(scores), false_alarm)
    known = scores[:, 0] <= 0  # copies of another normal image: they say nothing about how much images differ
    source += f", {known.sum()} identical to others left out" if known.any() else ""
    scores, maps = scores[~known], maps[~known]
    count = len(scores)
    if count < 2:
        raise UserError("identical normal images give no threshold; give other images, or --threshold")
    images = np.sort(scores[:, 0])
    if is_order_statistic(count, false_alarm):
        order = _order(count, false_alarm)
        value, rule = float(images[order - 1]), f"the {order}-th smallest of {count} scores"
    else:
        logs = np.log(scores[scores > 0].astype(np.float64))
        value = float(np.exp(logs.mean() + ndtri(1 - false_alarm) * logs.std()))
        rule = f"log-normal bound of {scores.size} views"
        if value < images[-1]:
            value, rule = float(images[-1]), f"the largest of {count} scores"
    region = np.median(np.quantile(maps.reshape(count, -1), 1 - false_alarm, axis=1))
    how = f"{rule} for a false-alarm rate of {false_alarm:g}, {source}"
    return Threshold(value, how, float(np.median(images)), float(region))


def check_calibration(count: int, false_alarm: float) -> None:
    """Checks that a threshold can be computed from `count` normal images for the rate `false_alarm`.

    Raises:
        UserError: fewer than two images, or a rate outside (0, 1).
    """
    if not 0 < false_alarm < 1:
        raise UserError(f"--false_alarm must be between 0 and 1, got {false_alarm}")
    if count < 2:
        raise UserError(f"a threshold needs the scores of at least 2 normal images, got {count}")


def _order(count: int, false_alarm: float) -> int:
    return math.ceil((count + 1) * (1 - false_alarm) - 1e-9)  # 20 * 0.95 must not become 19.000000000000004
