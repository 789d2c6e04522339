"""predict.py as a command: scores, decisions, heat maps, maps, watching, and error messages."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import binary_erosion, binary_fill_holes, gaussian_filter
from skimage.filters import threshold_otsu

import predict
from benchmarks.reference import DATA
from inspection.detector import FewShotDetector
from inspection.predictions import draw_panels
from inspection.threshold import Threshold
from models.efficientnet_lite import EfficientNetLite
from reports.drawing import CAPTION_HEIGHT, ELEVATED, FLAGGED
from tests.reference import needs_reference
from utils.devices import seed_everything
from utils.errors import UserError

SIZE = 64


@pytest.fixture(scope="module")
def support(demo_data) -> list[Path]:
    return sorted((demo_data / "ring/train/good").iterdir())[:3]


def run(support: list[Path], inputs: list[Path], output: Path, *flags: str) -> dict:
    predict.main(
        ["--support", *map(str, support), "--input", *map(str, inputs), "--output", str(output), *flags]
        + ["--weights", "none", "--img_size", str(SIZE), "--device", "cpu"]
    )
    return json.loads((output / "scores.json").read_text())


@pytest.fixture(scope="module")
def plain(support, demo_data, tmp_path_factory) -> tuple[dict, Path]:
    """The record and the output folder of a run without further flags over nine images."""
    output = tmp_path_factory.mktemp("plain")
    return run(support, [demo_data / "ring/test"], output), output


def test_scores_are_the_detector_s(plain, support):
    record, output = plain
    seed_everything(668)
    detector = FewShotDetector(EfficientNetLite("none", SIZE), "cpu").fit(support)
    paths = [row["path"] for row in record["images"]]
    assert len(paths) == 9
    scores, maps = detector.score(paths)
    assert [row["score"] for row in record["images"]] == scores.tolist()
    np.testing.assert_allclose(detector.score(paths[4:5])[1][0], maps[4], rtol=1e-4, atol=1e-6)  # not batch-dependent
    rows = list(csv.DictReader((output / "scores.csv").read_text().splitlines()))
    assert [np.float32(row["score"]) for row in rows] == scores.tolist()
    limits = [record["threshold"][name] for name in ("review", "value")]
    words = ("normal", "review", "defective")
    assert [row["decision"] for row in rows] == [words[np.searchsorted(limits, score)] for score in scores]
    assert len(list((output / "images").rglob("*.jpg"))) == 9 and (output / "report.html").stat().st_size > 10000


def test_maps_have_the_size_of_their_image(support, demo_data, tmp_path):
    with Image.open(demo_data / "ring/test/good/000.png") as image:
        image.resize((90, 40)).save(tmp_path / "wide.png")
    run(support, [tmp_path / "wide.png"], tmp_path / "out", "--maps", "npy", "--keep_aspect")
    (file,) = (tmp_path / "out/maps").iterdir()
    assert np.load(file).shape == (40, 90)
    (panels,) = (tmp_path / "out/images").iterdir()
    with Image.open(panels) as image:
        left, top, right, bottom = json.loads(image.info["comment"])
        assert bottom - top == CAPTION_HEIGHT + 40 and right - left > 3 * 90


@pytest.mark.parametrize(("images", "titles"), [(1, ["heat_map", "input"]), (3, ["heat_map", "input", "outlines"])])
def test_a_file_for_each_panel(images, titles, support, demo_data, tmp_path, capsys):
    """They have the image's own size; a single support image gives no threshold, so that there are no outlines."""
    source = demo_data / "ring/test/chip/000.png"
    record = run(support[:images], [source], tmp_path, "--panels", "separate")
    printed = capsys.readouterr().out
    for sentence in ("images are not classified; give two support images or more", "scored, not classified, 0 failed"):
        assert (sentence in printed) == (record["threshold"] is None) == (images == 1)
    assert (record["images"][0]["decision"] is None) == (images == 1)
    names = [f"images/000.png.{title}.jpg" for title in titles]
    assert sorted(record["images"][0]["files"]) == names
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [Path(name).name for name in names]
    heat, own, *_ = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in names)
    with Image.open(source) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    assert own.shape == heat.shape == expected.shape
    assert np.abs(own - expected).mean() < 5 < np.abs(heat - expected).mean()  # JPEG


