"""Decisions, boxes, and result files: every row comes back, a torn end is repaired, nothing else is removed."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets.images import SEVERAL
from inspection.config import PredictConfig
from inspection.inputs import full_name
from inspection.results import (
    CSV_COLUMNS,
    DECISIONS,
    DEFECTIVE,
    MOST_BOXES,
    NORMAL,
    REVIEW,
    Box,
    Prediction,
    ResultFiles,
    as_far_as_read,
    count_decisions,
    decide,
    find_boxes,
    relative_score,
)
from inspection.run import Run, check_paths
from inspection.threshold import Threshold, given_threshold
from utils.errors import UserError, WriteError
from utils.files import PROJECT_ROOT

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(['a,"b"', "x\r\ny", "größe\n"])
SCORES = st.floats(0, 100, width=32)
BOX = st.builds(Box, *[st.integers(0, 99)] * 5, SCORES)
ROWS = st.lists(
    st.builds(
        Prediction,
        TEXTS,
        TEXTS,
        st.none() | st.integers(0, 9),
        st.none() | TEXTS,
        st.none() | SCORES,
        st.none() | SCORES,
        st.sampled_from([None, "normal", "review", "defective"]),
        st.none() | TEXTS,
        st.none() | SCORES,
        TEXTS,
        st.none() | TEXTS,
        st.none() | TEXTS,
        st.none() | SCORES,
        st.lists(BOX, max_size=2),
        st.lists(TEXTS, max_size=2),
        st.dictionaries(TEXTS, SCORES, max_size=2),
    ),
    max_size=4,
)


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


@given(ROWS, st.integers(0, 10**6))
@settings(max_examples=30)  # each waits for the disk
def test_rows_come_back_and_a_torn_end_is_repaired(rows, cut):
    """After any loss at the end, the rows whose lines are whole are there, in all tables, and writing goes on."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with closing(ResultFiles(folder)) as files:
            for row in rows:
                files.add(row)
        content = (folder / "results.jsonl").read_bytes()
        left = content[: cut % (len(content) + 1)]
        (folder / "results.jsonl").write_bytes(left)
        (folder / "scores.csv").write_bytes((folder / "scores.csv").read_bytes()[:-3])
        with closing(ResultFiles(folder)) as files:
            kept = left.count(b"\n") + content[len(left) :].startswith(b"\n")  # only the end of the line is missing
            assert files.rows == rows[:kept]
            # images whose files could not be written are scored, but not done: --append tries them again
            assert files.done == {row.identity for row in rows[:kept] if not (row.error and row.score is not None)}
            for row in rows[kept:]:
                files.add(row)
        assert (folder / "results.jsonl").read_bytes() == content
        expected = [["" if value is None else str(value) for value in row[: len(CSV_COLUMNS)]] for row in rows]
        assert read_csv(folder / "scores.csv") == [list(CSV_COLUMNS), *expected]
        boxes = [[row.time, row.path, *map(str, box)] for row in rows for box in row.boxes]
        assert read_csv(folder / "boxes.csv")[1:] == boxes


def row_with(*files: str) -> Prediction:
    return Prediction("now", "a.png", 1, "then", 1.0, None, "normal", None, 2.0, "id", files=list(files))


def test_only_listed_files_inside_the_folder_are_removed(tmp_path):
    out, outside = tmp_path / "out", tmp_path / "outside.jpg"
    files = ResultFiles(out)
    files.add(row_with("images/a.jpg", "../outside.jpg", str(outside)))
    files.close()
    (out / "images").mkdir()
    for place in (outside, out / "images/a.jpg", out / "images/b.jpg"):
        place.write_bytes(b"x")
    with (out / "results.jsonl").open("a") as stream:
        stream.write('{"damaged\n')
    ResultFiles(out, overwrite=True).close()
    assert outside.is_file() and [path.name for path in (out / "images").iterdir()] == ["b.jpg"]
    assert (out / "results.jsonl").read_bytes() == b"" and len(read_csv(out / "scores.csv")) == 1


ODD = [{name: value} for name, value in (("score", "3"), ("score", np.nan), ("path", None), ("decision", "Normal"))]


@pytest.mark.parametrize(
    "line",
    ['{"round": 1}\n', '{"round": 1}', "text", '{"time": 3,\n', *(json.dumps(row_with().plain() | odd) for odd in ODD)],
)
def test_a_foreign_record_is_not_touched(line, tmp_path):
    before = json.dumps(row_with().plain()) + "\n\n" + line
    (tmp_path / "results.jsonl").write_text(before)
    with pytest.raises(UserError, match=r"results\.jsonl, line 3 is not a row of predict\.py"):
        ResultFiles(tmp_path)
    assert (tmp_path / "results.jsonl").read_text() == before


