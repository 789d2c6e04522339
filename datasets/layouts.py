"""Layouts of data sets: which files of a category are for training, which for the test, and which are not read.

A layout is a `Layout` in LAYOUTS. The layout of a category is the first one that recognises its folder.

MVTec AD's layout, also of MPDD and of data of one's own:
    <data_path>/<category>/train/good/*.png
    <data_path>/<category>/test/good/*.png, test/<defect>/*.png
    <data_path>/<category>/ground_truth/<defect>/<name>_mask.png, or <name>.png, with any image suffix
MVTec LOCO: several masks per image, which count together; its validation images are not used:
    <data_path>/<category>/ground_truth/<defect>/<name>/*.png
MVTec AD 2: the test images that have labels are below test_public; the others are not read:
    <data_path>/<category>/test_public/good/*.png, test_public/bad/*.png, test_public/ground_truth/bad/<name>_mask.png
BTAD: the folders of normal images are named ok, those of defective ones ko:
    <data_path>/<category>/train/ok/*.bmp, test/ok/*.bmp, test/ko/*.bmp, ground_truth/ko/<name>.png
VisA, as distributed:
    <data_path>/split_csv/1cls.csv      columns object, split, label, image, mask; paths relative to <data_path>
Real-IAD, as distributed, where <data_path> is a folder of images such as realiad_1024:
    <data_path>/../realiad_jsons/realiad_jsons/<category>.json      lists train and test; paths relative to the category
KolektorSDD, as distributed, where the category is its folder. A label without a white pixel means a normal image. There
are no splits: the normal images of the first half of the folders are for training, all other images for the test.
    <data_path>/<category>/kos01/Part0.jpg, kos01/Part0_label.bmp
"""

from __future__ import annotations

import functools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from datasets.images import IMAGE_SUFFIXES, is_image_file
from datasets.listing import GALLERY, PREDICTIONS, Listing, entries, is_folder, require_no_pipes
from datasets.masks import decode_mask
from utils.errors import UserError
from utils.text import read_table, read_text

GOOD = "good"  # the type of defect of a normal image
GROUND_TRUTH = "ground_truth"
VISA_SPLIT = Path("split_csv") / "1cls.csv"
VISA_LABELS = {"normal": GOOD, "anomaly": "anomaly"}  # VisA's split file names no types of defects
KOLEKTOR_ITEM = re.compile(r"kos\d+")
EXPECTED_MASKS = (
    f"expected: {GROUND_TRUTH}/<defect>/ with <name>_mask.png, <name>.png or <name>/*.png, or another image suffix"
)


class LabelledImage(NamedTuple):
    """One test image. `masks` is empty for a normal image and for a defective image without ground truth."""

    image: Path
    masks: tuple[Path, ...]
    defect: str  # "good" for a normal image

    @property
    def label(self) -> int:
        """1 for a defective image, 0 for a normal one."""
        return int(self.defect != GOOD)

    @property
    def has_ground_truth(self) -> bool:
        """Whether the defective pixels are known. A normal image has none."""
        return not self.label or bool(self.masks)


class Layout(ABC):
    """Where the images of a category are. `category` is its folder."""

    @abstractmethod
    def matches(self, category: Path) -> bool:
        """Whether the category has this layout, by what is there."""

    @abstractmethod
    def list_train(self, category: Path) -> list[Path]:
        """The normal training images, sorted by name; UserError if there are none."""

    @abstractmethod
    def list_test(self, category: Path) -> tuple[list[LabelledImage], list[str]]:
        """The test images, sorted by defect and name, and a sentence on each folder without images.

        Raises:
            UserError: there is no folder or file that says what the test images are.
        """

    def tests(self, category: Path) -> Path:
        """The folder of the test images, or the file that lists them; it may be missing."""
        return category / "test"

    def stray(self, category: Path, items: Sequence[LabelledImage]) -> list[str]:  # noqa: ARG002
        """Sentences on images and masks that no command reads. items: the test images."""
        return []


