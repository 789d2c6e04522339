"""Layouts other than MVTec AD's: VisA's tree, MPDD's names, incomplete folders, masks under every usual name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from datasets.mvtec import (
    CATEGORIES,
    VISA_SPLIT,
    LabelledDataset,
    category_folder,
    category_names,
    checked_test_items,
    list_source_images,
    list_test_items,
    list_train_images,
    without_truth,
)
from tests.commands.test_commands import test_command
from tests.datasets.test_images import SIDEWAYS
from utils.errors import UserError

WIDTH, HEIGHT = 30, 20


def image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(path)


def mask(path: Path, value: int = 255, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[5:15, 10:20] = value
    Image.fromarray(values).convert(mode).save(path)


VISA_HEAD = "object,split,label,image,mask\n"


@pytest.fixture
def visa(tmp_path) -> Path:
    """Two categories in VisA's tree as distributed: JPEGs that are not square, masks of class numbers."""
    rows = []
    for category in ("candle", "pcb1"):
        for number in range(4):
            name = f"{category}/Data/Images/Normal/{number:04d}.JPG"
            image(tmp_path / name, number)
            rows.append(f"{category},{'train' if number < 3 else 'test'},normal,{name},\n")
        name, truth = f"{category}/Data/Images/Anomaly/000.JPG", f"{category}/Data/Masks/Anomaly/000.png"
        image(tmp_path / name, 9)
        mask(tmp_path / truth, value=2)
        rows.append(f"{category},test,anomaly,{name},{truth}\n")
    (tmp_path / VISA_SPLIT).parent.mkdir()
    (tmp_path / VISA_SPLIT).write_text(VISA_HEAD + "".join(rows))
    return tmp_path


def test_visa_is_read_in_place(visa):
    folder = category_folder(visa, "visa", "candle")
    assert [path.name for path in list_train_images(folder)] == ["0000.JPG", "0001.JPG", "0002.JPG"]
    items = list_test_items(folder, strict=True)
    assert [(item.defect, item.image.name, item.label) for item in items] == [
        ("anomaly", "000.JPG", 1),
        ("good", "0003.JPG", 0),
    ]
    found = LabelledDataset(items, 60)[0]
    assert found["mask"].sum() == (60 * 10 // HEIGHT) * (60 * 10 // WIDTH)  # class number 2 is a defect
    assert found["counted"].all()
    kept = LabelledDataset(items, 60, keep_aspect=True)[0]
    assert kept["counted"].sum() == 60 * 40 and kept["mask"].sum() == 20 * 20


def test_visa_through_the_commands(visa, tmp_path, monkeypatch):
    monkeypatch.setitem(CATEGORIES, "visa", ("candle", "pcb1"))
    flags = "--obj candle --shot 2 --inferences 1 --img_size 64 --data_type visa --device cpu --num_workers 0"
    flags = [*flags.split(), "--weights", "none", "--data_path", str(visa)]
    out = tmp_path / "out"
    train.main([*flags, "--epochs", "1", "--save_dir", str(out), "--cache_dir", "none", "--keep_aspect"])
    test_command.main([*flags, "--save_dir", str(out), "--output", str(out), "--keep_aspect"])
    assert json.loads((out / "candle_2_rotation_scale.json").read_text())["pixel_auroc"]["mean"] > 0


WRONG_SPLITS = {
    "a column is missing": ("object,split,label,image\ncandle,test,normal,a.JPG\n", "cannot read VisA's splits"),
    "a short row": (VISA_HEAD + "candle,test\n", "cannot read VisA's splits"),
    "out of the folder": (VISA_HEAD + "candle,test,normal,../a.JPG,\n", r"names \.\./a\.JPG, which is not below"),
    "an absolute path": (VISA_HEAD + "candle,test,normal,/etc/passwd,\n", "names /etc/passwd, which is not below"),
    "no training images": (VISA_HEAD + "pcb1,train,normal,a.JPG,\n", "has no training images of candle"),
}


@pytest.mark.parametrize("case", WRONG_SPLITS)
def test_wrong_splits_are_rejected(case, visa):
    content, sentence = WRONG_SPLITS[case]
    (visa / VISA_SPLIT).write_text(content)
    with pytest.raises(UserError, match=sentence) as caught:
        (list_train_images if "training" in case else list_test_items)(visa / "candle")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data_type", ["mvtec", "mpdd", "visa"])
def test_missing_categories_are_listed(data_type, tmp_path):
    assert len(category_names(tmp_path, data_type)) == {"mvtec": 15, "mpdd": 6, "visa": 12}[data_type]
    name = CATEGORIES[data_type][0]
    for number in range(2):
        image(tmp_path / name / "train/good" / f"{number}.png")
    with pytest.raises(UserError, match=f"lacks {len(CATEGORIES[data_type]) - 2} of the .*{CATEGORIES[data_type][2]}"):
        list_source_images(tmp_path, data_type, target=CATEGORIES[data_type][1])


def test_errors_name_a_nested_folder_or_an_archive(tmp_path):
    image(tmp_path / "MVTec/bottle/train/good/000.png")
    with pytest.raises(UserError, match=r"but there is .*MVTec/bottle: give --data_path .*MVTec"):
        category_folder(tmp_path, "mvtec", "bottle")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/bottle.tar.xz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"archive bottle\.tar\.xz: unpack it first"):
        category_folder(tmp_path / "packed", "mvtec", "bottle")


