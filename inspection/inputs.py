"""Unlabelled images to score: listing files and folders, decoding ahead of the network, watching for new images."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from datasets.images import FULL_BITS, IMAGE_SUFFIXES, ImageError, decode_image, to_square
from datasets.listing import Listing, counted, is_folder, label_files, require_no_pipes
from inspection.images import as_tensor
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
    """A decoded image and its square network input (3, S, S) uint8, or the reason why it cannot be read.

    identity: of the file that was read; None if there was none, or if it changed meanwhile.
    """

    path: Path
    identity: Identity | None
    image: Image.Image | None
    square: torch.Tensor | None
    error: str | None


def list_inputs(
    sources: Sequence[Path], output: Path | None = None, listing: Listing | None = None, may_be_empty: bool = False
) -> list[Path]:
    """Lists the images in files and folders, in order and without duplicates.

    Folders are searched recursively, see `Listing`; files in `output` are skipped. Files given by name
    are always included, with any name and suffix. Prints how many files of folders are left out, and why.

    listing: the caller's, for images to score: what cannot be listed, and label files, are only said. Other images
    decide what is normal, so that nothing may be missing among them, and no label file may be one.

    Raises:
        UserError: a source is missing, no image is found unless `may_be_empty`, or, without `listing`, a folder cannot
            be listed or label files lie beside the images.
    """
    images: dict[Path, Path] = {}  # by absolute path
    is_strict, listing = listing is None, listing or Listing(output)
    for source in sources:
        if not is_folder(source) and not source.exists():
            raise UserError(f"no such file or folder: {source}")
        for path in listing.images_below(source) if is_folder(source) else require_no_pipes([source]):
            images.setdefault(absolute(path), path)
    if listing.unreadable and (is_strict or not images):
        raise UserError(counted(listing.unreadable, "folder"))
    print(*(f"{note}\n" for note in listing.notes()), sep="", end="")
    if not images and not may_be_empty:
        raise UserError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {', '.join(map(str, sources))}")
    if labels := counted(label_files(images), "image"):
        labels += ": named like label files of the images beside them"
        if is_strict:
            raise UserError(f"{labels}; give the images alone")
        print(f"note: {labels}, but scored as images")
    return list(images.values())


def absolute(path: Path) -> Path:
    """The absolute path without `..`. Links are not resolved: two links to one file are two images."""
    return Path(os.path.abspath(path))


def full_name(path: Path) -> str:
    """The absolute path as text for tables, independent of the working directory; undecodable bytes are escaped."""
    return os.fsencode(absolute(path)).decode("utf-8", "backslashreplace")  # the same in every locale


def current_name(name: str) -> str:
    """A `full_name` of an earlier version, which wrote an undecodable byte as \\udce9, as it is now: \\xe9."""
    return re.sub(r"\\udc([89a-f][0-9a-f])", r"\\x\1", name)


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

    An image that cannot be read is yielded with its error.
    """
    read = partial(_read, size=size, keep_aspect=keep_aspect, clock=clock.on_host(), bits=bits)
    return in_threads(read, paths, workers, ahead)


def _read(path: Path, size: int, keep_aspect: bool, clock: StageClock, bits: int) -> InputImage:
    before = identify(path)
    try:
        with clock("decode"):
            image = decode_image(path, bits)
            square = as_tensor(to_square(image, size, keep_aspect))
    except ImageError as error:
        return InputImage(path, before, None, None, str(error))
    if identify(path) not in (before, None):  # a whole image that was removed meanwhile is one, too
        return InputImage(path, None, None, None, f"cannot read the image {path}: it changed while it was read")
    return InputImage(path, before, image, square, None)


class Watcher:
    """Finds the images that arrive in `folder`, existing ones first. Images in `output` are skipped.

    A file has arrived once size and time of change are the same in two scans. It arrives again as long as its identity
    is not in `done`, to which the caller adds those that are scored or have failed: an image that cannot be read yet
    may be an upload that pauses.
    """

    def __init__(self, folder: Path, output: Path, done: Container[Identity]) -> None:
        self.folder, self.output, self.done = folder, output, done
        self._since: dict[Identity, float] = {}  # when a file was first seen as it is
        self._entered: dict[str, tuple[int, int] | None] = {}  # folders in the scan before
        self._unreadable: list[str] = []  # of the scan before
        self._was_there = False
        self.is_gone = False  # the folder itself, or another is in its place into which no image has come
        self.notes: list[str] = []  # sentences on folders that are new since the scan before

    def scan(self) -> list[Path]:
        """The images that have arrived, sorted; says in `notes` which folders are gone or cannot be entered."""
        now = time.monotonic()
        listing = Listing(self.output)
        seen = {identify(path): path for path in listing.images_below(self.folder)}
        self._note_folders(listing)
        new = {identity: path for identity, path in seen.items() if identity and identity not in self.done}
        arrived = sorted(path for identity, path in new.items() if identity in self._since)
        self._since = {identity: self._since.get(identity, now) for identity in new}
        self.is_gone &= not arrived
        return arrived

    def _note_folders(self, listing: Listing) -> None:
        """A folder that vanishes, or is unmounted or replaced, would else look like one without new images."""
        before, self._entered = self._entered, listing.entered
        gone = {place for place, of_place in before.items() if listing.entered.get(place) != of_place}
        self.is_gone |= os.path.realpath(self.folder) in gone
        outermost = sorted(place for place in gone if os.path.dirname(place) not in gone)
        self.notes = [f"the folder {place} is gone or was replaced" for place in outermost]
        if listing.entered and not before and self._was_there:
            self.notes.append(f"the folder {self.folder} is there again")
        self.notes += [note for note in listing.unreadable if note not in self._unreadable]
        self._was_there |= bool(listing.entered)
        self._unreadable = listing.unreadable

    def gives_up(self, identity: Identity) -> bool:
        """Whether an unreadable image has not changed for GIVE_UP_SECONDS."""
        since = self._since.get(identity)
        return since is not None and time.monotonic() - since >= GIVE_UP_SECONDS
