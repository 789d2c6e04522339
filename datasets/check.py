"""The check of a data set: reads every file, counts what each category holds and lists every problem."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets.folders import Listing
from datasets.images import ImageError, eight_bit, read_header, read_pixels, size_mismatch
from datasets.manifest import category_manifest, load_manifest, verify
from datasets.masks import Look, decode_mask, mask_notes
from datasets.mvtec import (
    GOOD,
    LabelledImage,
    category_folder,
    defect_folders,
    is_visa,
    list_folder_items,
    list_test_items,
    list_train_images,
    without_truth,
)
from datasets.notes import images_like_masks, stray_masks, unread_images
from datasets.support import load_support_rounds
from utils.errors import UserError


class Seen(NamedTuple):
    """An image or mask that was read."""

    size: tuple[int, int]  # width and height in pixels, upright
    mode: str  # Pillow's name of the stored format
    look: Look | None  # of a mask
    pixels: bytes  # digest of an image's pixels, equal for equal images in any format


class CategoryReport(NamedTuple):
    """What a category holds. Each of `problems` is a sentence that names a file or folder."""

    name: str
    train: int
    good: int
    defects: dict[str, int]  # images per kind
    masks: int
    sizes: list[tuple[int, int]]  # of images, smallest first
    modes: list[str]
    problems: list[str]


Progress = Callable[[], None]  # called after each file


def check_category(data_path: Path, data_type: str, name: str, progress: Progress) -> CategoryReport:
    """Reads every image and mask of a category, on all cores. Problems are listed in the report, never raised."""
    problems: list[str] = []
    train, test = _list_files(data_path, data_type, name, problems)
    masks = [mask for item in test for mask in item.masks]
    images = [*train, *(item.image for item in test)]
    seen = dict(_read_all(images, masks, progress))
    problems += [found for found in seen.values() if isinstance(found, str)]
    if len(train) == 1:
        problems.append(f"{train[0].parent} has one image; training needs at least two")
    problems += _same_names(images)
    problems += _copies(train, test, seen)
    problems += [*unread_images(data_path / name), *images_like_masks(test)]
    problems += _mask_problems(data_path / name, test, seen)
    good = [found for path in images if isinstance(found := seen[path], Seen)]
    defects = Counter(item.defect for item in test)
    return CategoryReport(
        name,
        len(train),
        defects.pop(GOOD, 0),
        dict(sorted(defects.items())),
        len(masks),
        sorted({found.size for found in good}),
        sorted({found.mode for found in good}),
        problems,
    )


def _list_files(
    data_path: Path, data_type: str, name: str, problems: list[str]
) -> tuple[list[Path], list[LabelledImage]]:
    """Training and test images of a category; what cannot be listed is added to `problems`."""
    try:
        folder = category_folder(data_path, data_type, name)
    except UserError as error:
        problems.append(str(error))
        return [], []
    train = _or_problem(list_train_images, folder, problems)
    return train, _list_test(folder, problems)


def _list_test(folder: Path, problems: list[str]) -> list[LabelledImage]:
    """Test images of a category, folder by folder, so that an empty folder does not hide the problems of others.

    The folder `test` may be missing. If it exists, it must hold normal and defective images.
    """
    if is_visa(folder):
        return _or_problem(list_test_items, folder, problems)
    if not (folder / "test").exists():
        return []
    before = len(problems)
    folders = _or_problem(defect_folders, folder, problems)
    test = [item for entry in folders for item in _or_problem(list_folder_items, entry, problems)]
    labels = {item.label for item in test}
    if labels != {0, 1} and len(problems) == before:
        problems.append(f"{folder / 'test'} has no {'defective' if labels == {0} else 'normal'} images to score")
    return test


def _or_problem(list_files: Callable[[Path], list], folder: Path, problems: list[str]) -> list:
    try:
        return list_files(folder)
    except UserError as error:
        problems.append(str(error))
        return []


def _read_all(images: Sequence[Path], masks: Sequence[Path], progress: Progress) -> Iterator[tuple[Path, Seen | str]]:
    def look(path: Path) -> tuple[Path, Seen | str]:
        found = _look(path, path in are_masks)
        progress()
        return path, found

    are_masks = set(masks)
    with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter lock
        yield from pool.map(look, dict.fromkeys([*images, *masks]))


def _look(path: Path, is_mask: bool) -> Seen | str:
    try:
        mode = read_header(path).mode
        if is_mask:
            mask = decode_mask(path)
            return Seen(mask.size, mode, Look.at(mask), b"")
        size, pixels = read_pixels(path, _identify)
        return Seen(size, mode, None, pixels)
    except ImageError as error:
        return str(error)


def _identify(image: Image.Image) -> tuple[tuple[int, int], bytes]:
    """Width and height of an image, and a digest of its pixels: of its stored values if they have 16 bits, else RGB."""
    shown = eight_bit(image).convert("RGB")  # also rejects what the reader rejects
    pixels = np.asarray(image).astype(np.int64) if image.mode.startswith("I") else np.asarray(shown)
    digest = hashlib.sha256(repr((pixels.shape, pixels.dtype)).encode())
    digest.update(np.ascontiguousarray(pixels))
    return image.size, digest.digest()


def _copies(train: Sequence[Path], test: Sequence[LabelledImage], seen: dict[Path, Seen | str]) -> list[str]:
    """Training images that are equal, test images that are also training images, and images both normal and defective.

    A copy in the test set is scored against itself, or cannot be scored right.
    """

    def first_by_pixels(paths: Iterable[Path]) -> dict[bytes, Path]:
        return {seen[path].pixels: path for path in reversed(list(paths)) if isinstance(seen[path], Seen)}

    def equal(paths: Iterable[Path], others: dict[bytes, Path], which: str) -> list[str]:
        found = [(path, others.get(seen[path].pixels)) for path in paths if isinstance(seen[path], Seen)]
        return [
            f"{path} has the same pixels as the {which} {other}" for path, other in found if other not in (None, path)
        ]

    first, defective = first_by_pixels(train), [item.image for item in test if item.label]
    normal = first_by_pixels(item.image for item in test if not item.label)
    return [
        *equal(train, first, "training image"),
        *equal((item.image for item in test), first, "training image"),
        *equal(defective, normal, "normal test image"),
    ]


def _same_names(images: Iterable[Path]) -> list[str]:
    """A problem for each group of images in one folder whose names differ in the suffix only: they share a mask."""
    count = Counter((path.parent, path.stem) for path in images)
    return [
        f"{folder} has {times} images named {stem}, with different suffixes"
        for (folder, stem), times in count.items()
        if times > 1
    ]


def _mask_problems(category: Path, test: Sequence[LabelledImage], seen: dict[Path, Seen | str]) -> list[str]:
    """Masks that differ in size from their image, mark no pixel, look odd or belong to no image.

    A missing mask is a problem only where other images of the category have one, or where a stray file may be it.
    """
    problems, looks = [], {}
    some_have_one = any(item.masks for item in test)
    for item in test:
        image = seen[item.image]
        if some_have_one and not item.has_truth:
            problems.append(f"{item.image} has no mask")
        for path in item.masks:
            if isinstance(mask := seen[path], Seen):
                looks[path] = mask.look
                problems += [f"the mask {path} marks no pixel"] * (mask.look.share == 0)
                if isinstance(image, Seen):
                    problems += filter(None, [size_mismatch(path, mask.size, image.size)])
    strays = _masks_of_nothing(category, {path for item in test for path in item.masks}) if test else []
    if not strays and without_truth(test):
        strays = stray_masks(category, test)
    return problems + mask_notes(looks) + strays


def _masks_of_nothing(category: Path, masks: set[Path]) -> list[str]:
    files = Listing().images_below(category / "ground_truth")
    return [f"{path} is the mask of no test image" for path in files if path not in masks]


def check_support(support_path: Path, data_path: Path, name: str) -> list[str]:
    """The problems of the support sets and manifests of a category, one sentence each."""
    problems, folder = [], data_path / name
    manifests = [category_manifest(support_path, name), *sorted((support_path / name).glob("*.json"))]
    for file in filter(Path.is_file, manifests):
        try:
            problems += [f"{file}: {problem}" for problem in verify(load_manifest(file), folder)]
        except UserError as error:
            problems.append(str(error))
    for file in sorted((support_path / name).glob("*.pt")):
        shot, _, rounds = file.stem.partition("_")
        if not (shot.isdecimal() and rounds.isdecimal()):
            problems.append(f"{file} is not named <shot>_<rounds>.pt")
            continue
        try:
            load_support_rounds(file, int(shot), int(rounds), None)
        except UserError as error:
            problems.append(str(error))
    return problems


def count_files(data_path: Path, names: Sequence[str]) -> int:
    """The number of image files below the categories, about as many as `check_category` reads. For a progress bar."""
    return sum(len(Listing().images_below(data_path / name)) for name in names)


def format_reports(reports: Sequence[CategoryReport]) -> str:
    """A text table with one line per category."""
    header = ("category", "train", "test good", "test defective", "masks", "sizes", "modes")
    rows = [header, *map(_cells, reports)]
    widths = np.array([[len(cell) for cell in row] for row in rows]).max(axis=0)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _cells(report: CategoryReport) -> tuple[str, ...]:
    defects = ", ".join(f"{kind} {count}" for kind, count in report.defects.items())
    total = sum(report.defects.values())
    few = [f"{width}x{height}" for width, height in report.sizes]
    sizes = " ".join(few) if len(few) <= 2 else f"{few[0]} ... {few[-1]} ({len(few)} sizes)"
    return (
        report.name,
        str(report.train),
        str(report.good),
        f"{total} ({defects})" if defects else "0",
        str(report.masks),
        sizes or "-",
        " ".join(report.modes) or "-",
    )
