"""The table of recipes: paired differences by hand, the rule for "helps", and what was not run."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import registration
from experiments.results import read_results
from tests.experiments.test_tables import write_record
from utils.errors import UserError


def write(folder, category, trained, untrained=((0.80, 0.9), (0.82, 0.9))):
    write_record(folder, category, 2, "untrained", untrained, data_type="folder")
    write_record(folder, category, 2, "last", trained, data_type="folder")


def test_differences_by_hand(tmp_path, capsys):
    write(tmp_path / "heads", "bottle", [(0.83, 0.9), (0.87, 0.9)])
    write(tmp_path / "released", "bottle", [(0.79, 0.9), (0.81, 0.9)])
    write_record(tmp_path / "heads", "screw", 2, "untrained", [(0.5, 0.9), (0.5, 0.9)], data_type="folder")
    of = registration.differences(read_results(tmp_path / "heads"), "image_auroc", "last", "gaussian")
    assert list(of) == ["bottle"] and of["bottle"] == pytest.approx(np.array([[3, 5]]))
    assert registration.interval(of["bottle"]) == pytest.approx((4, 4 - 12.706, 4 + 12.706), abs=1e-3)
    registration.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| released | gaussian | last | -1.0 [-1.0, -1.0] | not run | -1.0 [-1.0, -1.0] (1) |" in printed
    assert printed.index("| released") < printed.index("| heads | gaussian | last | +4.0 [-8.7, +16.7] | not run")
    with pytest.raises(UserError, match="no folder with the records of a recipe"):
        registration.main([str(tmp_path / "heads")])


def test_trainings_are_in_the_interval(tmp_path):
    write(tmp_path, "bottle", [(0.83, 0.9), (0.85, 0.9)])
    one = registration.interval(
        registration.differences(read_results(tmp_path), "image_auroc", "last", "gaussian")["bottle"]
    )
    write_record(tmp_path / "seed_669", "bottle", 2, "last", [(0.79, 0.9), (0.81, 0.9)], data_type="folder")
    of = registration.differences(read_results(tmp_path), "image_auroc", "last", "gaussian")["bottle"]
    assert of == pytest.approx(np.array([[3, 3], [-1, -1]]))
    two = registration.interval(of)
    assert one == pytest.approx((3, 3, 3)) and two[0] == pytest.approx(1) and two[1] < -20


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ((1, 1, 1, -5), "in 3 of 4 categories: training helps"),
        ((1, 1, 0.9, 9), "in 3 of 4 categories: training helps"),
        ((1, 1, 0.9, 0.9), "in 2 of 4 categories: training was not found to help"),
        ((5, 5, 5), "in 3 of 3 categories; four are needed"),
    ],
)
def test_the_rule(changes, words):
    image = {str(number): np.array([[change - 0.1, change, change + 0.1]]) for number, change in enumerate(changes)}
    assert registration.verdict(image).endswith(words)


def test_an_interval_with_zero_is_no_help():
    assert registration.helped({"a": np.array([[-9.0, 5.0, 9.0]])}) == []