@dataclass(frozen=True)
class Folders(Layout):
    """MVTec AD's layout and those like it: a folder per type of defect.

    mark: the folder by which a category is recognised. test, truth: folders of the test images and masks. normal: the
    name of the folders of normal images. unread: further folders, whose images are not used.
    """

    mark: str
    test: str = "test"
    truth: str = GROUND_TRUTH
    normal: str = GOOD
    unread: tuple[str, ...] = ("validation",)  # of LOCO

    def matches(self, category: Path) -> bool:
        """Whether there is the folder `mark`."""
        return is_folder(category / self.mark)

    def list_train(self, category: Path) -> list[Path]:
        """The images in train/<normal>."""
        return list_images(category / "train" / self.normal)

    def list_test(self, category: Path) -> tuple[list[LabelledImage], list[str]]:
        """The images in the folders of `tests`."""
        tests = self.tests(category)
        if not is_folder(tests):
            raise UserError(
                f"no folder {tests}: scoring needs {self.test}/{self.normal} and {self.test}/<defect> under the "
                "category"
            )
        items, problems = [], []
        for folder in entries(tests):
            try:
                if is_folder(folder) and folder != category / self.truth and not _is_output(folder):
                    items += self._items(category, folder)
            except UserError as error:
                problems.append(str(error))
        return items, problems

    def tests(self, category: Path) -> Path:
        """The folder whose sub-folders hold the test images."""
        return category / self.test

    def _items(self, category: Path, folder: Path) -> list[LabelledImage]:
        defect = GOOD if folder.name == self.normal else folder.name
        masks = {} if defect == GOOD else _masks(category / self.truth / folder.name)
        return [
            LabelledImage(image, masks.get(f"{image.stem}_mask") or masks.get(image.stem) or (), defect)
            for image in list_images(folder)
        ]

    def stray(self, category: Path, items: Sequence[LabelledImage]) -> list[str]:
        """Images outside the folders that are read, and files that are the mask of no image."""
        tests, truth, listing = self.tests(category), category / self.truth, Listing()
        train, test = (listing.images_below(place) for place in (category / "train", tests))
        known = {"train", self.test, self.truth, *self.unread}
        others = [place for place in entries(category) if place.name not in known and place.is_dir()]
        unread = {
            f"train/{self.normal}/<name>": [file for file in train if file.parent != category / "train" / self.normal],
            f"{self.test}/{self.normal}/<name>, {self.test}/<defect>/<name>": [
                file for file in test if file.parent.parent != tests and truth not in file.parents
            ],
            "the folders train and test": [file for place in others for file in listing.images_below(place)],
        }
        notes = [
            f"{len(images)} image(s) outside {expected} are not read, e.g. {images[0]}"
            for expected, images in unread.items()
            if images
        ]
        if listing.is_partial or listing.own:
            notes += [f"{category}: {note}" for note in listing.notes()]
        of_normal = {layout.normal for layout in LAYOUTS if isinstance(layout, Folders)}
        named = {item.image.parent for item in items if item.label and item.defect.lower() in of_normal}
        notes += [
            f"the images in {folder} count as defective: those of normal images are expected in {tests / self.normal}"
            for folder in sorted(named)
        ]
        lack_masks = any(not item.has_ground_truth for item in items)  # they may be in a folder of another name
        places = [truth, *(others if lack_masks else [])] if any(item.label for item in items) else []
        return notes + _unused_masks(places, items)


def list_images(folder: Path) -> list[Path]:
    """The images directly in `folder`, sorted by name; UserError if there are none."""
    if not is_folder(folder):
        raise UserError(f"no folder {folder} (expected layout: <category>/train/good, <category>/test/<defect>)")
    images = require_no_pipes(filter(is_image_file, entries(folder)))
    if not images:
        raise UserError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {folder}")
    return images


def _is_output(folder: Path) -> bool:
    names = {entry.name for entry in entries(folder)}
    return PREDICTIONS in names or names >= GALLERY