@pytest.mark.parametrize("end", ["", "\r", "\n\0\0\0"])
def test_the_end_that_an_editor_or_a_power_failure_leaves(end, tmp_path):
    (tmp_path / "results.jsonl").write_bytes(f"\ufeff{json.dumps(row_with().plain())}{end}".encode())
    with closing(ResultFiles(tmp_path)) as files:
        files.add(row_with()._replace(path="b.png"))
    with closing(ResultFiles(tmp_path)) as files:
        assert [row.path for row in files.rows] == ["a.png", "b.png"]


def replace(file: Path) -> None:
    os.replace(shutil.copy(file, f"{file}~"), file)


@pytest.mark.parametrize("spoil", [Path.unlink, replace])
def test_rows_are_not_written_into_a_record_that_was_removed(spoil, tmp_path):
    """Or replaced, as some editors do."""
    with closing(ResultFiles(tmp_path)) as files:
        files.add(row_with())
        spoil(tmp_path / "results.jsonl")
        with pytest.raises(WriteError, match=r"results\.jsonl: it was removed or replaced meanwhile"):
            files.add(row_with())


def test_relative_scores():
    assert relative_score(3.0, Threshold(5.0, "", 2.0, 1.0)) == 1.5
    assert relative_score(3.0, None) is None
    assert relative_score(3.0, given_threshold(5.0)) is None  # no normal score is known


def test_decisions_by_two_thresholds():
    threshold = Threshold(5.0, "", 2.0, 1.0, review=4.0)
    assert [decide(score, threshold)[0] for score in (4.0, 4.5, 5.0, 5.5)] == [NORMAL, REVIEW, REVIEW, DEFECTIVE]
    assert decide(4.5, threshold)[1] == "score between 4.000 and the threshold 5.000"
    assert decide(9.0, threshold, "turned") == (REVIEW, "turned") and decide(9.0, None) == (None, None)
    assert decide(4.5, threshold._replace(review=None)) == (NORMAL, None)  # of an earlier version


def test_regions_smaller_than_the_smallest_defect_do_not_decide():
    threshold, scores = Threshold(5.0, "", 2.0, 1.0, review=4.0), np.zeros((9, 9))
    scores[0, :3] = scores[5, 5] = scores[6, 6] = 6.0  # regions of 3 and, across the corner, 2 pixels
    assert decide(6.0, threshold, "", scores, 3)[0] == decide(6.0, threshold, "", scores)[0] == DEFECTIVE
    decision, reason = decide(6.0, threshold, "", scores, 4)
    assert decision == NORMAL and "3 of at least 4 pixels" in reason
    assert decide(6.0, threshold, "turned", scores, 4) == (REVIEW, "turned")
    assert decide(6.0, threshold, "", np.zeros((9, 9)), 4)[0] == DEFECTIVE  # no region is seen


def test_rows_of_earlier_versions_are_read(tmp_path):
    """`unusual` was a decision, and the name of its reason."""
    row = row_with()._replace(decision="unusual").plain()
    for name in ("reason", "review_threshold", "quality"):
        del row[name]
    (tmp_path / "results.jsonl").write_text(json.dumps(row | {"unusual": "turned"}) + "\n")
    with closing(ResultFiles(tmp_path)) as files:
        assert files.rows == [row_with()._replace(decision=REVIEW, reason="turned", boxes=[])]


def test_counts():
    row = row_with()
    rows = [row, row._replace(decision="review"), row._replace(score=None, decision=None, error="broken")]
    assert count_decisions(rows) == {"scored": 2, "normal": 1, "review": 1, "defective": 0, "failed": 1}
    assert [one.is_flagged for one in rows] == [False, True, False]


