"""The one image reader: path -> RGB picture -> (S, S, 3) uint8, and path -> mask. Every command reads through here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from utils.utils import UserError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
FULL_SCALE_16BIT = 65535  # 16-bit pictures are scaled by their full range, not by their brightest pixel
MASK_THRESHOLD = 127  # of 255: a mask pixel is defective above one half, as in the release


class ImageError(UserError):
    """A picture that cannot be used; the message names its path and the reason."""


def read_image(path: Path, size: int) -> np.ndarray:
    """The picture as RGB, (size, size, 3) uint8.

    Resized by Pillow's LANCZOS with antialiasing, as the release does; a picture that is not square is squeezed. Grey,
    palette, RGBA (alpha dropped), CMYK and 16-bit pictures become 8-bit RGB; an EXIF orientation is obeyed.

    Raises:
        ImageError: missing, damaged, not a picture, too large, or of a kind without a fixed value range (float TIFF).
    """
    return np.asarray(_open(path).resize((size, size), Image.Resampling.LANCZOS).convert("RGB"))


def read_mask(path: Path, size: int) -> np.ndarray:
    """A ground-truth mask as (size, size) bool, True on the defect; NEAREST resize, as the release does.

    Raises:
        ImageError: as `read_image`.
    """
    picture = _open(path).convert("L").resize((size, size), Image.Resampling.NEAREST)
    return np.asarray(picture) > MASK_THRESHOLD


def read_batches(dataset: Dataset, batch_size: int | None, num_workers: int) -> Iterator:
    """The items of `dataset` in order, in batches (None: one by one), read by `num_workers` processes (0: this one).

    Raises:
        ImageError: as the dataset does, on one line too where a worker process met it.
    """
    try:
        own = torch.Generator()  # reading must not advance the generator that the weights are drawn from
        yield from DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, generator=own)
    except ImageError as error:
        *traceback, last = str(error).strip().splitlines()  # torch puts the worker's traceback into the message
        raise ImageError(last.split("ImageError: ", 1)[1] if traceback else last) from error


def _open(path: Path) -> Image.Image:
    """The decoded picture, upright, in mode L or RGB."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files, and on large ones
            with Image.open(path) as picture:
                picture.load()
                return _eight_bit(_upright(picture))
    except Exception as error:  # on damaged files Pillow raises anything: OSError, SyntaxError, TypeError, struct.error
        reason = "not a picture or damaged" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ImageError(f"cannot read the picture {path}: {' '.join(str(reason).split()) or repr(error)}") from error


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged EXIF data raises anything; the pixels are fine
        return picture


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Grey stays grey (resizing it before copying it to three channels gives the same values at half the cost)."""
    if picture.mode.startswith("I"):  # I;16, I;16B, I: 16-bit grey
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > FULL_SCALE_16BIT:
            raise ValueError(f"its values {values.min()}..{values.max()} do not fit 16 bits")
        return Image.fromarray(np.rint(values * (255 / FULL_SCALE_16BIT)).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("floating-point pictures have no fixed value range; save it with 8 or 16 bits")
    return picture if picture.mode == "L" else picture.convert("L" if picture.mode in ("1", "LA") else "RGB")
