"""Scorers from the registry and from files."""

from __future__ import annotations

import pytest

from scorers.registry import SCORERS, make_scorer, make_scorers
from utils.errors import UserError

MINE = """
from scorers.base import Scorer

class Mine(Scorer):
    name = "mine"

    def fit(self, support):
        return {"mean": support[-1].mean(dim=0)}

    def distance_maps(self, fitted, test):
        return (test[-1] - fitted["mean"]).norm(dim=1)

class Nameless(Mine):
    name = "not a name"

class Thief(Mine):
    name = "gaussian"

class Unfinished(Scorer):
    name = "unfinished"

class Last(Mine):
    name = "last"

class Unordered(Mine):
    views = (0, 3, 2)

class WithoutTheImage(Mine):
    views = (5, 21)

class NoScorer:
    pass
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_scorer.py"
    path.write_text(MINE)
    return path


def test_by_name_and_from_a_file(file):
    assert (
        [make_scorer(name).name for name in SCORERS]
        == list(SCORERS)
        == ["gaussian", "neighbours", "positions", "combined"]
    )
    assert [scorer.name for scorer in make_scorers(["gaussian", f"{file}:Mine"])] == ["gaussian", "mine"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nearest", "no scorer 'nearest'; there are gaussian, neighbours"),
        ("missing.py:Mine", "no file missing.py"),
        ("{file}:Other", "has no class Other derived from"),
        ("{file}:NoScorer", "has no class NoScorer derived from"),
        ("{file}:Unfinished", "cannot be made without arguments.*abstract"),
        ("{file}:Nameless", "needs a `name` of letters"),
        ("{file}:Thief", "needs a `name` of letters"),
        ("{file}:Last", "needs a `name` of letters"),
        ("{file}:Unordered", "`views` must be ascending"),
        ("{file}:WithoutTheImage", "`views` must be ascending"),
        ("{broken}:Mine", r"cannot be imported: ZeroDivisionError"),
        ("{text}:Mine", "is not a Python file"),
    ],
)
def test_what_is_no_scorer_is_rejected_in_a_sentence(name, sentence, file, tmp_path):
    broken, text = tmp_path / "broken.py", tmp_path / "notes.txt"
    broken.write_text("1 / 0")
    text.write_text("")
    with pytest.raises(UserError, match=sentence):
        make_scorer(name.format(file=file, broken=broken, text=text))


def test_the_same_name_twice_is_rejected(file):
    with pytest.raises(UserError, match="needs different names"):
        make_scorers(["gaussian", "gaussian"])