def test_a_run_is_repeated_from_detector_or_record_and_a_fit_from_the_detector(support, demo_data, tmp_path):
    """With the same bits."""
    inputs, part = demo_data / "ring/test/rust", str(tmp_path / "part.regad")
    first = run(support, [inputs], tmp_path / "a", "--save", part, "--keep_aspect")
    new = ["--input", str(inputs), "--device", "cpu"]
    for flags in (["--detector", part, *new], ["--config", str(tmp_path / "a/scores.json")], ["--config", part, *new]):
        predict.main([*flags, "--output", str(tmp_path / "again"), "--overwrite"])
        again = json.loads((tmp_path / "again/scores.json").read_text())
        for before, row in zip(first["images"], again["images"], strict=True):
            assert row == before | {"time": row["time"]} and datetime.fromisoformat(row["time"]).utcoffset() is not None
        assert again["threshold"] == first["threshold"] and again["fingerprint"] == first["fingerprint"]
        assert again["detector"]["fingerprint"] == first["detector"]["fingerprint"]
        assert again["resolved"]["bits"] == 16


def test_every_image_has_its_own_files(support, demo_data, tmp_path):
    """Equal names in different folders, equal names with different suffixes, links to one file, non-ASCII names."""
    good = sorted((demo_data / "ring/test/good").iterdir())
    for name in ("x/a.png", "y/a.png", "x/größe 7 部品.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(good[0].read_bytes())
    with Image.open(good[1]) as image:
        image.save(tmp_path / "in/x/a.jpg")
    (tmp_path / "in/link.png").symlink_to(good[1])
    inputs = [tmp_path / "in", tmp_path / "in/x/a.png", tmp_path / "in/../in/y/a.png"]
    record = run(support, inputs, tmp_path / "out", "--maps", "png")
    names = sorted(str(path.relative_to(tmp_path / "in")) for path in (tmp_path / "in").rglob("*.*g"))
    assert len(record["images"]) == len(names) == 5
    for kind, ending in (("images", ".jpg"), ("maps", ".png")):
        folder = tmp_path / "out" / kind
        assert sorted(str(f.relative_to(folder)) for f in folder.rglob("*.*g")) == [name + ending for name in names]
    assert "größe 7 部品.png" in (tmp_path / "out/scores.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(("scorer", "scale"), [("gaussian", 256), ("neighbours", 16384)])
def test_maps_hold_the_scores(support, demo_data, tmp_path, scorer, scale):
    image, flags = demo_data / "ring/test/good/000.png", ("--no_images", "--scorer", scorer, "--maps")
    score = run(support, [image], tmp_path / "a", *flags, "npy")["images"][0]["score"]
    assert run(support, [image], tmp_path / "b", *flags, "png")["map_scale"] == scale
    with Image.open(tmp_path / "b/maps/000.png.png") as image:
        coarse = np.asarray(image) / scale
    scores = np.load(tmp_path / "a/maps/000.png.npy")
    assert coarse.shape == scores.shape == (64, 64)
    np.testing.assert_allclose(coarse, np.minimum(scores, 65535 / scale), atol=1 / (2 * scale) + 1e-4)
    assert scores.max() == pytest.approx(score)
    assert not (tmp_path / "a/images").exists() and not (tmp_path / "b/images").exists()


def test_no_images_draws_nothing(support, demo_data, tmp_path, monkeypatch):
    """Neither files nor previews of the report, those of support images and known defects included."""
    for name in ("inspection.predictions.draw_panels", "inspection.report.draw_panels", "reports.page.as_data_uri"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("drawn"))
    defect = demo_data / "ring/test/good/001.png"
    record = run(support, [demo_data / "ring/test"], tmp_path, "--no_images", "--defects", str(defect))
    assert len(record["images"]) == 9 and not (tmp_path / "images").exists()
    assert "data:image/jpeg" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_heat_maps_are_seen(support, demo_data, tmp_path):
    """The heat map of an image as normal as the support is coloured at its maximum, for any threshold."""
    record = run(support, [demo_data / "ring/test"], tmp_path, "--false_alarm", "1e-9")
    assert all(row["decision"] != "defective" for row in record["images"])
    for row in record["images"]:
        with Image.open(tmp_path / row["files"][0]) as image:
            panels = np.asarray(image.crop(json.loads(image.info["comment"]))).astype(int)[CAPTION_HEIGHT:]
        with Image.open(row["path"]) as image:
            width = image.width
        change = panels[:, width + 6 : 2 * width + 6] - panels[:, :width]
        change = np.abs(change.reshape(width // 8, 8, width // 8, 8, 3).mean((1, 3))).max()
        assert change > 8, row  # of equal panels below 2, from the compression


def test_page_shows_so_many_images(support, demo_data, tmp_path, monkeypatch):
    for module in ("inspection.run", "inspection.report"):
        monkeypatch.setattr(f"{module}.PAGE_IMAGES", 2)
    run(support, [demo_data / "ring/test"], tmp_path)
    page = (tmp_path / "report.html").read_text()
    rows = re.findall(r'class="row">(.*?)</script>', page)
    scores = {json.loads(row)["score"]: bool(json.loads(row)["thumbnail"]) for row in rows}
    assert [scores[score] for score in sorted(scores, reverse=True)] == [True] * 2 + [False] * 7
    known = json.loads(re.search(r'id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])["references"]
    assert [image["name"] for image in known] == [path.name for path in support]
    assert all(image["role"] == "support" and image["score"] > 0 and len(image["panels"]) == 3 for image in known)
    assert len(list((tmp_path / "images").rglob("*.jpg"))) == 9


@given(st.integers(1, 12), st.integers(1, 700), st.integers(0, 2**32 - 1))
def test_outlines_run_inside_the_border(height, width, seed):
    """Amber outlines above the region threshold, cyan ones above the threshold; outlines close at the image border."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (height, width), dtype=np.uint8))
    scores = gaussian_filter(rng.normal(size=(height, width)), 2).astype(np.float32)
    low, high = np.quantile(scores, rng.random(2)) * [1, 2] - [0.1, 0]
    image, _, outlined = map(np.array, draw_panels(image, scores, Threshold(high, "", 1.0, low)).values())
    expected = image.copy()
    for limit, colour in ((low, ELEVATED), (high, FLAGGED)):
        line = max(1, round(max(height, width) / 250))
        expected[(scores > limit) & ~binary_erosion(scores > limit, iterations=line)] = colour
    np.testing.assert_array_equal(outlined, expected)


@needs_reference
@pytest.mark.slow
def test_marked_places_lie_on_the_real_part(tmp_path):
    """Four screws, untrained network: nearly all outlined pixels of damaged screws are on the screw."""
    screws = sorted((DATA / "screw/test").glob("*_[fnt]*/00*.png"))  # manipulated_front, scratch_neck, thread_top
    predict.main(
        ["--support", *(str(DATA / f"screw/train/good/00{number}.png") for number in range(4)), "--device", "cpu"]
        + ["--input", *map(str, screws), "--output", str(tmp_path), "--maps", "npy", "--no_images"]
    )
    limit = json.loads((tmp_path / "scores.json").read_text())["threshold"]["region"]
    on_screw, marked, images = 0, 0, 0
    for path in screws:
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L"))
        hot = np.load(tmp_path / "maps" / path.parent.name / f"{path.name}.npy") > limit
        on_screw += (hot & binary_fill_holes(grey < threshold_otsu(grey))).sum()
        marked, images = marked + hot.sum(), images + hot.any()
    assert len(screws) == 30 and images >= 10 and on_screw > 0.8 * marked


def test_support_images_without_any_difference_are_one_image(tmp_path, capsys):
    for name in "ab":
        Image.new("L", (80, 60)).save(tmp_path / f"{name}.png")
    record = run([tmp_path / "a.png", tmp_path / "b.png"], [tmp_path / "a.png"], tmp_path / "out")
    sentence = f"{tmp_path / 'b.png'}: duplicate of {tmp_path / 'a.png'}, ignored"
    assert record["warnings"] == [sentence] and f"warning: {sentence}" in capsys.readouterr().err
    assert record["threshold"] is None and record["images"][0]["decision"] is None
    record = run([tmp_path / "a.png", tmp_path / "b.png"], [tmp_path / "a.png"], tmp_path / "o", "--threshold", "1")
    assert record["images"][0]["decision"] == "normal"


def test_known_defects_are_listed_and_leave_the_threshold(plain, support, demo_data, tmp_path, capsys):
    defects = sorted((demo_data / "ring/test/chip").iterdir())
    record = run(support, defects[:1], tmp_path, "--defects", *map(str, defects))
    printed = capsys.readouterr().out
    assert record["threshold"] == plain[0]["threshold"] and plain[0]["known_defects"] == []
    assert [row["name"] for row in record["known_defects"]] == sorted(
        map(str, defects), key={row["name"]: row["score"] for row in record["known_defects"]}.get
    )
    assert f"of {len(defects)} found, lowest scores first" in printed
    listed = record["normal_images"]["leave_one_out"]
    assert {row["path"] for row in listed} == set(map(str, support))
    assert [row["score"] for row in listed] == sorted((row["score"] for row in listed), reverse=True)
    assert "normal images, highest scores first" in printed and "normal images are too few" in record["warnings"][0]
    assert "known defect" in (tmp_path / "report.html").read_text()


def test_thresholds_of_further_images_and_of_another_rate(plain, support, demo_data, tmp_path):
    normal = sorted((demo_data / "ring/test/good").iterdir())
    record = run(support, normal, tmp_path / "a", "--calibrate", *map(str, normal), "--save", str(tmp_path / "x.regad"))
    assert "3 further normal images" in record["threshold"]["how"] and "0.01" in record["threshold"]["how"]
    assert record["threshold"]["typical"] == sorted(row["score"] for row in record["images"])[1]
    loose, strict = run(support, normal, tmp_path / "b", "--false_alarm", "0.2")["threshold"], plain[0]["threshold"]
    assert loose["value"] < strict["value"] and "leave-one-out over 3" in strict["how"]
    with pytest.raises(UserError, match=r"comes from 3 calibration images.*--calibrate"):
        predict.main(["--detector", str(tmp_path / "x.regad"), "--false_alarm", "0.2", "--save", str(tmp_path / "y")])
    predict.main(
        ["--detector", str(tmp_path / "x.regad"), "--input", str(normal[0]), "--output", str(tmp_path / "d")]
        + ["--threshold", "5", "--device", "cpu"]
    )
    assert json.loads((tmp_path / "d/scores.json").read_text())["threshold"]["value"] == 5


def test_own_output_is_neither_scored_nor_support(support, tmp_path, capsys):
    images = Path(shutil.copytree(support[0].parent, tmp_path / "in"))
    for _ in range(2):
        assert len(run([images], [images], images / "out", "--overwrite")["images"]) == 5
        assert "fitting to 5 normal image(s)" in capsys.readouterr().out
    (tmp_path / "out").mkdir()
    images = images.rename(tmp_path / "out/in")
    assert len(run(support, [images], tmp_path / "out")["images"]) == 5  # allowed: above inputs


def test_files_that_cannot_be_written_cost_no_score(support, demo_data, tmp_path, capsys):
    """Something is in the place of one; the name of the other is longer than the system allows."""
    images = Path(shutil.copytree(demo_data / "ring/test/good", tmp_path / "in"))
    (images / "002.png").rename(images / f"{'x' * 250}.png")
    (tmp_path / "out/images/000.png.jpg").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        run(support, [images], tmp_path / "out")
    rows = json.loads((tmp_path / "out/scores.json").read_text())["images"]
    assert ended.value.code == 1 and all(row["score"] > 0 for row in rows)
    assert [bool(row["error"]) for row in rows] == [True, False, True]
    said = capsys.readouterr()
    assert "files cannot be written" in said.err and "3 images scored" in said.out and "2 failed" in said.out


_counts: Counter[str] | None = None


def _count(event: str, arguments: tuple) -> None:
    if event == "open" and _counts is not None and isinstance(arguments[0], str | bytes | os.PathLike):
        _counts[os.path.basename(os.fsdecode(arguments[0]))] += 1


sys.addaudithook(_count)  # it stays for the life of the process, and counts for the fixture only


@pytest.fixture
def openings():
    """How often each file is opened, by name."""
    global _counts
    _counts = Counter()
    yield _counts
    _counts = None


@pytest.mark.parametrize("flags", [[], ["--calibrate"], ["--region", "0,0,0.5,1", "--tile", "48", "--calibrate"]])
def test_support_images_are_opened_at_most_twice(flags, openings, tmp_path):
    """Once for the fit and once for the page."""
    images = [tmp_path / f"{name}.png" for name in "abcdef"]
    for seed, image in enumerate(images):
        values = np.random.default_rng(seed).integers(0, 256, (70, 100, 3), dtype=np.uint8)
        Image.fromarray(values).save(image)
    flags = [*flags, *map(str, images[3:])] if "--calibrate" in flags else flags
    openings.clear()
    run(images[:3], images[3:4], tmp_path / "out", "--save", str(tmp_path / "part.regad"), *flags)
    assert [openings[name] for name in ("a.png", "b.png", "c.png")] == [2, 2, 2]
    assert openings["e.png"] <= 3 and openings["d.png"] <= 4  # once for its SHA-256; d.png is an input as well


INVALID = {
    "--input in": "either normal images with --support, or a saved detector",
    "--support in --detector x --input in": "either normal images",
    "--support in": "nothing to do",
    "--support in --input in --watch in": "exclude each other",
    "--support in --watch nowhere": "no folder nowhere to watch",
    "--support nowhere --input in": "no such file or folder: nowhere",
    "--support in --input empty": "no images",
    "--support empty --input in": "no images",
    "--support in --input in --img_size 50": "multiple of 32",
    "--support in --input in --num_workers -1": "--num_workers must be at least 0",
    "--support in --input in --threshold nan": "--threshold must be a finite number",
    "--support in --input in --output in": "--output in is also where the images come from",
    "--support in --input in --output in/a.png": "cannot write to the folder in/a.png (--output): ",
    "--support in --input in --false_alarm 0.01": "a threshold needs the scores of two normal images",
    "--support in in2 --input in --false_alarm 5": "must be between 0 and 1, got 5",
    "--support broken.png --input in": "cannot read the image broken.png",
    "--detector nowhere --input in": "no detector file nowhere",
    "--detector x --input in --keep_aspect --img_size 512 --checkpoint x": "--checkpoint, --img_size, --keep_aspect: a",
    "--support in --save out.regad --checkpoint x": "x",
    "--support in --save in": "cannot write the file in (--save): it exists and is not a file",
    "--support in --input in --device tpu9": "device 'tpu9' cannot be used",
}


@pytest.mark.parametrize(("flags", "sentence"), INVALID.items())
def test_invalid_arguments_are_one_sentence(flags, sentence, demo_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "in2", "empty"):
        Path(folder).mkdir()
    for name in ("in/a.png", "in2/b.png"):
        shutil.copy(demo_data / "ring/test/good/000.png", name)
    Path("broken.png").write_bytes(b"broken")
    fitting = [] if "--detector" in flags else ["--weights", "none", "--img_size", str(SIZE)]
    with pytest.raises(UserError) as caught:
        predict.main([*fitting, "--device", "cpu", *flags.split()])
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
