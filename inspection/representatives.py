"""Chooses the support images that represent all others best, where there are many."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inspection.out_of_distribution import relative_distances

MOST_FITTED = 32  # support images in the memory of a detector; 12 MB of features each while it is fitted


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
