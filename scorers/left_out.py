"""Leaves images out of prepared features, so that support images can be scored by fits without them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from utils.progress import ProgressBar

Rows = list[torch.Tensor]  # prepared features, as scorers.base.Prepared
FOLDS = 8  # groups of support images that are left out in turn


def allocate(like: torch.Tensor, count: int) -> torch.Tensor:
    """An uninitialised tensor for `count` images, with the memory layout of `like`."""
    order = sorted(range(like.dim()), key=lambda axis: -like.stride(axis))
    shape = [count if axis == 0 else like.shape[axis] for axis in order]
    return like.new_empty(shape).permute([order.index(axis) for axis in range(like.dim())])


def without_images(prepared: Rows, start: int, end: int) -> Rows:
    """A copy of the prepared features without the images `start` to `end` (exclusive)."""
    copies = []
    for tensor in prepared:
        copy = allocate(tensor, len(tensor) - (end - start))
        copy[:start], copy[start:] = tensor[:start], tensor[end:]
        copies.append(copy)
    return copies


def left_out(support: Rows, views: int, scored: int, measure: Callable[[Rows, Rows], torch.Tensor]) -> torch.Tensor:
    """`measure` of the first `scored` views of each image, given all views of other images: (K * scored, ...).

    Up to FOLDS images are left out one at a time. More are left out in FOLDS groups of consecutive images, so that the
    number of fits does not grow with the number of images.

    measure: a function of the features of the other images and of those that are left out.
    """
    images = len(support[0]) // views
    count = min(images, FOLDS)
    edges = itertools.pairwise(images * fold // count * views for fold in range(count + 1))
    measured = []
    for start, end in ProgressBar("cross-fitting", edges, count, "folds"):
        fold = [tensor[start:end].unflatten(0, (-1, views))[:, :scored].flatten(0, 1) for tensor in support]
        measured.append(measure(without_images(support, start, end), fold))
    return torch.cat(measured)
