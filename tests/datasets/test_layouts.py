"""Layouts other than MVTec AD's: VisA's tree, MPDD's names, incomplete folders, masks under every usual name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

import check_data
import train
from datasets.check import list_test_items_with_notes
from datasets.layouts import VISA_SPLIT, layout_of, short_name
from datasets.mvtec import (
    LabelledDataset,
    category_folder,
    category_names,
    list_test_items,
    list_train_images,
    without_mask,
)
from tests.commands.test_commands import test_command
from tests.datasets.test_images import SIDEWAYS
from tests.flags import small_run
from utils.choices import CATEGORIES
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
    assert found["valid_mask"].all()
    kept = LabelledDataset(items, 60, keep_aspect=True)[0]
    assert kept["valid_mask"].sum() == 60 * 40 and kept["mask"].sum() == 20 * 20


def test_visa_through_the_commands(visa, tmp_path, monkeypatch):
    monkeypatch.setitem(CATEGORIES, "visa", ("candle", "pcb1"))
    out = tmp_path / "out"
    common = {"obj": "candle", "shot": 2, "inferences": 1, "data_type": "visa", "save_dir": out, "keep_aspect": True}
    train.main(small_run(visa, epochs=1, cache_dir="none", **common))
    test_command.main(small_run(visa, output=out, **common))
    assert json.loads((out / "candle_2_rotation_scale.json").read_text())["pixel_auroc"]["mean"] > 0


WRONG_SPLITS = {
    "a column is missing": ("object,split,label,image\ncandle,test,normal,a.JPG\n", "cannot read VisA's splits"),
    "a short row": (VISA_HEAD + "candle,test\n", "cannot read VisA's splits"),
    "out of the folder": (VISA_HEAD + "candle,test,normal,../a.JPG,\n", r"names \.\./a\.JPG, which is not below"),
    "an absolute path": (VISA_HEAD + "candle,test,normal,/etc/passwd,\n", "names /etc/passwd, which is not below"),
    "another split": (VISA_HEAD + "candle,val,normal,a.JPG,\n", "the splits are train and test, not val"),
    "no training images": (VISA_HEAD + "pcb1,train,normal,a.JPG,\n", "has no training images of candle"),
}


@pytest.mark.parametrize("case", WRONG_SPLITS)
def test_wrong_splits_are_rejected(case, visa):
    content, sentence = WRONG_SPLITS[case]
    (visa / VISA_SPLIT).write_text(content)
    with pytest.raises(UserError, match=sentence) as caught:
        (list_train_images if "training" in case else list_test_items)(visa / "candle")
    assert "\n" not in str(caught.value)


def test_errors_name_a_nested_folder(tmp_path):
    image(tmp_path / "MVTec/bottle/train/good/000.png")
    with pytest.raises(UserError, match=r"but there is .*MVTec/bottle: give .*MVTec as the data folder"):
        category_folder(tmp_path, "mvtec", "bottle")


@pytest.fixture
def category(tmp_path) -> Path:
    """Two normal and three defective test images, no masks yet; suffixes of every kind and case."""
    folder = tmp_path / "part"
    for name in ("train/good/a.PNG", "train/good/b.jpeg", "test/good/c.bmp", "test/good/d.webp"):
        image(folder / name)
    for name in ("test/dent/e.tif", "test/dent/f.JPG", "test/hole/g.tiff"):
        image(folder / name)
    return folder


@pytest.mark.parametrize(
    ("ending", "mode"), [("_mask.png", "L"), (".png", "1"), ("_mask.bmp", "RGB"), (".TIF", "P"), ("_mask.PNG", "RGBA")]
)
def test_masks_are_found_under_any_usual_name_and_mode(ending, mode, category):
    mask(category / f"ground_truth/dent/e{ending}", mode=mode)
    (item,) = [item for item in list_test_items(category) if item.image.name == "e.tif"]
    assert item.masks[0].name == f"e{ending}"
    found = LabelledDataset([item], HEIGHT)[0]["mask"]
    assert 0.1 < found.float().mean() < 0.25


def test_images_without_a_mask_are_left_out_of_the_pixel_metrics(category, capsys):
    mask(category / "ground_truth/dent/e_mask.png")
    items = list_test_items_with_notes(category, strict=False)
    printed = capsys.readouterr().out
    assert "note: 2 defective image(s) have no mask" in printed and "the pixel metrics omit them" in printed
    assert {item.image.name for item in without_mask(items)} == {"f.JPG", "g.tiff"}
    counted = {item.image.name: LabelledDataset([item], 8)[0]["valid_mask"] for item in items}
    assert {name for name, pixels in counted.items() if pixels.all()} == {"c.bmp", "d.webp", "e.tif"}
    assert not counted["f.JPG"].any() and not counted["g.tiff"].any()
    with pytest.raises(UserError, match=r"2 mask\(s\) missing, the first is that of .*f\.JPG"):
        list_test_items_with_notes(category, strict=True)


def test_a_mask_of_another_size_is_rejected_before_any_score(category, tmp_path, capsys):
    """Sizes are compared upright: the stored sizes are equal here, but only the image has an EXIF rotation."""
    mask(category / "ground_truth/dent/e_mask.png")
    Image.open(category / "test/dent/e.tif").save(category / "test/dent/e.jpg", exif=SIDEWAYS)
    (category / "test/dent/e.tif").unlink()
    with pytest.raises(
        UserError, match=r"the mask .*e_mask\.png is 30x20 pixels instead of the 20x30 of its image"
    ) as caught:
        score(category, tmp_path)
    assert "\n" not in str(caught.value) and "round 0" not in capsys.readouterr().out
    with Image.open(category / "ground_truth/dent/e_mask.png") as stored:
        stored.save(category / "ground_truth/dent/e_mask.png", exif=SIDEWAYS)
    assert score(category, tmp_path)["pixel_auroc"]


def score(category: Path, tmp_path: Path) -> dict:
    flags = {"obj": "part", "shot": 2, "inferences": 1, "untrained": True, "overwrite": True, "num_workers": 1}
    test_command.main(small_run(category.parent, output=tmp_path / "out", **flags))
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


@pytest.fixture
def loco(tmp_path) -> Path:
    """Two categories in MVTec LOCO's tree: several masks of an image, with other values, and validation images."""
    for category in ("pushpins", "screw_bag"):
        folder = tmp_path / category
        for number in range(3):
            image(folder / f"train/good/{number:03d}.png", number)
        image(folder / "validation/good/000.png", 3)
        image(folder / "test/good/000.png", 4)
        for number, kind in enumerate(("logical_anomalies", "structural_anomalies")):
            image(folder / f"test/{kind}/000.png", 5 + number)
            mask(folder / f"ground_truth/{kind}/000/000.png", value=254)
        several = np.zeros((HEIGHT, WIDTH), np.uint8)
        several[:5, :10] = 233
        Image.fromarray(several).save(folder / "ground_truth/logical_anomalies/000/001.png")
    return tmp_path


