"""The one image reader: path -> RGB image -> (S, S, 3) uint8, and path -> mask. Every command reads through here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from utils.errors import UserError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
FULL_SCALE_16BIT = 65535  # 16-bit images are scaled by their full range, not by their brightest pixel
MASK_THRESHOLD = 127  # of 255: a mask pixel is defective above one half, as in the release
PILLOW_REFUSES_ABOVE = 2  # times Image.MAX_IMAGE_PIXELS; between once and twice it only warns


class ImageError(UserError):
    """A image that cannot be used; the message names its path and the reason."""


def is_image_file(path: Path) -> bool:
    """Whether the name is that of a image, and not a hidden one."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def read_image(path: Path, size: int, keep_aspect: bool = False) -> np.ndarray:
    """The image as RGB, (size, size, 3) uint8, see `decode_image` and `to_square`."""
    return to_square(decode_image(path), size, keep_aspect)


def read_mask(path: Path, size: int, keep_aspect: bool = False) -> np.ndarray:
    """A ground-truth mask as (size, size) bool, True on the defect, see `decode_image` and `to_mask`."""
    return to_mask(decode_image(path), size, keep_aspect)


def decode_image(path: Path) -> Image.Image:
    """The decoded image, upright, in mode L or RGB. Of several frames or pages, the first.

    Grey and 1-bit images are L; palette, RGBA (alpha dropped) and CMYK images become RGB; 16-bit grey is scaled by
    its full range to 8 bits; an EXIF orientation is obeyed.

    Raises:
        ImageError: missing, damaged, not a image, too large, or of a kind without a fixed value range (float TIFF).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files, and on large ones
            with Image.open(path) as image:
                image.load()
                return eight_bit(_upright(image))
    except Exception as error:  # on damaged files Pillow raises anything: OSError, SyntaxError, TypeError, struct.error
        raise ImageError(f"cannot read the image {path}: {_reason(error)}") from error


def to_square(image: Image.Image, size: int, keep_aspect: bool = False) -> np.ndarray:
    """A image from `decode_image` as the network's RGB input, (size, size, 3) uint8.

    Resized by Pillow's LANCZOS with antialiasing, as the release does. A image that is not square is squeezed; with
    `keep_aspect` its longer side becomes `size` and the rest is its own reflection, see `content_box`.
    """
    square = _fit(image, size, keep_aspect, Image.Resampling.LANCZOS)
    return square if square.ndim == 3 else square[..., None].repeat(3, axis=2)


def to_mask(image: Image.Image, size: int, keep_aspect: bool = False) -> np.ndarray:
    """A mask from `decode_image` as (size, size) bool, True on the defect; NEAREST resize, as the release does.

    True where the brightest channel is above one half. A mask that nowhere reaches it holds numbers of classes, as
    VisA's: True where it is not 0.
    """
    grey = image if image.mode == "L" else Image.fromarray(np.asarray(image).max(axis=2))
    threshold = MASK_THRESHOLD if grey.getextrema()[1] > MASK_THRESHOLD else 0
    return _fit(grey, size, keep_aspect, Image.Resampling.NEAREST) > threshold


def content_box(width: int, height: int, size: int, keep_aspect: bool) -> tuple[int, int, int, int]:
    """Where a image of `width` x `height` lies in its square of side `size`: left, top, right, bottom, in pixels.

    Convention: right and bottom are exclusive; with `keep_aspect` the image is centred, else it fills the square.
    """
    if not keep_aspect:
        return 0, 0, size, size
    inner = [max(1, round(size * side / max(width, height))) for side in (width, height)]
    left, top = ((size - side) // 2 for side in inner)
    return left, top, left + inner[0], top + inner[1]


def restore_map(scores: np.ndarray, width: int, height: int, keep_aspect: bool = False) -> np.ndarray:
    """A score map (S, S) float32 in the frame of its image, (height, width) float32.

    Without the padding of `keep_aspect`; enlarged bilinearly, averaged where the image is smaller than the map.
    """
    left, top, right, bottom = content_box(width, height, len(scores), keep_aspect)
    inner = Image.fromarray(np.ascontiguousarray(scores[top:bottom, left:right], dtype=np.float32))
    return np.asarray(inner.resize((width, height), Image.Resampling.BILINEAR))


class Header(NamedTuple):
    """What a image's file says of it before its pixels are decoded; sizes as stored, not turned upright."""

    width: int
    height: int
    mode: str