def _masks(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The masks of a type of defect by name: a file by its name without suffix, or all images in a sub-folder (LOCO).

    A PNG wins over other files of the same name, and a file over a folder.
    """
    if not is_folder(folder):
        return {}
    inside = entries(folder)
    files = sorted(require_no_pipes(filter(is_image_file, inside)), key=lambda file: file.suffix.lower() == ".png")
    folders = [entry for entry in inside if entry not in files and is_folder(entry)]
    several = {entry.name: tuple(require_no_pipes(filter(is_image_file, entries(entry)))) for entry in folders}
    return several | {file.stem: (file,) for file in files}


def _unused_masks(folders: Iterable[Path], items: Iterable[LabelledImage]) -> list[str]:
    """A sentence on the files in the first of the folders that has files which are the mask of no test image."""
    masks = {mask for item in items for mask in item.masks}
    for folder in folders:
        if unused := [path for path in Listing(all_files=True).images_below(folder) if path not in masks]:
            return [f"{len(unused)} file(s) in {folder} are the mask of no image, e.g. {unused[0]}; {EXPECTED_MASKS}"]
    return []


class Listed(Layout):
    """A layout with a file that lists the images of each split."""

    @abstractmethod
    def rows(self, category: Path, split: str) -> list[LabelledImage]:
        """The images of `split`, train or test; UserError if the file is not as expected."""

    def list_train(self, category: Path) -> list[Path]:
        """The normal images that the file lists for training."""
        images = [row.image for row in self.rows(category, "train") if row.defect == GOOD]
        if not images:
            raise UserError(f"{self.tests(category)} has no training images of {category.name}")
        return sorted(images)

    def list_test(self, category: Path) -> tuple[list[LabelledImage], list[str]]:
        """The test images that the file lists, and no notes."""
        return sorted(self.rows(category, "test"), key=lambda item: (item.defect, item.image.name)), []

    def _images(self, category: Path, root: Path, rows: Iterable[tuple]) -> list[LabelledImage]:
        """The images of rows (image, mask or nothing, defect), whose paths are relative to `root` and remain below."""
        items = []
        for image, mask, defect in rows:
            image, mask = (name and name.replace("\\", "/") for name in (image, mask))  # of Windows
            for path in map(Path, filter(None, (image, mask))):
                if path.is_absolute() or ".." in path.parts:
                    raise UserError(f"{self.tests(category)} names {path}, which is not below {root}")
            items.append(LabelledImage(root / image, (root / mask,) if mask else (), defect))
        return items


class VisA(Listed):
    """VisA as distributed."""

    def matches(self, category: Path) -> bool:
        """Whether there is no train folder, and a split file next to the category which is not that of others."""
        if is_folder(category / "train") or not self.tests(category).is_file():
            return False
        return is_folder(category / "Data") or bool(self.rows(category, "train") or self.rows(category, "test"))

    def tests(self, category: Path) -> Path:
        """The split file."""
        return category.parent / VISA_SPLIT

    def rows(self, category: Path, split: str) -> list[LabelledImage]:
        """The rows of a category in the split file."""
        file = self.tests(category)
        try:
            table = [{column.lower(): value for column, value in row.items()} for row in read_table(file)]
            rows = [row for row in table if row["object"] == category.name]
            if others := {row["split"] for row in rows if row["split"].lower() not in ("train", "test")}:
                raise ValueError(f"the splits are train and test, not {', '.join(sorted(others))}")
            rows = [row for row in rows if row["split"].lower() == split]
            named = [(row["image"], row["mask"], VISA_LABELS[row["label"].lower()]) for row in rows]
        except KeyError as error:
            needed = "the columns object, split, label, image, mask, and the labels normal and anomaly"
            raise UserError(f"cannot read VisA's splits {file}: it needs {needed}; there is no {error}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read VisA's splits {file}: {getattr(error, 'strerror', None) or error}") from error
        return self._images(category, category.parent, named)


class RealIAD(Listed):
    """Real-IAD as distributed. The type of a defect is its class in the file, such as AK (pit)."""

    def matches(self, category: Path) -> bool:
        """Whether the file that lists the category's images exists."""
        return self.tests(category).is_file()

    def tests(self, category: Path) -> Path:
        """The file of all views of a category."""
        return category.absolute().parent.parent / "realiad_jsons" / "realiad_jsons" / f"{category.name}.json"

    def rows(self, category: Path, split: str) -> list[LabelledImage]:
        """The entries of a split."""
        file = self.tests(category)
        try:
            rows = [
                (row["image_path"], row["mask_path"], GOOD if row["anomaly_class"] == "OK" else row["anomaly_class"])
                for row in json.loads(read_text(file))[split]
            ]
            return self._images(category, category, rows)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"cannot read Real-IAD's splits {file}: it needs train and test, lists of objects with image_path, "
                f"mask_path and anomaly_class ({type(error).__name__}: {error})"
            ) from error


