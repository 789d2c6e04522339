"""The CSV file of scores: what is written is read, and every mistake in a file costs one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.mvtec import LabelledImage
from evaluation.per_image import read_scores, write_scores
from utils.errors import UserError

ITEMS = [LabelledImage(Path(f"d/test/{place}/{n}.png"), None, place) for place in ("good", "cut") for n in "01"]
ROWS = ["file,label,defect,round_0,round_1", "good/0.png,0,good,1,2", "good/1.png,0,good,3,4"]
ROWS += ["cut/0.png,1,cut,5,6", "cut/1.png,1,cut,7,8"]


def write(folder, rows):
    (folder / "s.csv").write_text("\n".join(rows))
    return folder / "s.csv"


@given(st.lists(st.lists(st.floats(-1e9, 1e9, width=32), min_size=4, max_size=4), min_size=1, max_size=4))
def test_what_is_written_is_read(tmp_path_factory, rounds):
    path = tmp_path_factory.mktemp("scores") / "s.csv"
    rounds = np.array(rounds, dtype=np.float32)
    write_scores(path, ITEMS, rounds)
    assert (read_scores(path, ITEMS, len(rounds)) == rounds).all()


def test_other_spellings(tmp_path):
    """Rows in another order, whole paths, words as labels, a further column, no column `defect`."""
    rows = ["note,file,label,round_0", r"x,C:\mine\test\cut\1.png,anomaly,4", "x,/a/b/test/good/1.png,normal,2"]
    rows += ["x,good/0.png,good,1", "x,cut/0.png,Defective,3"]
    assert read_scores(write(tmp_path, rows), ITEMS, 1).tolist() == [[1, 2, 3, 4]]
    without_label = [",".join(row.split(",")[:1] + row.split(",")[2:]) for row in ROWS]
    assert read_scores(write(tmp_path, without_label), ITEMS, 2).tolist() == [[1, 3, 5, 7], [2, 4, 6, 8]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: [], "is not a CSV file of scores"),
        (lambda rows: ["a,b", "1,2"], "is not a CSV file of scores"),
        (lambda rows: ["file,label", "good/0.png,0"], "needs the columns round_0"),
        (lambda rows: [rows[0].replace("round_1", "round_2"), *rows[1:]], "in order; it has round_0, round_2"),
        (lambda rows: [*rows, "good/9.png,0,good,1,2"], r"names good/9\.png, which is not a test image \(1 such"),
        (lambda rows: [*rows, rows[2]], r"has 2 rows of good/1\.png"),
        (lambda rows: rows[:-1], r"lacks 1 of 4 test images, the first is cut/1\.png"),
        (lambda rows: [*rows[:-1], "cut/1.png,0,cut,7,8"], r"cut/1\.png has the label 0, by its folder it is 1"),
        (lambda rows: [*rows[:-1], "cut/1.png,7,cut,7,8"], r"cut/1\.png has the label '7'"),
        (lambda rows: [*rows[:-1], "cut/1.png,1,cut,nan,8"], r"cut/1\.png has the score 'nan' in round_0"),
        (lambda rows: [*rows[:-1], "cut/1.png,1,cut,7"], r"row 5 has 4 values for 5 columns"),
        (lambda rows: [*rows[:-1], "cut/1.png,1,cut,7,much"], "which is not a finite number"),
    ],
)
def test_a_mistake_costs_one_sentence(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        read_scores(write(tmp_path, change(ROWS)), ITEMS, 2)


def test_other_files(tmp_path):
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    for file, rounds, sentence in (
        (write(tmp_path, ROWS), 10, r"has 2 round\(s\), not 10; give --inferences 2"),
        (tmp_path / "nothing.csv", 2, "cannot read the scores"),
        (tmp_path / "b.csv", 2, r"is not a CSV file of scores|is not text in UTF-16"),
    ):
        with pytest.raises(UserError, match=sentence):
            read_scores(file, ITEMS, rounds)
