"""Sentences on what of a category's folder is not read, or may mean something else than it is read as."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from datasets.images import check_headers, is_ignored, is_image_file
from datasets.masks import look_at_masks, mask_notes
from datasets.mvtec import GOOD, LabelledImage, is_visa, list_test_items, without_truth

TRUTH = "ground_truth"
READ_FOLDERS = ("train", "test", TRUTH, "validation")  # of a category; LOCO's validation images are not used
EXPECTED_MASKS = (
    f"expected: {TRUTH}/<defect>/ with <name>_mask.png, <name>.png or <name>/*.png, or another image suffix"
)


def checked_test_items(category: Path, strict: bool, need_both: bool = True) -> list[LabelledImage]:
    """`list_test_items`, after the headers of all images and all masks were read. Prints the notes on both.

    Raises:
        UserError: as `list_test_items`, or an image or mask that cannot be read.
    """
    items = list_test_items(category, strict, need_both)
    check_headers([path for item in items for path in (item.image, *item.masks)])
    looks = look_at_masks([mask for item in items for mask in item.masks])
    print_notes([*unread_images(category), *images_like_masks(items), *missing_masks(category, items)])
    print_notes(mask_notes(looks))
    return items


def print_notes(notes: Iterable[str]) -> None:
    """Prints each note on a line."""
    for note in notes:
        print(f"note: {note}")


def unread_images(category: Path) -> list[str]:
    """Sentences on the images below `train` and below `test` that are not read because of their place."""
    if is_visa(category):
        return []
    train, test = category / "train", category / "test"
    lost = {
        f"train/{GOOD}/<name>": [file for file in _files(train) if file.parent != train / GOOD],
        f"test/{GOOD}/<name>, test/<defect>/<name>": [file for file in _files(test) if file.parent.parent != test],
    }
    images = {expected: sorted(filter(is_image_file, files)) for expected, files in lost.items()}
    return [
        f"{len(found)} image(s) outside {expected} are not read, e.g. {found[0]}"
        for expected, found in images.items()
        if found
    ]


def images_like_masks(items: Sequence[LabelledImage]) -> list[str]:
    """A sentence on the test images that are named like the mask of another one; [] if there are none."""
    names = {item.image.with_name(f"{item.image.stem}_mask") for item in items}
    like = sorted(item.image for item in items if item.image.with_suffix("") in names)
    if not like:
        return []
    return [f"{len(like)} test image(s) are named like masks but scored as images, e.g. {like[0]}; {EXPECTED_MASKS}"]


def missing_masks(category: Path, items: Sequence[LabelledImage]) -> list[str]:
    """A sentence on the defective images without a mask, and on files that could be their masks; [] if all have one."""
    unknown = without_truth(items)
    if not unknown:
        return []
    if any(item.masks for item in items):
        note = (
            f"{len(unknown)} defective image(s) have no mask, e.g. {unknown[0].image}; the pixel metrics leave them out"
        )
    else:
        note = f"no defective image has a mask, e.g. {unknown[0].image}: there are no pixel metrics"
    return [". ".join([note, *stray_masks(category, items)])]


def stray_masks(category: Path, items: Sequence[LabelledImage]) -> list[str]:
    """A sentence on files that fit no test image, in the folder of masks or else in a folder that is never read."""
    if is_visa(category):
        return []
    masks = {mask for item in items for mask in item.masks}
    others = sorted(entry for entry in category.iterdir() if entry.is_dir() and entry.name not in READ_FOLDERS)
    for folder in [category / TRUTH, *others]:
        if found := sorted(path for path in _files(folder) if path not in masks):
            return [f"{len(found)} file(s) in {folder} are the mask of no image, e.g. {found[0]}; {EXPECTED_MASKS}"]
    return []


def _files(folder: Path) -> Iterator[Path]:
    """All files below `folder` at any depth, without ignored ones; none if it is missing or cannot be listed."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_ignored(name)]
        yield from (Path(root, name) for name in names if not is_ignored(name))
