"""Ground-truth masks: mask files to (S, S) bool, True on the defect, and warnings about ambiguous masks.

A pixel is classified by its raw value: the maximum over the stored channels, without alpha.

grey levels       the mask holds the full-scale value (255; 65535 if any value exceeds 255), or a value above half of
                  it and more than MOST_CLASSES different non-zero values: defective above half of the full scale,
                  which for 8 bits is the release's rule, above 127
class indices     all other masks, such as VisA's: defective where not 0
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets.images import (
    FULL_BITS,
    HOW_READ,
    SEVERAL,
    TURNED,
    deep_values,
    eight_bit,
    full_scale,
    read_pixels,
    resize,
    turned,
)

FULL_SCALE_8BIT, FULL_SCALE_16BIT = 255, full_scale(FULL_BITS)
MOST_CLASSES = 8  # different values other than 0; masks with antialiased edges have more, thin ones a dozen
NEARLY_ALL = 0.9  # share of the masks that must look inverted before a hint is printed
ALPHA = "have an alpha channel that marks other pixels than the colours do; it is not read"
AMBIGUOUS = (
    "are of images with an EXIF orientation and have none: they are read as drawn on the upright image, not on the "
    "stored pixels"
)
PAGES = f"have {SEVERAL}: {HOW_READ[SEVERAL]}"
MIXED = "have a few small values next to 255; those up to 127 count as normal, as in the release"


class MaskFacts(NamedTuple):
    """What `mask_notes` needs to know of a mask."""

    size: tuple[int, int]  # width and height in pixels, upright
    share: float  # of the pixels that are defective
    doubt: str | None  # PAGES, ALPHA, MIXED or AMBIGUOUS where it may mean something else


class Mask(NamedTuple):
    """A mask that was read: pixels (H, W) bool, upright, True on the defect."""

    pixels: np.ndarray
    facts: MaskFacts


def decode_mask(path: Path, orientation: int = 1, is_stored: bool = False) -> Mask:
    """The mask in a file of any integer mode, turned upright by its EXIF orientation.

    orientation: the EXIF orientation of its image. A mask that has none itself was drawn on the stored pixels of the
    image if `is_stored`, else on the upright image, which is a doubt.

    Raises:
        ImageError: the file is missing, damaged, no image or too large, or has negative or floating-point values.
    """
    return read_pixels(path, partial(_mask, orientation=orientation, is_stored=is_stored))


def to_square_mask(pixels: np.ndarray, size: int, keep_aspect: bool = False) -> np.ndarray:
    """(H, W) bool as (size, size) bool, resized by NEAREST (release behaviour) and padded as `to_square` does.

    The release resizes before it thresholds; NEAREST only selects pixels, so both orders are equal.
    """
    image = Image.fromarray(pixels.astype(np.uint8))
    return resize(image, size, keep_aspect, Image.Resampling.NEAREST).astype(bool)


def _mask(image: Image.Image, orientation: int, is_stored: bool) -> Mask:
    values = _raw_values(image)
    different = _different_values(values)
    pixels = values > _threshold(different)
    doubt = ALPHA if _alpha_differs(image, pixels) else MIXED if _is_mixed(different) else None
    if orientation != 1 and TURNED not in image.info:
        doubt = doubt if is_stored else AMBIGUOUS
        pixels = turned(pixels, orientation) if is_stored else pixels
    doubt = PAGES if SEVERAL in image.info else doubt
    return Mask(pixels, MaskFacts(pixels.shape[::-1], float(pixels.mean()), doubt))


def _raw_values(image: Image.Image) -> np.ndarray:
    """(H, W) integers, 0 or more. A palette counts by its colours, or by its numbers where it has one colour only.

    Raises:
        ValueError: negative or floating-point values.
    """
    values = deep_values(image)
    if values is not None:
        values = values if values.ndim == 2 else values.max(axis=2)
        if values.min() < 0:
            raise ValueError(f"its values {values.min()}..{values.max()} are not those of a mask: some are negative")
        return values
    shown = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")  # without alpha
    colours = np.asarray(shown if image.mode != "F" else eight_bit(image))
    values = colours if colours.ndim == 2 else colours.max(axis=2)
    return np.asarray(image) if image.mode == "P" and values.min() == values.max() else values


def _different_values(values: np.ndarray) -> np.ndarray:
    """The different values other than 0, in rising order."""
    if values.dtype == np.uint8:
        return np.flatnonzero(np.bincount(values.ravel(), minlength=1)[1:]) + 1  # much faster than np.unique
    different = np.unique(values)
    return different[different > 0]


def _threshold(different: np.ndarray) -> int:
    """The largest value that is normal in a mask with these different values other than 0."""
    most, half = different.max(initial=0), _full_scale(different) // 2
    grey_levels = most == _full_scale(different) or (most > half and len(different) > MOST_CLASSES)
    return half if grey_levels and most <= FULL_SCALE_16BIT else 0


def _full_scale(different: np.ndarray) -> int:
    return FULL_SCALE_8BIT if different.max(initial=0) <= FULL_SCALE_8BIT else FULL_SCALE_16BIT


def _is_mixed(different: np.ndarray) -> bool:
    """Whether small values next to the full scale, and none between, look like class numbers."""
    full, small = _full_scale(different), different[:-1]
    return 0 < len(small) <= MOST_CLASSES and different[-1] == full and small[-1] <= full // 2


def _alpha_differs(image: Image.Image, pixels: np.ndarray) -> bool:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if "A" not in image.getbands():
        return False
    alpha = np.asarray(image.getchannel("A"))
    return alpha.min() != alpha.max() and bool(((alpha > FULL_SCALE_8BIT // 2) != pixels).any())


def mask_notes(masks: Sequence[tuple[Path, MaskFacts]]) -> list[str]:
    """A sentence for each way in which masks of a category may mean something else than they are read as."""
    notes = []
    for doubt in (PAGES, ALPHA, AMBIGUOUS, MIXED):
        if doubted := [path for path, facts in masks if facts.doubt == doubt]:
            notes.append(f"{len(doubted)} of {len(masks)} masks {doubt}, e.g. {doubted[0]}")
    notes += [f"the mask {path} marks no pixel" for path, facts in masks if facts.share == 0]
    mostly = [path for path, facts in masks if facts.share > 0.5]
    if mostly and len(mostly) >= NEARLY_ALL * len(masks):
        notes.append(
            f"{len(mostly)} of {len(masks)} masks mark more than half of their image, e.g. {mostly[0]}: are they "
            "inverted? A defect is bright, everything else 0"
        )
    return notes
