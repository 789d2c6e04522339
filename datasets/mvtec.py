"""Data sets: their categories, and each category's training and test images, masks and labels.

Where the files are is a matter of `datasets/layouts.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.images import (
    FULL_BITS,
    ImageError,
    ImageFacts,
    content_box,
    read_batches,
    read_header,
    read_pixels,
    size_mismatch,
    to_square,
    with_facts,
)
from datasets.layouts import LabelledImage, layout_of, recognised
from datasets.listing import entries, is_folder
from datasets.masks import MaskFacts, decode_mask, to_square_mask
from utils.choices import CATEGORIES, MASK_ORIENTATIONS
from utils.errors import UserError

KEPT_ITEMS_BYTES = 128 * 2**20  # of images and masks of a test set


def category_names(data_path: Path, data_type: str) -> list[str]:
    """The categories of the data type; for `folder`, every sub-folder of `data_path` that may be one.

    Raises:
        UserError: the folder cannot be listed.
    """
    names = CATEGORIES[data_type]
    return list(names or (entry.name for entry in entries(data_path) if _may_be_category(entry)))


def _may_be_category(folder: Path) -> bool:
    """Whether a folder has a known layout.

    A folder that cannot be entered counts, and one with another layout below train, as their reader says why.
    """
    try:
        return is_folder(folder) and (recognised(folder) is not None or is_folder(folder / "train"))
    except UserError:
        return True


def category_folder(data_path: Path, data_type: str, category: str) -> Path:
    """The folder of a category; it exists.

    Raises:
        UserError: the data folder or the category is missing, or the data type has no such category.
    """
    names = CATEGORIES[data_type]
    if names is not None and category not in names:
        raise UserError(
            f"{data_type} has no category {category!r}, only {', '.join(names)}; "
            "for other categories use the data type folder",
            ("data_type",),
        )
    require_data_folder(data_path)
    folder = data_path / category
    if folder.name not in {entry.name for entry in entries(data_path)} or not is_folder(folder):  # not by other case
        raise UserError(f"no category folder {folder}; {_what_there_is(data_path, category)}", ("obj", "data_path"))
    return folder


def require_data_folder(folder: Path, option: str = "data_path") -> None:
    """Raises UserError if there is no such folder. option: the setting that gives it."""
    if not is_folder(folder):
        raise UserError(f"no data folder {folder}; give the folder that holds the categories", (option,))


def _what_there_is(data_path: Path, category: str) -> str:
    """A hint for the user: what the data folder holds in place of the category, and what to do."""
    deeper = [entry for entry in entries(data_path) if is_folder(entry / category)]
    if deeper:
        return f"but there is {deeper[0] / category}: give {deeper[0]} as the data folder"
    names = category_names(data_path, "folder")
    return f"it has {', '.join(names)}" if names else "it holds no folder with train/good in it"


def list_train_images(category: Path) -> list[Path]:
    """The normal training images of the category in the folder `category`, sorted by name.

    Raises:
        UserError: there are none.
    """
    return layout_of(category).list_train(category)


def normal_images(category: Path) -> list[Path]:
    """`list_train_images`, empty where there are none: a stored support set needs no training images."""
    try:
        return list_train_images(category)
    except UserError:
        return []


def list_test_items(category: Path, strict: bool = False, need_both: bool = True) -> list[LabelledImage]:
    """Every test image of the category in the folder `category`, sorted by defect and name.

    Raises:
        UserError: no test images, a type of defect without images; with `need_both`, no normal or no defective images;
            with `strict`, a defective image without a mask.
    """
    layout = layout_of(category)
    items, problems = layout.list_test(category)
    labels = {item.label for item in items}
    if problems:
        raise UserError(problems[0])
    if not items or (need_both and labels != {0, 1}):
        lacking = "normal" if 0 not in labels else "defective"
        raise UserError(f"{layout.tests(category)} has no {lacking} images; an AUROC needs both")
    lacking_mask = without_mask(items)
    if strict and lacking_mask:
        raise UserError(
            f"{len(lacking_mask)} mask(s) missing, the first is that of {lacking_mask[0].image} (expected name: "
            f"ground_truth/{lacking_mask[0].defect}/{lacking_mask[0].image.stem}_mask.png)",
            ("strict",),
        )
    return items


def without_mask(items: Iterable[LabelledImage]) -> list[LabelledImage]:
    """The defective images without a mask."""
    return [item for item in items if not item.has_ground_truth]


def list_source_images(
    data_path: Path, data_type: str, target: str, only: Sequence[str] | None = None, source_path: Path | None = None
) -> dict[str, list[Path]]:
    """The normal training images of every category but `target`, by category: the data of meta-training.

    `target` is a folder of `data_path`. only: these categories instead of all. source_path: the data set with
    the sources, where it is not `data_path`. There, a category with the target's name is a source like the others,
    unless it is the target's folder. `data_type` is that of `data_path`.

    Raises:
        UserError: missing folders, no source category, a source category with a single image, or the target, or a copy
            of it, among the sources.
    """
    root = source_path or data_path
    require_data_folder(data_path)
    require_data_folder(root, "source_path")
    category_folder(data_path, "folder", target)  # a target in another spelling would be a source
    same = root.resolve() == data_path.resolve()
    if not same:
        data_type = "folder"
    names = sorted(set(only)) if only else category_names(root, data_type)
    target_folder = (data_path / target).resolve()
    is_target = {name: (same and name == target) or (root / name).resolve() == target_folder for name in names}
    if only and any(is_target.values()):
        raise UserError(f"the sources include the target {target}, which must not be trained on", ("sources",))
    names = [name for name in names if not is_target[name]]
    if missing := [name for name in names if not is_folder(root / name)]:
        raise UserError(
            f"{root} lacks {len(missing)} of the {len(names)} categories to train on: {', '.join(missing)}; "
            f"{_what_there_is(root, missing[0])}",
            ("sources",),
        )
    if not same and target in names and _names_and_sizes(root / target) == _names_and_sizes(target_folder):
        raise UserError(
            f"{root / target} is a copy of the target {target}; list the categories to train on", ("sources",)
        )
    sources = {name: list_train_images(root / name) for name in names}
    if not sources:
        raise UserError(
            f"no category to train on in {root}: it needs sub-folders with train/good other than {target}",
            ("sources", "source_path"),
        )
    for images in sources.values():
        if len(images) < 2:
            raise UserError(
                f"{images[0].parent} has one image; training needs at least two (a query and a support image)",
                ("sources",),
            )
    return sources


def _names_and_sizes(category: Path) -> list[tuple[str, int]]:
    return [(path.name, path.stat().st_size) for path in normal_images(category)]


def held_out_category(sources: Iterable[str], target: str) -> str:
    """The source category that `--select source` holds out to select the epoch.

    It is the one after `target` in alphabetical order, and the first one after the last. Over all targets, each
    category is held out once.
    """
    ordered = sorted(set(sources) - {target})
    return next((name for name in ordered if name > target), ordered[0])


def read_mask(
    item: LabelledImage,
    image_size: tuple[int, int],
    orientation: int,
    size: int,
    keep_aspect: bool = False,
    mask_orientation: str = MASK_ORIENTATIONS[0],
) -> tuple[np.ndarray, np.ndarray, dict[Path, MaskFacts]]:
    """The `mask` and `valid_mask` of LabelledDataset, (size, size) bool, and the facts of the files.

    image_size, orientation: width and height of the image, upright, and its EXIF orientation.

    Raises:
        ImageError: a mask cannot be read, or it and its image differ in size.
    """
    pixels, facts = np.zeros(image_size[::-1], dtype=bool), {}
    for path in item.masks:
        mask = decode_mask(path, orientation, mask_orientation == MASK_ORIENTATIONS[1])
        if problem := size_mismatch(path, mask.facts.size, image_size):
            raise ImageError(problem, ("mask_orientation",) if orientation != 1 else ())
        pixels |= mask.pixels
        facts[path] = mask.facts
    valid_mask = np.zeros((size, size), dtype=bool)
    if item.has_ground_truth:
        left, top, right, bottom = content_box(*image_size, size, keep_aspect)
        valid_mask[top:bottom, left:right] = True
    mask = valid_mask & to_square_mask(pixels, size, keep_aspect) if facts else np.zeros_like(valid_mask)
    return mask, valid_mask, facts


def read_masks(
    items: Sequence[LabelledImage], size: int, **how: bool | str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The masks and valid pixels of all images, (B, size, size) bool, without decoding the images.

    As in evaluation.round_metrics.GroundTruth: None if no pixel is known to be defective, and if all pixels are valid.
    how: keep_aspect and mask_orientation, see `read_mask`.
    """
    read = [read_mask(item, *read_header(item.image), size, **how)[:2] for item in items]
    masks, valid_mask = map(np.stack, zip(*read, strict=True))
    return masks if masks.any() else None, None if valid_mask.all() else valid_mask


