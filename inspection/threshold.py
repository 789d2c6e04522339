"""Computes a threshold from the scores of n normal images, without defective images.

The threshold for a false-positive rate a (the share of normal images that score above it):

- From further images, with (n + 1) a >= 1, it is the ceil((n + 1)(1 - a))-th smallest score of the images (split
  conformal prediction). This assumes no distribution.
- Otherwise the logarithms of the scores are taken as normally distributed, and the threshold is an extrapolation.
  - If the scorer has a prior (`scorers.base.ScorePrior`), n images are combined with it: the mean logarithm is pulled
    towards that of `typical` by `pull` / n, and the variance towards `spread`^2, which counts as `images` images. The
    threshold lies a share of the normal quantile above the mean. Leave-one-out scores are computed from one image less
    and are too high, by `bias` / n in the logarithm; `lift` makes up for what the support does not show. So the rate
    does not rise with the number of images. The threshold is at least the largest score of further images.
  - If it has none, each image is scored in all views that the scorer uses. The threshold is the quantile 1 - a of a
    normal distribution with mean and standard deviation of all these logarithms, or the largest score of an image if
    that is higher. Of leave-one-out scores with (n + 1) a >= 1 it is the order statistic, too.

The priors were chosen on the normal test images of several categories. `python -m benchmarks.threshold --choose`
chooses them on all but one and judges them on that one, each in turn. The scores of `combined` are relative to the
leave-one-out distances of the part itself, so nothing is pulled towards other parts.

The region threshold is usually lower. It is the quantile 1 - a of the pixels of a normal score map, as the median over
the normal images. Regions above it are outlined. Normal images contain such regions too, so the region threshold shows
where to look and does not affect the decision.

Limits: two to eight images say little about the spread between images and almost nothing about rare unusual images. The
rate holds on average over parts, but not for every part. benchmarks/threshold.py measures the actual rate.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtri

from inspection.region import pixels
from scorers.base import ScorePrior, Scorer
from scorers.maps import score_maps_at
from utils.errors import UserError

# Percent of the defects of nine parts that were called normal with the default rates and so many support images: mean,
# least and most of a part; the last with 20 further images (python -m benchmarks.threshold)
MISSED = {2: (50, 0, 82), 4: (40, 0, 82), 8: (32, 0, 67)}
MISSED_CALIBRATED = (31, 0, 56)
REVIEW_RATE = 0.05  # default share of normal images above the lower threshold


class NormalScores(NamedTuple):
    """Scores of normal images, from which a threshold is computed.

    scores: (n, views), at least 0; the first view is the image itself. maps: (n, S, S), the values of the score maps of
    the images: with a region or tiles, S x S of them (`inspection.region.pixels`), else the maps; empty where they were
    not kept. is_loo: whether they are leave-one-out scores, each image without its own support. names: of the images,
    for messages.
    """

    scores: np.ndarray
    maps: np.ndarray
    is_loo: bool
    names: tuple[str, ...] = ()

    def by_score(self) -> list[tuple[str, float]]:
        """Name and score of each image, highest score first."""
        names = self.names or tuple(f"image {n}" for n in range(1, len(self.scores) + 1))
        return sorted(zip(names, self.scores[:, 0].tolist(), strict=True), key=lambda row: -row[1])

    def state(self) -> dict:
        """Tensors and plain values for a file; `from_state` reads them."""
        scores, maps = torch.from_numpy(self.scores), torch.from_numpy(self.maps)
        return {"scores": scores, "maps": maps, "left_out": self.is_loo, "names": list(self.names)}

    def without_maps(self) -> NormalScores:
        """The scores alone: maps would be most of a file."""
        return self._replace(maps=self.maps[:, :0, :0])

    @staticmethod
    def from_state(state: dict) -> NormalScores:
        """The inverse of `state`."""
        scores, maps, names = state["scores"].numpy(), state["maps"].numpy(), map(os.fspath, state.get("names", ()))
        if (scores.ndim, maps.ndim, len(maps)) != (2, 3, len(scores)):
            raise ValueError(f"scores {scores.shape} with maps {maps.shape}")
        return NormalScores(scores, maps, bool(state["left_out"]), tuple(names))


def scored_views(scorer: Scorer) -> int:
    """In how many views support images are scored: in all if a threshold rule needs them, otherwise as they are."""
    return len(scorer.views) if scorer.prior is None else 1


def left_out_scores(
    scorer: Scorer, distances: torch.Tensor, size: int, inside: torch.Tensor | None = None
) -> NormalScores:
    """Leave-one-out scores from the distance maps of `Scorer.cross_fit` with `scored_views`.

    size: side of the score maps in pixels. inside: the region in each view, (views, S, S) bool; None: everywhere.
    """
    scores, maps = [], []
    scored = scored_views(scorer)
    for of_image in distances.split(scored):
        inside_scored = None if inside is None else inside[:scored]
        of_views, maps_of_views = score_maps_at(of_image, size, inside_scored, scorer.border_weight)
        scores.append(of_views.cpu().numpy())
        of_image = maps_of_views[0].cpu().numpy()
        maps.append(of_image if inside is None else pixels(of_image, inside[0].cpu().numpy(), size))
    return NormalScores(np.stack(scores), np.stack(maps), is_loo=True)


class Threshold(NamedTuple):
    """An image with a score above `value` is defective, one with a score above `review_value` for a person to judge.

    All values are distances. how: the origin of `value`, as text. typical: the median score of the normal images; sets
    the colour scale of the heat maps. region: regions above it are outlined. `typical` and `region` are equal if no
    normal scores are known. rate: the false-positive rate asked for; None for a given value. count: the number of
    normal images. review: at most `value`; None: equal to it. review_rate: the share of normal images above `review`
    asked for.
    """

    value: float
    how: str
    typical: float
    region: float
    rate: float | None = None
    count: int = 0
    review: float | None = None
    review_rate: float | None = None

    @staticmethod
    def from_state(state: Mapping | Sequence) -> Threshold:
        """The threshold in a detector file; in version 3 the values up to `count`, then two that mean nothing now."""
        threshold = Threshold(**state) if isinstance(state, Mapping) else Threshold(*state[:6])
        numbers = threshold.value, threshold.typical, threshold.region
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError(f"numbers are needed, got {threshold}")
        return threshold

    @property
    def review_value(self) -> float:
        """The lower of the two thresholds."""
        return self.value if self.review is None else self.review

    @property
    def knows_normal(self) -> bool:
        """Whether `typical` and `region` come from normal images."""
        return self.typical != self.region

    @property
    def warnings(self) -> list[str]:
        """Limits of the threshold, as sentences."""
        if self.rate is None or self.rate * (self.count + 1) >= 1:
            return []
        return [
            f"{self.count} normal images are too few for a false-positive rate of {100 * self.rate:.3g} %, so that the "
            f"threshold is a guess beyond their scores; {math.ceil(1 / self.rate - 1e-9) - 1} would be enough"
        ]


def expectation(count: int, is_loo: bool) -> str:
    """What to expect of the default scorer with default rates and `count` normal images, as a sentence."""
    known = max((known for known in MISSED if known <= count), default=min(MISSED))
    mean, least, most = MISSED[known] if is_loo else MISSED_CALIBRATED
    about = f"{known} support" if is_loo else "20 further normal"
    return (
        f"expect missed defects: with {about} images, {least} to {most} % of the defects of nine measured parts were "
        f"called normal, {mean} % on average; compare known defects"
    )


def given_threshold(value: float, known: Threshold | None = None, how: str = "given") -> Threshold:
    """A threshold of a given value. What normal images have shown, in `known`, stays."""
    if known is None or not known.knows_normal:
        return Threshold(value, how, value, value)
    return known._replace(value=value, how=how, rate=None, review=min(known.review_value, value))


def is_order_statistic(count: int, rate: float) -> bool:
    """Whether `count` normal images are enough for a threshold from their scores alone, without a distribution."""
    return _order(count, rate) <= count


def normal_threshold(
    normal: NormalScores, rate: float, prior: ScorePrior | None, source: str, review_rate: float | None = None
) -> Threshold:
    """The thresholds for a false-positive rate of `rate`, by the rule in the module's docstring.

    prior: the scorer's. source: where the scores come from, as text for `Threshold.how`. review_rate: the share of
    normal images above the lower threshold, at least `rate`; None: REVIEW_RATE.

    Raises:
        UserError: fewer than two images that differ, or rates that exclude each other or are outside (0, 1).
    """
    review_rate = max(rate, REVIEW_RATE) if review_rate is None else review_rate
    check_calibration(len(normal.scores), rate, review_rate)
    differ = ~(normal.scores[:, 0] <= 0)  # duplicates of support images do not show how much images differ
    source += "" if differ.all() else f", {(~differ).sum()} identical to others ignored"
    scores, maps, count = normal.scores[differ], normal.maps[differ], int(differ.sum())
    if count < 2:
        raise UserError(
            "identical normal images give no threshold; give other images, or set the threshold",
            options=("calibrate", "threshold"),
        )
    value, rule = _value(scores, normal.is_loo, rate, prior)
    region = np.median(np.quantile(maps.reshape(count, -1), 1 - rate, axis=1)) if maps.size else value
    how = f"{rule} for a false-positive rate of {rate:g}, {source}"
    typical = float(np.median(scores[:, 0]))
    review, _ = _value(scores, normal.is_loo, review_rate, prior)
    return Threshold(value, how, typical, float(region), rate, count, min(review, value), review_rate)


def _value(scores: np.ndarray, is_loo: bool, rate: float, prior: ScorePrior | None) -> tuple[float, str]:
    """The threshold from scores (n, views) above 0, and the name of the rule. It falls as the rate rises."""
    images, count = np.sort(scores[:, 0]), len(scores)
    if prior is not None and is_loo:
        return _bound(images, is_loo, rate, prior)
    largest = float(images[-1]), f"the largest of {count} scores"
    if is_order_statistic(count, rate):
        order = _order(count, rate)
        return float(images[order - 1]), f"the {order}-th smallest of {count} scores"
    if prior is not None:
        return max(_bound(images, is_loo, rate, prior), largest)
    logs = np.log(scores[scores > 0].astype(np.float64))
    value = float(np.exp(logs.mean() + ndtri(1 - rate) * logs.std()))
    return max((value, f"extrapolated from {scores.size} views"), largest)


def _bound(images: np.ndarray, is_loo: bool, rate: float, prior: ScorePrior) -> tuple[float, str]:
    """The threshold from scores (n,) of images and from what is known of other parts, and the name of the rule."""
    logs, count = np.log(images.astype(np.float64)), len(images)
    pull = min(1.0, prior.pull / count)
    mean = (1 - pull) * logs.mean() + pull * math.log(prior.typical)
    squares = prior.images * prior.spread**2 + ((logs - logs.mean()) ** 2).sum()
    spread = math.sqrt(squares / (prior.images + count - 1) * (1 + 1 / count))
    share = prior.loo_share if is_loo else prior.share
    shift = prior.lift - prior.bias / count if is_loo else 0.0
    return math.exp(mean + shift + share * ndtri(1 - rate) * spread), f"extrapolated from {count} scores"


def check_calibration(count: int, rate: float, review_rate: float | None = None) -> None:
    """Checks that thresholds can be computed from `count` normal images for these rates.

    Raises:
        UserError: fewer than two images, rates outside (0, 1), or `review_rate` below `rate`.
    """
    if not 0 < rate < 1:
        raise UserError(f"the false-positive rate must be between 0 and 1, got {rate}", ("false_positive_rate",))
    if review_rate is not None and not rate <= review_rate < 1:
        reason = f"the review rate must be below 1 and at least the false-positive rate {rate:g}, got {review_rate:g}"
        raise UserError(reason, ("review_rate", "false_positive_rate"))
    if count < 2:
        raise UserError(f"a threshold needs the scores of at least 2 normal images, got {count}")


def _order(count: int, rate: float) -> int:
    return math.ceil((count + 1) * (1 - rate) - 1e-9)  # 20 * 0.95 must not become 19.000000000000004