def test_loco_is_read_in_place_and_its_masks_count_together(loco, capsys):
    folder = category_folder(loco, "loco", "pushpins")
    assert [path.name for path in list_train_images(folder)] == ["000.png", "001.png", "002.png"]
    items = list_test_items_with_notes(folder, strict=True)
    assert [(item.defect, len(item.masks)) for item in items] == [
        ("good", 0),
        ("logical_anomalies", 2),
        ("structural_anomalies", 1),
    ]
    found = [int(LabelledDataset(items, 60)[number]["mask"].sum()) for number in range(3)]
    block = (60 // HEIGHT) * (60 // WIDTH)  # pixels of the square per pixel of the mask
    assert found == [0, (10 * 10 + 5 * 10) * block, 10 * 10 * block]
    assert not capsys.readouterr().out


def test_loco_through_the_commands(loco, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CATEGORIES, "loco", ("pushpins", "screw_bag"))
    check_data.main(["--data_type", "loco", "--data_path", str(loco)])
    assert "no problems" in capsys.readouterr().out
    flags = {"obj": "pushpins", "shot": 2, "inferences": 1, "data_type": "loco", "untrained": True, "strict": True}
    test_command.main(small_run(loco, output=tmp_path / "out", **flags))
    assert json.loads((tmp_path / "out/pushpins_2_rotation_scale_untrained.json").read_text())["pro"]["mean"] >= 0
    assert "note:" not in capsys.readouterr().out


LOST_MASKS = {  # where the masks of the fixture's three defective images lie; each fits no image
    "another ending": ["ground_truth/dent/e_gt.png", "ground_truth/dent/f_gt.png", "ground_truth/hole/g_gt.png"],
    "without the kind": ["ground_truth/e_mask.png", "ground_truth/f_mask.png", "ground_truth/g_mask.png"],
    "another name of the folder": ["masks/dent/e_mask.png", "masks/hole/g_mask.png"],
}


@pytest.mark.parametrize("case", LOST_MASKS)
def test_masks_that_fit_no_image_are_reported(case, category, capsys):
    files = LOST_MASKS[case]
    for name in files:
        mask(category / "mask.png")
        (category / name).parent.mkdir(parents=True, exist_ok=True)
        (category / "mask.png").replace(category / name)
    folder = category / files[0].split("/")[0]
    items = list_test_items_with_notes(category, strict=False)
    printed = capsys.readouterr().out
    assert not any(item.masks for item in items)
    assert "note: no defective image has a mask" in printed and "there are no pixel metrics" in printed
    assert f"{len(files)} file(s) in {folder} are the mask of no image, e.g. {category / files[0]}; " in printed
    with pytest.raises(SystemExit):
        check_data.main(["--data_type", "folder", "--data_path", str(category.parent), "--obj", "part"])
    printed = capsys.readouterr().out
    assert str(category / files[0]) in printed and "of no" in printed


def test_masks_next_to_their_images_are_reported(category, capsys):
    mask(category / "test/hole/g_mask.png")
    list_test_items_with_notes(category, strict=False)
    sentence = "1 test image(s) are named like masks but scored as images, e.g."
    assert f"{sentence} {category / 'test/hole/g_mask.png'}; expected: " in capsys.readouterr().out


PARTS = st.sampled_from(["good", "dent", "sub", "x"])


@given(st.sets(st.tuples(st.sampled_from(["train", "test"]), st.lists(PARTS, max_size=3).map(tuple)), max_size=6))
def test_every_image_is_read_or_reported(places):
    """Images at any depth below train and test: those that no command reads are counted."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "part"
        for place in ("train/good/a.png", "test/good/b.png", "test/dent/c.png"):
            image(folder / place)
        for part, below in places:
            image(folder / part / Path(*below) / "more.png")
            image(folder / part / Path(*below[:1]) / "own.png")  # a kind without an image of its own is an error
        found = {part: set((folder / part).rglob("*.png")) for part in ("train", "test")}
        read = {"train": set(list_train_images(folder)), "test": {item.image for item in list_test_items(folder)}}
        notes = layout_of(folder).stray(folder, [])
        lost = {part: found[part] - read[part] for part in found}
        assert [int(note.split()[0]) for note in notes] == [len(files) for files in lost.values() if files]
        for note, files in zip(notes, filter(None, lost.values()), strict=True):
            assert note.endswith(f"are not read, e.g. {min(files)}")


def test_unread_images_and_odd_masks_are_reported_by_the_commands(category, tmp_path, capsys):
    for number in range(2):
        image(tmp_path / f"other/train/good/{number}.png", number)
    image(tmp_path / "other/train/good/camera 2/0.png", 5)
    image(category / "train/good/camera 2/0.png", 6)
    image(category / "test/dent/camera 2/0.png", 7)
    for name in ("dent/e", "dent/f", "hole/g"):
        mask(category / f"ground_truth/{name}_mask.png")
        inverted = ImageOps.invert(Image.open(category / f"ground_truth/{name}_mask.png"))
        inverted.save(category / f"ground_truth/{name}_mask.png")
    score(category, tmp_path)
    scored = capsys.readouterr().out
    flags = {"obj": "part", "shot": 1, "inferences": 1, "epochs": 1, "cache_dir": "none"}
    train.main(small_run(tmp_path, save_dir=tmp_path / "out", **flags))
    trained = capsys.readouterr().out
    sentences = [
        f"note: 1 image(s) outside train/good/<name> are not read, e.g. {category / 'train/good/camera 2/0.png'}",
        f"test/<defect>/<name> are not read, e.g. {category / 'test/dent/camera 2/0.png'}",
        "3 of 3 masks mark more than half of their image",
    ]
    for sentence in sentences:
        assert sentence in scored and sentence in trained
    assert f"are not read, e.g. {tmp_path / 'other/train/good/camera 2/0.png'}" in trained
    with pytest.raises(SystemExit):
        check_data.main(["--data_type", "folder", "--data_path", str(tmp_path)])
    checked = capsys.readouterr().out
    assert all(sentence.removeprefix("note: ") in checked for sentence in sentences)


def write_folders(root: Path, train: str, test: str, good: str, bad: str, truth: str) -> None:
    for number in range(3):
        image(root / train / f"{number:03d}.png", number)
    image(root / test / good / "000.png", 3)
    image(root / test / bad / "001.png", 4)
    mask(root / truth)


def write_mvtec_ad_2(root: Path) -> Path:
    truth = "test_public/ground_truth/bad/001_mask.png"
    write_folders(root / "can", "train/good", "test_public", "good", "bad", truth)
    for place in ("validation/good", "test_private", "test_private_mixed"):
        image(root / "can" / place / "000.png", len(place))
    return root / "can"


def write_btad(root: Path) -> Path:
    write_folders(root / "01", "train/ok", "test", "ok", "ko", "ground_truth/ko/001.png")
    return root / "01"


def write_real_iad(root: Path) -> Path:
    """As distributed: several views of a sample, paths below the category, a split without defects for training."""
    category, splits = root / "realiad_256/tape", {"train": [], "test": []}
    for number, (split, kind) in enumerate((*[("train", "OK")] * 3, ("test", "OK"), ("test", "AK"))):
        name = f"{'OK' if kind == 'OK' else f'NG/{kind}'}/S{number:04d}/tape_{number:04d}_{kind}_C1_2023.jpg"
        image(category / name, number)
        truth = None if kind == "OK" else name.replace(".jpg", ".png")
        splits[split].append({"category": "tape", "anomaly_class": kind, "image_path": name, "mask_path": truth})
        if truth:
            mask(category / truth)
    file = root / "realiad_jsons/realiad_jsons/tape.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"meta": {"prefix": "tape/", "normal_class": "OK"}, **splits}))
    return category


def write_kolektor(root: Path) -> Path:
    for number, (item, part) in enumerate(((1, 0), (1, 1), (2, 0), (3, 0), (4, 0), (4, 1))):
        file = root / f"KolektorSDD/kos{item:02d}/Part{part}.jpg"
        image(file, number)
        mask(file.with_name(f"Part{part}_label.bmp"), value=255 if (item, part) == (4, 1) else 0)
    return root / "KolektorSDD"


OTHERS = {  # how it is written, and the type of its defect
    "MVTec AD 2": (write_mvtec_ad_2, "bad"),
    "BTAD": (write_btad, "ko"),
    "Real-IAD": (write_real_iad, "AK"),
    "KolektorSDD": (write_kolektor, "defect"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_data_sets_are_read_as_distributed(name, tmp_path, capsys):
    write, defect = OTHERS[name]
    category = write(tmp_path)
    assert category_names(category.parent, "folder") == [category.name]
    train_images = list_train_images(category)
    assert len({short_name(path) for path in train_images}) == 3
    items = list_test_items_with_notes(category, strict=True)
    assert {(item.defect, len(item.masks)) for item in items} == {("good", 0), (defect, 1)}
    assert not {item.image for item in items} & set(train_images)
    bad = LabelledDataset([item for item in items if item.label], 60)[0]
    assert bad["mask"].float().mean() == pytest.approx(1 / 6, abs=0.02) and not capsys.readouterr().out
    check_data.main(["--data_type", "folder", "--data_path", str(category.parent)])
    assert "no problems" in capsys.readouterr().out
    flags = {"obj": category.name, "shot": 2, "inferences": 2, "strict": True, "untrained": True}
    test_command.main(small_run(category.parent, output=tmp_path / "out", **flags))
    record = json.loads((tmp_path / f"out/{category.name}_2_rotation_scale_untrained.json").read_text())
    assert record["pro"]["mean"] >= 0 and len(set(record["support_set"]["names"][0])) == 2


def test_a_wrong_file_of_real_iad_is_named(tmp_path):
    category = write_real_iad(tmp_path)
    for content in ("", "[]", '{"train": 1}', '{"train": [{"image_path": "a"}]}'):
        (tmp_path / "realiad_jsons/realiad_jsons/tape.json").write_text(content)
        with pytest.raises(UserError, match=r"cannot read Real-IAD's splits .*tape\.json: it needs train and test"):
            list_train_images(category)


def test_a_label_of_kolektorsdd_that_is_missing_is_named(tmp_path):
    category = write_kolektor(tmp_path)
    (category / "kos02/Part0_label.bmp").unlink()
    with pytest.raises(UserError, match=r"cannot read the label file .*kos02/Part0_label\.bmp of the image"):
        list_train_images(category)
