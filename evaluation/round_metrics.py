"""The metrics of a round: of all test images, and of each kind of defect; and why some cannot be computed.

A kind's metrics compare its images with all normal images: its defective pixels with the other pixels of its images
and all pixels of the normal ones. Where a test set has one class only, or no masks, metrics are None, and
`Truth.reasons` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from evaluation.metrics import (
    METRIC_NAMES,
    Ranking,
    auroc,
    average_precision,
    f1_max,
    places_on,
    pro,
    rank_kinds,
    region_sizes,
)
from utils.devices import upload

KIND_METRICS = ("image_auroc", "pixel_auroc", "pro")
AUROCS = ("image_auroc", "pixel_auroc")
IMAGE_METRICS = tuple(name for name in METRIC_NAMES if name.startswith("image"))
NO_NORMAL, NO_DEFECTIVE = "no normal test images", "no defective test images"
NO_MASK, NO_NORMAL_PIXEL = "no defective pixel is known: masks are missing or empty", "every pixel is defective"

Numbers = dict[str, float | None]  # by the key of the metric in the records


class Truth(NamedTuple):
    """The ground truth of B test images.

    labels: (B,) bool, True for defective. masks: (B, S, S) bool, or None if no pixel is known to be defective. counted:
    (B, S, S) bool, the pixels with known ground truth, or None for all. kinds: the kind of defect of each image (not
    read for a normal one), or None for no metrics by kind.
    """

    labels: np.ndarray
    masks: np.ndarray | None
    counted: np.ndarray | None = None
    kinds: Sequence[str] | None = None

    def members(self) -> dict[str, np.ndarray]:
        """Indices of the images by kind, in the order of appearance, the normal images as the first, under ""."""
        if self.kinds is None:
            return {"": np.arange(len(self.labels))}
        found = {"": np.flatnonzero(~self.labels)}
        for index in np.flatnonzero(self.labels).tolist():
            found.setdefault(self.kinds[index], []).append(index)
        return {kind: np.asarray(indices, dtype=int) for kind, indices in found.items()}

    def reasons(self) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
        """Why metrics cannot be computed, by metric: of all images, and of each kind. Empty where all can be."""
        members = self.members()
        everything = self._reasons(np.arange(len(self.labels)))
        normal = members.pop("") if self.kinds is not None else []
        kinds = members if self.kinds is not None else {}
        return everything, {kind: self._reasons(np.append(normal, own).astype(int)) for kind, own in kinds.items()}

    def _reasons(self, images: np.ndarray) -> dict[str, str]:
        labels = self.labels[images]
        image = NO_NORMAL if labels.all() else "" if labels.any() else NO_DEFECTIVE
        pixel = ""
        if self.masks is None or not self.masks[images].any():
            pixel = NO_MASK if labels.any() else NO_DEFECTIVE
        elif not (~self.masks[images] if self.counted is None else self.counted[images] & ~self.masks[images]).any():
            pixel = NO_NORMAL_PIXEL
        found = {name: image if name.startswith("image") else pixel for name in METRIC_NAMES}
        return {name: reason for name, reason in found.items() if reason}


class RoundMetrics:
    """Computes the metrics of each round; values that do not depend on the round are computed once."""

    def __init__(self, truth: Truth, device: torch.device, names: Sequence[str] = tuple(METRIC_NAMES)) -> None:
        """device: where the score maps are. names: the metrics, keys of METRIC_NAMES."""
        self.names = tuple(names)
        members = truth.members()
        self.kinds = list(members)[1:]
        self.images = [_as_slice(indices) for indices in members.values()]
        self.labels = [truth.labels[images] for images in self.images]
        everything, _ = truth.reasons()
        self.has_images = "image_auroc" not in everything
        self.has_pixels = "pixel_auroc" not in everything and not set(names) <= set(IMAGE_METRICS)
        self.of_maps = [chosen if isinstance(chosen, slice) else _upload(chosen, device) for chosen in self.images]
        self.pixels, self.places, self.counted, self.regions = [], None, None, None
        if self.has_pixels:
            masks = [truth.masks[images] for images in self.images]
            self.pixels = masks
            if truth.counted is not None:
                known = [truth.counted[images] for images in self.images]
                self.pixels = [mask[counted] for mask, counted in zip(masks, known, strict=True)]
                self.counted = [_upload(np.flatnonzero(counted), device) for counted in known]
            if device.type != "cpu":
                self.places = places_on(device, self.pixels)
            if "pro" in names:
                self.regions = [region_sizes(mask) for mask in masks]

    def of_round(self, image_scores: np.ndarray, maps: torch.Tensor | None) -> tuple[Numbers, dict[str, Numbers]]:
        """The metrics of all images and of each kind.

        image_scores: (B,). maps: (B, S, S), on the device; None is enough for IMAGE_METRICS.
        """
        images, pixels = [None] * (1 + len(self.kinds)), [None] * (1 + len(self.kinds))
        if self.has_images:
            images = _rank([image_scores[chosen] for chosen in self.images], self.labels)
        if self.has_pixels:
            scores = [maps[chosen] for chosen in self.of_maps]
            if self.counted is not None:
                scores = [own.flatten()[counted] for own, counted in zip(scores, self.counted, strict=True)]
            pixels = _rank([own if self.places else own.numpy() for own in scores], self.pixels, self.places)
        everything = _numbers(self.names, images[0], pixels[0], self._weights(range(len(self.images))))
        names = [name for name in KIND_METRICS if name in self.names]
        kinds = [
            _numbers(names, images[part], pixels[part], self._weights([part])) for part in range(1, len(self.images))
        ]
        return everything, dict(zip(self.kinds, kinds, strict=True))

    def _weights(self, parts: Sequence[int]) -> np.ndarray | None:
        """The weight of each defective pixel of some parts, as evaluation.metrics.region_weights."""
        if self.regions is None:
            return None
        sizes, counts = zip(*(self.regions[part] for part in parts), strict=True)
        return 1 / (np.concatenate(sizes) * sum(counts))


def _as_slice(indices: np.ndarray) -> slice | np.ndarray:
    """Consecutive indices as a slice, which copies nothing."""
    if len(indices) and (np.diff(indices) == 1).all():
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return indices


def _upload(indices: np.ndarray, device: torch.device) -> torch.Tensor:
    return upload(torch.from_numpy(indices), device)


def _rank(
    scores: Sequence[np.ndarray | torch.Tensor],
    positive: Sequence[np.ndarray],
    places: Sequence[torch.Tensor] | None = None,
) -> list[Ranking | None]:
    """The ranking of all parts, then of each kind."""
    everything, kinds = rank_kinds(list(zip(scores, positive, strict=True)), places)
    return [everything, *kinds]


def _numbers(names: Sequence[str], image: Ranking | None, pixel: Ranking | None, weights: np.ndarray | None) -> Numbers:
    metrics = {"auroc": auroc, "ap": average_precision, "f1_max": f1_max}
    numbers: Numbers = {}
    for name in names:
        level, _, metric = name.partition("_")
        ranking = image if level == "image" else pixel
        if ranking is None:
            numbers[name] = None
        else:
            numbers[name] = pro(ranking, weights) if name == "pro" else metrics[metric](ranking)
    return numbers
