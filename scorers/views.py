"""Mathematics on pictures and maps: warps, the 22 views of a support picture, distance map to score map.

Letters used in the whole project: B batch, K shots, V = 22 K support views, C channels, H W feature grid,
P = H W positions, S side of the (square) network input.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

ROTATION_ANGLES = tuple(step * math.pi / 16 for step in (-4, -3, -2, -1, 1, 2, 3, 4))  # radians, release's table
TRANSLATIONS = tuple(
    (size * a, size * b) for size in (0.2, 0.1) for a, b in ((1, 1), (-1, 1), (-1, -1), (1, -1))
)  # (x, y) in normalised units, release's table
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as kornia's rgb_to_grayscale in the release
VIEWS_PER_IMAGE = 1 + len(ROTATION_ANGLES) + len(TRANSLATIONS) + 1 + 3 + 1  # 22
SMOOTHING_SIGMA = 4.0  # pixels of the score map, the release's gaussian_filter (truncate 4, mode "reflect")


def warp(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Maps `x` (B, C, H, W) resampled bilinearly through the matrices `theta` (B, 2, 3).

    Convention:
        - `theta` maps OUTPUT positions (x, y) to INPUT positions, both in [-1, 1], align_corners False
        - outside the picture the picture is reflected
    """
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)  # (B, H, W, 2)
    if x.device.type == "cpu" and not torch.is_grad_enabled() and x.is_contiguous(memory_format=torch.channels_last):
        return _sample_rows(x, grid)
    return _sample(x, grid)


def _sample(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _sample_rows(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """What grid_sample gives above, for channels-last memory: each output is a weighted sum of four rows of C values.

    Half the time of grid_sample on the CPU, which gathers value by value. Differs from it by rounding only.
    """
    batch, channels, height, width = x.shape
    (left, right, to_right), (top, bottom, to_bottom) = (
        _neighbours(grid[..., axis], side) for axis, side in ((0, width), (1, height))
    )
    top, bottom = (row * width + torch.arange(batch)[:, None, None] * height * width for row in (top, bottom))
    rows = torch.stack([top + left, top + right, bottom + left, bottom + right], dim=-1).view(-1, 4)
    to_left, to_top = 1 - to_right, 1 - to_bottom
    shares = (to_left * to_top, to_right * to_top, to_left * to_bottom, to_right * to_bottom)
    weights = torch.stack(shares, dim=-1).view(-1, 4)
    values = x.permute(0, 2, 3, 1).reshape(-1, channels)
    sampled = F.embedding_bag(rows, values, mode="sum", per_sample_weights=weights)
    return sampled.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _neighbours(coordinate: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cells on both sides of coordinates in [-1, 1] (reflected outside), and the share of the second one."""
    steps = ((coordinate + 1) * side / 2).abs()  # cells from the border at -1
    period = steps.remainder(2 * side)
    cell = (torch.minimum(period, 2 * side - period) - 0.5).clamp_(0, side - 1)
    first = cell.nan_to_num().floor()  # a NaN must not become an address; the share carries it on
    return first.long(), (first + 1).clamp_(max=side - 1).long(), cell - first


def inverse_affine(theta: torch.Tensor) -> torch.Tensor:
    """The matrices (B, 2, 3) that undo the warps `theta` (B, 2, 3): top rows of the inverse of [theta; 0 0 1]."""
    a, b, c, d, e, f = theta.flatten(1).unbind(1)
    determinant = a * e - b * d
    rows = (e, -b, b * f - c * e, -d, a, c * d - a * f)
    return (torch.stack(rows, dim=1) / determinant[:, None]).view(-1, 2, 3)


def support_views(images: torch.Tensor) -> torch.Tensor:
    """The 22 views of each support picture: (K, 3, S, S) in [0, 1] -> (22 K, 3, S, S).

    RegAD section 3.3. Order: for each kind of view all K pictures: as it is; 8 rotations; 8 translations; mirrored left
    to right; turned by 90, 180 and 270 degrees; grey. The release shuffles them, which changes no statistic.

    Convention:
        - rotations by `ROTATION_ANGLES`: matrix [cos -sin 0; sin cos 0], output -> input, reflection outside
        - translations by `TRANSLATIONS`: matrix [1 0 x; 0 1 y], so (.2, .2) moves the picture S/10 to the left and up
        - turns are counter-clockwise as displayed
    """
    grids = _view_grids(images.shape[-1], images.device)
    copies = images.repeat(len(grids), 1, 1, 1)
    moved = _sample(copies, grids.repeat_interleave(len(images), dim=0))
    luma = sum(weight * images[:, channel] for channel, weight in enumerate(GREY_WEIGHTS))
    grey = luma[:, None].expand_as(images)
    turned = [images.rot90(turns, (-2, -1)) for turns in (1, 2, 3)]
    return torch.cat([images, moved, images.flip(-1), *turned, grey])


@functools.cache
def _view_grids(size: int, device: torch.device) -> torch.Tensor:
    """Where the rotated and translated views read the picture, (16, S, S, 2); float32 sines, as the release's."""
    angles = torch.tensor(ROTATION_ANGLES)
    zero = torch.zeros_like(angles)
    rotations = torch.stack([angles.cos(), -angles.sin(), zero, angles.sin(), angles.cos(), zero], dim=1)
    translations = torch.tensor([(1.0, 0.0, x, 0.0, 1.0, y) for x, y in TRANSLATIONS])
    matrices = torch.cat([rotations, translations]).view(-1, 2, 3).to(device)
    return F.affine_grid(matrices, [len(matrices), 1, size, size], align_corners=False)


def score_map_matrix(grid: int, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The matrix M (size, grid) that turns a distance map D (grid, grid) into the score map M D M^T (size, size).

    Bilinear enlargement (align_corners False) and smoothing by scipy's gaussian_filter with SMOOTHING_SIGMA are linear
    and act on rows and columns alike, so M is had by applying them to the columns of the identity, in float64.
    """
    identity = torch.eye(grid, dtype=torch.float64)
    enlarged = F.interpolate(identity[None], size=size, mode="linear", align_corners=False)[0].T  # (size, grid)
    smoothed = gaussian_filter(enlarged.numpy(), sigma=(SMOOTHING_SIGMA, 0))
    return torch.from_numpy(smoothed).to(device, torch.float32)
