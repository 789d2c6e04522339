"""Combinations of scorers: the weighted geometric mean of their distances, each on a scale from the support images.

Each distance map is divided by its mean over support images that were left out of the fit, so 1 is the distance of a
region of a new normal image. With weights w that add up to 1, the result is the product of the d ** w.

`combined` joins `neighbours`, which finds appearances that no support image has anywhere, and `positions`, which finds
appearances that none has at the same position. If support images agree position by position, the left-out distance of
`positions` is small, and a deviation at a position has a large effect. If parts lie anywhere in the image, it is large,
and `neighbours` dominates. The score map gives `positions` the larger weight, as its maps are sharper; the image score
gives it to `neighbours`, which confuses fewer normal images with defective ones.

Normal images also differ as a whole, for example in light, focus or pose, and then all their distances are larger. The
lower quartile of a map shows by how much, as a defect rarely covers three quarters of an image. `combined` divides the
map by a power of it (`image_levels`). So a deviation of the whole image counts less than one of a part of it.

With several backbones (models/networks.py), each backbone has separate scorers.

At the border of an image, features differ from others, whatever the image shows. In the image score of `combined`, the
border therefore has a smaller weight (`border_weight`, scorers/maps.py), and the local averages of `neighbours` do not
include zeros beyond the border.

benchmarks/scorers.py measures the weights, powers and windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from scorers.base import FeatureMaps, Fitted, Prepared, ScorePrior, Scorer
from scorers.left_out import left_out, without_images
from scorers.neighbours import Neighbours, NeighboursConfig
from scorers.positions import WINDOW, Positions
from utils.stages import StageClock

MAP_WEIGHT, SCORE_WEIGHT = 0.35, 0.65  # of `neighbours` in the score map and in the image score
BORDER_WEIGHT = 0.9
LEVEL_POWERS = 0.3, 0.15  # of the level of an image, in the score map and in the image score
LEVEL_SHARE = 0.25  # of the map: the level is its lower quartile
# Limits of the level, which is below 1 for most normal images, and 0 if an image is mostly equal to a support image. A
# level that no normal image has is a deviation, which must not be divided out.
LEAST_LEVEL, HIGHEST_LEVEL = 0.25, 1.25
EPS = 1e-12  # least scale, for support images that are equal


class Part(NamedTuple):
    """A scorer in a mean. layers: the feature maps that it gets. weights: in the score map and in the image score."""

    scorer: Scorer
    layers: slice
    weights: tuple[float, float]


class GeometricMean(Scorer):
    """The weighted geometric mean of the distances of several scorers, which use the same views.

    Prepared features are those of the first part, then those of the second, and so on.
    """

    level_powers = 0.0, 0.0  # of `image_levels`, in the score map and in the image score

    def __init__(self, name: str, parts: Sequence[Part]) -> None:
        self.name, self.parts = name, list(parts)
        self.views = self.parts[0].scorer.views
        self.counts: list[int] = []  # numbers of prepared tensors of the parts, set by `prepare`

    def prepare(self, maps: FeatureMaps) -> Prepared:
        """The prepared features of all parts."""
        prepared = [part.scorer.prepare(maps[part.layers]) for part in self.parts]
        self.counts = [len(tensors) for tensors in prepared]
        return [tensor for tensors in prepared for tensor in tensors]

    def fit(self, support: Prepared) -> Fitted:
        """The tensors of all parts, with a prefix for each part, and `scale`, the mean distance of each part."""
        return self._cross_fit(support, 1)[0]

    def cross_fit(self, support: Prepared, clock: StageClock, scored: int = 1) -> tuple[Fitted, torch.Tensor]:
        """As `Scorer.cross_fit`, but the fits that set the scale also give the distance maps."""
        with clock(self.name):
            fitted, distances = self._cross_fit(support, scored)
            return fitted, self._means(distances, fitted["scale"])

    def refit(self, fitted: Fitted, support: Prepared) -> Fitted:
        """A fit to other views, with the scale of `fitted`."""
        refitted = {}
        for prefix, scorer, features in self._split(support):
            refitted |= {f"{prefix}{name}": tensor for name, tensor in scorer.fit(features).items()}
        return refitted | {"scale": fitted["scale"]}

    def extend(self, fitted: Fitted, accepted: Prepared, known: int) -> Fitted:
        """The parts, extended with further images; the scale stays."""
        extended = {"scale": fitted["scale"]}
        for prefix, scorer, features in self._split(accepted):
            part = scorer.extend(_tensors_of(fitted, prefix), features, known)
            extended |= {f"{prefix}{name}": tensor for name, tensor in part.items()}
        return extended

    def distance_maps(self, fitted: Fitted, test: Prepared) -> torch.Tensor:
        """Geometric means, about 1 for normal regions: (B, 2, H, H), for the score map and for the image score."""
        distances = [
            scorer.distance_maps(_tensors_of(fitted, prefix), features)
            for prefix, scorer, features in self._split(test)
        ]
        return self._means(distances, fitted["scale"])

    def _means(self, distances: Sequence[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
        """Geometric means (B, 2, H, H) of the distance maps of all parts, on the finest of their grids.

        Each map is divided by a power of its level.
        """
        side = max(maps.shape[-1] for maps in distances)
        scaled = []
        for maps, typical in zip(distances, scale, strict=True):
            if maps.shape[-1] < side:
                maps = F.interpolate(maps[:, None], size=(side, side), mode="bilinear", align_corners=False)[:, 0]
            scaled.append(maps / typical)
        means = []
        for which, power in enumerate(self.level_powers):
            mean = math.prod(maps ** part.weights[which] for maps, part in zip(scaled, self.parts, strict=True))
            means.append(mean / image_levels(mean) ** power)
        return torch.stack(means, dim=1)

    def _cross_fit(self, support: Prepared, scored: int) -> tuple[Fitted, list[torch.Tensor]]:
        """The fit, and the distance maps of each part for the first `scored` views of left-out support images.

        With a single image, its first view is compared with the rest of its views.
        """
        views, distances = len(self.views), []
        for _, scorer, features in self._split(support):
            measure = partial(_fit_and_measure, scorer)
            if len(features[0]) > views:
                distances.append(left_out(features, views, scored, measure))
            else:
                distances.append(measure(without_images(features, 0, 1), [tensor[:1] for tensor in features]))
        scale = torch.stack([maps[::scored].mean() for maps in distances]).clamp(min=EPS)
        return self.refit({"scale": scale}, support), distances

    def _split(self, prepared: Prepared) -> list[tuple[str, Scorer, Prepared]]:
        """For each part, the prefix of the names of its fitted tensors, its scorer and its prepared features.

        The prefix is the scorer's name; several parts with the same scorer are numbered.
        """
        names, split, start = [], [], 0
        for part, count in zip(self.parts, self.counts, strict=True):
            prefix = f"{part.scorer.name}{names.count(part.scorer.name) or ''}_"
            split.append((prefix, part.scorer, prepared[start : start + count]))
            names.append(part.scorer.name)
            start += count
        return split


def image_levels(maps: torch.Tensor) -> torch.Tensor:
    """The levels (B, 1, 1) of maps (B, H, H) of images: the lower quartile, within the limits."""
    flat = maps.flatten(1)
    lowest = flat.topk(math.ceil(LEVEL_SHARE * flat.shape[1]), dim=1, largest=False).values
    return lowest[:, -1, None, None].clamp(LEAST_LEVEL, HIGHEST_LEVEL)


def _tensors_of(fitted: Fitted, prefix: str) -> Fitted:
    """The fitted tensors of one part, without the prefix of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in fitted.items() if name.startswith(prefix)}


