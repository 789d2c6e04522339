"""From the scores of a few normal images to a threshold, with no defect seen.

Where n normal images are few, each is scored in all its 22 views, which stand in for the images that were not
taken.

The rule. For a false-alarm rate a with (n + 1) a >= 1, the ceil((n + 1)(1 - a))-th smallest score of the images
themselves: it assumes no distribution (split conformal prediction). Rarer alarms cannot be read off n images. Then
the logarithms of the n x 22 view scores are taken as normally distributed with their own mean and standard deviation,
and the threshold is that distribution's quantile 1 - a, or the largest score of an image if that is higher.

A region has a lower bound of its own: what the hottest share a of a normal image's area exceeds, the median over the
normal images. On normal images too some area is hotter; it shows where to look and decides nothing.

Its weakness: views of one image resemble each other, so two to eight images still say little about the spread
between images and next to nothing about rare odd ones, which makes the threshold too low. Scores of a support image
come from the K - 1 others instead of K, and rotated or shifted views are a little odd in themselves, which makes it too
high. So the rate holds on average over parts at best, not for each; benchmarks/threshold.py measures what comes of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from scorers.base import Prepared, Scorer
from scorers.features import without_images
from scorers.maps import score_map_matrix, score_maps
from utils.errors import UserError
from utils.stages import StageClock


class NormalScores(NamedTuple):
    """What a threshold comes from: scores (n, views) of normal images, the first view being the image itself, and
    score maps (n, S, S) of the images themselves.
    """

    scores: np.ndarray
    maps: np.ndarray


def leave_one_out(scorer: Scorer, support: Prepared, size: int, clock: StageClock) -> NormalScores:
    """Scores of all views in `support`; those of an image by a fit to the views of the K - 1 others."""
    scores, maps = [], []
    views = len(scorer.views)
    for start in range(0, len(support[0]), views):
        end = start + views
        own, others = [layer[start:end] for layer in support], without_images(support, start, end)
        distances = scorer.measure(others, own, clock)
        matrix = score_map_matrix(distances.shape[-1], size, distances.device)
        of_views, maps_of_views = score_maps(distances, matrix)
        scores.append(of_views.cpu().numpy())
        maps.append(maps_of_views[0].cpu().numpy())
    return NormalScores(np.stack(scores), np.stack(maps))


class Threshold(NamedTuple):
    """A score above `value` (a distance) is called defective; `how` says where the value came from.

    typical: the median score of the normal images; heat-maps are coloured by it. region: places above it are
    outlined. Both are `value` where no normal score is known.
    """

    value: float
    how: str
    typical: float
    region: float


def is_order_statistic(count: int, false_alarm: float) -> bool:
    """Whether the scores of `count` normal images alone give the threshold, without their views."""
    return _order(count, false_alarm) <= count


def normal_threshold(scores: np.ndarray, maps: np.ndarray, false_alarm: float, source: str) -> Threshold:
    """The threshold that about a share `false_alarm` of normal images exceeds, by the module's rule.

    scores: (n, views) above 0, of normal images; the first view is the image itself, maps: (n, S, S) its score map.

    Raises:
        UserError: fewer than two images, a score of 0, or a share outside (0, 1).
    """
    count = len(scores)
    check_calibration(count, false_alarm)
    if scores.min() <= 0:
        raise UserError("normal images that are all alike give no threshold; give other ones, or --threshold")
    images = np.sort(scores[:, 0])
    if is_order_statistic(count, false_alarm):
        order = _order(count, false_alarm)
        value, rule = float(images[order - 1]), f"the {order}-th smallest of {count} scores"
    else:
        logs = np.log(scores.astype(np.float64))
        value = float(np.exp(logs.mean() + ndtri(1 - false_alarm) * logs.std()))
        rule = f"log-normal bound of {scores.size} views"
        if value < images[-1]:
            value, rule = float(images[-1]), f"the largest of {count} scores"
    region = np.median(np.quantile(maps.reshape(count, -1), 1 - false_alarm, axis=1))
    how = f"{rule} for a false-alarm rate of {false_alarm:g}, {source}"
    return Threshold(value, how, float(np.median(images)), float(region))


def check_calibration(count: int, false_alarm: float) -> None:
    """UserError where `count` normal images and that share can give no threshold."""
    if not 0 < false_alarm < 1:
        raise UserError(f"--false_alarm is a share between 0 and 1, got {false_alarm}")
    if count < 2:
        raise UserError(f"a threshold needs the scores of at least 2 normal images, got {count}")


def _order(count: int, false_alarm: float) -> int:
    return math.ceil((count + 1) * (1 - false_alarm) - 1e-9)  # 20 * 0.95 must not become 19.000000000000004