class Kolektor(Layout):
    """KolektorSDD as distributed."""

    def matches(self, category: Path) -> bool:
        """Whether there is a folder of an item."""
        return any(KOLEKTOR_ITEM.fullmatch(entry.name) for entry in entries(category))

    def list_train(self, category: Path) -> list[Path]:
        """The normal images of the first half of the items."""
        items = self._items(category)
        images = [
            image for item in items[: len(items) // 2] for image in self._images(item) if not _is_defective(image)
        ]
        if not images:
            raise UserError(f"{category} has no normal images in the first half of its folders kos01, kos02, ...")
        return images

    def list_test(self, category: Path) -> tuple[list[LabelledImage], list[str]]:
        """All other images."""
        train = set(self.list_train(category))
        rest = [image for item in self._items(category) for image in self._images(item) if image not in train]
        defective = [LabelledImage(image, (_label_file(image),), "defect") for image in rest if _is_defective(image)]
        return defective + [LabelledImage(image, (), GOOD) for image in rest if not _is_defective(image)], []

    def tests(self, category: Path) -> Path:
        """The category."""
        return category

    def _items(self, category: Path) -> list[Path]:
        return [entry for entry in entries(category) if KOLEKTOR_ITEM.fullmatch(entry.name) and is_folder(entry)]

    def _images(self, item: Path) -> list[Path]:
        return [image for image in list_images(item) if not image.stem.endswith("_label")]


def _label_file(image: Path) -> Path:
    return image.with_name(f"{image.stem}_label.bmp")


def _is_defective(image: Path) -> bool:
    label = _label_file(image)
    try:
        return _has_defect(label, label.stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"cannot read the label file {label} of the image {image}: {error.strerror}") from error


@functools.lru_cache(maxsize=4096)
def _has_defect(label: Path, changed: int) -> bool:  # noqa: ARG001, a label that was replaced is read again
    return bool(decode_mask(label).pixels.any())


MVTEC = Folders(mark="train/good")
LAYOUTS: tuple[Layout, ...] = (
    Folders(
        mark="test_public",
        test="test_public",
        truth=f"test_public/{GROUND_TRUTH}",
        unread=("validation", "test_private", "test_private_mixed"),  # the last two have no labels
    ),
    MVTEC,
    Folders(mark="train/ok", normal="ok"),
    VisA(),
    RealIAD(),
    Kolektor(),
)


def recognised(category: Path) -> Layout | None:
    """The layout of a category; None where the folder is not that of a category."""
    return next((layout for layout in LAYOUTS if layout.matches(category)), None)


def layout_of(category: Path) -> Layout:
    """The layout of a category; MVTec AD's where none is recognised, whose functions say what is missing."""
    return recognised(category) or MVTEC


def short_name(image: Path) -> str:
    """The name of an image, unique in its category and split: its file's, in KolektorSDD also its folder's."""
    return f"{image.parent.name}_{image.name}" if KOLEKTOR_ITEM.fullmatch(image.parent.name) else image.name
