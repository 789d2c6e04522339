"""The synthetic data set: layout, exact masks, the same bytes for the same seed."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.images import read_image
from datasets.layouts import list_images
from datasets.mvtec import list_test_items
from examples.demo_data import CATEGORIES, NOISE, main, render, write_dataset
from tests.datasets.test_images import read_mask
from utils.errors import UserError

SIZE = 64
SMALL = {"train": 2, "good": 2, "defective": 1, "size": SIZE}
DEFECTS = [(category, defect) for category, scene in CATEGORIES.items() for defect in scene.defects]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    output = tmp_path_factory.mktemp("synthetic")
    write_dataset(output, **SMALL)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b).mean())


@pytest.mark.parametrize("category", CATEGORIES)
def test_layout_is_read_by_the_mvtec_reader(dataset, category):
    items = list_test_items(dataset / category)
    defects = sorted(CATEGORIES[category].defects)
    assert [item.defect for item in items] == sorted([*defects, "good", "good"])
    assert [path.name for path in list_images(dataset / category / "train" / "good")] == ["000.png", "001.png"]
    assert len(contents(dataset / category)) == 2 + len(items) + len(defects)  # no other files
    for item in items:
        image, _ = render(category, f"test/{item.defect}", int(item.image.stem), SIZE)
        np.testing.assert_array_equal(read_image(item.image, SIZE), image)


def test_mask_files_are_grey_and_binary(dataset):
    for category in CATEGORIES:
        for item in list_test_items(dataset / category):
            for path in item.masks:
                with Image.open(path) as stored:
                    assert (stored.mode, stored.size, set(np.unique(stored))) == ("L", (SIZE, SIZE), {0, 255})
                _, mask = render(category, f"test/{item.defect}", 0, SIZE)
                np.testing.assert_array_equal(read_mask(path, SIZE), mask)


@pytest.mark.parametrize(("category", "defect"), DEFECTS)
def test_mask_is_exactly_where_the_defect_changed_the_image(category, defect):
    for index in range(3):
        image, mask = render(category, f"test/{defect}", index, SIZE)
        flawless, nothing = render(category, f"test/{defect}", index, SIZE, flawless=True)
        np.testing.assert_array_equal((image != flawless).any(axis=2), mask)
        assert 0.003 < mask.mean() < 0.06  # visible, yet a small part of the image
        assert distance(image[mask], flawless[mask]) > 4 * NOISE
        assert not nothing.any()


@pytest.mark.parametrize("category", CATEGORIES)
def test_normal_images_have_no_mask_and_vary(category):
    images = []
    for folder, index in (("train/good", 0), ("train/good", 1), ("test/good", 0)):
        image, mask = render(category, folder, index, SIZE)
        assert not mask.any()
        images.append(image)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert distance(images[a], images[b]) > 2 * NOISE  # more than the noise: the object itself has moved


def test_categories_look_different():
    images = {name: [render(name, "train/good", k, SIZE)[0] for k in range(3)] for name in CATEGORIES}
    for name, (first, *others) in images.items():
        own = max(distance(first, other) for other in others)
        assert all(distance(first, other[0]) > 1.2 * own for key, other in images.items() if key != name)


def test_bytes_depend_on_the_seed_only(dataset, tmp_path):
    write_dataset(tmp_path, **{**SMALL, "train": 3, "defective": 2})
    larger = contents(tmp_path)
    assert contents(dataset) == {name: larger[name] for name in contents(dataset)}


def test_other_seed_other_images(dataset, tmp_path):
    write_dataset(tmp_path, ["ring"], **SMALL, seed=1)
    here, there = contents(tmp_path / "ring"), contents(dataset / "ring")
    assert here.keys() == there.keys()
    assert all(here[name] != there[name] for name in here)


def test_command_writes_every_category_and_can_be_repeated(dataset, tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--train", "2", "--good", "2", "--defective", "1", "--size", str(SIZE)]
    main(arguments)
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(CATEGORIES)
    assert all(str(tmp_path / name) in line for name, line in zip(CATEGORIES, lines[: len(CATEGORIES)], strict=True))
    assert contents(tmp_path) == contents(dataset)


def test_left_over_images_are_rejected(tmp_path):
    write_dataset(tmp_path, ["teeth"], **SMALL)
    with pytest.raises(UserError, match=r"teeth holds another data set \(train/good/001.png"):
        write_dataset(tmp_path, ["teeth"], **{**SMALL, "train": 1})


@pytest.mark.parametrize("wrong", [{"train": 0}, {"good": 0}, {"defective": 0}, {"size": 63}, {"seed": -1}])
def test_numbers_out_of_range_are_rejected(tmp_path, wrong):
    with pytest.raises(UserError, match="or more"):
        write_dataset(tmp_path, **{**SMALL, **wrong})
    assert not contents(tmp_path)
