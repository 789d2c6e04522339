"""Means and intervals over rounds: shares stay between 0 and 1 wherever they are written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evaluation.statistics import SHARE, format_interval, summaries, summary


@given(st.lists(st.floats(0, 1), min_size=2, max_size=10))
def test_the_interval_of_a_share(values):
    low, high = summary(values, SHARE)["interval95"]
    mean, error = np.mean(values), stats.sem(values)
    reach = stats.t.ppf(0.975, len(values) - 1) * error
    assert (low, high) == pytest.approx((max(0, mean - reach), min(1, mean + reach)))
    assert 0 <= low <= high <= 1


def test_records_and_terminal_say_the_same():
    numbers = summaries([{"image_auroc": 0.9, "pixel_auroc": None}, {"image_auroc": 1.0, "pixel_auroc": None}])
    assert numbers["pixel_auroc"] is None and numbers["image_auroc"]["interval95"][1] == 1
    assert format_interval(numbers["image_auroc"]).endswith(" to 1.0000")


def test_differences_have_no_limits():
    low, high = summary([-3.0, 2.0])["interval95"]
    assert low < -3 and high > 2
