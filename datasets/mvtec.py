"""Data sets: which categories there are, and a category's training and test images, masks and labels.

MVTec AD's layout (MPDD's too, and that of any folder):
    <data_path>/<category>/train/good/*.png
    <data_path>/<category>/test/good/*.png, test/<defect>/*.png
    <data_path>/<category>/ground_truth/<defect>/<name>_mask.png, or <name>.png, with any image's suffix
VisA's, as it is distributed:
    <data_path>/split_csv/1cls.csv      columns object, split, label, image, mask; paths below <data_path>
A category's folder tells which it is: VisA's has no train folder, but the file of splits beside it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from datasets.images import (
    IMAGE_SUFFIXES,
    ImageError,
    check_headers,
    content_box,
    decode_image,
    is_image_file,
    read_batches,
    to_mask,
    to_square,
)
from utils.errors import UserError

TRAINING_IMAGES = {  # MVTec AD: number of normal training images, called 000.png upwards
    **{"bottle": 209, "cable": 224, "capsule": 219, "carpet": 280, "grid": 264, "hazelnut": 391, "leather": 245},
    **{"metal_nut": 220, "pill": 267, "screw": 320, "tile": 230, "toothbrush": 60, "transistor": 213, "wood": 247},
    "zipper": 240,
}
CATEGORIES = {
    "mvtec": tuple(TRAINING_IMAGES),
    "mpdd": ("bracket_black", "bracket_brown", "bracket_white", "connector", "metal_plate", "tubes"),
    "visa": (
        *("candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2", "pcb1", "pcb2", "pcb3"),
        *("pcb4", "pipe_fryum"),
    ),
    "folder": None,  # any sub-folder of the data folder
}
ARCHIVE_SUFFIXES = frozenset({".zip", ".tar", ".gz", ".xz", ".tgz"})
GOOD = "good"  # the folder of normal images
VISA_SPLIT = Path("split_csv") / "1cls.csv"
VISA_DEFECT = "anomaly"  # VisA does not tell its kinds of defects apart


class LabelledImage(NamedTuple):
    """One test image. `mask` is None for a normal image and for a defective one without ground truth."""

    image: Path
    mask: Path | None
    defect: str  # "good" for a normal image

    @property
    def label(self) -> int:
        return int(self.defect != GOOD)

    @property
    def has_truth(self) -> bool:
        """Whether it is known which pixels are defective: of a normal image none is."""
        return not self.label or self.mask is not None


def category_names(data_path: Path, data_type: str) -> list[str]:
    """The categories of a data folder: those of the data type, or every sub-folder with train/good.

    Raises:
        UserError: no such folder.
    """
    names = CATEGORIES[data_type]
    return list(names) if names else [entry.name for entry in _entries(data_path) if _is_category(entry)]


def category_folder(data_path: Path, data_type: str, category: str) -> Path:
    """The folder of a category.

    Raises:
        UserError: the data folder or the category is missing, or the data type has no such category.
    """
    names = CATEGORIES[data_type]
    if names is not None and category not in names:
        raise UserError(
            f"{data_type} has no category {category!r}, only {', '.join(names)}; "
            "for a category of your own in the same layout use --data_type folder"
        )
    if not data_path.is_dir():
        raise UserError(f"no data folder {data_path}; give the folder that holds the categories with --data_path")
    folder = data_path / category
    if not folder.is_dir():
        raise UserError(f"no category folder {folder}; {_what_there_is(data_path, category)}")
    return folder


def _what_there_is(data_path: Path, category: str) -> str:
    """What a data folder without the category holds instead, and what to do."""
    deeper = [entry for entry in _entries(data_path) if entry.is_dir() and (entry / category).is_dir()]
    if deeper:
        return f"but there is {deeper[0] / category}: give --data_path {deeper[0]}"
    archives = [entry.name for entry in _entries(data_path) if entry.suffix in ARCHIVE_SUFFIXES and entry.is_file()]
    if archives:
        return f"{archives[0]} lies there packed: unpack it first"
    found = [entry.name for entry in _entries(data_path) if _is_category(entry)]
    has = f"it has {', '.join(found)}" if found else "it holds no folder with train/good in it"
    return f"{has}. Give another --obj or --data_path"


def _is_category(folder: Path) -> bool:
    return (folder / "train" / GOOD).is_dir()


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted by name, without what begins with a dot: UserError if it cannot be listed."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}") from error


def list_images(folder: Path) -> list[Path]:
    """The images directly in `folder`, sorted by name; UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder} (expected layout: <category>/train/good, <category>/test/<defect>)")
    images = list(filter(is_image_file, _entries(folder)))
    if not images:
        raise UserError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {folder}")
    return images


