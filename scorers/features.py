"""Runs images through the network and stores the features that each scorer needs."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import torch

from scorers.base import FeatureMaps, Prepared, Scorer
from scorers.left_out import allocate
from scorers.views import VIEWS_PER_IMAGE, support_views
from utils.devices import free_memory, release_freed_memory, upload
from utils.errors import UserError

MOST_BYTES, PART_BYTES = 2**30, 128 * 2**20  # largest size of features in host memory; of a part of those in a file
CUDA_SHARE = 0.5  # share of CUDA's free memory for a network pass, and for features; distances need the rest
CUDA_IMAGES = 64  # largest number of images per network pass; not measured


class FeatureNetwork(Protocol):
    """The interface that scoring requires of a network; `models.stn.STNResNet` implements it."""

    img_size: int

    def features(self, x: torch.Tensor) -> FeatureMaps:
        """Feature maps of images (B, 3, S, S) in [0, 1], finest layer first."""


def images_per_pass(network: FeatureNetwork, device: torch.device, on_cpu: int) -> int:
    """Images per network pass: `on_cpu` on the CPU; on CUDA as many as fit into CUDA_SHARE of the free memory.

    On CUDA at most CUDA_IMAGES. The memory per image is measured by passing one.
    """
    if device.type == "cpu":
        return on_cpu
    image = torch.zeros(1, 3, network.img_size, network.img_size, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    network.features(image)
    per_image = torch.cuda.max_memory_allocated(device) - before
    return max(1, min(CUDA_IMAGES, int(CUDA_SHARE * free_memory(device)) // max(1, per_image)))


class FeatureStore:
    """Prepared features of a fixed number of images for several scorers, filled batch by batch.

    images: number of images. with_views: store the `views` of each scorer for every image; otherwise the image alone.
    folder: features that exceed MOST_BYTES on the CPU, or CUDA_SHARE of the free memory on CUDA, are stored in a
    temporary file in this folder; None: all stay in memory.

    prepared: features by scorer, of all images, or of the last part of them if there is a file.
    """

    def __init__(
        self, scorers: Sequence[Scorer], images: int, with_views: bool = False, folder: Path | None = None
    ) -> None:
        self.scorers, self.images = scorers, images
        self.per_image = {scorer.name: len(scorer.views) if with_views else 1 for scorer in scorers}
        self.prepared: dict[str, Prepared] = {}
        self.folder, self.at_once = folder, images  # at_once: images per part
        self._file: BinaryIO | None = None
        self._filed = 0  # number of parts in the file

    def write(self, start: int, maps: FeatureMaps) -> None:
        """Prepares and stores the feature maps of consecutive images, the first at index `start`.

        With a folder, all batches but the last have the same size and come in order.
        """
        prepared = {scorer.name: scorer.prepare(maps) for scorer in self.scorers}
        if self.folder and not self.prepared:
            self._divide(prepared, self.folder)
        if start // self.at_once > self._filed:
            for tensor in self._tensors():
                self._file.write(_in_memory_order(tensor).cpu().numpy())
            self._filed += 1
        for name, rows in prepared.items():
            self.write_rows(name, start % self.at_once, rows)

    def _divide(self, first: dict[str, Prepared], folder: Path) -> None:
        """Chooses the size of a part from the first batch, and opens the file if there are several."""
        tensors = [tensor for prepared in first.values() for tensor in prepared]
        batch, per_image = len(tensors[0]), sum(tensor[0].nbytes for tensor in tensors)
        needed, device = per_image * self.images, tensors[0].device
        if needed <= (MOST_BYTES if device.type == "cpu" else CUDA_SHARE * free_memory(device)):
            return
        self.at_once = max(1, PART_BYTES // (per_image * batch)) * batch
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if needed > free:
                raise UserError(
                    f"the features of {self.images} images need {needed / 2**30:.1f} GB of disk in {folder}, "
                    f"{free / 2**30:.1f} GB are free: make room, set XDG_CACHE_HOME to a folder on another disk, or "
                    "score fewer images or one scorer",
                    ("scorer",),
                )
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, it has no name
            weakref.finalize(self, self._file.close)
        except OSError as error:
            raise UserError(f"cannot write features to {folder}: {error.strerror}") from error
        print(f"storing the features of {self.images} images, {needed / 2**30:.1f} GB, in a temporary file in {folder}")

    @property
    def is_in_parts(self) -> bool:
        """Whether features are in a file, part by part."""
        return self._file is not None

    def parts(self, name: str) -> Iterator[Prepared]:
        """The features of a scorer for consecutive images; all images at once unless there is a file."""
        tensors = self._tensors()
        sizes = [tensor.nbytes for tensor in tensors]
        for part in range(self._filed):
            read = []
            for number, like in enumerate(tensors):
                if not any(like is tensor for tensor in self.prepared[name]):
                    continue
                host = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
                self._file.seek(part * sum(sizes) + sum(sizes[:number]))
                self._file.readinto(_in_memory_order(host).numpy())
                read.append(upload(host, like.device))
            yield read
            del read, host
            release_freed_memory()
        rows = (self.images - self._filed * self.at_once) * self.per_image[name]
        yield [tensor[:rows] for tensor in self.prepared[name]]

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for prepared in self.prepared.values() for tensor in prepared]

    def write_rows(self, name: str, start: int, prepared: Prepared) -> None:
        """Stores prepared features of one scorer, the first at row `start`."""
        if name not in self.prepared:
            count = self.at_once * self.per_image[name]
            require_memory(sum(tensor[0].nbytes for tensor in prepared) * count, prepared[0].device, count)
            self.prepared[name] = [allocate(tensor, count) for tensor in prepared]
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
        return sum(tensor.nbytes for tensor in self._tensors())


def _in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor from `allocate` with its axes in the order of memory."""
    return tensor.permute(sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis)))


