"""Runs images through the network and stores the features that each scorer needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from scorers.base import FeatureMaps, Prepared, Scorer
from scorers.views import GREY_VIEW, support_views


class FeatureNetwork(Protocol):
    """The interface that scoring requires of a network; `models.stn.STNResNet` implements it."""

    img_size: int

    def features(self, x: torch.Tensor) -> FeatureMaps:
        """Feature maps of images (B, 3, S, S) in [0, 1], finest layer first."""


class FeatureStore:
    """Prepared features of a fixed number of images for several scorers, filled batch by batch.

    images: number of images. with_views: store each scorer's own `views` of every image; otherwise the image alone.
    """

    def __init__(self, scorers: Sequence[Scorer], images: int, with_views: bool = False) -> None:
        self.scorers, self.images = scorers, images
        self.per_image = {scorer.name: len(scorer.views) if with_views else 1 for scorer in scorers}
        self.prepared: dict[str, Prepared] = {}

    def write(self, start: int, maps: FeatureMaps) -> None:
        """Prepares and stores the feature maps of consecutive images, the first at index `start`."""
        for scorer in self.scorers:
            self.write_rows(scorer.name, start, scorer.prepare(maps))

    def write_rows(self, name: str, start: int, prepared: Prepared) -> None:
        """Stores prepared features of one scorer, the first at row `start`."""
        if name not in self.prepared:
            self.prepared[name] = [room_for(tensor, self.images * self.per_image[name]) for tensor in prepared]
        for tensor, rows in zip(self.prepared[name], prepared, strict=True):
            tensor[start : start + len(rows)] = rows

    def copy_image(self, number: int, image: dict[str, Prepared]) -> None:
        """Stores the features of one image, as returned by `part`, at index `number`."""
        for name, prepared in image.items():
            self.write_rows(name, number * self.per_image[name], prepared)

    def part(self, first: int, last: int) -> dict[str, Prepared]:
        """Features of the images `first` to `last` (exclusive) by scorer name, as views without a copy."""
        return {
            name: [tensor[first * self.per_image[name] : last * self.per_image[name]] for tensor in prepared]
            for name, prepared in self.prepared.items()
        }

    @property
    def nbytes(self) -> int:
        """Size of the stored features in bytes."""
        return sum(tensor.nbytes for prepared in self.prepared.values() for tensor in prepared)


def room_for(like: torch.Tensor, count: int) -> torch.Tensor:
    """An uninitialised tensor for `count` images, with the memory layout of `like`."""
    order = sorted(range(like.dim()), key=lambda axis: -like.stride(axis))
    shape = [count if axis == 0 else like.shape[axis] for axis in order]
    return like.new_empty(shape).permute([order.index(axis) for axis in range(like.dim())])


def take_images(prepared: Prepared, order: torch.Tensor) -> Prepared:
    """A copy of the prepared features with the images in the given order."""
    copies = [room_for(tensor, len(order)) for tensor in prepared]
    for copy, tensor in zip(copies, prepared, strict=True):
        copy[:] = tensor[order]
    return copies


def without_images(prepared: Prepared, start: int, end: int) -> Prepared:
    """A copy of the prepared features without the images `start` to `end` (exclusive)."""
    copies = []
    for tensor in prepared:
        copy = room_for(tensor, len(tensor) - (end - start))
        copy[:start], copy[start:] = tensor[:start], tensor[end:]
        copies.append(copy)
    return copies


def write_support_image(
    store: FeatureStore, number: int, network: FeatureNetwork, image: torch.Tensor, batch_size: int
) -> None:
    """Computes and stores the features of the support views of one image.

    A view that several scorers need goes through the network once. For a grey image, the features of the image are
    reused for its grey view; both are equal up to rounding.

    number: index of the image in the store. image: (3, S, S) in [0, 1]. batch_size: views per network pass.
    """
    views, needed = support_views(image[None]), sorted({view for scorer in store.scorers for view in scorer.views})
    is_grey = GREY_VIEW in needed and bool((image == image[:1]).all())
    for batch in torch.tensor(needed[: len(needed) - is_grey]).split(batch_size):
        maps, numbers = network.features(views[batch.to(views.device)]), batch.tolist()
        for scorer in store.scorers:
            rows = [row for row, view in enumerate(numbers) if view in scorer.views]
            if rows:
                own = maps if len(rows) == len(numbers) else [layer[rows] for layer in maps]
                first = number * len(scorer.views) + scorer.views.index(numbers[rows[0]])
                store.write_rows(scorer.name, first, scorer.prepare(own))
    for scorer in store.scorers:
        if is_grey and GREY_VIEW in scorer.views:
            start = number * len(scorer.views)
            original = [tensor[start : start + 1] for tensor in store.prepared[scorer.name]]
            store.write_rows(scorer.name, start + scorer.views.index(GREY_VIEW), original)
