"""Warps of feature maps and images by affine matrices (RegAD section 3.2)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F


def warp(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """The maps `x` (B, C, H, W), resampled bilinearly through the matrices `theta` (B, 2, 3).

    Convention: `theta` maps OUTPUT positions (x, y) to INPUT positions, both normalised to [-1, 1], align_corners
    False. Outside the map, its reflection is sampled.
    """
    with full_precision(x.device):
        grid = sampling_grid(theta, *x.shape[2:])
        x = x.to(theta.dtype)
    if x.device.type == "cpu" and not torch.is_grad_enabled() and x.is_contiguous(memory_format=torch.channels_last):
        return _sample_rows(x, grid)
    with full_precision(x.device):
        return sample(x, grid)


def sampling_grid(theta: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The positions (B, H, W, 2) that `warp` samples; as F.affine_grid, up to rounding.

    Computed by sums, because CUDA may compute a batched matrix product in TF32, with 10 bits of the coordinates.
    """
    sides = (torch.arange(side, device=theta.device, dtype=theta.dtype) for side in (width, height))
    x, y = ((2 * cells + 1) / len(cells) - 1 for cells in sides)  # the centres of cells from -1 to 1
    a, b, c = theta[:, None, None].unbind(-1)  # (B, 1, 1, 2) each, for both coordinates
    return x[:, None] * a + y[:, None, None] * b + c


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context without autocast on `device`.

    bfloat16 rounds a scale of 0.9975 to 1 and moves sampling positions by a tenth of a cell.
    """
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def sample(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """`x` (B, C, H, W) sampled bilinearly at `grid` (B, H, W, 2), reflected outside: (B, C, H, W).

    Convention: positions (x, y) normalised to [-1, 1], align_corners False.
    """
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _sample_rows(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """`sample` for channels-last memory on the CPU, without gradient; equal to it up to rounding.

    Each output is a weighted sum of four rows of C values. grid_sample gathers single values and takes twice as long.
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
    """The two cells next to each coordinate in [-1, 1], reflected outside, and the weight of the second cell."""
    steps = ((coordinate + 1) * side / 2).abs()  # distance in cells from the border at -1
    period = steps.remainder(2 * side)
    cell = (torch.minimum(period, 2 * side - period) - 0.5).clamp_(0, side - 1)
    first = cell.nan_to_num().floor()  # NaN must not become an index; the weight keeps the NaN
    return first.long(), (first + 1).clamp_(max=side - 1).long(), cell - first


def inverse_affine(theta: torch.Tensor) -> torch.Tensor:
    """The inverses (B, 2, 3) of the warps `theta` (B, 2, 3): the first two rows of the inverse of [theta; 0 0 1]."""
    a, b, c, d, e, f = theta.flatten(1).unbind(1)
    determinant = a * e - b * d
    rows = (e, -b, b * f - c * e, -d, a, c * d - a * f)
    return (torch.stack(rows, dim=1) / determinant[:, None]).view(-1, 2, 3)