def list_train_images(category: Path) -> list[Path]:
    """The normal training images of the category in the folder `category`, sorted by name.

    Raises:
        UserError: no folder train/good, or no images in it.
    """
    if not is_visa(category):
        return list_images(category / "train" / GOOD)
    images = [row.image for row in _visa_rows(category, "train") if row.defect == GOOD]
    if not images:
        raise UserError(f"{category.parent / VISA_SPLIT} has no training images of {category.name}")
    return sorted(images)


def list_test_items(category: Path, strict: bool = False, need_both: bool = True) -> list[LabelledImage]:
    """Every test image of the category in the folder `category`, by defect and name.

    Labels come from the folder's own name, or VisA's file of splits. strict: a defective image without a mask is
    refused, otherwise its mask is None. need_both: so is a test set without normal or without defective images.

    Raises:
        UserError: no test images, or what is said above.
    """
    if is_visa(category):
        items = _visa_rows(category, "test")
    else:
        items = [item for folder in defect_folders(category) for item in list_folder_items(folder)]
    labels = {item.label for item in items}
    if not items or (need_both and labels != {0, 1}):
        lacking = f"normal images (test/{GOOD})" if 0 not in labels else "defective images (test/<defect>)"
        raise UserError(f"{category / 'test'} has no {lacking}; an AUROC needs both kinds")
    lacking_mask = without_truth(items)
    if strict and lacking_mask:
        raise UserError(
            f"{len(lacking_mask)} mask(s) missing, the first is that of {lacking_mask[0].image} (expected like "
            f"ground_truth/{lacking_mask[0].defect}/{lacking_mask[0].image.stem}_mask.png); without --strict these "
            "images only leave the pixel metrics"
        )
    return items


def checked_test_items(category: Path, strict: bool) -> list[LabelledImage]:
    """`list_test_items`, with the headers of all images and masks looked at; says how many lack their mask.

    Raises:
        UserError: as `list_test_items`, and images that cannot be read.
    """
    items = list_test_items(category, strict)
    check_headers([path for item in items for path in (item.image, item.mask) if path])
    unknown = without_truth(items)
    if unknown and any(item.mask for item in items):
        print(
            f"note: {len(unknown)} defective image(s) without a mask leave the pixel metrics, e.g. {unknown[0].image}"
        )
    return items


def without_truth(items: Iterable[LabelledImage]) -> list[LabelledImage]:
    """The defective images without a mask."""
    return [item for item in items if not item.has_truth]


def defect_folders(category: Path) -> list[Path]:
    """The folders test/good and test/<defect>, sorted by name; UserError if there is no folder test."""
    test = category / "test"
    if not test.is_dir():
        raise UserError(f"no folder {test}: scoring needs test/{GOOD} and test/<defect> under the category")
    return [entry for entry in _entries(test) if entry.is_dir()]


def list_folder_items(folder: Path) -> list[LabelledImage]:
    """The test images in <category>/test/<defect>; UserError if there are none."""
    masks = _masks(folder.parent.parent / "ground_truth" / folder.name) if folder.name != GOOD else {}
    images = list_images(folder)
    return [
        LabelledImage(image, masks.get(f"{image.stem}_mask") or masks.get(image.stem), folder.name) for image in images
    ]


def _masks(folder: Path) -> dict[str, Path]:
    """The images in a folder of masks by name without suffix; of several with one name the PNG."""
    if not folder.is_dir():
        return {}
    masks = filter(is_image_file, _entries(folder))
    return {mask.stem: mask for mask in sorted(masks, key=lambda mask: mask.suffix.lower() == ".png")}


def is_visa(category: Path) -> bool:
    """Whether the category's images are those that VisA's file of splits lists."""
    return not (category / "train").is_dir() and (category.parent / VISA_SPLIT).is_file()


