"""check_data.py on data sets with every kind of fault. The other commands reject the same faults in one sentence."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import check_data
import train
from benchmarks.reference import DATA
from datasets import images
from datasets.manifest import category_manifest, draw_manifest, save_manifest
from tests.commands.test_commands import test_command
from tests.datasets.test_images import (
    COLOURS,
    GREYS,
    SIDEWAYS,
    coloured,
    encoded,
    grey,
    palette,
    sixteen_bit,
    with_alpha,
)
from tests.datasets.test_layouts import visa  # noqa: F401
from tests.flags import small_run
from tests.reference import needs_reference
from utils.errors import UserError
from utils.files import PROJECT_ROOT

SIZE = 64


@pytest.fixture
def data(demo_data, tmp_path) -> Path:
    """A copy of the small data set that a test may damage. Its path holds names of the layout's own folders."""
    root = tmp_path / "test" / "good ground_truth"
    shutil.copytree(demo_data, root)
    return root


def check(data: Path, *flags: str) -> int:
    """The exit code."""
    try:
        check_data.main(["--data_type", "folder", "--data_path", str(data), *flags])
    except SystemExit as ended:
        return ended.code
    return 0


def test_clean_data(data, capsys):
    assert check(data) == 0
    printed = capsys.readouterr().out
    assert "no problems" in printed
    row = next(line.split() for line in printed.splitlines() if line.startswith("ring"))
    assert row[:4] == ["ring", "5", "3", "6"] and row[-3:] == ["6", "64x64", "RGB"]
    assert "(chip 2, rust 2, scratch 2)" in printed


def big(side: tuple[int, int]) -> bytes:
    return encoded(Image.new("L", side, 128), "PNG")


def animated() -> bytes:
    frames = [Image.fromarray(COLOURS), Image.fromarray(COLOURS[::-1])]
    return encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])


FINE = {  # images of every kind, some under a wrong suffix
    "16-bit": lambda: encoded(sixteen_bit(GREYS * np.uint16(257)), "PNG"),
    "1-bit": lambda: encoded(grey().convert("1"), "PNG"),
    "RGBA": lambda: encoded(with_alpha(coloured(), "RGBA"), "PNG"),
    "palette with transparency": lambda: encoded(palette(), "PNG", transparency=2),
    "CMYK": lambda: encoded(coloured().convert("CMYK"), "JPEG"),
    "turned by EXIF": lambda: encoded(coloured(), "JPEG", exif=SIDEWAYS),
    "animated": animated,
    "1x1": lambda: big((1, 1)),
    "20000x50": lambda: big((20000, 50)),
}
BROKEN = {
    "truncated": lambda: big((90, 90))[:60],
    "zero bytes": lambda: b"",
    "text": lambda: b"no image",
    "float": lambda: encoded(Image.fromarray(GREYS.astype(np.float32)), "TIFF"),
}


def test_every_kind_of_image_and_name_works_in_training_and_scoring(data, tmp_path, capsys):
    for number, content in enumerate(FINE.values()):
        (data / f"ring/test/good/1{number}.png").write_bytes(content())
    for place in ("ring/train/good", "weave/train/good"):
        for number, name in enumerate(("ünï cødé.png", "数据 集.png", 'it\'s "x".png', "<b>.PNG", "plain.png")):
            (data / place / f"00{number}.png").unlink()
            (data / place / name).write_bytes(list(FINE.values())[number]())
    assert check(data) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    expected = "has the same pixels as the", "images are grey, e.g. ", *(f"have {part}" for part in images.HOW_READ)
    assert len(problems) >= 9 and all(any(words in line for words in expected) for line in problems)
    run_all(data, tmp_path)


def run_all(data: Path, tmp_path: Path) -> None:
    common = {"shot": 1, "inferences": 1, "save_dir": tmp_path / "save"}
    train.main(small_run(data, epochs=1, cache_dir=tmp_path / "cache", **common))
    test_command.main(small_run(data, output=tmp_path / "out", **common))


