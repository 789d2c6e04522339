"""Scorers made of scorers: the weighted geometric mean of their distances, each on the scale of the support itself.

Each distance map is divided by its mean over support images that were left out of the fit, so 1 is the distance of a
region of a new normal image. With weights w that add up to 1, the result is the product of the d ** w.

`combined` joins `neighbours`, which finds what no support image shows anywhere, and `positions`, which finds what none
shows there. Where support images agree position by position, the left-out distance of `positions` is small, and a
deviation from the position counts much. Where parts lie anywhere, it is large, and `neighbours` decides. The score map
weights `positions` more, whose maps are sharper, and the image score weights `neighbours` more, which confuses fewer
normal images with defective ones.

With several backbones (models/several.py), each backbone has scorers of its own.

Features at the border of an image differ from others, whatever it shows. The image score of `combined` therefore counts
the border less (`border_weight`, scorers/maps.py); the maps are not changed. The local averages of `neighbours` count
no zeros beyond the border here.

benchmarks/scorers.py measures the choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from scorers.base import FeatureMaps, Fitted, Prepared, ScorePrior, Scorer
from scorers.left_out import left_out, without_images
from scorers.neighbours import Neighbours, NeighboursConfig
from scorers.positions import Positions
from utils.stages import StageClock

MAP_WEIGHT, SCORE_WEIGHT = 0.35, 0.65  # of `neighbours` in the score map and in the image score
BORDER_WEIGHT = 0.9
EPS = 1e-12  # the least scale: images can be equal


class Part(NamedTuple):
    """A scorer in a mean. layers: the feature maps that it sees. weights: in the score map and in the image score."""

    scorer: Scorer
    layers: slice
    weights: tuple[float, float]


class GeometricMean(Scorer):
    """The weighted geometric mean of the distances of several scorers, which use the same views.

    Prepared features are those of the first part, then those of the second, and so on.
    """

    def __init__(self, name: str, parts: Sequence[Part]) -> None:
        self.name, self.parts = name, list(parts)
        self.views = self.parts[0].scorer.views
        self.kept: list[int] = []  # prepared tensors of each part: the same for all images of a network

    def prepare(self, maps: FeatureMaps) -> Prepared:
        """The prepared features of all parts."""
        prepared = [part.scorer.prepare(maps[part.layers]) for part in self.parts]
        self.kept = [len(tensors) for tensors in prepared]
        return [tensor for tensors in prepared for tensor in tensors]

    def fit(self, support: Prepared) -> Fitted:
        """What all parts learn, their names preceded by the part's, and `scale`, the mean distance of each."""
        return self._cross_fit(support, 1)[0]

    def cross_fit(self, support: Prepared, clock: StageClock, scored: int = 1) -> tuple[Fitted, torch.Tensor]:
        """As `Scorer.cross_fit`, but the fits that set the scale also give the distance maps."""
        with clock(self.name):
            fitted, found = self._cross_fit(support, scored)
            return fitted, self._means(found, fitted["scale"])

    def refit(self, fitted: Fitted, support: Prepared) -> Fitted:
        """A fit to other views, with the scale of `fitted`."""
        learned = {
            f"{prefix}{name}": tensor
            for prefix, part, own in zip(self._prefixes(), self.parts, self._split(support), strict=True)
            for name, tensor in part.scorer.fit(own).items()
        }
        return learned | {"scale": fitted["scale"]}

    def extend(self, fitted: Fitted, accepted: Prepared, known: int) -> Fitted:
        """What all parts learn from further images; the scale stays."""
        learned = {"scale": fitted["scale"]}
        for prefix, part, own in zip(self._prefixes(), self.parts, self._split(accepted), strict=True):
            of_part = {name.removeprefix(prefix): fitted[name] for name in fitted if name.startswith(prefix)}
            learned |= {f"{prefix}{name}": tensor for name, tensor in part.scorer.extend(of_part, own, known).items()}
        return learned

    def distance_maps(self, fitted: Fitted, test: Prepared) -> torch.Tensor:
        """Geometric means, about 1 for normal regions: (B, 2, H, H), of the score map and of the image score."""
        found = []
        for prefix, part, own in zip(self._prefixes(), self.parts, self._split(test), strict=True):
            learned = {name.removeprefix(prefix): fitted[name] for name in fitted if name.startswith(prefix)}
            found.append(part.scorer.distance_maps(learned, own))
        return self._means(found, fitted["scale"])

    def _means(self, found: Sequence[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
        """Geometric means (B, 2, H, H) of the distance maps of all parts."""
        side = max(one.shape[-1] for one in found)
        means = 1.0
        for one, typical, part in zip(found, scale, self.parts, strict=True):
            if one.shape[-1] < side:
                one = F.interpolate(one[:, None], size=(side, side), mode="bilinear", align_corners=False)[:, 0]
            means = means * torch.stack([(one / typical) ** weight for weight in part.weights], dim=1)
        return means

    def _cross_fit(self, support: Prepared, scored: int) -> tuple[Fitted, list[torch.Tensor]]:
        """The fit, and the distance maps of each part of the first `scored` views of left-out support images.

        A single image has no others: its first view is compared with the rest of its views.
        """
        views, found = len(self.views), []
        for part, own in zip(self.parts, self._split(support), strict=True):
            measure = partial(_fit_and_measure, part.scorer)
            if len(own[0]) > views:
                found.append(left_out(own, views, scored, measure))
            else:
                found.append(measure(without_images(own, 0, 1), [tensor[:1] for tensor in own]))
        scale = torch.stack([one[::scored].mean() for one in found]).clamp(min=EPS)
        return self.refit({"scale": scale}, support), found

    def _prefixes(self) -> list[str]:
        """Of the names of tensors, one per part: the scorer's name; several parts with one scorer are numbered."""
        names = [part.scorer.name for part in self.parts]
        counts = [names[:number].count(name) for number, name in enumerate(names)]
        return [f"{name}{count or ''}_" for name, count in zip(names, counts, strict=True)]

    def _split(self, prepared: Prepared) -> list[Prepared]:
        """The tensors of each part."""
        ends = [sum(self.kept[: number + 1]) for number in range(len(self.kept))]
        return [prepared[end - count : end] for end, count in zip(ends, self.kept, strict=True)]


def _fit_and_measure(scorer: Scorer, support: Prepared, test: Prepared) -> torch.Tensor:
    return scorer.distance_maps(scorer.fit(support), test)


class Combined(GeometricMean):
    """The geometric mean of `neighbours` and `positions`."""

    name = "combined"
    views = Neighbours.views
    border_weight = BORDER_WEIGHT
    prior = ScorePrior(  # see inspection/threshold.py
        typical=1.2, pull=0.0, spread=0.05, images=12.0, loo_share=1.0, share=1.0, bias=0.25, lift=0.05
    )

    def __init__(
        self,
        map_weight: float = MAP_WEIGHT,
        score_weight: float = SCORE_WEIGHT,
        border_weight: float = BORDER_WEIGHT,
    ) -> None:
        weights = map_weight, score_weight
        neighbours = Part(Neighbours(NeighboursConfig(zero_padding=False)), slice(None), weights)
        positions = Part(Positions(), slice(None), (1 - map_weight, 1 - score_weight))
        super().__init__(self.name, [neighbours, positions])
        self.border_weight = border_weight


def over_backbones(scorer: Scorer, layers: Sequence[int]) -> Scorer:
    """`scorer` for a network of several backbones, applied to each of them; the results are averaged.

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
    found = GeometricMean(scorer.name, parts)
    found.border_weight = scorer.border_weight
    found.prior = scorer.prior if isinstance(scorer, GeometricMean) else None  # the others have another scale now
    return found