@pytest.fixture
def category(tmp_path) -> Path:
    """Two normal and three defective test images, no masks yet; suffixes of every kind and case."""
    folder = tmp_path / "part"
    for name in ("train/good/a.PNG", "train/good/b.jpeg", "test/good/c.bmp", "test/good/d.webp"):
        image(folder / name)
    for name in ("test/dent/e.tif", "test/dent/f.JPG", "test/hole/g.tiff"):
        image(folder / name)
    return folder


@pytest.mark.parametrize("ending", ["_mask.png", ".png", "_mask.bmp", ".TIF", "_mask.PNG"])
@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "P"])
def test_masks_are_found_under_any_usual_name_and_mode(ending, mode, category):
    mask(category / f"ground_truth/dent/e{ending}", mode=mode)
    (item,) = [item for item in list_test_items(category) if item.image.name == "e.tif"]
    assert item.mask.name == f"e{ending}"
    found = LabelledDataset([item], HEIGHT)[0]["mask"]
    assert 0.1 < found.float().mean() < 0.25


def test_images_without_a_mask_are_left_out_of_the_pixel_metrics(category, capsys):
    mask(category / "ground_truth/dent/e_mask.png")
    items = checked_test_items(category, strict=False)
    printed = capsys.readouterr().out
    assert "note: 2 defective image(s) have no mask" in printed and "the pixel metrics leave them out" in printed
    assert {item.image.name for item in without_truth(items)} == {"f.JPG", "g.tiff"}
    counted = {item.image.name: LabelledDataset([item], 8)[0]["counted"] for item in items}
    assert {name for name, pixels in counted.items() if pixels.all()} == {"c.bmp", "d.webp", "e.tif"}
    assert not counted["f.JPG"].any() and not counted["g.tiff"].any()
    with pytest.raises(UserError, match=r"2 mask\(s\) missing, the first is that of .*f\.JPG"):
        checked_test_items(category, strict=True)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_mask_of_another_size_is_rejected_before_any_score(workers, category, tmp_path, capsys):
    """Sizes are compared upright: the stored sizes are equal here, but only the image has an EXIF rotation."""
    mask(category / "ground_truth/dent/e_mask.png")
    Image.open(category / "test/dent/e.tif").save(category / "test/dent/e.jpg", exif=SIDEWAYS)
    (category / "test/dent/e.tif").unlink()
    with pytest.raises(
        UserError, match=r"the mask .*e_mask\.png is 30x20 pixels instead of the 20x30 of its image"
    ) as caught:
        score(category, tmp_path, workers)
    assert "\n" not in str(caught.value) and "round 0" not in capsys.readouterr().out
    with Image.open(category / "ground_truth/dent/e_mask.png") as lying:
        lying.save(category / "ground_truth/dent/e_mask.png", exif=SIDEWAYS)
    assert score(category, tmp_path, workers)["pixel_auroc"]


def score(category: Path, tmp_path: Path, workers: str = "0") -> dict:
    flags = f"--obj part --shot 2 --inferences 1 --img_size 64 --data_type folder --device cpu --num_workers {workers}"
    test_command.main(
        [*flags.split(), "--untrained", "--weights", "none", "--data_path", str(category.parent)]
        + ["--output", str(tmp_path / "out")]
    )
    return json.loads((tmp_path / "out/part_2_rotation_scale_untrained.json").read_text())


def test_pixel_metrics_are_those_of_the_images_with_masks(category, tmp_path):
    """Without the images that lack a mask, the pixel metrics are the same."""
    mask(category / "ground_truth/dent/e_mask.png")
    partly = score(category, tmp_path)
    for name in ("dent/f.JPG", "hole/g.tiff"):
        (category / "test" / name).unlink()
    (category / "test/hole").rmdir()
    whole = score(category, tmp_path)
    for name in ("pixel_auroc", "pixel_ap", "pixel_f1_max", "pro"):
        assert partly[name]["mean"] == pytest.approx(whole[name]["mean"], abs=1e-4), name


def test_without_any_mask_pixel_metrics_are_absent(category, tmp_path):
    found = score(category, tmp_path)
    assert found["image_auroc"]["mean"] >= 0 and found["pixel_auroc"] is None and found["pro"] is None