def _fit_and_measure(scorer: Scorer, support: Prepared, test: Prepared) -> torch.Tensor:
    return scorer.distance_maps(scorer.fit(support), test)


class Combined(GeometricMean):
    """The geometric mean of `neighbours` and `positions`."""

    name = "combined"
    views = Neighbours.views
    border_weight = BORDER_WEIGHT
    prior = ScorePrior(  # see inspection/threshold.py
        typical=1.2, pull=0.0, spread=0.05, images=12.0, loo_share=1.0, share=1.0, bias=0.15, lift=0.03
    )

    def __init__(
        self,
        map_weight: float = MAP_WEIGHT,
        score_weight: float = SCORE_WEIGHT,
        border_weight: float = BORDER_WEIGHT,
        level_powers: tuple[float, float] = LEVEL_POWERS,
        window: int = WINDOW,
    ) -> None:
        weights = map_weight, score_weight
        neighbours = Part(Neighbours(NeighboursConfig(zero_padding=False)), slice(None), weights)
        positions = Part(Positions(window), slice(None), (1 - map_weight, 1 - score_weight))
        super().__init__(self.name, [neighbours, positions])
        self.border_weight, self.level_powers = border_weight, level_powers


def over_backbones(scorer: Scorer, layers: Sequence[int]) -> Scorer:
    """A scorer that applies `scorer` to each of several backbones and averages the results geometrically.

    layers: the number of feature maps of each backbone. With at most one backbone, the scorer itself.
    """
    if len(layers) < 2:
        return scorer
    parts, start = [], 0
    for count in layers:
        for part in getattr(scorer, "parts", [Part(scorer, slice(None), (1.0, 1.0))]):
            weights = tuple(weight / len(layers) for weight in part.weights)
            parts.append(Part(part.scorer, slice(start, start + count), weights))
        start += count
    mean = GeometricMean(scorer.name, parts)
    mean.border_weight = scorer.border_weight
    if isinstance(scorer, GeometricMean):  # the prior of another scorer is for another scale
        mean.level_powers, mean.prior = scorer.level_powers, scorer.prior
    return mean
