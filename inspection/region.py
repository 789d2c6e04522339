"""The part of the images that is scored: a rectangle or a mask, and what is left out of it.

A region is a bool array (H, W), True where images are scored, stretched to each image. Score maps are 0 elsewhere, so
the score of an image is the largest value in the region.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.masks import decode_mask
from utils.errors import UserError

LONGEST_SIDE = 1024  # of a stored region; finer ones are reduced: score maps are coarser
ASPECT_TOLERANCE = 0.02  # relative difference of the aspect ratios of mask and image without a warning


class RegionWarning(UserWarning):
    """A mask that may not fit the images."""


def read_region(region: str | None, ignore: Path | None, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """The part of the images (H, W) in `region` and not in `ignore`.

    region: "x,y,width,height" in pixels, or in fractions of the image if no number exceeds 1; or a mask file, not black
    inside the region. ignore: a mask file, not black where images are not scored. sizes: (width, height) of the support
    images, which is that of all images.

    Raises:
        UserError: a file cannot be read, the rectangle is none, or nothing is left to score.
    """
    width, height = sizes[0]
    shrink = min(1, LONGEST_SIDE / max(width, height))
    shape = max(1, round(height * shrink)), max(1, round(width * shrink))
    inside = np.ones(shape, bool)
    if region is not None:
        box = _rectangle(region, sizes)
        inside &= _filled(box, shape) if box else _mask(Path(region), sizes[0], shape)
    if ignore is not None:
        inside &= ~_mask(ignore, sizes[0], shape)
    if not inside.any():
        raise UserError(f"the region excludes all {width}x{height} pixels of an image", ("region", "ignore"))
    return inside


def _rectangle(text: str, sizes: Sequence[tuple[int, int]]) -> tuple[float, ...] | None:
    """The rectangle (left, top, right, bottom) in fractions of the image; None if `text` is not four numbers."""
    if not re.fullmatch(r"\s*[-+.\deE]+(\s*,\s*[-+.\deE]+){3}\s*", text):
        return None
    try:
        left, top, width, height = (float(number) for number in text.split(","))
    except ValueError as error:
        raise UserError(f"a region is x,y,width,height or a mask file, not {text}") from error
    if min(left, top) < 0 or min(width, height) <= 0:
        raise UserError(f"{text} is not a rectangle: x,y,width,height must not be negative, nor the last two 0")
    if max(left, top, width, height) <= 1:
        return left, top, left + width, top + height
    if len(set(sizes)) > 1:
        raise UserError(f"{text} is in pixels, but the support images differ in size: give fractions, 0 to 1")
    across, down = sizes[0]
    return left / across, top / down, (left + width) / across, (top + height) / down


def _filled(box: Sequence[float], shape: tuple[int, int]) -> np.ndarray:
    """A bool array of `shape`, True inside `box` (fractions): every pixel whose centre it contains."""
    y, x = ((np.arange(side) + 0.5) / side for side in shape)
    return ((y >= box[1]) & (y < box[3]))[:, None] & ((x >= box[0]) & (x < box[2]))


def _mask(path: Path, size: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """The mask file as a bool array of `shape`. Warns where its aspect ratio is not that of the image."""
    if not path.is_file():
        raise UserError(f"no mask file {path}; a region is x,y,width,height or a mask file", ("region", "ignore"))
    mask = decode_mask(path)
    width, height = mask.facts.size
    if abs(width / height * size[1] / size[0] - 1) > ASPECT_TOLERANCE:
        warnings.warn(
            f"the mask {path} of {width}x{height} pixels is stretched to images of {size[0]}x{size[1]}",
            RegionWarning,
            stacklevel=3,
        )
    return inside_map(mask.pixels, *shape[::-1])


def inside_map(inside: np.ndarray | None, across: int, down: int) -> np.ndarray | None:
    """The region at the size of a map of a whole image without padding, (down, across) bool."""
    if inside is None:
        return None
    return np.asarray(Image.fromarray(inside).resize((across, down), Image.Resampling.NEAREST))


def pixels(scores: np.ndarray, inside: np.ndarray | None, size: int) -> np.ndarray:
    """S x S values of a score map, evenly spread over the region: the map itself if it is (S, S) without a region.

    Stands for maps of any size where only the distribution of the values matters.
    """
    if inside is None and scores.shape == (size, size):
        return scores
    values = scores[inside] if inside is not None and inside.any() else scores.ravel()
    return values[np.linspace(0, len(values) - 1, size * size).round().astype(int)].reshape(size, size)
