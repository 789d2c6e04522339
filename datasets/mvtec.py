"""Data sets in MVTec AD's layout: listing a category's files and reading its test side.

<data_path>/<category>/train/good/*.png
<data_path>/<category>/test/good/*.png, test/<defect>/*.png
<data_path>/<category>/ground_truth/<defect>/<name>_mask.png
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.images import IMAGE_SUFFIXES, read_batches, read_image, read_mask
from utils.utils import UserError

CATEGORIES = {
    "mvtec": (
        *("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw"),
        *("tile", "toothbrush", "transistor", "wood", "zipper"),
    ),
    "folder": None,  # any sub-folder of the data folder
}


class LabelledImage(NamedTuple):
    """One test picture. `mask` is None for a normal picture and where the category has no ground truth."""

    image: Path
    mask: Path | None
    defect: str  # "good" for a normal picture

    @property
    def label(self) -> int:
        return int(self.defect != "good")


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
        found = sorted(entry.name for entry in data_path.iterdir() if (entry / "train" / "good").is_dir())
        has = f"it has {', '.join(found)}" if found else "it holds no folder with train/good in it"
        raise UserError(f"no category folder {folder}; {has}. Give another --obj or --data_path")
    return folder


def list_images(folder: Path) -> list[Path]:
    """The pictures directly in `folder`, sorted by name; UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder} (expected layout: <category>/train/good, <category>/test/<defect>)")
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not images:
        raise UserError(f"no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}) in {folder}")
    return images


def list_test_items(category: Path) -> list[LabelledImage]:
    """Every picture under `category`/test, by defect and name. Labels come from the folder's own name only.

    Raises:
        UserError: no test folder, normal or defective pictures missing, or some (not all) masks missing.
    """
    test, truth = category / "test", category / "ground_truth"
    if not test.is_dir():
        raise UserError(f"no folder {test}: scoring needs test/good and test/<defect> under the category")
    items = []
    for folder in sorted(entry for entry in test.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        has_masks = truth.is_dir() and folder.name != "good"
        for image in list_images(folder):
            mask = truth / folder.name / f"{image.stem}_mask.png" if has_masks else None
            items.append(LabelledImage(image, mask, folder.name))
    labels = {item.label for item in items}
    if labels != {0, 1}:
        lacking = "normal pictures (test/good)" if 0 not in labels else "defective pictures (test/<defect>)"
        raise UserError(f"{test} has no {lacking}; an AUROC needs both kinds")
    missing = [item.mask for item in items if item.mask is not None and not item.mask.is_file()]
    if missing:
        raise UserError(f"{len(missing)} mask(s) missing, the first is {missing[0]} for a picture of {test}")
    return items


def list_source_images(data_path: Path, data_type: str, target: str) -> dict[str, list[Path]]:
    """The normal training pictures of every category but `target`: what meta-training sees.

    `folder`: every sub-folder with train/good is a category, and `target` need not be one of them.

    Raises:
        UserError: missing folders, no source category, or one with a single picture (a query needs another one).
    """
    names = CATEGORIES[data_type]
    if names is None:
        folders = sorted(data_path.iterdir()) if data_path.is_dir() else []
        names = [entry.name for entry in folders if (entry / "train" / "good").is_dir()]
    sources = {
        name: list_images(category_folder(data_path, data_type, name) / "train" / "good")
        for name in names
        if name != target
    }
    if not sources:
        raise UserError(
            f"no category to train on in {data_path}: it needs sub-folders with train/good besides {target}"
        )
    for images in sources.values():
        if len(images) < 2:
            raise UserError(
                f"{images[0].parent} has one picture; training needs at least two to register to each other"
            )
    return sources


class LabelledDataset(Dataset):
    """Test pictures as dicts: image (3, S, S) uint8, mask (S, S) bool (all False without a mask file)."""

    def __init__(self, items: list[LabelledImage], size: int) -> None:
        self.items, self.size = items, size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self.items[index]
        image = np.ascontiguousarray(read_image(item.image, self.size).transpose(2, 0, 1))
        no_defect = np.zeros((self.size, self.size), dtype=bool)
        mask = no_defect if item.mask is None else read_mask(item.mask, self.size)
        return {"image": torch.from_numpy(image), "mask": torch.from_numpy(mask.copy())}


class Preloaded(Dataset):
    """The items of another dataset, all read once and kept in memory, for scoring the same pictures many times."""

    def __init__(self, dataset: Dataset, num_workers: int) -> None:
        self.items = list(read_batches(dataset, None, num_workers))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.items[index]
