"""Means and intervals over rounds: shares stay between 0 and 1 wherever they are written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evaluation.statistics import SHARE, format_interval, holm, p_value, summaries, summary


@given(st.lists(st.floats(0, 1), min_size=2, max_size=10))
def test_the_interval_of_a_share(values):
    low, high = summary(values, SHARE)["interval95"]
    mean, error = np.mean(values), stats.sem(values)
    reach = stats.t.ppf(0.975, len(values) - 1) * error
    assert (low, high) == pytest.approx((max(0, mean - reach), min(1, mean + reach)))
    assert 0 <= low <= high <= 1


def test_limits():
    """Records and the terminal say the same; differences have no limits; of None there is no summary."""
    numbers = summaries([{"image_auroc": 0.9, "pixel_auroc": None}, {"image_auroc": 1.0, "pixel_auroc": None}])
    assert numbers["pixel_auroc"] is None and numbers["image_auroc"]["interval95"][1] == 1
    assert format_interval(numbers["image_auroc"]).endswith(" to 1.0000")
    low, high = summary([-3.0, 2.0])["interval95"]
    assert low < -3 and high > 2


def test_trainings_and_support_sets_in_loops():
    """The two-way layout, written as sums; with one training repeated, the spread is that of the support sets."""
    table = [[0.90, 0.94, 0.92], [0.86, 0.89, 0.91]]
    rows, columns = 2, 3
    mean = sum(map(sum, table)) / 6
    of_row = [sum(row) / columns for row in table]
    of_column = [sum(row[c] for row in table) / rows for c in range(columns)]
    squares_rows = columns * sum((value - mean) ** 2 for value in of_row) / (rows - 1)
    squares_columns = rows * sum((value - mean) ** 2 for value in of_column) / (columns - 1)
    rest = sum((table[r][c] - of_row[r] - of_column[c] + mean) ** 2 for r in range(rows) for c in range(columns)) / 2
    total = squares_rows + squares_columns - rest
    assert total > max(squares_rows, squares_columns)
    freedom = total**2 / (squares_rows**2 / 1 + squares_columns**2 / 2 + rest**2 / 2)
    reach = stats.t.ppf(0.975, freedom) * (total / 6) ** 0.5
    found = summary(table)
    assert found["mean"] == pytest.approx(mean)
    assert found["interval95"] == pytest.approx([mean - reach, mean + reach])
    assert found["sd"] == pytest.approx((squares_columns / rows) ** 0.5)
    assert found["sd_trainings"] == pytest.approx((squares_rows / columns) ** 0.5)
    same = summary([table[0], table[0]])
    assert same["sd_trainings"] == 0 and same["sd"] == pytest.approx(summary(table[0])["sd"])
    assert same["interval95"] == pytest.approx([0.92 - 4.303 * 0.02 / 3**0.5, 0.92 + 4.303 * 0.02 / 3**0.5], abs=1e-4)
    assert summary([[1.0, 1.0], [1.0, 1.0]], (0.0, 1.0))["interval95"] == [1.0, 1.0]


def test_the_interval_of_trainings_covers():
    """Of simulated tables, 95 % of the intervals hold the true mean; 90 to 99 % are accepted."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        effects = generator.normal(0, 1, (3, 1)), generator.normal(0, 1, (1, 10)), generator.normal(0, 0.5, (3, 10))
        low, high = summary(sum(effects))["interval95"]
        held += low <= 0 <= high
    assert 900 <= held <= 990


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=10))
def test_p_values_against_scipy(values):
    if np.ptp(values) > 1e-6:
        assert p_value(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-6)
    assert p_value([0.0, 0.0]) == 1 and p_value([0.5, 0.5]) == 0


def test_the_p_value_of_trainings_fits_their_interval():
    """It is 0.05 where the interval ends at 0."""
    table = np.array([[0.90, 0.94, 0.92], [0.86, 0.89, 0.91]])
    low, high = summary(table)["interval95"]
    assert p_value(table - low) == pytest.approx(0.05) and p_value(table - high) == pytest.approx(0.05)
    assert p_value(table - (low + high) / 2) == pytest.approx(1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_s_method_step_by_step(values):
    """A hypothesis is rejected at a level if all with smaller p-values are, each compared with level / those left."""
    corrected = holm(values)
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for step, index in enumerate(np.argsort(values, kind="stable")):
            if values[index] * (len(values) - step) > level:
                break
            rejected.add(index)
        assert {index for index, value in enumerate(corrected) if value <= level} == rejected


def test_holm_s_method_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1, 1]
