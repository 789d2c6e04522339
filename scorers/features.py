"""Images through the network, and what the scorers keep of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from scorers.base import FeatureMaps, Prepared, Scorer
from scorers.views import VIEWS_PER_IMAGE, support_views


class FeatureNetwork(Protocol):
    """What scoring needs of a network; `models.stn.STNResNet18` is one."""

    img_size: int

    def features(self, x: torch.Tensor) -> FeatureMaps:
        """Feature maps of images (B, 3, S, S) in [0, 1]."""


class FeatureStore:
    """What each of several scorers keeps of `count` images; filled a batch at a time."""

    def __init__(self, scorers: Sequence[Scorer], count: int) -> None:
        self.scorers, self.count = scorers, count
        self.prepared: dict[str, Prepared] = {}

    def write(self, start: int, maps: FeatureMaps) -> None:
        """Keeps the feature maps of the images from number `start` on."""
        for scorer in self.scorers:
            new = scorer.prepare(maps)
            kept = self.prepared.setdefault(scorer.name, [])
            if not kept:
                kept.extend(room_for(tensor, self.count) for tensor in new)
            for tensor, of_batch in zip(kept, new, strict=True):
                tensor[start : start + len(of_batch)] = of_batch

    def copy(self, start: int, images: dict[str, Prepared]) -> None:
        """Keeps, from number `start` on, what `part` of a store gave."""
        for name, prepared in images.items():
            if name not in self.prepared:
                self.prepared[name] = [room_for(tensor, self.count) for tensor in prepared]
            for tensor, part in zip(self.prepared[name], prepared, strict=True):
                tensor[start : start + len(part)] = part

    def part(self, start: int, end: int) -> dict[str, Prepared]:
        """What is kept of the images `start` to `end`, in the same memory."""
        return {name: [tensor[start:end] for tensor in prepared] for name, prepared in self.prepared.items()}

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
    """Keeps the features of all views of support image `number`, (3, S, S) in [0, 1].

    The grey view of a grey image is the image itself, which equals it up to rounding.
    """
    start, views = number * VIEWS_PER_IMAGE, support_views(image[None])
    is_grey = bool((image == image[:1]).all())
    different = views[: len(views) - is_grey]
    for done, batch in enumerate(different.split(batch_size)):
        store.write(start + done * batch_size, network.features(batch))
    if is_grey:
        store.copy(start + len(different), store.part(start, start + 1))
