"""The nearest-neighbour scorer: the distance of each image region to the most similar region of any support view.

After PatchCore (Roth et al., CVPR 2022, section 3), adapted to a few support images:

1. Regions. The two coarsest layers are averaged over 3 x 3 positions and joined on the coarsest grid (14 x 14 at 224
   pixels). Each region has a patch embedding of 384 features. The memory bank holds those of all views, up to a
   limit; PatchCore keeps a small subset (coreset).
2. Coordinates. Each layer is scaled to the same total variance. The patch embeddings of the support views determine
   the principal directions. The first `components` directions are kept. Each is divided by the fourth root of its
   variance, which is half of full whitening.
3. Damping. An embedding x becomes x / sqrt(|x|^2 + mean |x|^2 of the support). The resulting distance lies between the
   Euclidean and the cosine distance.
4. Distance. The Euclidean distance to the nearest patch embedding of the memory bank, computed exactly with one matrix
   product.

The position of a region does not matter, so parts may lie anywhere in the image. The translated and the grey views are
not used: they add embeddings and network passes, and hardly any accuracy. benchmarks/scorers.py measures the effect of
each choice, and whether the other categories would have led to the same choice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from scorers.base import FeatureMaps, Fitted, Prepared, ScorePrior, Scorer
from scorers.coordinates import damp, principal_directions, resample
from scorers.views import GREY_VIEW, TRANSLATED_VIEWS, VIEWS_PER_IMAGE
from utils.devices import upload

CUDA_TABLE_BYTES = 512 * 2**20  # largest table of distances between test patch embeddings and the memory bank
ROUNDING = 1e-5  # smaller squared distances are set to 0: the float32 error of |q|^2 + |m|^2 - 2 q m
ACCEPTED_ROWS = 4096  # largest number of patch embeddings that `extend` adds to the memory bank
SUBSET_SEED = 0  # for the random subset of patch embeddings, if there are more than `bank_size`


class NeighboursConfig(NamedTuple):
    """Parameters that benchmarks/scorers.py varies one at a time. The project uses the defaults.

    layers: number of layers, counted from the coarsest. window: side of the averaging window in positions. finer: grid
    positions per position of the coarsest layer, along one side. components: number of principal directions, None for
    the features without step 2. whitening: exponent of the standard deviation that each direction is divided by; 0 is
    none, 1 is full whitening. damped: whether step 3 is applied. zero_padding: whether the averages include zeros from
    beyond the border, which damps the border, where the features of all views are similar. bank_size: largest number of
    patch embeddings in the memory bank; a random subset is kept if there are more.
    """

    layers: int = 2
    window: int = 3
    finer: int = 1
    components: int | None = 128
    whitening: float = 0.5
    damped: bool = True
    zero_padding: bool = True
    bank_size: int = 12288


DEFAULT = NeighboursConfig()


class Neighbours(Scorer):
    """The distance of each region to the nearest region of the support.

    Prepared features are per layer (N, P, C_l): one row per region, with P = side * side regions per image.
    """

    name = "neighbours"
    largest = 2.0  # between damped embeddings, which are shorter than 1
    prior = ScorePrior(typical=0.78, pull=1.5, spread=0.1, images=0.5, loo_share=0.5)  # see inspection/threshold.py
    views = tuple(view for view in range(VIEWS_PER_IMAGE) if view not in TRANSLATED_VIEWS and view != GREY_VIEW)

    def __init__(self, config: NeighboursConfig = DEFAULT) -> None:
        self.config = config

    def prepare(self, maps: FeatureMaps) -> Prepared:
        """Averages each layer over `window` x `window` positions, resampled to one grid: (N, P, C_l) per layer."""
        side, window, padded = maps[-1].shape[-1] * self.config.finer, self.config.window, self.config.zero_padding
        layers = [
            F.avg_pool2d(layer, window, stride=1, padding=window // 2, count_include_pad=padded)
            for layer in maps[-self.config.layers :]
        ]
        return [resample(layer, side) for layer in layers]

    def fit(self, support: Prepared) -> Fitted:
        """Computes `directions` (C, D) and `offset` (D,) of step 2, `damping` of step 3 and `memory` (D + 1, M).

        A column of the memory holds -2 m for a support row m, followed by |m|^2. One product with a test row q then
        gives |m|^2 - 2 q m.
        """
        embeddings = torch.cat(support, dim=2).flatten(0, 1)  # (N P, C)
        components, whitening = self.config.components, self.config.whitening
        if components is None:
            offset = torch.zeros_like(embeddings[0])
            directions = torch.eye(len(offset), dtype=offset.dtype, device=offset.device)
        else:
            channels = [layer.shape[2] for layer in support]
            directions, offset = principal_directions(embeddings, channels, components, whitening)
        if len(embeddings) > self.config.bank_size:
            order = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(SUBSET_SEED))
            embeddings = embeddings[upload(order[: self.config.bank_size], embeddings.device)]
        embeddings = torch.addmm(offset, embeddings, directions)
        damping = embeddings.square().sum(dim=1).mean()
        if self.config.damped:
            embeddings = damp(embeddings, damping)
        memory = torch.cat([-2 * embeddings.T, embeddings.square().sum(dim=1)[None]])
        return {"directions": directions, "offset": offset, "damping": damping, "memory": memory}

    def extend(self, fitted: Fitted, accepted: Prepared, known: int) -> Fitted:
        """Adds patch embeddings of further images to the memory bank: the ACCEPTED_ROWS that are farthest from it."""
        del known  # the embeddings of an image count once, not relative to the views
        embeddings = torch.cat(accepted, dim=2)
        distances = torch.cat([self._squared_distances(fitted, image[None]) for image in embeddings]).flatten()
        farthest = distances.topk(min(ACCEPTED_ROWS, len(distances))).indices
        rows = torch.addmm(fitted["offset"], embeddings.flatten(0, 1)[farthest], fitted["directions"])
        if self.config.damped:
            rows = damp(rows, fitted["damping"])
        added = torch.cat([-2 * rows.T, rows.square().sum(dim=1)[None]])
        return fitted | {"memory": torch.cat([fitted["memory"], added], dim=1)}

    def distance_maps(self, fitted: Fitted, test: Prepared) -> torch.Tensor:
        """Distances (B, H, H) to the memory bank: at least 0, at most 2 with damping, without a unit."""
        images, positions = test[0].shape[:2]
        embeddings = torch.cat(test, dim=2)
        if torch.compiler.is_compiling():  # the number of images, and so of parts, is unknown when exporting
            squared = self._squared_distances(fitted, embeddings)
        else:
            parts = embeddings.split(self._images_at_once(fitted["memory"], positions))
            squared = torch.cat([self._squared_distances(fitted, part) for part in parts])
        side = math.isqrt(positions)
        return F.threshold(squared, ROUNDING, 0.0).sqrt().view(images, side, side)

    def _squared_distances(self, fitted: Fitted, embeddings: torch.Tensor) -> torch.Tensor:
        """Squared distances (B, P) of patch embeddings (B, P, C) to the memory bank; can be negative by rounding."""
        embeddings = torch.addmm(fitted["offset"], embeddings.flatten(0, 1), fitted["directions"])
        if self.config.damped:
            embeddings = damp(embeddings, fitted["damping"])
        nearest = (F.pad(embeddings, (0, 1), value=1.0) @ fitted["memory"]).amin(dim=1)
        return embeddings.square().sum(dim=1) + nearest

    def _images_at_once(self, memory: torch.Tensor, positions: int) -> int:
        """Number of images that share a table of distances.

        CPU: one, so that the table fits into the caches and the result does not depend on the batch. CUDA: as many as
        CUDA_TABLE_BYTES allows.
        """
        if memory.device.type == "cpu":
            return 1
        return max(1, CUDA_TABLE_BYTES // (positions * memory.shape[1] * memory.element_size()))
