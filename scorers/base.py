"""The scorer interface: from feature maps to distance maps.

A scorer takes the feature maps of the support views, keeps what it needs as named tensors, and computes a distance map
for each test image. All scorers share the support views, the network, the score maps, the metrics, the thresholds and
the file formats. Scorers are chosen by name (`scorers.registry`). docs/extend.md shows how to add one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from scorers.left_out import left_out
from scorers.views import VIEWS_PER_IMAGE
from utils.errors import UserError
from utils.stages import StageClock

FeatureMaps = Sequence[torch.Tensor]  # per layer (N, C_l, H_l, W_l), finest layer first
Prepared = list[torch.Tensor]  # tensors whose first dimension is the image
Fitted = dict[str, torch.Tensor]


class ScorePrior(NamedTuple):
    """Prior knowledge of the image scores of normal images, for inspection/threshold.py.

    typical: a high score of normal images of any part. pull: the weight of its logarithm against n scores is pull / n,
    at most 1. spread: the standard deviation of the logarithms of a part's scores. images: the number of images that
    `spread` counts as. share, loo_share: factors of the normal quantile, for scores of further images and leave-one-out
    scores. bias: the logarithms of leave-one-out scores of n images are too high by bias / n. lift: added to the
    logarithm of a threshold from leave-one-out scores, as further images differ more from the support images than
    those do from each other.
    """

    typical: float
    pull: float
    spread: float
    images: float
    loo_share: float
    share: float = 0.75
    bias: float = 0.0
    lift: float = 0.0


class Scorer(ABC):
    """Measures the distance between the features of a test image and those of the support views.

    An instance has no state: `fit` returns what it learns as tensors, which detector files and exported files store.

    name: the name in --scorer, records and file names. views: the support views that the scorer uses.
    """

    name: str
    largest: float | None = None  # upper bound of the distances; None: there is none
    prior: ScorePrior | None = None  # of the image scores of normal images; None: unknown
    border_weight: float = 1.0  # weight of the border of a score map in the image score
    views: tuple[int, ...] = tuple(range(VIEWS_PER_IMAGE))  # ascending indices of `support_views`; 0: the image itself

    def prepare(self, maps: FeatureMaps) -> Prepared:
        """The features of N images to store: any number of tensors (N, ...). By default the maps, unchanged."""
        return list(maps)

    @abstractmethod
    def fit(self, support: Prepared) -> Fitted:
        """Learns from the prepared features of all support views; the views of one image are consecutive.

        Returns tensors by name.
        """

    def refit(self, fitted: Fitted, support: Prepared) -> Fitted:
        """A fit to other views, with distances comparable to those of `fitted`."""
        del fitted  # by default, distances have no scale that depends on the fit
        return self.fit(support)

    def extend(self, fitted: Fitted, accepted: Prepared, known: int) -> Fitted:
        """A fit that has also learned from further normal images, with distances comparable to those of `fitted`.

        accepted: prepared features of the images, without augmented views. known: the number of support views behind
        `fitted`. The order of the images does not matter.
        """
        del fitted, accepted, known
        raise UserError(f"the scorer {self.name} cannot learn from further images; fit a new detector", ("support",))

    @abstractmethod
    def distance_maps(self, fitted: Fitted, test: Prepared) -> torch.Tensor:
        """Distance maps (B, H, H) of B test images. Values are at least 0 and grow with the distance to the support.

        Or (B, 2, H, H): the first of an image gives its score map, the second its image score.
        """

    def measure(self, support: Prepared, test: Prepared, clock: StageClock, like: Fitted | None = None) -> torch.Tensor:
        """Fits on `support` and returns `distance_maps` of `test`. like: `fitted` of `refit`; None: a new fit.

        The clock records the stages `self.name` (fitting) and `distance`.
        """
        with clock(self.name):
            fitted = self.fit(support) if like is None else self.refit(like, support)
        with clock("distance"):
            return self.distance_maps(fitted, test)

    def cross_fit(self, support: Prepared, clock: StageClock, scored: int = 1) -> tuple[Fitted, torch.Tensor]:
        """A fit to all views, and the distance maps of the first `scored` views of each image from fits without it.

        See `left_out`. The maps of the views of an image are consecutive.
        """
        with clock(self.name):
            fitted = self.fit(support)
        return fitted, left_out(support, len(self.views), scored, partial(self.measure, clock=clock, like=fitted))
