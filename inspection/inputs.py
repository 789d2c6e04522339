"""Unlabelled images to score: listing files and folders, decoding ahead of the network, watching for new images."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets.folders import Listing
from datasets.images import IMAGE_SUFFIXES, ImageError, clipping_note, decode_image, to_square
from utils.errors import UserError
from utils.flags import FULL_BITS
from utils.stages import StageClock, in_threads

POLL_SECONDS = 0.5  # interval between scans of a watched folder


class InputImage(NamedTuple):
    """A decoded image and its square network input (S, S, 3) uint8, or the reason why it cannot be read."""

    path: Path
    image: Image.Image | None
    square: np.ndarray | None
    error: str | None
    warning: str | None = None  # why its scores may mislead


def list_inputs(sources: Sequence[Path], output: Path | None = None) -> list[Path]:
    """Lists the images in files and folders, in order and without duplicates.

    Folders are searched recursively, see `datasets.folders.Listing`; files in `output` are skipped. Files given by name
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
        print(f"left out: {listing.what_was_left_out()}")
    if not found:
        raise UserError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {', '.join(map(str, sources))}")
    return list(found.values())


def absolute(path: Path) -> Path:
    """The absolute path without `..`. Links are not resolved: two links to one file are two images."""
    return Path(os.path.abspath(path))


def full_name(path: Path) -> str:
    """The absolute path as text for tables, independent of the working directory; undecodable bytes are escaped."""
    return str(absolute(path)).encode(errors="backslashreplace").decode()


def read_inputs(
    paths: Iterable[Path], size: int, keep_aspect: bool, workers: int, clock: StageClock, bits: int = FULL_BITS
) -> Iterator[InputImage]:
    """Yields decoded images in the order of `paths`, decoded a few images ahead.

    An image that cannot be read is yielded with its error, a 16-bit image that exceeds `bits` with a warning.
    """
    return in_threads(partial(_read, size=size, keep_aspect=keep_aspect, clock=clock, bits=bits), paths, workers)


def _read(path: Path, size: int, keep_aspect: bool, clock: StageClock, bits: int) -> InputImage:
    try:
        with clock("decode"):
            image = decode_image(path, bits)
            warning = clipping_note(image, path, bits)
            return InputImage(path, image, to_square(image, size, keep_aspect), None, warning)
    except ImageError as error:
        return InputImage(path, None, None, str(error))


def watch(folder: Path, output: Path, done: Collection[str] = ()) -> Iterator[list[Path]]:
    """Yields images as they arrive in `folder`, without end.

    Existing images come first. Images in `output` are skipped. A file counts as arrived once its size is unchanged
    between two scans.

    done: full names (`full_name`) of images to skip.
    """
    sizes: dict[Path, int] = {}
    seen_before = set(done)
    while True:
        listed = Listing(output).images_below(folder)
        seen = {path: _size(path) for path in listed if full_name(path) not in seen_before}
        arrived = sorted(path for path, size in seen.items() if size and sizes.get(path) == size)
        sizes = {path: size for path, size in seen.items() if size}
        seen_before.update(map(full_name, arrived))
        if arrived:
            yield arrived
        else:
            time.sleep(POLL_SECONDS)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # removed in the meantime
        return None
