"""Variation over test images: equal to a plain bootstrap with scikit-learn's metrics, and near DeLong's variance."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
from scipy import stats

from evaluation.metrics import auroc, average_precision, f1_max, pro, rank, region_weights
from evaluation.resampling import (
    DRAWS,
    count_images,
    count_pixels,
    draw_copies,
    metrics_of,
    percentile_interval,
    resample,
)

IMAGES, SIZE = 12, 16


@pytest.fixture
def images():
    """Labels (B,) and scores (2 rounds, B), some of them equal."""
    generator = np.random.default_rng(0)
    labels = np.arange(40) % 3 == 0
    return labels, np.round(generator.normal(labels * 1.0, 1, (2, 40)), 1)


@pytest.fixture
def pixels():
    """Masks and maps (B, S, S) with few values, so that the bins hold one value each; two regions in each mask."""
    generator = np.random.default_rng(1)
    masks = np.zeros((IMAGES, SIZE, SIZE), bool)
    masks[: IMAGES // 2, 2:5, 3:7] = True
    masks[: IMAGES // 2, 9:14, 9:11] = True
    return masks, generator.integers(0, 40, masks.shape) + np.float32(10) * masks


def plain(scores, truth, chosen):
    """The metrics of a test set that holds image `chosen[n]` as its n-th."""
    scores, truth = scores[chosen], truth[chosen]
    found = {
        "auroc": sklearn.metrics.roc_auc_score(truth.ravel(), scores.ravel()),
        "ap": sklearn.metrics.average_precision_score(truth.ravel(), scores.ravel()),
        "f1_max": f1_max(rank(scores, truth)),
    }
    return found if scores.ndim == 1 else found | {"pro": pro(rank(scores, truth), region_weights(truth))}


def test_image_metrics_against_a_plain_bootstrap(images):
    labels, scores = images
    copies = draw_copies(labels, 20)
    assert (copies[:, labels].sum(axis=1) == labels.sum()).all() and (copies.sum(axis=1) == 40).all()
    found = resample([count_images(of_round, labels) for of_round in scores], copies, "image")
    assert set(found) == {"image_auroc", "image_ap", "image_f1_max"}
    itself = [plain(of_round, labels, np.arange(40)) for of_round in scores]
    for number, row in enumerate(copies.astype(int)):
        drawn = [plain(of_round, labels, np.repeat(np.arange(40), row)) for of_round in scores]
        for name, values in found.items():
            metric = name.removeprefix("image_")
            expected = np.mean([of[metric] for of in drawn]) - np.mean([of[metric] for of in itself])
            assert values[number] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("with_padding", [False, True])
def test_pixel_metrics_against_a_plain_bootstrap(pixels, with_padding):
    masks, maps = pixels
    valid = np.ones_like(masks)
    valid[:, :, -4:] = not with_padding
    counts = count_pixels(maps, masks, valid if with_padding else None, region_weights(masks))
    copies = draw_copies(masks.any(axis=(1, 2)), 10)
    found = metrics_of(counts, copies)
    for number, row in enumerate(copies.astype(int)):
        chosen = np.repeat(np.arange(IMAGES), row)
        scores = maps[:, :, :12] if with_padding else maps
        truth = masks[:, :, :12] if with_padding else masks
        for name, expected in plain(scores, truth, chosen).items():
            assert found[name][number] == pytest.approx(expected, abs=1e-5), name


def test_bins_change_pixel_metrics_little():
    """Of continuous scores: less than a hundredth."""
    generator = np.random.default_rng(2)
    masks = np.zeros((20, 64, 64), bool)
    masks[:10, 20:30, 20:40] = True
    maps = generator.lognormal(0, 0.5, masks.shape).astype(np.float32) + masks
    found = metrics_of(count_pixels(maps, masks, None, weights := region_weights(masks)), np.ones((1, 20), np.float32))
    exact = rank(maps, masks)
    metrics = {
        "auroc": auroc(exact),
        "ap": average_precision(exact),
        "f1_max": f1_max(exact),
        "pro": pro(exact, weights),
    }
    assert {name: values[0] for name, values in found.items()} == pytest.approx(metrics, abs=0.01)


def delong(labels, scores):
    """The standard error of the mean AUROC of rounds by DeLong et al. (1988), from its definition."""
    positives, negatives = scores[:, labels], scores[:, ~labels]
    pairs = (positives[:, :, None] > negatives[:, None]) + 0.5 * (positives[:, :, None] == negatives[:, None])
    pairs = pairs.mean(axis=0)
    variance = pairs.mean(axis=1).var(ddof=1) / labels.sum() + pairs.mean(axis=0).var(ddof=1) / (~labels).sum()
    return variance**0.5


def test_the_spread_of_the_auroc_is_delong_s():
    """Within a tenth, for a test set of the usual size; also of the difference of two methods."""
    generator = np.random.default_rng(3)
    labels = np.arange(150) % 3 > 0
    scores = generator.normal(labels * 1.0, 1, (3, 150))
    other = scores + generator.normal(labels * 0.5, 0.7, (3, 150))
    copies = draw_copies(labels)
    one, two = (
        resample([count_images(of_round, labels) for of_round in method], copies, "image")["image_auroc"]
        for method in (scores, other)
    )
    assert len(one) == DRAWS and one.std() == pytest.approx(delong(labels, scores), rel=0.1)
    low, high = percentile_interval(one)
    assert high - low == pytest.approx(2 * stats.norm.ppf(0.975) * one.std(), rel=0.1)
    pairs = [(method[:, labels][:, :, None] > method[:, ~labels][:, None]).mean(axis=0) for method in (other, scores)]
    of_pairs = pairs[0] - pairs[1]
    error = of_pairs.mean(axis=1).var(ddof=1) / labels.sum() + of_pairs.mean(axis=0).var(ddof=1) / (~labels).sum()
    assert (two - one).std() == pytest.approx(error**0.5, rel=0.1)


def test_categories_are_drawn_apart():
    labels = np.arange(20) % 2 == 0
    one, same, other = (draw_copies(labels, 5, [*name.encode()]) for name in ("bottle", "bottle", "cable"))
    assert (one == same).all() and (one != other).any()
