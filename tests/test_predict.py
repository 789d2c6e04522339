"""predict.py as a user meets it: pictures in, scores, decisions and pictures out."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import predict
from models.regad import FewShotDetector, untrained
from utils.utils import UserError, seed_everything

SIZE = 64


@pytest.fixture
def support(demo_data) -> list[Path]:
    return sorted((demo_data / "ring/train/good").iterdir())[:3]


def run(support: list[Path], inputs: list[Path], output: Path, *flags: str) -> dict:
    predict.main(
        ["--support", *map(str, support), "--input", *map(str, inputs), "--output", str(output), *flags]
        + ["--weights", "none", "--img_size", str(SIZE), "--device", "cpu"]
    )
    return json.loads((output / "scores.json").read_text())


def test_scores_are_the_detector_s(support, demo_data, tmp_path):
    record = run(support, [demo_data / "ring/test"], tmp_path)
    seed_everything(668)
    detector = FewShotDetector(untrained("none", img_size=SIZE).stn.eval(), "cpu").fit(support)
    paths = [row["path"] for row in record["pictures"]]
    assert len(paths) == 9
    scores, maps = detector.score(paths)
    assert [row["score"] for row in record["pictures"]] == scores.tolist()
    np.testing.assert_array_equal(detector.score(paths[4:5])[1][0], maps[4])  # alone as among others, bit for bit
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert [np.float32(row["score"]) for row in rows] == scores.tolist()
    limit = record["threshold"]["value"]
    assert [row["decision"] for row in rows] == ["defective" if score > limit else "normal" for score in scores]
    assert len(list((tmp_path / "pictures").rglob("*.jpg"))) == 9 and (tmp_path / "report.html").stat().st_size > 10000


def test_maps_have_the_size_of_their_picture(support, demo_data, tmp_path):
    with Image.open(demo_data / "ring/test/good/000.png") as picture:
        picture.resize((90, 40)).save(tmp_path / "wide.png")
    run(support, [tmp_path / "wide.png"], tmp_path / "out", "--maps", "npy", "--keep_aspect")
    (file,) = (tmp_path / "out/maps").iterdir()
    assert np.load(file).shape == (40, 90)
    (panels,) = (tmp_path / "out/pictures").iterdir()
    with Image.open(panels) as picture:
        assert picture.height == 40 and picture.width > 3 * 90


def test_broken_inputs_do_not_stop_the_run(support, demo_data, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"broken")
    (tmp_path / "in/b.png").write_bytes((demo_data / "ring/test/good/000.png").read_bytes())
    with pytest.raises(SystemExit) as ended:
        run(support, [tmp_path / "in"], tmp_path / "out")
    assert ended.value.code == 1
    assert f"failed: cannot read the picture {tmp_path}/in/a.png" in capsys.readouterr().err
    rows = json.loads((tmp_path / "out/scores.json").read_text())["pictures"]
    assert rows[0]["score"] is None and rows[1]["score"] > 0


def test_saved_detector_gives_the_same_bits(support, demo_data, tmp_path):
    inputs = [demo_data / "ring/test/rust"]
    first = run(support, inputs, tmp_path / "a", "--save", str(tmp_path / "part.regad"))
    predict.main(
        ["--detector", str(tmp_path / "part.regad"), "--input", *map(str, inputs), "--output", str(tmp_path / "b")]
        + ["--device", "cpu"]
    )
    second = json.loads((tmp_path / "b/scores.json").read_text())
    assert second["pictures"] == first["pictures"] and second["threshold"] == first["threshold"]


def test_given_threshold_wins(support, demo_data, tmp_path):
    record = run(support, [demo_data / "ring/test/good"], tmp_path, "--threshold", "0.001")
    assert {row["decision"] for row in record["pictures"]} == {"defective"}


def test_one_support_picture_decides_nothing(support, demo_data, tmp_path, capsys):
    record = run(support[:1], [demo_data / "ring/test/good"], tmp_path)
    assert record["threshold"] is None and {row["decision"] for row in record["pictures"]} == {None}
    assert "nothing is decided; give two support pictures or more" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 damaged"])
def test_foreign_detector_files_are_refused(content, demo_data, tmp_path):
    file = tmp_path / "part.regad"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"part\.regad") as caught:
        predict.main(["--detector", str(file), "--input", str(demo_data / "ring/test/good")])
    assert "\n" not in str(caught.value)