def read_header(path: Path) -> Header:
    """The header of a image; cheap, and finds most files that are no image, too large, or of a refused kind.

    Raises:
        ImageError: as `decode_image`, as far as a header shows it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                _refuse_floats(image)
                return Header(*image.size, image.mode)
    except Exception as error:  # as in decode_image
        raise ImageError(f"cannot read the image {path}: {_reason(error)}") from error


def check_headers(paths: Sequence[Path]) -> None:
    """Looks at the headers of images that are about to be read, several at a time.

    Raises:
        ImageError: the first one that `read_header` refuses, and how many more there are.
    """
    with ThreadPoolExecutor() as pool:
        problems = [problem for problem in pool.map(_header_problem, paths) if problem]
    if problems:
        more = f" (and {len(problems) - 1} more; python check_data.py lists them)" if len(problems) > 1 else ""
        raise ImageError(f"{problems[0]}{more}")


def _header_problem(path: Path) -> str | None:
    try:
        read_header(path)
    except ImageError as error:
        return str(error)
    return None


def limit_pixels(count: int) -> None:
    """Refuses images of more than `count` pixels (rounded up to an even number) from now on, here and in workers."""
    Image.MAX_IMAGE_PIXELS = -(-count // PILLOW_REFUSES_ABOVE)


def read_batches(dataset: Dataset, batch_size: int | None, num_workers: int) -> Iterator:
    """The items of `dataset` in order, in batches (None: one by one), read by `num_workers` processes (0: this one).

    Raises:
        ImageError: as the dataset does, on one line too where a worker process met it.
    """
    limit = partial(_limit_pixels_of_worker, Image.MAX_IMAGE_PIXELS)
    try:
        own = torch.Generator()  # reading must not advance the generator that the weights are drawn from
        yield from DataLoader(dataset, batch_size, num_workers=num_workers, worker_init_fn=limit, generator=own)
    except ImageError as error:
        *traceback, last = str(error).strip().splitlines()  # torch puts the worker's traceback into the message
        raise ImageError(last.split("ImageError: ", 1)[1] if traceback else last) from error


def _limit_pixels_of_worker(limit: float, _worker: int) -> None:
    Image.MAX_IMAGE_PIXELS = limit  # where processes are not forked, they start with Pillow's own


def _fit(image: Image.Image, size: int, keep_aspect: bool, resampling: Image.Resampling) -> np.ndarray:
    """`image` resized into its place in the square and reflected around it, (size, size[, 3]) uint8."""
    left, top, right, bottom = content_box(*image.size, size, keep_aspect)
    inner = np.asarray(image.resize((right - left, bottom - top), resampling))
    around = ((top, size - bottom), (left, size - right), (0, 0))
    return np.pad(inner, around[: inner.ndim], mode="symmetric") if inner.shape[:2] != (size, size) else inner


def _reason(error: Exception) -> str:
    """What was wrong with a image, on one line and never empty."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a image or damaged"
    reason = " ".join(str(error).split()) or repr(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"{reason} If it is what it should be, give a larger --max_pixels"
    return reason


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data raises anything; the pixels are fine
        return image


def eight_bit(image: Image.Image) -> Image.Image:
    """`image` in mode L or RGB; ValueError where its kind has no fixed value range.

    Grey stays grey (resizing it before copying it to three channels gives the same values at half the cost).
    """
    if image.mode.startswith("I"):  # I;16, I;16B, I: 16-bit grey
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > FULL_SCALE_16BIT:
            raise ValueError(f"its values {values.min()}..{values.max()} do not fit 16 bits")
        return Image.fromarray(np.rint(values * (255 / FULL_SCALE_16BIT)).astype(np.uint8))
    _refuse_floats(image)
    return image if image.mode == "L" else image.convert("L" if image.mode in ("1", "LA") else "RGB")


def _refuse_floats(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("floating-point images have no fixed value range; save it with 8 or 16 bits")
