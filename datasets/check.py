"""What is wrong or unusual in a data set: notes that a run prints, and the problems that check_data.py lists."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from datasets.images import (
    ImageError,
    ImageFacts,
    clipping_summary,
    read_odd_header,
    read_pixels,
    reading_summary,
    size_mismatch,
    smallest_depth,
    with_facts,
)
from datasets.layouts import EXPECTED_MASKS, GOOD, LabelledImage, layout_of
from datasets.listing import label_files
from datasets.manifest import category_manifest, load_manifest, verify
from datasets.masks import AMBIGUOUS, MaskFacts, decode_mask, mask_notes
from datasets.mvtec import LabelledDataset, category_folder, list_test_items, normal_images, without_mask
from datasets.support import load_support_rounds
from utils.choices import MASK_ORIENTATIONS
from utils.errors import UserError
from utils.fingerprint import FileDigests
from utils.progress import ProgressBar
from utils.text import one_line

COLUMNS = ("category", "train", "test good", "test defective", "masks", "sizes", "modes")  # of the table

Facts = TypeVar("Facts")


def list_test_items_with_notes(category: Path, strict: bool, need_both: bool = True) -> list[LabelledImage]:
    """`list_test_items`; prints the `findings`, and whether there are pixel metrics at all. Opens no image.

    Raises:
        UserError: as `list_test_items`.
    """
    items = list_test_items(category, strict, need_both)
    missing = without_mask(items)
    if missing and not any(item.masks for item in items):
        print_notes([f"no defective image has a mask, e.g. {missing[0].image}: there are no pixel metrics"])
    print_notes(findings(category, items), strict)
    return items


def findings(category: Path, items: Sequence[LabelledImage]) -> list[str]:
    """Sentences on images that are not read or named like masks, and on masks that are missing or used by no image."""
    layout = layout_of(category)
    notes, train = layout.stray(category, items), normal_images(category)
    if len(labels := {item.label for item in items}) == 1:
        notes.append(f"{layout.tests(category)} has no {'defective' if labels == {0} else 'normal'} images to score")
    if like := sorted(label_files(item.image for item in items)):
        notes.append(
            f"{len(like)} test image(s) are named like masks but scored as images, e.g. {like[0]}; {EXPECTED_MASKS}"
        )
    if like := label_files(train):
        notes.append(f"{len(like)} training image(s) are named like masks but used as normal images, e.g. {like[0]}")
    every = Counter([*train, *(item.image for item in items)])
    if twice := [path for path, times in every.items() if times > 1]:
        notes.append(f"{len(twice)} image(s) are listed more than once, e.g. {twice[0]}")
    notes += _same_names(every)
    missing = without_mask(items)
    if missing and any(item.masks for item in items):
        notes.append(
            f"{len(missing)} defective image(s) have no mask, e.g. {missing[0].image}; the pixel metrics omit them"
        )
    return notes


def content_findings(
    train: Sequence[Path],
    test: Sequence[LabelledImage],
    images: Mapping[Path, ImageFacts],
    masks: Mapping[Path, MaskFacts],
    bits: int,
) -> list[str]:
    """Sentences on the content of the files of a category: of those of `train` and `test` whose facts are known."""
    notes = _equal_images(train, test, images)
    for item in test:
        for path in item.masks:
            if path in masks and item.image in images:
                notes += filter(None, [size_mismatch(path, masks[path].size, images[item.image].size)])
    notes += mask_notes(list({path: masks[path] for item in test for path in item.masks if path in masks}.items()))
    for what, paths in (("training images", train), ("test images", [item.image for item in test])):
        facts = {path: images[path] for path in paths if path in images}
        notes += reading_summary([(str(path), known.parts) for path, known in facts.items()], len(paths), what)
        grey, coloured = ([path for path, known in facts.items() if known.is_grey is value] for value in (True, False))
        if grey and coloured:
            notes.append(
                f"{len(grey)} of {len(paths)} {what} are grey, e.g. {grey[0]}; others are coloured, e.g. {coloured[0]}"
            )
    values = [(str(item.image), images[item.image].largest) for item in test if item.image in images]
    return notes + clipping_summary(values, bits)


def report_content(dataset: LabelledDataset, train: Sequence[Path], strict: bool, digests: FileDigests) -> None:
    """Prints the `content_findings` on a test set that was read; with `strict`, the first is a UserError.

    Of the training images, those are decoded whose header says that HOW_READ may apply; of the others, those count
    that equal a test image, or each other, as files.
    """
    tests = [item.image for item in dataset.items]
    sizes = Counter(path.stat().st_size for path in {*train, *tests})
    twins = [path for path in {*train, *tests} if sizes[path.stat().st_size] > 1]
    of_file = dict(zip(twins, digests.of(twins), strict=True))
    known = {of_file[path]: dataset.images[path] for path in tests if path in of_file}
    not_decoded = ImageFacts((0, 0), "", b"", 1, (), 0, None)
    images = {
        path: known.get(of_file[path]) or not_decoded._replace(pixels=of_file[path].encode())
        for path in train
        if path in of_file
    }
    with ThreadPoolExecutor() as pool:
        images |= {path: facts for path, facts in zip(train, pool.map(_odd_facts, train), strict=True) if facts}
    print_notes(content_findings(train, dataset.items, images | dataset.images, dataset.masks, dataset.bits), strict)


def _odd_facts(path: Path) -> ImageFacts | None:
    """The facts of an image to which HOW_READ may apply; None of others, and of damaged ones."""
    try:
        has_parts = read_odd_header(path)[1]
        return read_pixels(path, with_facts)[1] if has_parts else None
    except Exception:  # as in read_pixels
        return None


def print_notes(notes: Iterable[str], strict: bool = False) -> None:
    """Prints each note on a line; with `strict`, the first is a UserError."""
    for note in notes:
        if strict:
            raise UserError(note, ("strict", "mask_orientation") if AMBIGUOUS in note else ("strict",))
        print(f"note: {one_line(note)}")


class CategoryReport(NamedTuple):
    """What a category holds: a row of COLUMNS, and problems, each a sentence that names a file or folder."""

    row: tuple[str, ...]
    problems: list[str]


def check_category(
    data_path: Path, data_type: str, name: str, mask_orientation: str = MASK_ORIENTATIONS[0]
) -> CategoryReport:
    """Reads every image and mask of a category, on all cores. Problems are listed in the report, never raised."""
    train, test, problems = _list_files(data_path, data_type, name)
    paths = [*train, *(item.image for item in test)]
    mask_paths = [mask for item in test for mask in item.masks]
    images = _read_all(paths, lambda path: read_pixels(path, with_facts)[1], name, problems)
    turned = {mask: images[item.image].orientation for item in test for mask in item.masks if item.image in images}
    is_stored = mask_orientation == MASK_ORIENTATIONS[1]
    masks = _read_all(mask_paths, lambda path: decode_mask(path, turned.get(path, 1), is_stored).facts, name, problems)
    if len(train) == 1:
        problems.append(f"{train[0].parent} has one image; training needs at least two")
    bits = smallest_depth(images[path].largest for path in train if path in images and images[path].largest)
    problems += content_findings(train, test, images, masks, bits)
    if os.path.isdir(data_path / name):
        try:
            problems += findings(data_path / name, test)
        except UserError as error:
            problems.append(str(error))
    return CategoryReport(_table_row(name, train, test, images.values()), list(dict.fromkeys(problems)))


def _list_files(data_path: Path, data_type: str, name: str) -> tuple[list[Path], list[LabelledImage], list[str]]:
    """Training and test images of a category, and what cannot be listed. There may be no test images at all."""
    try:
        folder = category_folder(data_path, data_type, name)
        layout = layout_of(folder)
    except UserError as error:
        return [], [], [str(error)]
    train, test, problems, tests = [], [], [], layout.tests(folder)
    try:
        train = layout.list_train(folder)
    except UserError as error:
        problems.append(str(error))
    if tests.exists():
        try:
            test, without_images = layout.list_test(folder)
            problems += without_images or ([] if test else [f"{tests} has no images to score"])
        except UserError as error:
            problems.append(str(error))
    return train, test, problems


def _read_all(
    paths: Sequence[Path], read: Callable[[Path], Facts], name: str, problems: list[str]
) -> dict[Path, Facts]:
    """What `read` returns of each file. Files that cannot be read are added to `problems`."""

    def attempt(path: Path) -> Facts | ImageError:
        try:
            return read(path)
        except ImageError as error:
            return error

    with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter lock
        results = list(ProgressBar(name, pool.map(attempt, paths), len(paths), "files"))
    problems += [str(result) for result in results if isinstance(result, ImageError)]
    return {path: result for path, result in zip(paths, results, strict=True) if not isinstance(result, ImageError)}


def _equal_images(train: Sequence[Path], test: Sequence[LabelledImage], images: Mapping[Path, ImageFacts]) -> list[str]:
    """Training images that are equal, test images that are also training images, and images both normal and defective.

    A training image in the test set is scored against itself, an image of both classes cannot be scored right.
    """

    def equal(paths: Iterable[Path], others: Iterable[Path], which: str) -> list[str]:
        first = {images[path].pixels: path for path in reversed(list(others)) if path in images}
        pairs = [(path, first.get(images[path].pixels)) for path in paths if path in images]
        return [
            f"{path} has the same pixels as the {which} {other}" for path, other in pairs if other not in (None, path)
        ]

    normal, defective = ([item.image for item in test if item.label == label] for label in (0, 1))
    return [
        *equal(train, train, "training image"),
        *equal((item.image for item in test), train, "training image"),
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


def check_support(support_path: Path, data_path: Path, name: str) -> list[str]:
    """The problems of the support sets and manifests of a category, one sentence each."""
    problems: list[str] = []

    def check(file: Path) -> list[str]:
        if file.suffix == ".json":
            return [f"{file}: {problem}" for problem in verify(load_manifest(file), data_path / name)]
        shot, _, rounds = file.stem.partition("_")
        if not (shot.isdecimal() and rounds.isdecimal()):
            return [f"{file} is not named <shot>_<rounds>.pt"]
        load_support_rounds(file, int(shot), int(rounds))
        return []

    folder = support_path / name
    files = [category_manifest(support_path, name), *sorted(folder.glob("*.json")), *sorted(folder.glob("*.pt"))]
    for file in filter(Path.is_file, files):
        try:
            problems += check(file)
        except UserError as error:
            problems.append(str(error))
    return problems


def format_reports(reports: Sequence[CategoryReport]) -> str:
    """A text table with one line per category."""
    rows = [COLUMNS, *(report.row for report in reports)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _table_row(
    name: str, train: Sequence[Path], test: Sequence[LabelledImage], images: Collection[ImageFacts]
) -> tuple[str, ...]:
    defects = Counter(item.defect for item in test)
    good = defects.pop(GOOD, 0)
    kinds = ", ".join(f"{defect} {count}" for defect, count in sorted(defects.items()))
    defective = f"{defects.total()} ({kinds})" if kinds else "0"
    masks = sum(len(item.masks) for item in test)
    sizes = [f"{width}x{height}" for width, height in sorted({facts.size for facts in images})]
    shown = sizes if len(sizes) <= 2 else [f"{sizes[0]} ... {sizes[-1]} ({len(sizes)} sizes)"]
    modes = sorted({facts.mode for facts in images})
    return name, str(len(train)), str(good), defective, str(masks), " ".join(shown) or "-", " ".join(modes) or "-"
