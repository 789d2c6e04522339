"""The positions scorer: the distance of each region to the support's regions at the same position.

One Gaussian per position of a fine grid, as in the release's scorer, but in coordinates that all positions share:
1. Patch embeddings of the three finest layers are resampled to one grid, joined, and mapped to D coordinates
   as those of `neighbours` (scorers/coordinates.py).
2. At each position, m and S are mean and covariance over the n support views, S divided by n - 1. S is replaced by its
   `RANK` largest principal components plus e times the identity, with e the variance of a coordinate within positions,
   averaged over all of them. So directions in which the few views do not vary keep a variance above 0.
3. The distance is sqrt((q - m)^T S^-1 (q - m)).

Each component v with variance l gives a column v sqrt(l / (l + e)) of the factors F. With d = q - m,
distance^2 = (|d|^2 - |F^T d|^2) / e.
The size of the fitted tensors does not depend on the number of support images.
"""

from __future__ import annotations

import math

import torch

from scorers.base import FeatureMaps, Fitted, Prepared, Scorer
from scorers.coordinates import damp, eigenvalues, principal_directions, resample
from scorers.neighbours import Neighbours

LAYERS = 3  # of the network, counted from the coarsest
FINER = 2  # grid positions per position of the coarsest layer, along one side
COMPONENTS, WHITENING = 128, 0.5  # D, and the exponent, as in `neighbours`
RANK = 16  # principal components per position; bounds size and time
CUDA_IMAGES = 32  # images whose products with the factors are in memory together
EPS = 1e-12  # avoids division by 0 where all views are equal


class Positions(Scorer):
    """The Mahalanobis distance at each position of a grid twice as fine as the coarsest layer.

    Prepared features are per layer (N, P, C_l), with P positions per image.
    """

    name = "positions"
    views = Neighbours.views

    def prepare(self, maps: FeatureMaps) -> Prepared:
        """Resamples the layers to one grid: (N, P, C_l) per layer."""
        side = maps[-1].shape[-1] * FINER
        return [resample(layer, side) for layer in maps[-LAYERS:]]

    def fit(self, support: Prepared) -> Fitted:
        """Returns the coordinates (`directions`, `offset`, `damping`) and a Gaussian for each position.

        `mean` (P, D); `factors` (P, D, r) and `ridge`, of the covariance, see the docstring of the module.

        Raises:
            ValueError: fewer than 2 support views.
        """
        views = len(support[0])
        if views < 2:
            raise ValueError("a covariance needs at least 2 support views")
        embeddings = torch.cat(support, dim=2).flatten(0, 1)  # (n P, C)
        channels = [layer.shape[2] for layer in support]
        directions, offset = principal_directions(embeddings, channels, COMPONENTS, WHITENING)
        embeddings = torch.addmm(offset, embeddings, directions)
        damping = embeddings.square().sum(dim=1).mean()
        by_position = damp(embeddings, damping).unflatten(0, (views, -1)).transpose(0, 1)  # (P, n, D)
        mean = by_position.mean(dim=1)
        centred = (by_position - mean[:, None]) / math.sqrt(views - 1)
        ridge = (centred.square().sum() / (len(mean) * mean.shape[1])).clamp(min=EPS)
        coordinates = {"directions": directions, "offset": offset, "damping": damping}
        return coordinates | {"mean": mean, "factors": _factors(centred, ridge), "ridge": ridge}

    def extend(self, fitted: Fitted, accepted: Prepared, known: int) -> Fitted:
        """Updates mean and covariance of each position; an image has the weight of all views of a support image.

        The covariance of the support is restored from its factors, without the components that they leave out.
        """
        weight, ridge, mean = len(self.views), fitted["ridge"], fitted["mean"]
        embeddings = torch.cat(accepted, dim=2)
        rows = torch.addmm(fitted["offset"], embeddings.flatten(0, 1), fitted["directions"])
        rows = damp(rows, fitted["damping"]).unflatten(0, (len(embeddings), -1)).transpose(0, 1)  # (P, n, D)
        total = known + weight * len(embeddings)
        centre = (known * mean + weight * rows.sum(dim=1)) / total
        factors = fitted["factors"].transpose(1, 2)  # of length sqrt(l / (l + ridge)), for a variance l
        variances = ridge / (1 - factors.square().sum(dim=2, keepdim=True)).clamp(min=EPS)
        parts = (
            math.sqrt((known - 1) / (total - 1)) * variances.sqrt() * factors,
            math.sqrt(weight / (total - 1)) * (rows - centre[:, None]),
            math.sqrt(known / (total - 1)) * (mean - centre)[:, None],
        )
        return fitted | {"mean": centre, "factors": _factors(torch.cat(parts, dim=1), ridge)}

    def distance_maps(self, fitted: Fitted, test: Prepared) -> torch.Tensor:
        """Mahalanobis distances (B, H, H): at least 0, without a unit."""
        embeddings = torch.cat(test, dim=2)
        at_once = 1 if embeddings.device.type == "cpu" else CUDA_IMAGES  # 1: results do not depend on the batch
        parts = [embeddings] if torch.compiler.is_compiling() else embeddings.split(at_once)
        squared = torch.cat([_squared_distances(fitted, part) for part in parts])
        side = math.isqrt(squared.shape[1])
        return squared.clamp(min=0).sqrt().unflatten(1, (side, side))


def _factors(centred: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """The factors (P, D, r) of the covariances A^T A with A = `centred` (P, n, D), r = min(RANK, n, D).

    Their eigenvectors come from the smaller of A A^T and A^T A.
    """
    if centred.shape[1] <= centred.shape[2]:
        variances, vectors = eigenvalues(centred @ centred.mT)
        variances, vectors = variances[:, -RANK:].clamp(min=0), vectors[:, :, -RANK:]
        return (centred.mT @ vectors) * (variances + ridge).rsqrt()[:, None]  # A^T u = v sqrt(l)
    variances, vectors = eigenvalues(centred.mT @ centred)
    variances, vectors = variances[:, -RANK:].clamp(min=0), vectors[:, :, -RANK:]
    return vectors * (variances / (variances + ridge)).sqrt()[:, None]


def _squared_distances(fitted: Fitted, embeddings: torch.Tensor) -> torch.Tensor:
    """Squared distances (B, P) of joined features (B, P, C)."""
    coordinates = torch.addmm(fitted["offset"], embeddings.flatten(0, 1), fitted["directions"])
    difference = damp(coordinates, fitted["damping"]).view(-1, *fitted["mean"].shape) - fitted["mean"]
    projected = (difference.transpose(0, 1) @ fitted["factors"]).transpose(0, 1)
    return (difference.square().sum(dim=2) - projected.square().sum(dim=2)) / fitted["ridge"]
