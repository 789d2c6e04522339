"""Data sets in MVTec AD's layout: the images listed, their order and labels, and the errors for missing files."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import train
from benchmarks.reference import DATA, GOLDEN
from datasets.images import ImageError, read_image
from datasets.layouts import list_images
from datasets.mvtec import LabelledDataset, category_folder, list_test_items
from tests.datasets.test_images import read_mask
from tests.reference import needs_reference
from utils.choices import CATEGORIES, category_name
from utils.errors import UserError

SIDE = 12
TEST_FILES = ["good/10.png", "good/9.png", "good/a.png", "bent/000.png", "bent/001.png", "scratch/000.png"]
# sorted by folder, then by name as text
LISTED = ["bent/000.png", "bent/001.png", "good/10.png", "good/9.png", "good/a.png", "scratch/000.png"]


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path, "PNG")


def write_category(category: Path) -> Path:
    """Three kinds of test images, masks for the two kinds of defects, three training images."""
    for seed, name in enumerate(TEST_FILES):
        write_image(category / "test" / name, seed)
        if not name.startswith("good"):
            write_image(category / "ground_truth" / name.replace(".png", "_mask.png"), 100 + seed)
    for seed, name in enumerate(("2.png", "1.png", "10.png")):
        write_image(category / "train/good" / name, 200 + seed)
    return category


@pytest.fixture
def category(tmp_path) -> Path:
    return write_category(tmp_path / "data" / "bolt")


def relative(paths: list[Path], folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in paths]


@pytest.mark.parametrize("place", ["data", "test", "good", "ground_truth", "goodman/my test", "bent/test/good"])
@pytest.mark.parametrize("name", ["bolt", "good", "test"])
def test_order_labels_and_masks_for_any_folder_names(place, name, tmp_path, monkeypatch):
    """Neither the names of the folders above a category nor the order of the disk's listing matter."""
    by_disk = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(sorted(by_disk(folder), reverse=True)))
    write_category(tmp_path / place / name)
    category = category_folder(tmp_path / place, "folder", name)
    items = list_test_items(category)
    assert relative([item.image for item in items], category / "test") == LISTED
    assert [item.defect for item in items] == ["bent", "bent", "good", "good", "good", "scratch"]
    assert [item.label for item in items] == [1, 1, 0, 0, 0, 1]
    masks = relative([mask for item in items for mask in item.masks if item.label], category / "ground_truth")
    assert masks == ["bent/000_mask.png", "bent/001_mask.png", "scratch/000_mask.png"]
    assert [item.masks for item in items if not item.label] == [()] * 3
    assert relative(list_images(category / "train/good"), category) == [f"train/good/{n}.png" for n in (1, 10, 2)]


def test_what_is_not_an_image_is_ignored(category):
    for junk in (".hidden.png", "._000.png", ".DS_Store", "Thumbs.db", "notes.txt", "000.png.part", "png"):
        for folder in ("test/bent", "test/good", "train/good", "ground_truth/bent"):
            (category / folder / junk).write_bytes(b"junk")
    (category / "test/Thumbs.db").write_bytes(b"junk")
    (category / "test/.cache").mkdir()
    assert relative([item.image for item in list_test_items(category)], category / "test") == LISTED
    assert len(list_images(category / "train/good")) == 3


def test_links_are_followed(category, tmp_path):
    store = tmp_path / "store"
    category.rename(store)
    category.mkdir()
    for folder in ("train", "test", "ground_truth"):
        (category / folder).symlink_to(store / folder)
    (store / "test/good/0.png").symlink_to(store / "train/good/1.png")
    assert relative([item.image for item in list_test_items(category)], category / "test")[2] == "good/0.png"


# removed from the data set: the error message
MISSING = {
    "test": "no folder {category}/test: scoring needs",
    "test/bent, test/scratch": "{category}/test has no defective images; an AUROC",
    "test/good": "{category}/test has no normal images; an AUROC",
    "test/good/*": "no images (.bmp, .jfif, .jpeg, .jpg, .png, .tif, .tiff, .webp) in {category}/test/good",
    "test/bent/*": "in {category}/test/bent",
    "ground_truth/bent/001_mask.png": "1 mask(s) missing, the first is that of {category}/test/bent/001.png",
    "ground_truth/bent": "2 mask(s) missing, the first is that of {category}/test/bent/000.png",
    "ground_truth/*": "3 mask(s) missing, the first is that of {category}/test/bent/000.png",
}


