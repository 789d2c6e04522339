"""The metrics against scikit-learn, a loop over regions and manual counts, on difficult inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from benchmarks import plain
from evaluation.metrics import auroc, average_precision, f1_max, pro, rank, region_weights


@st.composite
def some_scores(draw, size):
    kind = draw(st.sampled_from(["few values", "neighbours", "any"]))
    if kind == "few values":
        values = draw(st.lists(st.sampled_from([-1.0, 0.0, -0.0, 2.5]), min_size=size, max_size=size))
    elif kind == "neighbours":  # adjacent float32 values around 30, a typical distance
        steps = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
        values = np.float32(30) + np.array(steps) * np.spacing(np.float32(30))
    else:
        finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
        values = draw(st.lists(finite, min_size=size, max_size=size))
    return np.asarray(values, np.float32)


@st.composite
def scores_and_labels(draw):
    size = draw(st.integers(2, 60))
    labels = np.zeros(size, bool)
    labels[draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size - 1, unique=True))] = True
    return draw(some_scores(size)), labels


@st.composite
def maps_and_masks(draw):
    shape = draw(st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(2, 6)))
    size = int(np.prod(shape))
    masks = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    masks[:2] = True, False
    return draw(some_scores(size)).reshape(shape), masks.reshape(shape)


def check_ranking_metrics(scores, labels):
    ranking = rank(scores, labels)
    assert auroc(ranking) == pytest.approx(roc_auc_score(labels.ravel(), scores.ravel()), abs=1e-12)
    assert average_precision(ranking) == pytest.approx(plain.average_precision(scores, labels), abs=1e-12)
    assert f1_max(ranking) == pytest.approx(plain.f1_max(scores, labels), abs=1e-12)


@given(scores_and_labels())
def test_equal_scikit_learn(case):
    check_ranking_metrics(*case)


@given(maps_and_masks())
def test_pro_equals_a_loop_over_regions(case):
    maps, masks = case
    assert pro(rank(maps, masks), region_weights(masks)) == pytest.approx(plain.pro(maps, masks), abs=1e-12)


@pytest.mark.cuda
def test_on_cuda_as_on_the_cpu():
    maps, masks = pixels(share=0.01)
    here, there = rank(maps, masks), rank(torch.from_numpy(maps).cuda(), masks)
    assert auroc(here) == auroc(there) and average_precision(here) == average_precision(there)


def test_by_hand():
    # pairs (positive, negative): (3, 1) right, (3, 3) tie, (2, 1) right, (2, 3) wrong
    ranking = rank(np.array([3.0, 2.0, 1.0, 3.0]), np.array([True, True, False, False]))
    assert auroc(ranking) == 2.5 / 4
    assert average_precision(ranking) == (1 / 2 + 2 / 3) / 2
    assert f1_max(ranking) == pytest.approx(0.8)  # threshold 2: precision 2/3, recall 1


def test_pro_by_hand():
    """Two regions, one of a single pixel, one of two pixels that touch at a corner; nine normal pixels."""
    masks = np.zeros((1, 3, 4), bool)
    masks[0, 0, 0] = masks[0, 1, 2] = masks[0, 2, 3] = True
    maps = np.zeros((1, 3, 4))
    maps[masks] = 9.0, 7.0, 1.0  # two normal pixels score higher than the pixel at 1
    maps[0, 0, 1:3] = 8.0, 2.0
    assert len(np.unique(region_weights(masks))) == 2
    # overlap: 1/2 up to the first normal pixel of nine, 3/4 up to the second, 1 up to the limit 0.3
    area = 1 / 2 * 1 / 9 + 3 / 4 * 1 / 9 + (0.3 - 2 / 9)
    assert pro(rank(maps, masks), region_weights(masks)) == pytest.approx(area / 0.3)


def pixels(share):
    rng = np.random.default_rng(0)
    scores = rng.gamma(3, size=(10, 224, 224)).astype(np.float32)
    masks = rng.random(scores.shape) < share
    masks[0, 0, 0], masks[0, 0, 1] = True, False
    return scores + np.float32(0.3) * masks, masks


@pytest.mark.parametrize("share", [1e-6, 0.01, 0.5, 0.99])
def test_half_a_million_pixels(share):
    scores, masks = pixels(share)
    check_ranking_metrics(scores, masks)
    check_ranking_metrics(np.round(scores, 1), masks)


def test_pro_of_smooth_maps():
    rng = np.random.default_rng(1)
    yy, xx = np.mgrid[:64, :64]
    centres = rng.uniform(0, 64, (6, 3, 2))
    spots = np.exp(-((yy - centres[..., :1, None]) ** 2 + (xx - centres[..., 1:, None]) ** 2) / 50)
    masks = spots.max(axis=1) > 0.5
    maps = (spots.sum(axis=1) + 0.5 * rng.random((6, 64, 64))).astype(np.float32)
    for scores in (maps, np.round(maps, 2)):
        assert pro(rank(scores, masks), region_weights(masks)) == pytest.approx(plain.pro(scores, masks), abs=1e-9)


@pytest.mark.parametrize(
    ("scores", "labels", "words"),
    [
        ([1, 2], [True, True], "both classes"),
        ([1, 2], [False, False], "both classes"),
        ([np.nan, 2, 3], [True, False, False], "NaN"),
        ([1, np.nan, 3], [True, False, False], "NaN"),
    ],
)
def test_what_is_refused(scores, labels, words):
    with pytest.raises(ValueError, match=words):
        rank(np.array(scores, float), np.array(labels))
