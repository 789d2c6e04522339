"""The metrics of a round: of all test images, and of each defect type; and why some cannot be computed.

The metrics of a defect type compare its images with all normal images: its defective pixels with the other pixels of
its images and all pixels of the normal ones. Where a test set has one class only, or no masks, metrics are None, and
`GroundTruth.reasons` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from evaluation.metrics import (
    METRIC_NAMES,
    Ranking,
    ascending,
    auroc,
    average_precision,
    f1_max,
    pro,
    rank_groups,
    region_weights,
)
from utils.devices import upload

TYPE_METRICS = ("image_auroc", "pixel_auroc", "pro")  # of each defect type
AUROCS = ("image_auroc", "pixel_auroc")
IMAGE_METRICS = tuple(name for name in METRIC_NAMES if name.startswith("image"))
NO_NORMAL, NO_DEFECTIVE = "no normal test images", "no defective test images"
NO_MASK, NO_NORMAL_PIXEL = "no defective pixel is known: masks are missing or empty", "every pixel is defective"

Numbers = dict[str, float | None]  # by the key of the metric in the records


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
        of_types = {name: self._reasons(~self.labels | members) for name, members in self.members().items()}
        return self._reasons(np.ones_like(self.labels)), of_types

    def _reasons(self, images: np.ndarray) -> dict[str, str]:
        labels = self.labels[images]
        image = NO_NORMAL if labels.all() else "" if labels.any() else NO_DEFECTIVE
        pixel = ""
        if self.masks is None or not self.masks[images].any():
            pixel = NO_MASK if labels.any() else NO_DEFECTIVE
        elif not (
            ~self.masks[images] if self.valid_mask is None else self.valid_mask[images] & ~self.masks[images]
        ).any():
            pixel = NO_NORMAL_PIXEL
        found = {name: image if name.startswith("image") else pixel for name in METRIC_NAMES}
        return {name: reason for name, reason in found.items() if reason}


class RoundMetrics:
    """Computes the metrics of each round; values that do not depend on the round are computed once."""

    def __init__(self, truth: GroundTruth, device: torch.device, names: Sequence[str] = tuple(METRIC_NAMES)) -> None:
        """device: where the score maps are. names: the metrics, keys of METRIC_NAMES."""
        self.names = tuple(names)
        members = truth.members()
        self.defect_types = list(members)
        groups = [~truth.labels, *members.values()] if members else [np.ones_like(truth.labels)]
        has_pixels = truth.masks is not None and not set(names) <= set(IMAGE_METRICS)
        self.images = [_split(truth.labels, group, torch.device("cpu")) for group in groups]
        self.pixels, self.weights = None, None
        if has_pixels:
            valid = np.ones_like(truth.masks) if truth.valid_mask is None else truth.valid_mask
            self.pixels = [_split(truth.masks, valid & group[:, None, None], device) for group in groups]
            if "pro" in names:
                self.weights = [region_weights(truth.masks & group[:, None, None]) for group in groups]

    def of_round(self, image_scores: np.ndarray, maps: torch.Tensor | None) -> tuple[Numbers, dict[str, Numbers]]:
        """The metrics of all images and of each defect type.

        image_scores: (B,). maps: (B, S, S), on the device; None is enough for IMAGE_METRICS.
        """
        images = _rankings(torch.from_numpy(image_scores), self.images)
        pixels = [None] * len(images) if self.pixels is None else _rankings(maps.flatten(), self.pixels)
        weights = [None] * len(images) if self.weights is None else [np.concatenate(self.weights), *self.weights[1:]]
        everything, *of_types = zip(images, pixels, weights, strict=True)
        names = [name for name in TYPE_METRICS if name in self.names]
        by_type = {name: _numbers(names, *one) for name, one in zip(self.defect_types, of_types, strict=True)}
        return _numbers(self.names, *everything), by_type


Split = tuple[torch.Tensor, torch.Tensor]  # indices of the positives and of the negatives


def _split(positive: np.ndarray, chosen: np.ndarray, device: torch.device) -> Split:
    """The indices where `positive` is True and False, of those where `chosen` is True."""
    both = (chosen & positive, chosen & ~positive)
    return tuple(upload(torch.from_numpy(np.flatnonzero(one)), device) for one in both)


def _rankings(scores: torch.Tensor, groups: Sequence[Split]) -> list[Ranking | None]:
    """The ranking of all groups together, then of each group but the first with the negatives of the first one.

    None where one class is missing. The negatives of each group are sorted once.
    """
    positives = [scores[positive] for positive, _ in groups]
    everything, counts = torch.cat(positives), [len(negative) for _, negative in groups]
    if not len(everything) or not sum(counts):
        return [None] * len(groups)
    negatives = [ascending(scores[negative], everything) for _, negative in groups]
    chosen = [(everything, negatives, sum(counts))]
    for own, others, count in zip(positives[1:], negatives[1:], counts[1:], strict=True):
        chosen.append((own, [negatives[0], others], counts[0] + count))
    possible = [len(one[0]) > 0 and one[2] > 0 for one in chosen]
    ranked = iter(rank_groups([one for one, can in zip(chosen, possible, strict=True) if can]))
    return [next(ranked) if can else None for can in possible]


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