class LabelledDataset(Dataset):
    """Test images as dicts of `image` (3, S, S) uint8 RGB, `mask` (S, S) bool and `valid_mask` (S, S) bool.

    `mask` is True on the defect. `valid_mask` is True on the pixels that enter the pixel metrics: all but the padding
    of `keep_aspect`, and none of a defective image without a mask. `mask` is False where `valid_mask` is.

    Items are read when they are used, and KEPT_ITEMS_BYTES of them are kept in memory. bits: the depth of 16-bit
    images, not of masks. mask_orientation: one of MASK_ORIENTATIONS.

    images, masks: facts of all files that were read.

    Raises, when an item is read:
        ImageError: a file cannot be read, or a mask and its image differ in size.
    """

    def __init__(
        self,
        items: Sequence[LabelledImage],
        size: int,
        keep_aspect: bool = False,
        bits: int = FULL_BITS,
        mask_orientation: str = MASK_ORIENTATIONS[0],
    ) -> None:
        self.items, self.size, self.keep_aspect, self.bits = list(items), size, keep_aspect, bits
        self.mask_orientation = mask_orientation
        self.images: dict[Path, ImageFacts] = {}
        self.masks: dict[Path, MaskFacts] = {}
        self._read: dict[int, dict[str, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self._read.get(index) or self._load(self.items[index])
        if len(self._read) * sum(tensor.nbytes for tensor in item.values()) < KEPT_ITEMS_BYTES:
            self._read[index] = item
        return item

    def load(self, num_workers: int) -> None:
        """Reads all items, in `num_workers` threads."""
        for _ in read_batches(self, None, num_workers):
            pass

    def _load(self, item: LabelledImage) -> dict[str, torch.Tensor]:
        image, facts = read_pixels(item.image, partial(with_facts, bits=self.bits))
        self.images[item.image] = facts
        how = self.size, self.keep_aspect, self.mask_orientation
        mask, valid_mask, of_masks = read_mask(item, image.size, facts.orientation, *how)
        self.masks |= of_masks
        square = np.ascontiguousarray(to_square(image, self.size, self.keep_aspect).transpose(2, 0, 1))
        arrays = {"image": square, "mask": mask, "valid_mask": valid_mask}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