@pytest.mark.parametrize(("kind", "comma"), [("excel", False), ("excel_comma", True)])
def test_tables_for_excel(kind, comma, tmp_path):
    """A byte-order mark once, part and file name, times of one form; the next run may choose another form."""
    values = {name: None for name in Prediction._fields[:10]}
    row = Prediction(**values)._replace(
        time="2026-11-28T02:30:05.123+00:00",
        path="/photos/a.png",
        modified="2026-11-28T02:30:00.123456789Z",
        score=1.25,
    )
    with closing(ResultFiles(tmp_path, kind=kind, part="bottle")) as files:
        files.add(row)
    with closing(ResultFiles(tmp_path, kind=kind, part="bottle")) as files:
        files.add(row._replace(path="/photos/b.png"))
    content = (tmp_path / "scores.csv").read_bytes()
    assert content.count(b"\xef\xbb\xbf") == 1 and content.startswith(b"\xef\xbb\xbf")
    lines = list(csv.DictReader(content.decode("utf-8-sig").splitlines(), delimiter=";" if comma else ","))
    assert [(line["part"], line["file"]) for line in lines] == [("bottle", "a.png"), ("bottle", "b.png")]
    moment = datetime(2026, 11, 28, 2, 30, 5, tzinfo=timezone.utc).astimezone()
    assert lines[0]["time"] == f"{moment:%Y-%m-%d %H:%M:%S}" and len(lines[0]["modified"]) == 19
    assert lines[0]["score"] == ("1,25" if comma else "1.25")
    with closing(ResultFiles(tmp_path)):
        assert (tmp_path / "scores.csv").read_text().startswith("time,path")


@pytest.mark.parametrize("decision", [*DECISIONS, None])
@pytest.mark.parametrize("part", [SEVERAL, "dpi"])
def test_an_image_of_several_pages_is_not_normal(part, decision):
    image = Image.new("L", (4, 4))
    image.info[part] = True
    found = as_far_as_read(image, (decision, None))
    expected = (REVIEW, "several pages or frames: only the first is read")
    assert found == (expected if (part, decision) == (SEVERAL, NORMAL) else (decision, None))


def test_a_map_drawn_by_hand():
    """Columns count from the left and rows from the top; pixels that touch at a corner are one region."""
    scores = np.zeros((5, 8), np.float32)
    scores[1, 2] = scores[2, 3] = 0.5
    scores[4, 5:8] = [0.25, 0.75, 0.5]
    assert find_boxes(scores, 0.2) == [Box(5, 4, 3, 1, 3, 0.75), Box(2, 1, 2, 2, 2, 0.5)]
    assert find_boxes(scores, 0.5) == [Box(6, 4, 1, 1, 1, 0.75)]
    assert find_boxes(scores, 0.75) == []


def test_the_highest_peaks_are_kept():
    scores = np.zeros((40, 40), np.float32)
    scores[::2, ::2] = 1 + np.arange(400).reshape(20, 20)
    boxes = find_boxes(scores, 0.5)
    assert [box.peak for box in boxes] == list(range(400, 400 - MOST_BOXES, -1))
    assert boxes[0] == Box(38, 38, 1, 1, 1, 400.0)


def test_results_of_a_run_that_ended_meanwhile_are_kept(tmp_path):
    config = PredictConfig(support=(tmp_path,), input=(tmp_path / "x.png",), output=tmp_path / "out")
    check_paths(config)
    results = ResultFiles(config.output)
    results.add(row_with())
    results.close()
    with (
        closing(ResultFiles(config.output)) as results,
        pytest.raises(UserError, match="another run has written results"),
    ):
        Run(config, None, [], results, [tmp_path / "x.png"], None)


def test_nothing_to_write_needs_no_output_folder(tmp_path):
    (tmp_path / "file").touch()
    check_paths(PredictConfig(support=(tmp_path,), save=tmp_path / "x.regad", output=tmp_path / "file/out"))


@pytest.mark.parametrize("name", [b"\xff\xfe.png", "gr\u00fcn.png".encode(), b"gr\xfcn.png"])
def test_names_are_the_same_text_in_every_locale(name):
    path = Path(os.fsdecode(b"/x/" + name))
    assert full_name(path) == "/x/" + name.decode(errors="backslashreplace")


FOUND = """
import sys; from pathlib import Path; from inspection.results import ResultFiles
folder = Path(sys.argv[1])
for overwrite in (False, True):
    results = ResultFiles(folder, overwrite)
    print([(folder / name).is_file() for row in results.rows for name in row.files])
    results.close()
"""
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_files_of_rows_are_found_in_every_locale(tmp_path):
    results, names = ResultFiles(tmp_path), ["gr\u00fcn.png", os.fsdecode(b"gr\xfcn.png")]
    results.add(row_with(*names))
    results.close()
    for name in names:
        (tmp_path / name).touch()
    command = [sys.executable, "-c", FOUND, str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT_ROOT, env=os.environ | ASCII, capture_output=True, text=True)
    assert done.stdout == "[True, True]\n[]\n", done.stderr
    assert not any((tmp_path / name).exists() for name in names)