def _visa_rows(category: Path, split: str) -> list[LabelledImage]:
    """The images that VisA's file of splits gives to `split` (train or test) of a category, by defect and name.

    Raises:
        UserError: the file cannot be read, lacks a column or a value, or names a file outside the data folder.
    """
    file, root = category.parent / VISA_SPLIT, category.parent
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if (row["object"], row["split"]) == (category.name, split)]
        named = [Path(row[column]) for row in rows for column in ("image", "mask")]
        defects = [GOOD if row["label"] == "normal" else VISA_DEFECT for row in rows]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"cannot read VisA's splits {file}: {' '.join(repr(error).split())}") from error
    if outside := [path for path in named if path.is_absolute() or ".." in path.parts]:
        raise UserError(f"{file} names {outside[0]}, which is not below {root}")
    items = [
        LabelledImage(root / row["image"], root / row["mask"] if row["mask"] else None, defect)
        for row, defect in zip(rows, defects, strict=True)
    ]
    return sorted(items, key=lambda item: (item.defect, item.image.name))


def list_source_images(data_path: Path, data_type: str, target: str) -> dict[str, list[Path]]:
    """The normal training images of every category but `target`: what meta-training sees.

    `folder`: every sub-folder with train/good is a category, and `target` need not be one of them.

    Raises:
        UserError: missing folders, no source category, or one with a single image (a query needs another one).
    """
    if not data_path.is_dir():
        raise UserError(f"no data folder {data_path}; give the folder that holds the categories with --data_path")
    names = [name for name in category_names(data_path, data_type) if name != target]
    if missing := [name for name in names if not (data_path / name).is_dir()]:
        raise UserError(
            f"{data_path} lacks {len(missing)} of the {len(names)} categories to train on: {', '.join(missing)}; "
            f"{_what_there_is(data_path, missing[0])}"
        )
    sources = {name: list_train_images(data_path / name) for name in names}
    if not sources:
        raise UserError(
            f"no category to train on in {data_path}: it needs sub-folders with train/good besides {target}"
        )
    for images in sources.values():
        if len(images) < 2:
            raise UserError(f"{images[0].parent} has one image; training needs at least two to register to each other")
    return sources


def held_out_category(sources: Iterable[str], target: str) -> str:
    """The source category to choose an epoch by: the one after `target` in order of names, the first after the last.

    Over all targets, each category is held out once.
    """
    ordered = sorted(set(sources) - {target})
    return next((name for name in ordered if name > target), ordered[0])


class LabelledDataset(Dataset):
    """Test images as dicts of image (3, S, S) uint8, mask and counted (S, S) bool.

    `counted` are the pixels for the pixel metrics: not the padding of `keep_aspect`, and none of a defective image
    without a mask file. `mask` is False outside.

    Reading an item raises ImageError if a file cannot be read or a mask is not as large as its image.
    """

    def __init__(self, items: list[LabelledImage], size: int, keep_aspect: bool = False) -> None:
        self.items, self.size, self.keep_aspect = items, size, keep_aspect

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self.items[index]
        decoded = decode_image(item.image)
        square = to_square(decoded, self.size, self.keep_aspect).transpose(2, 0, 1)
        counted = np.zeros((self.size, self.size), dtype=bool)
        if item.has_truth:
            left, top, right, bottom = content_box(*decoded.size, self.size, self.keep_aspect)
            counted[top:bottom, left:right] = True
        mask = np.zeros_like(counted)
        if item.mask is not None:
            mask = counted & to_mask(_mask_of(item.mask, decoded), self.size, self.keep_aspect)
        arrays = {"image": np.ascontiguousarray(square), "mask": mask, "counted": counted}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _mask_of(path: Path, image: Image.Image) -> Image.Image:
    """The mask, which must be as large as its upright image: else it would mark other places."""
    mask = decode_image(path)
    if mask.size != image.size:
        sizes = " instead of ".join(f"{width}x{height}" for width, height in (mask.size, image.size))
        raise ImageError(f"the mask {path} is {sizes} pixels, the size of its image")
    return mask


class Preloaded(Dataset):
    """The items of another dataset, all read once and kept in memory, for scoring the same images many times."""

    def __init__(self, dataset: Dataset, num_workers: int) -> None:
        self.items = list(read_batches(dataset, None, num_workers))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.items[index]