@pytest.mark.parametrize(
    ("kind", "place"),
    [(kind, "ring/test/rust/000.png") for kind in BROKEN]
    + [("text", place) for place in ("weave/train/good/000.png", "ring/train/good/001.png")],
)
def test_every_command_names_a_broken_image_first(kind, place, data, tmp_path, capsys):
    path = data / place
    path.write_bytes(BROKEN[kind]())
    assert check(data) == 1
    assert f"cannot read the image {path}" in capsys.readouterr().out
    if "ring/train" in place:  # an image that is read only if the support set draws it
        return
    with pytest.raises(UserError) as caught:
        run_all(data, tmp_path)
    assert f"cannot read the image {path}" in str(caught.value) and "\n" not in str(caught.value)


def no_file(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.png")


@pytest.mark.parametrize("spoil", [no_file, dangling])
def test_folders_and_dangling_links_are_named(spoil, data, tmp_path, capsys):
    path = data / "weave/train/good/002.png"
    spoil(path)
    assert check(data) == 1 and f"cannot read the image {path}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"cannot read the (image|file) .*002\.png"):
        run_all(data, tmp_path)


def test_bombs_and_their_limit(data, capsys, monkeypatch):
    monkeypatch.setattr(images.Image, "MAX_IMAGE_PIXELS", images.Image.MAX_IMAGE_PIXELS)  # restored after the test
    coloured().resize((400, 400)).save(data / "ring/test/good/000.png")
    assert check(data, "--max_pixels", "100000") == 1
    assert "exceeds limit of 100000 pixels" in capsys.readouterr().out
    assert check(data, "--max_pixels", "160000") == 0


FAULTS = {
    "no mask": (
        lambda d: (d / "ring/ground_truth/rust/001_mask.png").unlink(),
        "1 defective image(s) have no mask",
    ),
    "mask of another size": (
        lambda d: Image.new("L", (9, 7), 255).save(d / "ring/ground_truth/rust/001_mask.png"),
        "001_mask.png is 9x7 pixels instead of the 64x64 of its image",
    ),
    "mask of nothing": (
        lambda d: shutil.copy(d / "ring/ground_truth/rust/001_mask.png", d / "ring/ground_truth/rust/7_mask.png"),
        "are the mask of no image, e.g. ",
    ),
    "two equal training images": (
        lambda d: Image.open(d / "ring/train/good/001.png").save(d / "ring/train/good/9.tif"),
        "ring/train/good/9.tif has the same pixels as the training image",
    ),
    "a training image among the test images": (
        lambda d: Image.open(d / "ring/train/good/001.png").convert("RGBA").save(d / "ring/test/rust/001.png"),
        "ring/test/rust/001.png has the same pixels as the training image",
    ),
    "one image": (
        lambda d: [p.unlink() for p in sorted((d / "ring/train/good").iterdir())[1:]],
        "ring/train/good has one image; training needs at least two",
    ),
    "no images": (lambda d: [p.unlink() for p in (d / "ring/train/good").iterdir()], "no images (.bmp"),
    "an empty kind": (lambda d: (d / "ring/test/dent").mkdir(), "ring/test/dent"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, data, capsys):
    spoil, sentence = FAULTS[fault]
    spoil(data)
    assert check(data) == 1
    printed = capsys.readouterr().out
    assert sentence in printed and "1 problem(s)" in printed


def test_an_empty_folder_hides_nothing(data, capsys):
    """The images of other folders are counted, and their problems are listed."""
    (data / "ring/test/dent").mkdir()
    (data / "ring/test/rust/001.png").write_bytes(b"x")
    for path in (data / "ring/train/good").iterdir():
        path.unlink()
    assert check(data) == 1
    printed = capsys.readouterr().out
    assert "3 problem(s)" in printed and "(chip 2, rust 2, scratch 2)" in printed
    assert all(text in printed for text in ("ring/test/dent", "ring/test/rust/001.png", "ring/train/good"))


def test_an_empty_test_folder_is_a_problem(data, capsys):
    shutil.rmtree(data / "ring/test")
    (data / "ring/test").mkdir()
    shutil.rmtree(data / "ring/ground_truth")
    assert check(data) == 1 and "1 problem(s)" in capsys.readouterr().out


def test_visa(visa, capsys):  # noqa: F811
    flags = ["--data_type", "visa", "--data_path", str(visa), "--obj", "candle"]
    check_data.main(flags)
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row == ["candle", "3", "1", "1", "(anomaly", "1)", "1", "30x20", "RGB"]
    (visa / "candle/Data/Images/Normal/0003.JPG").unlink()
    with pytest.raises(SystemExit):
        check_data.main(flags)
    assert "cannot read the image" in capsys.readouterr().out


@pytest.mark.parametrize("label", ["normal", "anomaly"])
def test_images_that_a_list_names_twice(label, visa, capsys):  # noqa: F811
    """In train and test, or as normal and defective."""
    split = visa / "split_csv/1cls.csv"
    row = next(line for line in split.read_text().splitlines() if line.startswith("candle,test,normal"))
    split.write_text(f"{split.read_text()}{row.replace('normal', label, 1)}\n")
    with pytest.raises(SystemExit):
        check_data.main(["--data_type", "visa", "--data_path", str(visa), "--obj", "candle"])
    printed = capsys.readouterr().out
    assert "1 image(s) are listed more than once, e.g. " in printed and "different suffixes" not in printed


def test_a_name_that_the_terminal_cannot_show(data):
    """A name that is not UTF-8, as archives of old systems hold. Some file systems reject such names."""
    try:
        (data / "ring/test/rust/gr\udcfcn.png").write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    done = subprocess.run(
        [sys.executable, "check_data.py", "--data_type", "folder", "--data_path", str(data)],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 1 and "gr\\udcfcn.png" in done.stdout, done.stderr
    assert done.stderr.startswith("finished in ") and done.stderr.count("\n") == 1


def test_test_and_ground_truth_may_be_missing(data, capsys):
    shutil.rmtree(data / "ring/test")
    shutil.rmtree(data / "ring/ground_truth")
    shutil.rmtree(data / "weave/ground_truth")
    (data / "ring/train/good/Thumbs.db").write_bytes(b"x")
    (data / "ring/train/good/.DS_Store").write_bytes(b"x")
    (data / "ring/train/good/._000.png").write_bytes(b"x")
    assert check(data) == 0, capsys.readouterr().out


def test_missing_categories_of_a_data_type(data, capsys):
    with pytest.raises(SystemExit) as ended:
        check_data.main(["--data_type", "mpdd", "--data_path", str(data)])
    assert ended.value.code == 1
    assert capsys.readouterr().out.count("no category folder") == 6


def test_support_sets_are_checked(data, tmp_path, capsys):
    root = tmp_path / "support"
    save_manifest(category_manifest(root, "ring"), draw_manifest("ring", ["000.png", "77.png"], 2, 1, 0))
    (root / "weave").mkdir()
    (root / "weave/2_1.pt").write_bytes(b"x")
    (root / "weave/two.pt").write_bytes(b"x")
    assert check(data, "--support", "--support_path", str(root)) == 1
    printed = capsys.readouterr().out
    assert "77.png is not among the training images" in printed and "2_1.pt cannot be read" in printed
    assert "two.pt is not named <shot>_<rounds>.pt" in printed and "3 problem(s)" in printed


def test_nothing_is_written_to_the_data_folder(data, tmp_path):
    """The tree is read-only during the test; its listing and modification times stay the same."""
    for path in sorted(data.rglob("*"), reverse=True):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    try:
        assert check(data) == 0
        run_all(data, tmp_path)
        assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
    finally:
        for path in data.rglob("*"):
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


@needs_reference
@pytest.mark.slow
def test_real_images(capsys):
    """Two thousand images. One mask of the magnetic tiles really marks no pixel."""
    assert check(DATA) == 1
    printed = capsys.readouterr().out
    assert "uneven/006_mask.png marks no pixel" in printed and "1 problem(s)" in printed
