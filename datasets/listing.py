"""Listing of folders, for every command: what counts as an image, what is left out, and what cannot be listed."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from datasets.images import is_ignored, is_image_file
from utils.errors import UserError

# How folders of this tool's output are recognised, by the names in them: predict.py, test.py --save_images, train.py.
PREDICTIONS, GALLERY, CURVE = "results.jsonl", {"contact_sheet.jpg", "report.html"}, ("_curve.png", "_epochs.jsonl")
PREDICTED = frozenset({"images", "maps", "pictures"})  # the folders of predict.py; pictures: until version 0.1
NO_IMAGES = frozenset({".txt", ".md", ".json", ".jsonl", ".xml", ".csv", ".yaml", ".yml", ".html", ".log", ".pdf"})
NO_FILE = "pipe or device"
LABEL_NAME = re.compile(
    r"(.+)[ _.-](gt|ground_?truth|labels?|masks?|seg|segmentation|annotations?|anno)", re.IGNORECASE
)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; UserError if that is unknown: no rights, a link to nothing, a mount that is gone."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        if is_missing and not path.is_symlink():
            return False
        reason = "it is a link to nothing" if is_missing else error.strerror
        raise UserError(f"cannot use {path}: {reason}") from error


def is_pipe(path: Path) -> bool:
    """Whether a path is a pipe, socket or device, which may block its reader."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def require_no_pipes(images: Iterable[Path]) -> list[Path]:
    """The images as a list; UserError if one `is_pipe`."""
    images = list(images)
    if pipe := next(filter(is_pipe, images), None):
        raise UserError(f"{pipe} is a {NO_FILE}, not an image file")
    return images


def entries(folder: Path) -> list[Path]:
    """The entries of a folder, sorted by name, without ignored ones and output; UserError if it cannot be listed."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}") from error
    return sorted(folder / name for name in set(names) - own_output(names) if not is_ignored(name))


def own_output(names: Collection[str]) -> set[str]:
    """Those of the names in one folder that are folders or images which this tool wrote."""
    own = set(PREDICTED.intersection(names)) if PREDICTIONS in names else set()
    curves = (name for name in names if name.endswith(CURVE[0]) and name.replace(*CURVE) in names)
    return own.union(filter(lambda name: is_image_file(Path(name)), names) if set(names) >= GALLERY else curves)


def label_files(images: Iterable[Path]) -> list[Path]:
    """Images with the name of a label file of another one in their folder: a_GT.png or a_label.bmp beside a.png."""
    images = list(images)
    stems = {(path.parent, path.stem.lower()) for path in images}
    named = ((path, LABEL_NAME.fullmatch(path.stem)) for path in images)
    return [path for path, match in named if match and (path.parent, match[1].lower()) in stems]


class Listing:
    """Collects the images below folders.

    Entries that `is_ignored` names are left out, with all that is below them. A folder that several links lead to is
    entered once in the life of the object; a link to a folder that it lies in is not entered. A folder that vanishes
    meanwhile counts as empty. Output of this tool (`own_output`) does not count wherever it lies, unless it is asked
    for by name.

    output: a folder that is not entered either, unless the images are asked for from within it.
    left_out: how many files were left out, by suffix in lower case; a file without suffix counts as "".
    all_files: files of all suffixes count as images. own: how many images were left out because this tool wrote them.
    unreadable: why folders could not be entered.
    entered: the device and number of each folder that was entered, by its real path.
    """

    def __init__(self, output: Path | None = None, all_files: bool = False) -> None:
        self.output = None if output is None else os.path.realpath(output)
        self.all_files = all_files
        self.left_out: Counter[str] = Counter()
        self.own = 0
        self.unreadable: list[str] = []
        self.entered: dict[str, tuple[int, int] | None] = {}

    def images_below(self, folder: Path) -> list[Path]:
        """The images in `folder` and its sub-folders, sorted, that no earlier call has listed."""
        images: list[Path] = []
        skips_output = self.output and not _is_below(os.path.realpath(folder), self.output)
        for place, folders, names in os.walk(folder, followlinks=True, onerror=self._note):
            real = os.path.realpath(place)
            is_loop = (
                Path(place) != folder
                and os.path.islink(place)
                and _is_below(os.path.realpath(os.path.dirname(place)), real)
            )
            if real in self.entered or is_loop:
                folders.clear()
                continue
            if skips_output and _is_below(real, self.output):
                self.own += len(list(filter(is_image_file, map(Path, names))))
                continue
            self.entered[real] = identity(real)
            own = own_output([*folders, *names])
            self.own += sum(_count_images(Path(place, name)) for name in own)
            folders[:] = [name for name in folders if not is_ignored(name) and name not in own]
            folders.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))
            images += self._images(Path(place, name) for name in names if not is_ignored(name) and name not in own)
        return sorted(images)

    def _images(self, files: Iterable[Path]) -> list[Path]:
        """The images among files; the others are counted."""
        images = []
        for path in files:
            if not is_image_file(path) and not self.all_files:
                self._leave_out(path)
            elif is_pipe(path):
                self.left_out[NO_FILE] += 1
            else:
                images.append(path)
        return images

    def _leave_out(self, path: Path) -> None:
        """Counts a file by its suffix. A link to nothing, or a mount that is gone, seems to be one, and is named."""
        suffix = path.suffix.lower()
        try:
            if suffix not in NO_IMAGES:
                is_folder(path)
            self.left_out[suffix] += 1
        except UserError as error:
            self.unreadable.append(str(error))

    def _note(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # it vanished
            self.unreadable.append(f"cannot list the folder {error.filename}: {error.strerror}")

    @property
    def is_partial(self) -> bool:
        """Whether something was left out that may be an image which the user gave."""
        return bool(self.unreadable or set(self.left_out) - NO_IMAGES)

    def notes(self) -> list[str]:
        """A sentence on the files that were left out, one on those that this tool wrote, one on folders not entered."""
        common = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        counts = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in common)
        own = f"{self.own} image(s) that this tool wrote, in an output folder" if self.own else ""
        return [f"left out: {text}" for text in (counts, own, counted(self.unreadable, "folder")) if text]


def counted(sentences: Sequence[str], what: str) -> str:
    """The number of sentences and the first one; empty if there are none."""
    return f"{len(sentences)} {what}(s), e.g. {sentences[0]}" if sentences else ""


def identity(folder: str) -> tuple[int, int] | None:
    """Device and number of a folder, which another folder in its place, or a mount, changes; None if it is gone."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _count_images(place: Path) -> int:
    below = (name for _, _, names in os.walk(place) for name in names)
    return sum(is_image_file(Path(name)) for name in ([place.name] if os.path.isfile(place) else below))


def _is_below(place: str, folder: str) -> bool:
    """Whether a real path is `folder` or lies in it."""
    return os.path.commonpath([place, folder]) == folder