@pytest.mark.parametrize("removed", MISSING)
def test_missing_files_and_folders_are_named(removed, category):
    for pattern in removed.split(", "):
        for path in list(category.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=re.escape(MISSING[removed].format(category=category))):
        list_test_items(category, strict=True)


def test_no_data_folder(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"no data folder {tmp_path}/x; ")):
        category_folder(tmp_path / "x", "folder", "bolt")


def test_an_unknown_category_lists_the_existing_ones(category):
    data = category.parent
    write_category(data / "anchor")
    (data / "notes").mkdir()
    sentence = re.escape(f"no category folder {data}/nut; it has anchor, bolt")
    with pytest.raises(UserError, match=sentence):
        category_folder(data, "folder", "nut")
    with pytest.raises(UserError, match=r"no category folder .*/zipper; it has anchor, bolt"):
        category_folder(data, "mvtec", "zipper")
    with pytest.raises(UserError, match=r"it holds no folder with train/good in it"):
        category_folder(data / "notes", "folder", "nut")


def test_an_unknown_mvtec_category_lists_all_fifteen(category):
    with pytest.raises(UserError, match="mvtec has no category 'bolt'") as caught:
        category_folder(category.parent, "mvtec", "bolt")
    assert len(CATEGORIES["mvtec"]) == 15
    assert ", ".join(sorted(CATEGORIES["mvtec"])) in str(caught.value)
    assert "data type folder" in str(caught.value) and caught.value.options == ("data_type",)


@pytest.mark.parametrize("size", [8, SIDE, 32])
def test_dataset_equals_the_reader(category, size):
    items = list_test_items(category)
    dataset = LabelledDataset(items, size)
    assert len(dataset) == len(items) == 6
    for item, found in zip(items, (dataset[number] for number in range(6)), strict=True):
        assert set(found) == {"image", "mask", "valid_mask"} and found["valid_mask"].all()
        assert (found["image"].shape, found["image"].dtype) == ((3, size, size), torch.uint8)
        assert (found["mask"].shape, found["mask"].dtype) == ((size, size), torch.bool)
        np.testing.assert_array_equal(found["image"].permute(1, 2, 0), read_image(item.image, size))
        expected = read_mask(*item.masks, size) if item.label else np.zeros((size, size), bool)
        np.testing.assert_array_equal(found["mask"], expected)
        assert found["mask"].any() == item.label


@pytest.mark.parametrize("file", ["test/bent/001.png", "ground_truth/bent/001_mask.png"])
def test_broken_file_is_named_when_it_is_read(file, category):
    (category / file).write_bytes(b"broken")
    with pytest.raises(ImageError, match=re.escape(str(category / file))):
        LabelledDataset(list_test_items(category), 8)[1]


@needs_reference
def test_order_equals_the_release():
    recorded = json.loads((GOLDEN / "screw.json").read_text())["test_order"]
    assert relative([item.image for item in list_test_items(DATA / "screw")], DATA / "screw") == recorded


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1).filter(
    lambda name: name not in (".", "..")
)


@given(NAMES, st.sampled_from(["", "./", ".//", "././"]), st.sampled_from(["", "/", "//", "/."]))
def test_what_tab_completion_adds_is_taken_away(name, before, after):
    assert category_name(before + name + after) == name


@given(st.lists(NAMES, min_size=2, max_size=4))
def test_a_path_is_no_category(parts):
    with pytest.raises(argparse.ArgumentTypeError, match="is not the name of a category"):
        category_name("/".join(parts))


@pytest.mark.parametrize("text", ["", ".", "..", "/", "./", "../ring", "ring/..", "/ring"])
def test_what_names_no_folder_in_the_data_folder(text):
    with pytest.raises(argparse.ArgumentTypeError):
        category_name(text)


def test_the_target_is_not_trained_on_however_it_is_written(demo_data, tmp_path):
    parser = train.get_args_parser()
    for spelling in ("ring", "ring/", "./ring"):
        assert parser.parse_args(["--obj", spelling]).obj == "ring"
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--obj", str(Path(demo_data) / "ring")])
    assert ended.value.code == 2
