"""The threshold from normal scores: order statistics, few images with and without a prior, warnings."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from inspection.threshold import (
    REVIEW_RATE,
    NormalScores,
    Threshold,
    expectation,
    given_threshold,
    normal_threshold,
)
from scorers.base import ScorePrior
from scorers.combined import Combined
from scorers.neighbours import Neighbours
from utils.errors import UserError

PRIOR = Neighbours.prior
scores_of_images = st.lists(st.floats(0.1, 1.5), min_size=2, max_size=30)
kinds = st.sampled_from([(prior, is_loo) for prior in (None, PRIOR, Combined.prior) for is_loo in (True, False)])


def threshold_of(scores, share: float, prior: ScorePrior | None = None, is_loo: bool = True) -> Threshold:
    """The threshold for scores (n,) or (n, views); the maps do not matter."""
    scores = np.array(scores, float).reshape(len(scores), -1)
    names = tuple(f"{n}.png" for n in range(len(scores)))
    return normal_threshold(NormalScores(scores, np.zeros((len(scores), 2, 2)), is_loo, names), share, prior, "")


def test_few_images_without_a_prior_by_the_definition():
    logs = np.array([[3.0, 3.1], [3.2, 3.5]])
    expected = np.exp(stats.norm(3.2, np.sqrt(0.035)).ppf(0.99))  # (0.04 + 0.01 + 0 + 0.09) / 4
    assert threshold_of(np.exp(logs), 0.01).value == pytest.approx(expected)
    same_views = np.exp(logs[:, :1].repeat(22, axis=1))
    assert threshold_of(same_views, 0.32).value == pytest.approx(np.exp(3.2))  # the largest image score
    assert threshold_of(np.exp(logs), 0.01).typical == pytest.approx(np.exp([3.0, 3.2]).mean())


@pytest.mark.parametrize(("left_out", "share"), [(True, 0.5), (False, 0.75)])
def test_few_images_with_a_prior_by_the_definition(left_out, share):
    """Written out for three images: the prior weighs 1.5 / 3 in the mean, and half an image in the spread."""
    logs = np.log([0.5, 0.6, 0.9])
    mean = 0.5 * logs.mean() + 0.5 * np.log(0.78)
    spread = np.sqrt((0.5 * 0.01 + 2 * logs.var(ddof=1)) / 2.5 * (1 + 1 / 3))
    expected = np.exp(mean + share * stats.norm.ppf(0.95) * spread)
    expected = expected if left_out else max(expected, 0.9)
    assert threshold_of(np.exp(logs), 0.05, PRIOR, left_out).value == pytest.approx(expected)


def test_one_copy_more_or_less_hardly_matters_with_a_prior():
    """The prior decides for two images, whatever their own spread."""
    two = [threshold_of(pair, 0.05, PRIOR).value for pair in ((0.5, 0.5), (0.5, 0.7), (0.7, 0.7))]
    assert min(two) > 0.7 and max(two) < 1.0


@given(st.lists(st.floats(0.5, 1.5), min_size=2, max_size=9), st.sampled_from([0.01, 0.05]))
def test_leave_one_out_scores_of_combined_by_the_definition(scores, rate):
    prior, logs = Combined.prior, np.log(scores)
    squares = prior.images * prior.spread**2 + ((logs - logs.mean()) ** 2).sum()
    spread = np.sqrt(squares / (prior.images + len(logs) - 1) * (1 + 1 / len(logs)))
    expected = np.exp(logs.mean() - prior.bias / len(logs) + prior.lift + stats.norm.ppf(1 - rate) * spread)
    assert threshold_of(scores, rate, prior).value == pytest.approx(expected)


@pytest.mark.parametrize("prior", [PRIOR, Combined.prior])
def test_one_more_median_score_hardly_raises_the_threshold(prior):
    for count in range(4, 30):
        scores = np.exp(stats.norm(0, 0.08).ppf((np.arange(count) + 0.5) / count))
        more = np.append(scores, np.median(scores))
        assert threshold_of(more, 0.01, prior).value < 1.01 * threshold_of(scores, 0.01, prior).value


def test_more_images_of_a_part_do_not_raise_its_rate():
    """Scores as measured: log-normal, leave-one-out scores too high by bias / n."""
    rng, rates = np.random.default_rng(0), []
    for count in (2, 4, 8, 16, 32):
        draws = np.exp(rng.normal(0.2, 0.06, (2000, count)) + Combined.prior.bias / count)
        values = np.log([threshold_of(draw, 0.05, Combined.prior).value for draw in draws])
        rates.append(stats.norm(0.2, 0.06).sf(values).mean())
    assert rates[0] < 0.06 and all(after <= before + 0.001 for before, after in itertools.pairwise(rates))


def test_many_scores_are_an_order_statistic():
    scores = np.random.default_rng(0).permutation(np.arange(1, 20))
    for prior in (None, 5.0):
        assert threshold_of(scores, 0.05, prior, is_loo=False).value == 19  # (19 + 1) 0.95 = 19
        assert threshold_of(scores, 0.5, prior, is_loo=False).value == 10
    assert threshold_of(scores, 0.04).value > 19


def test_region_is_the_hottest_share_of_the_area_of_a_typical_image():
    maps = np.random.default_rng(0).permutation(3 * 100).reshape(3, 10, 10) + 1.0
    normal = NormalScores(maps.max(axis=(1, 2))[:, None], maps, is_loo=True)
    threshold = normal_threshold(normal, 0.2, None, "")
    shares = sorted((maps > threshold.region).mean(axis=(1, 2)))
    assert shares[1] == pytest.approx(0.2) and shares[0] < 0.2 < shares[2]


@given(scores_of_images, st.floats(0.001, 0.5), st.floats(0.1, 10), kinds)
def test_threshold_scales_with_the_scores_and_rises_as_the_rate_falls(scores, share, factor, kind):
    prior, left_out = kind
    value = threshold_of(scores, share, prior, left_out).value
    scaled_prior = prior and prior._replace(typical=factor * prior.typical)
    scaled = threshold_of(factor * np.array(scores), share, scaled_prior, left_out).value
    assert scaled == pytest.approx(factor * value)
    assert threshold_of(scores, share / 2, prior, left_out).value >= value * (1 - 1e-9)


def test_the_rate_of_log_normal_scores_is_as_asked():
    """Mean rate over many draws without a prior, for views that vary as much as images do."""
    rng = np.random.default_rng(0)
    for count in (4, 40):
        draws = np.exp(rng.normal(3, 0.25, (2000, count + 1, 22)))
        exceeding = [draw[-1, 0] > threshold_of(draw[:-1], 0.05).value for draw in draws]
        assert 0.025 < np.mean(exceeding) < 0.065


@given(st.integers(2, 40), st.floats(0.001, 0.5))
def test_a_rate_that_the_images_cannot_show_is_said(count, rate):
    threshold = threshold_of(np.linspace(0.5, 0.8, count), rate, PRIOR)
    said = any(f"{count} normal images are too few" in sentence for sentence in threshold.warnings)
    assert said == (rate < 1 / (count + 1)) and threshold.count == count and threshold.rate == rate


def test_images_without_a_score_are_ignored():
    with_copy = threshold_of([0.0, 0.5, 0.6], 0.05, PRIOR)
    assert with_copy.value == threshold_of([0.5, 0.6], 0.05, PRIOR).value and "1 identical" in with_copy.how
    with pytest.raises(UserError, match="identical normal images"):
        threshold_of([0.0, 0.0, 0.5], 0.05, PRIOR)


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan"), float("inf")])
def test_impossible_shares(share):
    with pytest.raises(UserError, match="between 0 and 1"):
        threshold_of(np.ones(3), share)
    with pytest.raises(UserError, match="at least 2 normal images, got 1"):
        threshold_of(np.ones(1), 0.05)


def test_thresholds_of_earlier_files_are_one():
    threshold = threshold_of([0.5, 0.6, 0.7], 0.05)
    assert Threshold.from_state(threshold._asdict()) == threshold
    earlier = Threshold.from_state((*threshold[:6], "2.png", 0.6))
    assert earlier == threshold._replace(review=None, review_rate=None) and earlier.review_value == threshold.value


@given(scores_of_images, st.floats(0.001, 0.5), kinds)
def test_the_lower_threshold_is_that_of_the_higher_rate(scores, rate, kind):
    threshold = threshold_of(scores, rate, *kind)
    assert threshold.review <= threshold.value and threshold.review_rate == max(rate, REVIEW_RATE)
    assert threshold.review == threshold_of(scores, threshold.review_rate, *kind).value


def test_a_given_threshold_keeps_what_normal_images_have_shown():
    known = threshold_of([0.5, 0.6, 0.7], 0.01, PRIOR)
    assert given_threshold(9.0, known) == known._replace(value=9.0, how="given", rate=None)
    assert given_threshold(0.1, known).review == 0.1
    assert given_threshold(0.5, given_threshold(0.9)) == given_threshold(0.5)  # no normal score is known


@pytest.mark.parametrize(
    ("count", "is_loo", "expected"),
    [
        (2, True, "2 support images, 0 to 82 %"),
        (7, True, "4 support images, 0 to 82 %"),
        (320, True, "8 support images, 0 to 67 %"),
        (30, False, "20 further normal images, 0 to 56 %"),
    ],
)
def test_what_to_expect_is_said_of_no_more_images_than_there_are(count, is_loo, expected):
    assert expectation(count, is_loo).startswith(f"expect missed defects: with {expected} of the defects")


def test_rates_that_exclude_each_other():
    normal = NormalScores(np.ones((3, 1)), np.zeros((3, 2, 2)), is_loo=True)
    for rate, review_rate in ((0.05, 0.01), (0.05, 1.0)):
        with pytest.raises(UserError, match="review rate must be below 1 and at least"):
            normal_threshold(normal, rate, None, "", review_rate)
