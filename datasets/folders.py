"""The images below a folder: hidden and system entries never count, linked folders are entered once."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from datasets.images import is_ignored, is_image_file


class Listing:
    """Collects the images below folders, sorted per folder.

    Entries that `is_ignored` names are left out, with all that is below them. A folder that several links lead to is
    entered once in the life of the object, under its own path where it has one below the folder. A link to a folder
    that it lies in is not entered. A folder that cannot be listed, or vanishes meanwhile, counts as empty.

    output: a folder that is not entered either, unless the images are asked for from within it.
    left_out: how many files were left out, by suffix in lower case; a file without suffix counts as "".
    """

    def __init__(self, output: Path | None = None) -> None:
        self.output = None if output is None else os.path.realpath(output)
        self.left_out: Counter[str] = Counter()
        self._entered: set[str] = set()

    def images_below(self, folder: Path) -> list[Path]:
        """The images in `folder` and its sub-folders, sorted, that no earlier call has listed."""
        found: list[Path] = []
        root = os.path.realpath(folder)
        places, links = [(folder, root)], []
        while places or links:  # links last, so that a folder is listed under its own path
            place, real = places.pop() if places else links.pop(0)
            if real in self._entered or self._is_output(real, root):
                continue
            self._entered.add(real)
            for entry in _entries(place):
                path = Path(place, entry.name)
                if not _is_folder(entry):
                    self._take(path, entry, found)
                elif not entry.is_symlink():
                    places.append((path, os.path.join(real, entry.name)))
                elif not _is_below(real, target := os.path.realpath(path)):
                    links.append((path, target))
        return sorted(found)

    def _take(self, path: Path, entry: os.DirEntry, found: list[Path]) -> None:
        """Adds an image to `found`, or counts the file as left out. A dangling link is an image that cannot be read."""
        if not (entry.is_symlink() or entry.is_file()):
            return  # a pipe or device: to open it may wait without end
        if is_image_file(path):
            found.append(path)
        else:
            self.left_out[path.suffix.lower()] += 1

    def _is_output(self, real: str, root: str) -> bool:
        return self.output is not None and _is_below(real, self.output) and not _is_below(root, self.output)

    def what_was_left_out(self) -> str:
        """The files that were left out as text, such as `3 .heic, 1 .gif`; empty if there are none."""
        common = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in common)


def _entries(folder: Path) -> list[os.DirEntry]:
    """The entries of a folder without those that are ignored; none where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not is_ignored(entry.name)), key=lambda entry: entry.name)
    except OSError:
        return []


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_below(place: str, folder: str) -> bool:
    """Whether a real path is `folder` or lies in it."""
    return os.path.commonpath([place, folder]) == folder
