"""The scorer interface: from feature maps to distance maps.

A scorer takes the feature maps of the support views, keeps what it needs as named tensors, and computes a distance map
for each test image. All scorers share the support views, the network, the score maps, the metrics, the thresholds and
the file formats. Scorers are chosen by name (`scorers.registry`). docs/extend.md shows how to add one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from scorers.views import VIEWS_PER_IMAGE
from utils.stages import StageClock

FeatureMaps = Sequence[torch.Tensor]  # per layer (N, C_l, H_l, W_l), finest layer first
Prepared = list[torch.Tensor]  # tensors whose first dimension is the image
Fitted = dict[str, torch.Tensor]


class Scorer(ABC):
    """Measures the distance between the features of a test image and those of the support views.

    An instance has no state. `fit` returns everything it learns as tensors. Detector files and exported files store
    these tensors.

    name: the name in --scorer, records and file names. views: the support views that the scorer uses.
    """

    name: str
    largest: float | None = None  # no distance is larger; None: there is no bound
    typical_score: float | None = None  # a high score of normal images of any part, for thresholds; None: not known
    views: tuple[int, ...] = tuple(range(VIEWS_PER_IMAGE))  # indices of `support_views`, ascending; 0: the image

    def prepare(self, maps: FeatureMaps) -> Prepared:
        """Features to keep of N images: any number of tensors (N, ...). The default returns the maps unchanged."""
        return list(maps)

    @abstractmethod
    def fit(self, support: Prepared) -> Fitted:
        """Learns from the prepared features of all support views; the views of one image are consecutive.

        Returns tensors by name.
        """

    @abstractmethod
    def distance_maps(self, fitted: Fitted, test: Prepared) -> torch.Tensor:
        """Distance maps (B, H, H) of B test images. Values are at least 0 and grow with the distance to the support."""

    def measure(self, support: Prepared, test: Prepared, clock: StageClock) -> torch.Tensor:
        """Fits on `support` and returns `distance_maps` of `test`; the fit is not kept.

        The clock records the stages `self.name` (fitting) and `distance`.
        """
        with clock(self.name):
            fitted = self.fit(support)
        with clock("distance"):
            return self.distance_maps(fitted, test)