def require_memory(needed: int, device: torch.device, images: int) -> None:
    """Raises UserError unless `needed` bytes are free on `device`; the system would kill the process without a message.

    images: their number, for the message.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        raise UserError(
            f"the features of {images} images need {needed / 2**30:.1f} GB of memory, {free / 2**30:.1f} GB are free: "
            "score fewer images at a time, or one scorer",
            ("img_size", "scorer"),
        )


def write_support_images(
    store: FeatureStore, numbers: Sequence[int], network: FeatureNetwork, images: torch.Tensor, batch_size: int
) -> None:
    """Computes and stores the features of the support views of images.

    A view that several scorers need passes through the network once. On the CPU, a network pass has views of one image
    only, so that features do not depend on other images. On CUDA, a pass has views of several images.

    numbers: the indices of the images in the store. images: (K, 3, S, S) in [0, 1]. batch_size: views per network pass.
    """
    needed = sorted({view for scorer in store.scorers for view in scorer.views})
    at_once = 1 if images.device.type == "cpu" else max(1, batch_size // len(needed))
    for start in range(0, len(images), at_once):
        group = slice(start, start + at_once)
        _write_together(store, numbers[group], network, images[group], needed, batch_size)


def _write_together(
    store: FeatureStore,
    numbers: Sequence[int],
    network: FeatureNetwork,
    images: torch.Tensor,
    needed: Sequence[int],
    batch_size: int,
) -> None:
    """`write_support_images` for images that share network passes. needed: the views; a pass has some of all images."""
    views = support_views(images).unflatten(0, (VIEWS_PER_IMAGE, len(images)))
    step = max(1, batch_size // len(images))
    for batch in (needed[at : at + step] for at in range(0, len(needed), step)):
        maps = network.features(torch.stack([views[view] for view in batch], dim=1).flatten(0, 1))
        for scorer in store.scorers:
            places = [place for place, view in enumerate(batch) if view in scorer.views]
            if places:
                prepared = scorer.prepare([_pick(layer, places, len(batch)) for layer in maps])
                first, count = scorer.views.index(batch[places[0]]), len(places)
                for image, number in enumerate(numbers):
                    rows = [tensor[image * count : (image + 1) * count] for tensor in prepared]
                    store.write_rows(scorer.name, number * len(scorer.views) + first, rows)


def _pick(layer: torch.Tensor, places: Sequence[int], views: int) -> torch.Tensor:
    """The rows at `places` of each image in `layer` (images * views, ...); `layer` itself if these are all rows.

    Consecutive places are sliced, because a list of indices would have to be copied to the device.
    """
    if len(places) == views:
        return layer
    runs = [[places[0], places[0]]]
    for place in places:
        if place > runs[-1][1] + 1:
            runs.append([place, place])
        runs[-1][1] = place
    return torch.cat([image[first : last + 1] for image in layer.split(views) for first, last in runs])
