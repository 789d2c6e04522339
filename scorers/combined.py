"""The combined scorer: distances to the support at any position and at the same position, on one scale.

`neighbours` finds what no support image shows anywhere, `positions` what none shows there. Each distance map is divided
by its mean over support images that were left out of the fit. Where support images agree position by position, this
mean is small, and a deviation from the position counts much. Where parts lie anywhere, it is large, and `neighbours`
decides. The result is the weighted mean of both, about 1 for a region of a new normal image.

Features at the border of an image differ from others, whatever it shows. The image score therefore counts the border
less (`border_weight`, scorers/maps.py); the maps are not changed. The local averages of `neighbours` count no zeros
beyond the border here.

benchmarks/scorers.py measures the choices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from scorers.base import FeatureMaps, Fitted, Prepared, ScorePrior, Scorer
from scorers.left_out import without_images
from scorers.neighbours import Neighbours, NeighboursConfig
from scorers.positions import Positions

NEIGHBOURS_WEIGHT = 0.5  # of the map of `neighbours`; less finds fewer moved and rare parts, more blurs the maps
BORDER_WEIGHT = 0.9
MOST_LEFT_OUT = 8  # support images that set the scale
EPS = 1e-12  # the least scale: images can be equal


class Combined(Scorer):
    """The weighted mean of the distance maps of `neighbours` and `positions`.

    Prepared features are those of `neighbours`, then those of `positions`.
    """

    name = "combined"
    views = Neighbours.views
    border_weight = BORDER_WEIGHT
    prior = ScorePrior(typical=1.2, pull=0.0, spread=0.05, images=1.0, loo_share=1.0)  # see inspection/threshold.py

    def __init__(self, neighbours_weight: float = NEIGHBOURS_WEIGHT, border_weight: float = BORDER_WEIGHT) -> None:
        self.parts: tuple[Scorer, Scorer] = (Neighbours(NeighboursConfig(zero_padding=False)), Positions())
        self.neighbours_weight, self.border_weight = neighbours_weight, border_weight

    def prepare(self, maps: FeatureMaps) -> Prepared:
        """The prepared features of both scorers."""
        return [tensor for part in self.parts for tensor in part.prepare(maps)]

    def fit(self, support: Prepared) -> Fitted:
        """What both scorers learn, its names preceded by theirs, and `scale` (2,), the mean distance of each."""
        scales = [self._mean_left_out(*part) for part in zip(self.parts, self._split(support), strict=True)]
        return self.refit({"scale": torch.stack(scales).clamp(min=EPS)}, support)

    def refit(self, fitted: Fitted, support: Prepared) -> Fitted:
        """A fit to other views, with the scale of `fitted`."""
        learned = {
            f"{part.name}_{name}": tensor
            for part, own in zip(self.parts, self._split(support), strict=True)
            for name, tensor in part.fit(own).items()
        }
        return learned | {"scale": fitted["scale"]}

    def distance_maps(self, fitted: Fitted, test: Prepared) -> torch.Tensor:
        """Weighted means (B, H, H) of both distances: at least 0, about 1 for normal regions."""
        found = []
        for part, own in zip(self.parts, self._split(test), strict=True):
            learned = {
                name.removeprefix(f"{part.name}_"): tensor
                for name, tensor in fitted.items()
                if name.startswith(f"{part.name}_")
            }
            found.append(part.distance_maps(learned, own))
        side = found[1].shape[-1]
        found[0] = F.interpolate(found[0][:, None], size=(side, side), mode="bilinear", align_corners=False)[:, 0]
        weights = self.neighbours_weight, 1 - self.neighbours_weight
        return sum(weight * one / scale for weight, one, scale in zip(weights, found, fitted["scale"], strict=True))

    def _split(self, prepared: Prepared) -> tuple[Prepared, Prepared]:
        """The tensors of either scorer: those of `positions` have a finer grid."""
        coarse = prepared[0].shape[1]
        number = sum(tensor.shape[1] == coarse for tensor in prepared)
        return prepared[:number], prepared[number:]

    def _mean_left_out(self, part: Scorer, support: Prepared) -> torch.Tensor:
        """The mean distance of a support image to the others; of one image alone, to its own other views."""
        rows, views = len(support[0]), len(self.views)
        at_once = views if rows > views else 1
        starts = range(0, rows if at_once > 1 else 1, at_once)
        distances = [
            part.distance_maps(
                part.fit(without_images(support, start, min(start + at_once, rows))),
                [tensor[start : start + 1] for tensor in support],
            )
            for start in list(starts)[:: -(-len(starts) // MOST_LEFT_OUT)]
        ]
        return torch.cat(distances).mean()
