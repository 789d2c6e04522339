"""Duplicates among normal images: each image counts once, and the others are named."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def equal_images(squares: Sequence[torch.Tensor]) -> dict[int, int]:
    """For each network input that equals an earlier one, the number of the first such."""
    first: dict[str, int] = {}
    found = {}
    for number, square in enumerate(squares):
        earlier = first.setdefault(hashlib.sha256(square.cpu().numpy().tobytes()).hexdigest(), number)
        if earlier != number:
            found[number] = earlier
    return found


def duplicate_notes(names: Sequence[str], found: dict[int, int], what: str = "duplicate of") -> list[str]:
    """A sentence for each image that is ignored, by the numbers of the image and of its original."""
    return [f"{names[number]}: {what} {names[original]}, ignored" for number, original in found.items()]
