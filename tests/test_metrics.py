"""AUROC against scikit-learn and against counting, on input made to break it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from evaluation import metrics
from evaluation.metrics import auroc


@st.composite
def scores_and_labels(draw):
    size = draw(st.integers(2, 60))
    kind = draw(st.sampled_from(["few values", "neighbours", "any"]))
    if kind == "few values":
        values = draw(st.lists(st.sampled_from([-1.0, 0.0, -0.0, 2.5]), min_size=size, max_size=size))
    elif kind == "neighbours":  # float32 values next to each other around 30, where distances lie
        steps = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
        values = np.float32(30) + np.array(steps) * np.spacing(np.float32(30))
    else:
        finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
        values = draw(st.lists(finite, min_size=size, max_size=size))
    labels = np.zeros(size, bool)
    labels[draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size - 1, unique=True))] = True
    return np.asarray(values, np.float32), labels


@settings(max_examples=400, deadline=None)
@given(scores_and_labels(), st.sampled_from([1, 7, 2**20]))
def test_equals_scikit_learn(case, chunk):
    scores, labels = case
    original, metrics.SORT_CHUNK = metrics.SORT_CHUNK, chunk
    try:
        assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    finally:
        metrics.SORT_CHUNK = original


def test_by_hand():
    # pairs (positive, negative): (3, 1) right, (3, 3) tie, (2, 1) right, (2, 3) wrong
    assert auroc(np.array([3.0, 2.0, 1.0, 3.0]), np.array([True, True, False, False])) == 2.5 / 4


def test_all_equal_is_one_half():
    assert auroc(np.full(1000, 7.0, np.float32), np.arange(1000) < 3) == 0.5


@pytest.mark.parametrize("share", [1e-6, 0.01, 0.5, 0.99])
def test_millions_of_pixels(share):
    rng = np.random.default_rng(0)
    scores = rng.gamma(3, size=(20, 224, 224)).astype(np.float32)
    labels = rng.random(scores.shape) < share
    labels[0, 0, 0], labels[0, 0, 1] = True, False
    scores += 0.3 * labels
    expected = roc_auc_score(labels.ravel(), scores.ravel())
    assert auroc(scores, labels) == pytest.approx(expected, abs=1e-12)
    assert auroc(np.round(scores, 1), labels) == pytest.approx(
        roc_auc_score(labels.ravel(), np.round(scores, 1).ravel()), abs=1e-12
    )


@pytest.mark.parametrize("labels", [[True, True], [False, False]])
def test_one_class_is_refused(labels):
    with pytest.raises(ValueError, match="both classes"):
        auroc(np.array([1.0, 2.0]), np.array(labels))


@pytest.mark.parametrize("where", [0, 1])
def test_nan_is_refused(where):
    scores = np.array([1.0, 2.0, 3.0])
    scores[where] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        auroc(scores, np.array([True, False, False]))
