"""Converts distance maps to score maps (enlarged and smoothed) and image scores (the maximum of the score map)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

SMOOTHING_SIGMA = 4.0  # pixels of the score map; as in the release, with scipy's truncate 4, mode "reflect"


def score_maps(distances: torch.Tensor, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Image scores (B,) and score maps (B, S, S) of distance maps (B, H, H).

    An image's score is the maximum of its score map (release behaviour). matrix: from `score_map_matrix`.
    """
    maps = matrix @ distances @ matrix.T
    return maps.flatten(1).amax(dim=1), maps


def score_maps_at(
    distances: torch.Tensor, size: int, inside: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`score_maps` of distance maps (B, H, H) for images of side `size`.

    inside: (S, S) or (B, S, S) bool; the maps are 0 where it is False, before the image scores are taken.
    """
    scores, maps = score_maps(distances, score_map_matrix(distances.shape[-1], size, distances.device))
    return (scores, maps) if inside is None else masked(maps, inside)


def masked(maps: torch.Tensor, inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Image scores (B,) and score maps (B, S, S) that are 0 where `inside`, (S, S) or (B, S, S) bool, is False."""
    maps = maps * inside
    return maps.flatten(1).amax(dim=1), maps


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
