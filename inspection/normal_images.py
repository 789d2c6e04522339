"""Which normal images count: each once, duplicates are named; of many, those that represent all others best."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from datasets.images import unit_range
from inspection.out_of_distribution import relative_distances

SUPPORT = -1  # in place of the number of the original, where that is a support image
MOST_FITTED = 32  # support images in the memory of a detector; 12 MB of features each while it is fitted


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


def duplicate_notes(names: Sequence[str], found: dict[int, int]) -> list[str]:
    """A sentence for each image that is ignored, by the numbers of the image and of its original."""
    originals = {number: "a support image" if one == SUPPORT else names[one] for number, one in found.items()}
    return [f"{names[number]}: duplicate of {original}, ignored" for number, original in originals.items()]


def representatives(statistics: Sequence[torch.Tensor], count: int) -> list[int]:
    """Indices of `count` of K images, ascending: each next one is the farthest from those chosen before.

    The first is the one with the smallest mean distance to all. The order of the images does not matter, but for ties.

    statistics: tensors (K, D), compared as by `inspection.out_of_distribution`.
    """
    distances = relative_distances(statistics, statistics)
    chosen = [int(distances.mean(dim=1).argmin())]
    nearest = distances[chosen[0]]
    while len(chosen) < min(count, len(distances)):
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distances[chosen[-1]])
    return sorted(chosen)
