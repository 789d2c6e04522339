"""Duplicates among normal images: each image counts once, and the others are named."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from datasets.images import unit_range

SUPPORT = -1  # in place of the number of the original, where that is a support image


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
