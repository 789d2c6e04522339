"""Detector and result files that commit 369ac53 wrote are read, and give what they gave there.

tests/data/369ac53: `predict.py --support ... --checkpoint ... --img_size 64 --false_alarm 0.1 --save part.regad`. The
detector file is compressed from 14.8 MB to 1.1 MB; its weights repeat every 4999 numbers so that it can be.
"""

from __future__ import annotations

import csv
import json
import lzma
import shutil
from pathlib import Path

import pytest

import predict
from inspection.config import PredictConfig
from inspection.detector import FewShotDetector
from utils.config import read_config
from utils.files import PROJECT_ROOT

DATA = PROJECT_ROOT / "tests/data/369ac53"


@pytest.fixture(scope="module")
def part(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("earlier") / "part.regad"
    file.write_bytes(lzma.decompress((DATA / "part.regad.xz").read_bytes()))
    return file


@pytest.fixture
def output(tmp_path) -> Path:
    return Path(shutil.copytree(DATA / "predictions", tmp_path / "out"))


def test_a_detector_scores_as_it_did(part):
    rows = [json.loads(line) for line in (DATA / "predictions/results.jsonl").read_text().splitlines()]
    detector = FewShotDetector.load(part, "cpu")
    scores, _, reasons, _ = detector.inspect([DATA / "images" / Path(row["path"]).name for row in rows])
    assert scores.tolist() == pytest.approx([row["score"] for row in rows], rel=1e-4) and reasons == ["", ""]
    assert detector.identity() == rows[0]["detector"] and detector.threshold.value == rows[0]["threshold"]
    assert detector.calibrate(0.1).value == pytest.approx(rows[0]["threshold"])


def test_the_record_of_a_run_is_a_configuration():
    """Names that have changed since are understood; defaults count as not given."""
    found = read_config(DATA / "predictions/scores.json", PredictConfig)
    assert found["false_positive_rate"] == 0.1 and found["checkpoint"] == "trained.pt" and "keep_aspect" not in found


def test_results_are_continued(part, output):
    """The earlier rows stay as they are; the same images in another place are new."""
    earlier = (output / "results.jsonl").read_text()
    given = ["--detector", str(part), "--input", str(DATA / "images"), "--device", "cpu"]
    predict.main([*given, "--output", str(output), "--append"])
    assert (output / "results.jsonl").read_text().startswith(earlier)
    with (output / "scores.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    scores = [float(row["score"]) for row in rows]
    assert len(rows) == 4 and scores[2:] == pytest.approx(scores[:2], rel=1e-4)
    assert {row["detector"] for row in rows} == {rows[0]["detector"]}
    assert sum(len(list(folder.iterdir())) for folder in output.iterdir() if folder.is_dir()) == 4
