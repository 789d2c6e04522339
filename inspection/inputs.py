"""Unlabelled images to score: listing files and folders, decoding ahead of the network, watching for new images."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets.images import (
    FULL_BITS,
    IMAGE_SUFFIXES,
    ImageError,
    clipping_note,
    decode_image,
    is_ignored,
    is_image_file,
    to_square,
)
from utils.errors import UserError
from utils.stages import StageClock, in_threads

POLL_SECONDS = 0.5  # interval between scans of a watched folder
GIVE_UP_SECONDS = 30.0  # an unreadable image in a watched folder has failed once it has not changed for so long


class Identity(NamedTuple):
    """The identity of an image: a camera may write the next image under the same name.

    path: from `full_name`. bytes: size of the file. modified: time of its last change, in UTC, to the nanosecond.
    """

    path: str
    bytes: int
    modified: str


class InputImage(NamedTuple):
    """A decoded image and its square network input (S, S, 3) uint8, or the reason why it cannot be read.

    identity: of the file that was read; None if there was none, or if it changed meanwhile.
    """

    path: Path
    identity: Identity | None
    image: Image.Image | None
    square: np.ndarray | None
    error: str | None
    warning: str | None = None  # why its scores may mislead


class Listing:
    """Collects the images below folders.

    Entries that `is_ignored` names are left out, with all that is below them. A folder that several links lead to is
    entered once in the life of the object; a link to a folder that it lies in is not entered. A folder that cannot be
    listed, or vanishes meanwhile, counts as empty.

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
        skips_output = self.output and not _is_below(os.path.realpath(folder), self.output)
        for place, folders, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(place)
            is_loop = os.path.islink(place) and _is_below(os.path.realpath(os.path.dirname(place)), real)
            if real in self._entered or is_loop or (skips_output and _is_below(real, self.output)):
                folders.clear()
                continue
            self._entered.add(real)
            folders[:] = [name for name in folders if not is_ignored(name)]
            folders.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))
            for path in (Path(place, name) for name in names if not is_ignored(name)):
                if not is_image_file(path):
                    self.left_out[path.suffix.lower()] += 1
                elif path.is_file() or path.is_symlink():  # no pipe, which may block its reader
                    found.append(path)
        return sorted(found)


def _is_below(place: str, folder: str) -> bool:
    """Whether a real path is `folder` or lies in it."""
    return os.path.commonpath([place, folder]) == folder


def list_inputs(sources: Sequence[Path], output: Path | None = None) -> list[Path]:
    """Lists the images in files and folders, in order and without duplicates.

    Folders are searched recursively, see `Listing`; files in `output` are skipped. Files given by name
    are always included, with any name and suffix. Prints how many files of folders are left out, by suffix.

    Raises:
        UserError: a source is missing, or no image is found.
    """
    found: dict[Path, Path] = {}
    listing = Listing(output)
    for source in sources:
        if not source.exists():
            raise UserError(f"no such file or folder: {source}")
        for path in listing.images_below(source) if source.is_dir() else [source]:
            found.setdefault(absolute(path), path)
    if listing.left_out:
        common = sorted(listing.left_out.items(), key=lambda item: (-item[1], item[0]))
        print("left out:", ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in common))
    if not found:
        raise UserError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {', '.join(map(str, sources))}")
    return list(found.values())


def absolute(path: Path) -> Path:
    """The absolute path without `..`. Links are not resolved: two links to one file are two images."""
    return Path(os.path.abspath(path))


def full_name(path: Path) -> str:
    """The absolute path as text for tables, independent of the working directory; undecodable bytes are escaped."""
    return str(absolute(path)).encode(errors="backslashreplace").decode()


def identify(path: Path) -> Identity | None:
    """The identity of a file; None if it does not exist or its folder cannot be entered."""
    try:
        status = path.stat()
    except OSError:
        return None
    seconds, rest = divmod(status.st_mtime_ns, 10**9)
    try:
        modified = f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"
    except (ValueError, OverflowError, OSError):  # years that the calendar does not have
        modified = f"{status.st_mtime_ns} ns"
    return Identity(full_name(path), status.st_size, modified)


def read_inputs(
    paths: Iterable[Path],
    size: int,
    keep_aspect: bool,
    workers: int,
    clock: StageClock,
    bits: int = FULL_BITS,
    ahead: int | None = None,
) -> Iterator[InputImage]:
    """Yields decoded images in the order of `paths`, decoded `ahead` of the network (see `in_threads`).

    An image that cannot be read is yielded with its error, a 16-bit image that exceeds `bits` with a warning.
    """
    read = partial(_read, size=size, keep_aspect=keep_aspect, clock=clock.on_host(), bits=bits)
    return in_threads(read, paths, workers, ahead)


def _read(path: Path, size: int, keep_aspect: bool, clock: StageClock, bits: int) -> InputImage:
    before = identify(path)
    try:
        with clock("decode"):
            image = decode_image(path, bits)
            square = to_square(image, size, keep_aspect)
    except ImageError as error:
        return InputImage(path, before, None, None, str(error))
    if identify(path) not in (before, None):  # a whole image that was removed meanwhile is one, too
        return InputImage(path, None, None, None, f"cannot read the image {path}: it changed while it was read")
    return InputImage(path, before, image, square, None, clipping_note(image, path, bits))


class Watcher:
    """Finds the images that arrive in `folder`, existing ones first. Images in `output` are skipped.

    A file has arrived once size and time of change are the same in two scans. It arrives again as long as its identity
    is not in `done`, to which the caller adds those that are scored or have failed: an image that cannot be read yet
    may be an upload that pauses.
    """

    def __init__(self, folder: Path, output: Path, done: Container[Identity]) -> None:
        self.folder, self.output, self.done = folder, output, done
        self._since: dict[Identity, float] = {}  # when a file was first seen as it is

    def scan(self) -> list[Path]:
        """The images that have arrived, sorted."""
        now = time.monotonic()
        seen = {identify(path): path for path in Listing(self.output).images_below(self.folder)}
        new = {identity: path for identity, path in seen.items() if identity and identity not in self.done}
        arrived = sorted(path for identity, path in new.items() if identity in self._since)
        self._since = {identity: self._since.get(identity, now) for identity in new}
        return arrived

    def gives_up(self, identity: Identity) -> bool:
        """Whether an unreadable image has not changed for GIVE_UP_SECONDS."""
        since = self._since.get(identity)
        return since is not None and time.monotonic() - since >= GIVE_UP_SECONDS
