"""Support images: decoded, no label files, each once; of many, those that represent all others best."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from datasets.images import TRANSPARENT, parts_of, reading_summary, unit_range
from inspection.images import Decoded, ImageInput, image_names
from inspection.out_of_distribution import relative_distances
from utils.errors import UserError

SUPPORT = -1  # in place of the number of the original, where that is a support image
MOST_FITTED = 32  # support images in the memory of a detector; 12 MB of features each while it is fitted
MOST_LABELS, PHOTO_LEVELS = 4, 64  # different grey values of a label file at most, of a photo at least


class Support(NamedTuple):
    """Support images without duplicates: as given, their names, network inputs (3, S, S) and sizes (width, height).

    notes: sentences on duplicates and on how images were read. has_alpha: whether some have transparent parts.
    """

    images: list[ImageInput]
    names: list[str]
    squares: list[torch.Tensor]
    sizes: list[tuple[int, int]]
    notes: list[str]
    has_alpha: bool


def read_support(images: Sequence[ImageInput], decode: Callable[[ImageInput], Decoded]) -> Support:
    """Decodes support images; UserError if there are label files or black images among photos."""
    squares, sizes, levels, parts, names = [], [], [], [], image_names(images)
    for name, image in zip(names, images, strict=True):
        decoded, square = decode(image)
        if decoded:
            levels.append((sum(map(bool, decoded.convert("L").histogram())), name))
            parts.append((name, parts_of(decoded)))
        squares.append(square)
        sizes.append(decoded.size if decoded else (square.shape[2], square.shape[1]))
    flat = [name for count, name in levels if count <= MOST_LABELS]
    if flat and max(levels)[0] >= PHOTO_LEVELS:
        raise UserError(
            f"{len(flat)} of {len(images)} support images have at most {MOST_LABELS} grey values, as label files "
            f"and black images have, e.g. {flat[0]}: give normal images alone"
        )
    duplicates = equal_images(squares)
    notes = duplicate_notes(names, duplicates) + reading_summary(parts, len(images), "support images")
    kept = [number for number in range(len(images)) if number not in duplicates]
    columns = ([column[number] for number in kept] for column in (images, names, squares, sizes))
    return Support(*columns, notes, any(TRANSPARENT in of_image for _, of_image in parts))


def digest(square: torch.Tensor) -> str:
    """SHA-256 of the values in [0, 1] of a network input, in hexadecimal."""
    return hashlib.sha256(unit_range(square).cpu().numpy().tobytes()).hexdigest()


def equal_images(squares: Sequence[torch.Tensor], support: Sequence[str] = ()) -> dict[int, int]:
    """For each network input that equals an earlier one, the number of the first such, or SUPPORT.

    support: digests of the support images.
    """
    first = dict.fromkeys(support, SUPPORT)
    originals = [first.setdefault(digest(square), number) for number, square in enumerate(squares)]
    return {number: original for number, original in enumerate(originals) if number != original}


def duplicate_notes(names: Sequence[str], duplicates: dict[int, int]) -> list[str]:
    """A sentence for each image that is ignored, by the numbers of the image and of its original."""
    originals = [(number, "a support image" if of == SUPPORT else names[of]) for number, of in duplicates.items()]
    return [f"{names[number]}: duplicate of {original}, ignored" for number, original in originals]


def representatives(statistics: Sequence[torch.Tensor], count: int) -> list[int]:
    """Indices of `count` of K images, ascending: each next one is the farthest from those chosen before.

    The first is the one with the smallest mean distance to all. The order of the images does not matter, but for ties.

    statistics: tensors (K, D), compared as by `inspection.out_of_distribution`.
    """
    distances = relative_distances(statistics, statistics)
    chosen = [int(distances.mean(dim=1).argmin())]
    while len(chosen) < min(count, len(distances)):
        nearest = distances[chosen].amin(dim=0)
        nearest[chosen] = -1  # distances of an image to itself are not exactly 0, nor are those of equal images
        chosen.append(int(nearest.argmax()))
    return sorted(chosen)
