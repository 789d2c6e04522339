"""Images through the network, and what the scorers keep of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from scorers.base import FeatureMaps, Prepared, Scorer
from scorers.views import GREY_VIEW, support_views


class FeatureNetwork(Protocol):
    """What scoring needs of a network; `models.stn.STNResNet` is one."""

    img_size: int

    def features(self, x: torch.Tensor) -> FeatureMaps:
        """Feature maps of images (B, 3, S, S) in [0, 1]."""


class FeatureStore:
    """What each of several scorers keeps of a number of images, or of their support views; filled a batch at a time.

    with_views: whether each scorer keeps its own `views` of an image, or the image alone.
    """

    def __init__(self, scorers: Sequence[Scorer], images: int, with_views: bool = False) -> None:
        self.scorers, self.images = scorers, images
        self.per_image = {scorer.name: len(scorer.views) if with_views else 1 for scorer in scorers}
        self.prepared: dict[str, Prepared] = {}

    def write(self, start: int, maps: FeatureMaps) -> None:
        """Keeps the feature maps of the images from number `start` on."""
        for scorer in self.scorers:
            self.write_rows(scorer.name, start, scorer.prepare(maps))

    def write_rows(self, name: str, start: int, prepared: Prepared) -> None:
        """Keeps prepared features of one scorer, from row `start` on."""
        if name not in self.prepared:
            self.prepared[name] = [room_for(tensor, self.images * self.per_image[name]) for tensor in prepared]
        for tensor, rows in zip(self.prepared[name], prepared, strict=True):
            tensor[start : start + len(rows)] = rows

    def copy_image(self, number: int, image: dict[str, Prepared]) -> None:
        """Keeps as image `number` what `part` of a store gave of one image."""
        for name, prepared in image.items():
            self.write_rows(name, number * self.per_image[name], prepared)

    def part(self, first: int, last: int) -> dict[str, Prepared]:
        """What is kept of the images `first` to `last` (exclusive), in the same memory."""
        return {
            name: [tensor[first * self.per_image[name] : last * self.per_image[name]] for tensor in prepared]
            for name, prepared in self.prepared.items()
        }

    @property
    def nbytes(self) -> int:
        """Memory of all that is kept."""
        return sum(tensor.nbytes for prepared in self.prepared.values() for tensor in prepared)


def room_for(like: torch.Tensor, count: int) -> torch.Tensor:
    """An empty tensor for `count` images, its dimensions in the same order in memory as those of `like`."""
    order = sorted(range(like.dim()), key=lambda axis: -like.stride(axis))
    shape = [count if axis == 0 else like.shape[axis] for axis in order]
    return like.new_empty(shape).permute([order.index(axis) for axis in range(like.dim())])


def take_images(prepared: Prepared, order: torch.Tensor) -> Prepared:
    """A copy with the images in the given order."""
    copies = [room_for(tensor, len(order)) for tensor in prepared]
    for copy, tensor in zip(copies, prepared, strict=True):
        copy[:] = tensor[order]
    return copies


def without_images(prepared: Prepared, start: int, end: int) -> Prepared:
    """A copy that lacks the images `start` to `end`."""
    copies = []
    for tensor in prepared:
        copy = room_for(tensor, len(tensor) - (end - start))
        copy[:start], copy[start:] = tensor[:start], tensor[end:]
        copies.append(copy)
    return copies


def write_support_image(
    store: FeatureStore, number: int, network: FeatureNetwork, image: torch.Tensor, batch_size: int
) -> None:
    """Keeps the features of the support views of image `number`, (3, S, S) in [0, 1].

    A view that several scorers need goes through the network once. The grey view of a grey image is the image itself,
    which equals it up to rounding.
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
