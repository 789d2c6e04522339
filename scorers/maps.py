"""Converts distance maps to score maps (enlarged and smoothed) and image scores (the maximum of the score map)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

BORDER_GRID = 16  # the border of a map is as wide as its side divided by this
SMOOTHING_SIGMA = 4.0  # pixels of the score map; as in the release, with scipy's truncate 4, mode "reflect"


def score_maps(
    distances: torch.Tensor,
    matrix: torch.Tensor,
    inside: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image scores (B,) and score maps (B, S, S) of distance maps (B, H, H).

    An image's score is the maximum of its score map (release behaviour), multiplied by `weights` (S, S) if given.
    With distance maps (B, 2, H, H), the first of an image gives its score map and the second its image score.
    matrix: from `score_map_matrix`. inside: (S, S) or (B, S, S) bool; the maps are 0 where it is False.
    """
    distances = distances if distances.dim() == 4 else distances[:, None]
    maps = matrix @ distances @ matrix.T  # (B, 1 or 2, S, S)
    if inside is not None:
        maps = maps * (inside[:, None] if inside.dim() == 3 else inside)
    weighted = maps[:, -1] if weights is None else maps[:, -1] * weights
    return weighted.flatten(1).amax(dim=1), maps[:, 0]


def score_maps_at(
    distances: torch.Tensor, size: int, inside: torch.Tensor | None = None, border_weight: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`score_maps` of distance maps for images of side `size`, with the weights of `border_weights`."""
    matrix = score_map_matrix(distances.shape[-1], size, distances.device)
    return score_maps(distances, matrix, inside, border_weights(size, border_weight, distances.device))


@functools.cache
def border_weights(size: int, border_weight: float, device: torch.device | str = "cpu") -> torch.Tensor | None:
    """Weights (size, size) of a score map for the image score: 1 inside, about `border_weight` at the border.

    The edges are enlarged and smoothed as score maps are. None: all weights are 1.
    """
    if border_weight == 1:
        return None
    line = torch.ones(BORDER_GRID, device=device)
    line[0] = line[-1] = border_weight
    line = score_map_matrix(BORDER_GRID, size, device) @ line
    return line[:, None] * line


@functools.cache
def score_map_matrix(grid: int, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The matrix M (size, grid) that turns a distance map D (grid, grid) into the score map M D M^T (size, size).

    M combines bilinear enlargement and smoothing by scipy's gaussian_filter with SMOOTHING_SIGMA. Both are linear and
    treat rows and columns alike. M is therefore the result of applying both to the columns of the identity matrix. It
    is computed in float64 and returned in float32.

    Convention: align_corners=False, as in the release.
    """
    identity = torch.eye(grid, dtype=torch.float64)
    enlarged = F.interpolate(identity[None], size=size, mode="linear", align_corners=False)[0].T  # (size, grid)
    smoothed = gaussian_filter(enlarged.numpy(), sigma=(SMOOTHING_SIGMA, 0))
    return torch.from_numpy(smoothed).to(device, torch.float32)
