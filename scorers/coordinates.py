"""Patch embeddings of several layers on one grid, scaled, projected and damped so that they can be compared.

Each layer is scaled to the same total variance. The first principal directions of the support embeddings are kept, each
divided by a power of its standard deviation. Damping then turns x into x / sqrt(|x|^2 + mean |x|^2 of the support), so
a distance lies between the Euclidean and the cosine distance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

SHRINKAGE = 0.01  # times the mean variance, added to every variance before whitening: limits noise in weak directions
RIDGE = 1e-5  # times the mean variance, added to the diagonal: eigh can take seconds without it
EPS = 1e-12  # avoids division by 0 where a layer has no variance or all embeddings are equal


def resample(layer: torch.Tensor, side: int) -> torch.Tensor:
    """The embeddings (N, P, C), P = side * side, of a feature map (N, C, H, H).

    Convention: a finer map is averaged over areas, a coarser one enlarged bilinearly with align_corners=False.
    """
    if layer.shape[-1] > side:
        layer = F.adaptive_avg_pool2d(layer, side)
    elif layer.shape[-1] < side:
        layer = F.interpolate(layer, size=(side, side), mode="bilinear", align_corners=False)
    return layer.flatten(2).transpose(1, 2)


def principal_directions(
    embeddings: torch.Tensor, channels: Sequence[int], components: int, whitening: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions (C, D) and offset (D,); the coordinates of an embedding x are x @ directions + offset.

    embeddings: (N, C), of the support. channels: of each layer, their sum is C. components: the largest D. whitening:
    the exponent of the standard deviation that each direction is divided by; 0 is none, 1 is full whitening.
    """
    mean = embeddings.mean(dim=0)
    centred = embeddings - mean
    covariance = centred.T @ centred / (len(embeddings) - 1)
    variances = covariance.diagonal().split(list(channels))
    scale = torch.cat([v.sum().clamp(min=EPS).rsqrt().expand(len(v)) for v in variances])
    covariance = covariance * scale * scale[:, None]
    typical = len(channels) / len(mean)  # the mean variance, as each layer now has a total variance of 1
    covariance.diagonal().add_(RIDGE * typical)
    values, vectors = eigenvalues(covariance)
    values, vectors = values.flip(0)[:components].clamp(min=0), vectors.flip(1)[:, :components]
    directions = scale[:, None] * vectors * (values + SHRINKAGE * typical).pow(-whitening / 2)
    return directions, -(mean @ directions)


def eigenvalues(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (..., n), ascending, and eigenvectors (..., n, n) of symmetric matrices (..., n, n).

    On the CPU one thread computes them: for many small matrices, several threads take far longer, as they wait for each
    other after every step.
    """
    if matrices.device.type != "cpu":
        return torch.linalg.eigh(matrices)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.linalg.eigh(matrices)
    finally:
        torch.set_num_threads(threads)


def damp(embeddings: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    """Scales embeddings x (N, D) to x / sqrt(|x|^2 + damping), so that their length is below 1."""
    return embeddings * (embeddings.square().sum(dim=1, keepdim=True) + damping).clamp(min=EPS).rsqrt()
