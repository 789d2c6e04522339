"""The metrics of a round: of all test images, and of each defect type; and why some cannot be computed.

The metrics of a defect type compare its images with all normal images: its defective pixels with the other pixels of
its images and all pixels of the normal ones. Where a test set has one class only, or no masks, metrics are None, and
`GroundTruth.reasons` says why.
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

IMAGES_AT_ONCE = 1024  # whose pixels are ranked; several parts take up to twice the time

Numbers = dict[str, float | None]  # by the key of the metric in the records
Split = tuple[torch.Tensor, torch.Tensor]  # indices or scores of the positives and of the negatives


class Maps(Protocol):
    """Score maps (B, S, S), such as a tensor."""

    def __getitem__(self, images: slice) -> torch.Tensor: ...


class GroundTruth(NamedTuple):
    """The ground truth of B test images.

    labels: (B,) bool, True for defective. masks: (B, S, S) bool, or None if no pixel is known to be defective.
    valid_mask: (B, S, S) bool, the pixels with known ground truth, or None for all. defect_types: of each image (not
    read for a normal one), or None for no metrics by defect type.
    """

    labels: np.ndarray
    masks: np.ndarray | None
    valid_mask: np.ndarray | None = None
    defect_types: Sequence[str] | None = None

    def members(self) -> dict[str, np.ndarray]:
        """(B,) bool by defect type, the images of each, in the order of appearance. Empty without defect types."""
        types = np.asarray([] if self.defect_types is None else self.defect_types, dtype=object)
        names = dict.fromkeys(types[self.labels].tolist() if len(types) else [])
        return {name: self.labels & (types == name) for name in names}

    def reasons(self) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
        """Why metrics cannot be computed, by metric: of all images, and of each defect type. Empty where all can be."""
        have = np.zeros((2, len(self.labels)), bool)  # images with defective pixels, and with normal ones
        for number in range(0 if self.masks is None else len(self.labels)):
            mask = self.masks[number]
            normal = ~mask if self.valid_mask is None else self.valid_mask[number] & ~mask
            have[:, number] = mask.any(), normal.any()
        of_types = {name: self._reasons(~self.labels | members, *have) for name, members in self.members().items()}
        return self._reasons(np.ones_like(self.labels), *have), of_types

    def _reasons(self, images: np.ndarray, has_defective: np.ndarray, has_normal: np.ndarray) -> dict[str, str]:
        labels = self.labels[images]
        image = NO_NORMAL if labels.all() else "" if labels.any() else NO_DEFECTIVE
        pixel = ""
        if not has_defective[images].any():
            pixel = NO_MASK if labels.any() else NO_DEFECTIVE
        elif not has_normal[images].any():
            pixel = NO_NORMAL_PIXEL
        found = {name: image if name.startswith("image") else pixel for name in METRIC_NAMES}
        return {name: reason for name, reason in found.items() if reason}


class RoundMetrics:
    """Computes the metrics of each round; values that do not depend on the round are computed once.

    Pixels are ranked in parts of IMAGES_AT_ONCE images. The counts, and so the numbers, are those of all at once.
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
            self.weights = [np.concatenate(of_group) for of_group in regions]

    def of_round(self, image_scores: np.ndarray, maps: Maps | None) -> tuple[Numbers, dict[str, Numbers]]:
        """The metrics of all images and of each defect type.

        image_scores: (B,). maps: (B, S, S), on the device; None is enough for IMAGE_METRICS.
        """
        scores = torch.from_numpy(image_scores)
        images = _rankings(lambda: [[(scores[one], scores[other]) for one, other in self.images]])
        pixels = _rankings(partial(self._pixels, maps)) if self.has_pixels else [None] * len(images)
        weights = [None] * len(images) if self.weights is None else [np.concatenate(self.weights), *self.weights[1:]]
        everything, *of_types = zip(images, pixels, weights, strict=True)
        names = [name for name in TYPE_METRICS if name in self.names]
        by_type = {name: _numbers(names, *one) for name, one in zip(self.defect_types, of_types, strict=True)}
        return _numbers(self.names, *everything), by_type

    def _pixels(self, maps: Maps) -> Iterator[list[Split]]:
        """The scores of the defective and the normal pixels of each group, part by part."""
        masks, valid_mask = self.truth.masks, self.truth.valid_mask
        for part in self.parts:
            of_part = maps[part]
            if self.pixels is not None:
                flat = of_part.flatten()
                yield [(flat[one], flat[other]) for one, other in self.pixels]
                continue
            found = []
            for group in self.groups:
                rows = np.flatnonzero(group[part])
                mask, own = masks[part][rows], of_part[torch.from_numpy(rows).to(of_part.device)].cpu().numpy()
                normal = ~mask if valid_mask is None else valid_mask[part][rows] & ~mask
                found.append(tuple(torch.from_numpy(own[chosen]).to(of_part.device) for chosen in (mask, normal)))
            yield found


def _split(positive: np.ndarray, chosen: np.ndarray, device: torch.device) -> Split:
    """The indices where `positive` is True and False, of those where `chosen` is True."""
    both = (chosen & positive, chosen & ~positive)
    return tuple(upload(torch.from_numpy(np.flatnonzero(one)), device) for one in both)


def _rankings(parts: Callable[[], Iterable[list[Split]]]) -> list[Ranking | None]:
    """The ranking of all groups together, then of each group but the first with the negatives of the first one.

    None where one class is missing. parts: makes the scores of the positives and negatives of each group, in one or
    more parts; it is called twice, since only negatives above the lowest positive need to be sorted.
    """
    found = list(zip(*([one for one, _ in part] for part in parts()), strict=True))
    positives = [torch.cat(of_group) for of_group in found]
    everything = torch.cat(positives)
    if not len(everything):
        return [None] * len(positives)
    groups = [range(len(positives)), *((0, number) for number in range(1, len(positives)))]
    counted = [Counting(own) if len(own) else None for own in (everything, *positives[1:])]
    for part in parts():
        negatives = [(ascending(other, everything), len(other)) for _, other in part]
        for one, chosen in zip(counted, groups, strict=True):
            for group in chosen if one else ():
                one.add(*negatives[group])
    ranked = iter(rankings([one for one in counted if one and one.negatives]))
    return [next(ranked) if one and one.negatives else None for one in counted]


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
