"""The metrics of a round, over all test images and by defect type.

The metrics of a defect type compare its images with all normal images: its defective pixels with the other pixels of
its images and all pixels of the normal images. If a test set has one class only, or no masks, metrics are None, and
`GroundTruth.reasons` gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch

from evaluation.metrics import (
    METRIC_NAMES,
    Counting,
    Ranking,
    ascending,
    auroc,
    average_precision,
    f1_max,
    pro,
    rankings,
    region_weights,
)
from utils.devices import upload

TYPE_METRICS = ("image_auroc", "pixel_auroc", "pro")  # of each defect type
AUROCS = ("image_auroc", "pixel_auroc")
IMAGE_METRICS = tuple(name for name in METRIC_NAMES if name.startswith("image"))
NO_NORMAL, NO_DEFECTIVE = "no normal test images", "no defective test images"
NO_MASK, NO_NORMAL_PIXEL = "no defective pixel is known: masks are missing or empty", "every pixel is defective"

IMAGES_AT_ONCE = 1024  # images whose pixels are ranked together; several parts take up to twice the time

Numbers = dict[str, float | None]  # by the key of the metric in the records
Split = tuple[torch.Tensor, torch.Tensor]  # indices or scores of the positives and of the negatives


class Maps(Protocol):
    """Score maps (B, S, S), such as a tensor."""

    def __getitem__(self, images: slice) -> torch.Tensor: ...


class GroundTruth(NamedTuple):
    """The ground truth of B test images.

    labels: (B,) bool, True for defective. masks: (B, S, S) bool, or None if no pixel is known to be defective.
    valid_mask: (B, S, S) bool, the pixels with known ground truth, or None for all. defect_types: of each image
    (ignored for normal images), or None for no metrics by defect type.
    """

    labels: np.ndarray
    masks: np.ndarray | None
    valid_mask: np.ndarray | None = None
    defect_types: Sequence[str] | None = None

    def members(self) -> dict[str, np.ndarray]:
        """The images (B,) bool of each defect type, in the order of appearance. Empty without defect types."""
        types = np.asarray([] if self.defect_types is None else self.defect_types, dtype=object)
        names = dict.fromkeys(types[self.labels].tolist() if len(types) else [])
        return {name: self.labels & (types == name) for name in names}

    def reasons(self) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
        """Why metrics cannot be computed, by metric: over all images, and by defect type. Empty if all can."""
        has_pixels = np.zeros((2, len(self.labels)), bool)  # whether an image has defective, and normal pixels
        for number in range(0 if self.masks is None else len(self.labels)):
            mask = self.masks[number]
            normal = ~mask if self.valid_mask is None else self.valid_mask[number] & ~mask
            has_pixels[:, number] = mask.any(), normal.any()
        by_type = {name: self._reasons(~self.labels | images, *has_pixels) for name, images in self.members().items()}
        return self._reasons(np.ones_like(self.labels), *has_pixels), by_type

    def _reasons(self, images: np.ndarray, has_defective: np.ndarray, has_normal: np.ndarray) -> dict[str, str]:
        labels = self.labels[images]
        image = NO_NORMAL if labels.all() else "" if labels.any() else NO_DEFECTIVE
        pixel = ""
        if not has_defective[images].any():
            pixel = NO_MASK if labels.any() else NO_DEFECTIVE
        elif not has_normal[images].any():
            pixel = NO_NORMAL_PIXEL
        reasons = {name: image if name.startswith("image") else pixel for name in METRIC_NAMES}
        return {name: reason for name, reason in reasons.items() if reason}


class RoundMetrics:
    """Computes the metrics of each round; values that do not depend on the round are computed once.

    Pixels are ranked in parts of IMAGES_AT_ONCE images. The parts do not change the metrics.
    """

    def __init__(self, truth: GroundTruth, device: torch.device, names: Sequence[str] = tuple(METRIC_NAMES)) -> None:
        """device: where the score maps are. names: the metrics, keys of METRIC_NAMES."""
        self.names, self.truth = tuple(names), truth
        members = truth.members()
        self.defect_types = list(members)
        self.groups = [~truth.labels, *members.values()] if members else [np.ones_like(truth.labels)]
        self.images = [_split(truth.labels, group, torch.device("cpu")) for group in self.groups]
        self.has_pixels = truth.masks is not None and not set(names) <= set(IMAGE_METRICS)
        self.parts = [slice(at, at + IMAGES_AT_ONCE) for at in range(0, len(truth.labels), IMAGES_AT_ONCE)]
        self.pixels, self.weights = None, None
        if self.has_pixels and len(self.parts) == 1:
            valid = np.ones_like(truth.masks) if truth.valid_mask is None else truth.valid_mask
            self.pixels = [_split(truth.masks, valid & group[:, None, None], device) for group in self.groups]
        if self.has_pixels and "pro" in names:
            regions = ([region_weights(truth.masks[part][group[part]]) for part in self.parts] for group in self.groups)
            self.weights = [np.concatenate(parts) for parts in regions]

    def of_round(self, image_scores: np.ndarray, maps: Maps | None) -> tuple[Numbers, dict[str, Numbers]]:
        """The metrics of all images and of each defect type.

        image_scores: (B,). maps: (B, S, S), on the device; None is enough for IMAGE_METRICS.
        """
        scores = torch.from_numpy(image_scores)
        images = _rankings(lambda: [[(scores[positive], scores[negative]) for positive, negative in self.images]])
        pixels = _rankings(partial(self._pixels, maps)) if self.has_pixels else [None] * len(images)
        weights = [None] * len(images) if self.weights is None else [np.concatenate(self.weights), *self.weights[1:]]
        overall, *by_type = zip(images, pixels, weights, strict=True)
        names = [name for name in TYPE_METRICS if name in self.names]
        numbers = {name: _numbers(names, *ranked) for name, ranked in zip(self.defect_types, by_type, strict=True)}
        return _numbers(self.names, *overall), numbers

    def _pixels(self, maps: Maps) -> Iterator[list[Split]]:
        """The scores of the defective and the normal pixels of each group, part by part."""
        masks, valid_mask = self.truth.masks, self.truth.valid_mask
        for part in self.parts:
            part_maps = maps[part]
            if self.pixels is not None:
                flat = part_maps.flatten()
                yield [(flat[positive], flat[negative]) for positive, negative in self.pixels]
                continue
            splits, device = [], part_maps.device
            for group in self.groups:
                rows = np.flatnonzero(group[part])
                mask, scores = masks[part][rows], part_maps[torch.from_numpy(rows).to(device)].cpu().numpy()
                normal = ~mask if valid_mask is None else valid_mask[part][rows] & ~mask
                splits.append(tuple(torch.from_numpy(scores[pixels]).to(device) for pixels in (mask, normal)))
            yield splits


def _split(positive: np.ndarray, valid: np.ndarray, device: torch.device) -> Split:
    """The indices of the positives and of the negatives where `valid` is True."""
    masks = (valid & positive, valid & ~positive)
    return tuple(upload(torch.from_numpy(np.flatnonzero(mask)), device) for mask in masks)


def _rankings(parts: Callable[[], Iterable[list[Split]]]) -> list[Ranking | None]:
    """The ranking of all groups together, then of each group but the first together with the negatives of the first.

    None where one class is missing. parts: makes the scores of the positives and negatives of each group, in one or
    more parts; it is called twice, since only negatives above the lowest positive need to be sorted.
    """
    by_group = zip(*([positive for positive, _ in part] for part in parts()), strict=True)
    positives = [torch.cat(group) for group in by_group]
    all_positives = torch.cat(positives)
    if not len(all_positives):
        return [None] * len(positives)
    groups = [range(len(positives)), *((0, number) for number in range(1, len(positives)))]  # whose negatives count
    countings = [Counting(scores) if len(scores) else None for scores in (all_positives, *positives[1:])]
    for part in parts():
        negatives = [(ascending(negative, all_positives), len(negative)) for _, negative in part]
        for counting, numbers in zip(countings, groups, strict=True):
            for number in numbers if counting else ():
                counting.add(*negatives[number])
    ranked = iter(rankings([counting for counting in countings if counting and counting.negatives]))
    return [next(ranked) if counting and counting.negatives else None for counting in countings]


def _numbers(names: Sequence[str], image: Ranking | None, pixel: Ranking | None, weights: np.ndarray | None) -> Numbers:
    metrics = {"auroc": auroc, "ap": average_precision, "f1_max": f1_max, "": partial(pro, weights=weights)}
    numbers: Numbers = {}
    for name in names:
        level, _, metric = name.partition("_")  # "pro" has no level
        ranking = image if level == "image" else pixel
        numbers[name] = None if ranking is None else metrics[metric](ranking)
    return numbers
