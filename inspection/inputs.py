"""Unlabelled images to score: listing files and folders, decoding ahead of the network, waiting for new ones."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets.images import IMAGE_SUFFIXES, ImageError, decode_image, is_image_file, to_square
from utils.errors import UserError
from utils.stages import StageClock, in_threads

POLL_SECONDS = 0.5  # between looks into a watched folder


class InputImage(NamedTuple):
    """A decoded image and the same as the network's square (S, S, 3) uint8, or why there is none."""

    path: Path
    image: Image.Image | None
    square: np.ndarray | None
    error: str | None


def list_inputs(sources: Sequence[Path], output: Path | None = None) -> list[Path]:
    """The images among files and folders, folders searched to any depth, in order and each once.

    Files named outright are taken whatever their ending, hidden ones in folders and what lies in `output` are not.

    Raises:
        UserError: a source is missing, or there is no image at all.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        if not source.exists():
            raise UserError(f"no such file or folder: {source}")
        for path in _images_below(source, output) if source.is_dir() else [source]:
            found.setdefault(absolute(path), path)
    if not found:
        raise UserError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {', '.join(map(str, sources))}")
    return list(found.values())


def absolute(path: Path) -> Path:
    """The path from the root on, without `..`; links stay, so two links to one file are two images."""
    return Path(os.path.abspath(path))


def full_name(path: Path) -> str:
    """The absolute path as text for tables, the same from wherever the image is named and whatever bytes it holds."""
    return str(absolute(path)).encode(errors="backslashreplace").decode()


def _images_below(folder: Path, output: Path | None) -> list[Path]:
    """The images in a folder, at any depth, sorted; without those in `output`, where that lies in the folder."""
    found = sorted(filter(is_image_file, folder.rglob("*")))
    own = output.resolve() if output else None
    if own is None or folder.resolve() not in own.parents:
        return found
    in_own = {place for place in {path.parent for path in found} if place.resolve().is_relative_to(own)}
    return [path for path in found if path.parent not in in_own]


def read_inputs(
    paths: Iterable[Path], size: int, keep_aspect: bool, workers: int, clock: StageClock
) -> Iterator[InputImage]:
    """Decoded images in the order of `paths`, a few ahead; one that cannot be read comes with its error instead."""
    return in_threads(partial(_read, size=size, keep_aspect=keep_aspect, clock=clock), paths, workers)


def _read(path: Path, size: int, keep_aspect: bool, clock: StageClock) -> InputImage:
    try:
        with clock("decode"):
            image = decode_image(path)
            return InputImage(path, image, to_square(image, size, keep_aspect), None)
    except ImageError as error:
        return InputImage(path, None, None, str(error))


def watch(folder: Path, output: Path, done: Collection[str] = ()) -> Iterator[list[Path]]:
    """Images as they arrive in `folder`, without end; those already there come first, those in `output` never.

    A file counts as arrived once its size stayed the same from one look to the next. done: full names to leave out.
    """
    sizes: dict[Path, int] = {}
    seen_before = set(done)
    while True:
        seen = {path: _size(path) for path in _images_below(folder, output) if full_name(path) not in seen_before}
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
    except OSError:  # taken away meanwhile
        return None
