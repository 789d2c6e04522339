"""Nearest neighbours: how far each region of a test image is from the most similar region of any support view.

After PatchCore (Roth et al., CVPR 2022, section 3), changed in what costs little and gives much with few images:

1. Regions. The two coarsest layers, each averaged over 3 x 3 positions, on the coarsest grid (14 x 14 at 224 pixels),
   joined: one row of 384 numbers per region. On this grid the rows of all views fit into the memory, where PatchCore
   keeps a few of many.
2. Coordinates. Each layer is scaled to the same total variance. The rows of the support views give the principal
   directions; the first COMPONENTS are kept, each divided by the fourth root of its variance (half of whitening).
3. Damping. A row x becomes x / sqrt(|x|^2 + mean |x|^2 of the support): halfway between Euclidean and cosine distance.
4. Distance. Euclidean, to the nearest row of the memory, computed exactly as one matrix product.

A region's position plays no part, so parts may lie anywhere. Of the 22 views the translated and the grey ones are left
out: they add rows and network passes, and hardly any accuracy. benchmarks/scorers.py measures what each choice gives;
each was made on categories other than the one it is judged on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from scorers.base import FeatureMaps, Fitted, Prepared, Scorer
from scorers.views import GREY_VIEW, TRANSLATED_VIEWS, VIEWS_PER_IMAGE

CUDA_TABLE_BYTES = 512 * 2**20  # of the largest table of distances between rows of test images and the memory
SHRINKAGE = 0.01  # of the mean variance, added to each before whitening: weak directions must not become noise
RIDGE = 1e-5  # of the mean variance, on the diagonal: without it the eigenvectors take seconds on some features
EPS = 1e-12  # where a layer has no variance, or all rows are alike
ROUNDING = 4e-6  # squared distances below it are what float32 makes of 0 in |q|^2 + |m|^2 - 2 q m
SUBSET_SEED = 0  # of the rows that are kept where there are more than `limit`


class Choices(NamedTuple):
    """What benchmarks/scorers.py varies, one at a time; the defaults are what the project uses.

    layers: how many, the coarsest ones. window: side of the square that is averaged over. finer: grid positions per
    position of the coarsest layer, along a side. components: kept directions, None for the features as they are.
    whitening: exponent of the standard deviation that each direction is divided by, 0 none, 1 full. damped: step 3.
    limit: rows of the memory; a random subset where there are more.
    """

    layers: int = 2
    window: int = 3
    finer: int = 1
    components: int | None = 128
    whitening: float = 0.5
    damped: bool = True
    limit: int = 12288


CHOSEN = Choices()


class Neighbours(Scorer):
    """The distance of each region to the nearest one in a memory of the support's regions.

    Prepared features are rows (N, P, C) of the regions of N images, P = side * side.
    """

    name = "neighbours"
    views = tuple(view for view in range(VIEWS_PER_IMAGE) if view not in TRANSLATED_VIEWS and view != GREY_VIEW)

    def __init__(self, choices: Choices = CHOSEN) -> None:
        self.choices = choices

    def prepare(self, maps: FeatureMaps) -> Prepared:
        """Per layer (N, P, C_l): means over `window` x `window` positions on one grid, zeros beyond the border counted.

        Counting the zeros keeps the border, which every view shows alike, from standing out.
        """
        side, window = maps[-1].shape[-1] * self.choices.finer, self.choices.window
        layers = []
        for layer in maps[-self.choices.layers :]:
            layer = F.avg_pool2d(layer, window, stride=1, padding=window // 2)
            if layer.shape[-1] > side:
                layer = F.avg_pool2d(layer, layer.shape[-1] // side)
            elif layer.shape[-1] < side:
                layer = F.interpolate(layer, size=(side, side), mode="bilinear", align_corners=False)
            layers.append(layer.flatten(2).transpose(1, 2))
        return layers

    def fit(self, support: Prepared) -> Fitted:
        """`directions` (C, D) and `offset` (D,) of step 2, `damping` of step 3, and the `memory` (D + 1, M) of rows m.

        The memory holds -2 m, and |m|^2 in the last line, so that one product with a test row gives |m|^2 - 2 q m.
        """
        rows = torch.cat(support, dim=2).flatten(0, 1)  # (N P, C)
        directions, offset = self._coordinates(rows, [layer.shape[2] for layer in support])
        if len(rows) > self.choices.limit:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SUBSET_SEED))
            rows = rows[order[: self.choices.limit].to(rows.device)]
        rows = torch.addmm(offset, rows, directions)
        damping = rows.square().sum(dim=1).mean()
        if self.choices.damped:
            rows = _damp(rows, damping)
        memory = torch.cat([-2 * rows.T, rows.square().sum(dim=1)[None]])
        return {"directions": directions, "offset": offset, "damping": damping, "memory": memory}

    def distance_maps(self, fitted: Fitted, test: Prepared) -> torch.Tensor:
        """Distances (B, H, H) to the nearest row of the memory; without a unit, with damping from 0 to 2."""
        images, positions = test[0].shape[:2]
        rows = torch.cat(test, dim=2)
        if torch.compiler.is_compiling():  # parts would depend on the number of images, which is not known then
            squared = self._squared_distances(fitted, rows)
        else:
            parts = rows.split(self._images_at_once(fitted["memory"], positions))
            squared = torch.cat([self._squared_distances(fitted, part) for part in parts])
        side = math.isqrt(positions)
        return F.threshold(squared, ROUNDING, 0.0).sqrt().view(images, side, side)

    def _squared_distances(self, fitted: Fitted, rows: torch.Tensor) -> torch.Tensor:
        """Of rows (B, P, C) to the nearest row of the memory: (B, P), negative by rounding at most."""
        rows = torch.addmm(fitted["offset"], rows.flatten(0, 1), fitted["directions"])
        if self.choices.damped:
            rows = _damp(rows, fitted["damping"])
        nearest = (F.pad(rows, (0, 1), value=1.0) @ fitted["memory"]).amin(dim=1)
        return rows.square().sum(dim=1) + nearest

    def _images_at_once(self, memory: torch.Tensor, positions: int) -> int:
        """How many images share a table of distances.

        On the CPU one, whose table fits into the caches. An image then goes through the same arithmetic alone as among
        others. On CUDA as many as CUDA_TABLE_BYTES allow.
        """
        if memory.device.type == "cpu":
            return 1
        return max(1, CUDA_TABLE_BYTES // (positions * memory.shape[1] * memory.element_size()))

    def _coordinates(self, rows: torch.Tensor, channels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Directions (C, D) and offset (D,) that take a row x to its coordinates x @ directions + offset."""
        choices, mean = self.choices, rows.mean(dim=0)
        if choices.components is None:
            return torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device), torch.zeros_like(mean)
        centred = rows - mean
        covariance = centred.T @ centred / (len(rows) - 1)
        variances = covariance.diagonal().split(channels)
        scale = torch.cat([v.sum().clamp(min=EPS).rsqrt().expand(len(v)) for v in variances])
        covariance = covariance * scale * scale[:, None]
        typical = len(channels) / len(mean)  # the mean variance: each layer has a total of 1 now
        covariance.diagonal().add_(RIDGE * typical)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0)[: choices.components].clamp(min=0), vectors.flip(1)[:, : choices.components]
        floor = SHRINKAGE * typical
        directions = scale[:, None] * vectors * (values + floor).pow(-choices.whitening / 2)
        return directions, -(mean @ directions)


def _damp(rows: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    """Rows (N, D) shortened to a length below 1; half the squared length where it equals `damping`."""
    return rows * (rows.square().sum(dim=1, keepdim=True) + damping).clamp(min=EPS).rsqrt()
