"""The seam between a network and its scores: what a scorer is.

A scorer gets the feature maps of the support views, keeps what it needs of them as named tensors, and gives a distance
map for each test image. Everything else is shared: views, network, score maps, metrics, thresholds, files. Scorers are
chosen by name, see `scorers.registry`; docs/extend.md adds one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from scorers.views import VIEWS_PER_IMAGE
from utils.stages import StageClock

FeatureMaps = Sequence[torch.Tensor]  # per layer (N, C_l, H_l, W_l), finest first
Prepared = list[torch.Tensor]  # tensors whose first dimension counts images
Fitted = dict[str, torch.Tensor]


class Scorer(ABC):
    """One way to measure how far the features of a test image are from those of the support views.

    An instance has no state: what `fit` learns is in the tensors that it returns, and these are what a detector's file
    and an exported file hold.
    """

    name: str
    views: tuple[int, ...] = tuple(range(VIEWS_PER_IMAGE))  # numbers of `support_views`, ascending from 0, the image

    def prepare(self, maps: FeatureMaps) -> Prepared:
        """What is kept of N images: any number of tensors (N, ...). Here: the maps as they are."""
        return list(maps)

    @abstractmethod
    def fit(self, support: Prepared) -> Fitted:
        """What is learned from the prepared features of all support views, those of an image one after the other."""

    @abstractmethod
    def distance_maps(self, fitted: Fitted, test: Prepared) -> torch.Tensor:
        """Distances (B, H, H) of B test images, at least 0, higher where an image is less like the support."""

    def measure(self, support: Prepared, test: Prepared, clock: StageClock) -> torch.Tensor:
        """`distance_maps` of a fit that is not needed again. Stages: the scorer's name (fitting) and `distance`."""
        with clock(self.name):
            fitted = self.fit(support)
        with clock("distance"):
            return self.distance_maps(fitted, test)
