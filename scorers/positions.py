"""The positions scorer: the distance of each region to the support's regions around the same position.

One Gaussian per position of a fine grid, as in the release's scorer, but in coordinates that all positions share:
1. Patch embeddings of the three finest layers are resampled to one grid, joined, and mapped to D coordinates
   as those of `neighbours` (scorers/coordinates.py).
2. m is the mean of the support views over the `WINDOW` x `WINDOW` positions around a position, as parts are never at
   exactly the same place.
3. The `FINER` x `FINER` positions within a position of the coarsest layer (a block) share a covariance S: that of the
   embeddings in all their windows. S is replaced by its `RANK` largest principal components plus e times the identity,
   with e the mean variance of a coordinate over all blocks. So directions in which the few views do not vary keep a
   variance above 0.
4. The distance is sqrt((q - m)^T S^-1 (q - m)).

Each component v with variance l gives a column v sqrt(l / (l + e)) of the factors F. With d = q - m,
distance^2 = (|d|^2 - |F^T d|^2) / e.
The size of the fitted tensors does not depend on the number of support images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from scorers.base import FeatureMaps, Fitted, Prepared, Scorer
from scorers.coordinates import damp, eigenvalues, principal_directions, resample
from scorers.neighbours import Neighbours
from utils.devices import upload

LAYERS = 3  # of the network, counted from the coarsest
FINER = 2  # grid positions per position of the coarsest layer, along one side
WINDOW = 3  # side of the window around a position, in positions
COMPONENTS, WHITENING = 128, 0.5  # D, and the exponent, as in `neighbours`
RANK = 16  # principal components per block; bounds size and time
CUDA_IMAGES = 32  # images whose products with the factors are in memory together
EPS = 1e-12  # avoids division by 0 where all views are equal


class Positions(Scorer):
    """The Mahalanobis distance at each position of a grid twice as fine as the coarsest layer.

    Prepared features are per layer (N, P, C_l), with P positions per image.
    """

    name = "positions"
    views = Neighbours.views

    def __init__(self, window: int = WINDOW) -> None:
        """window: side of the window around a position, in positions; odd."""
        if window % 2 == 0:
            raise ValueError(f"a window around a position has an odd side, not {window}")
        self.window = window

    def prepare(self, maps: FeatureMaps) -> Prepared:
        """Resamples the layers to one grid: (N, P, C_l) per layer."""
        side = maps[-1].shape[-1] * FINER
        return [resample(layer, side) for layer in maps[-LAYERS:]]

    def fit(self, support: Prepared) -> Fitted:
        """Returns the coordinates (`directions`, `offset`, `damping`) and the Gaussians.

        `mean` (P, D); `factors` (P / FINER^2, D, r) and `ridge`, of the covariances, see the docstring of the module.

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
        maps = _padded_maps(damp(embeddings, damping), views, self.window)
        mean = _window_means(maps, self.window)
        covariances = _covariances(maps, mean, self.window)
        ridge = covariances.diagonal(dim1=1, dim2=2).mean().clamp(min=EPS)
        coordinates = {"directions": directions, "offset": offset, "damping": damping}
        return coordinates | {"mean": mean, "factors": _factors(covariances, ridge), "ridge": ridge}

    def extend(self, fitted: Fitted, accepted: Prepared, known: int) -> Fitted:
        """Updates means and covariances; an image has the weight of all views of a support image.

        The covariance of the support is restored from its factors, without the components that they leave out.
        """
        weight, ridge, mean = len(self.views), fitted["ridge"], fitted["mean"]
        embeddings = torch.cat(accepted, dim=2)
        rows = torch.addmm(fitted["offset"], embeddings.flatten(0, 1), fitted["directions"])
        maps = _padded_maps(damp(rows, fitted["damping"]), len(embeddings), self.window)
        added, added_mean = weight * len(embeddings), _window_means(maps, self.window)
        total = known + added
        centre = (known * mean + added * added_mean) / total
        factors = fitted["factors"].mT  # (P / FINER^2, r, D), of length sqrt(l / (l + ridge)) for a variance l
        variances = ridge / (1 - factors.square().sum(dim=2, keepdim=True)).clamp(min=EPS)
        of_known = factors.mT @ (variances * factors) + _squares(_block_means(mean - centre))
        of_added = _covariances(maps, added_mean, self.window) + _squares(_block_means(added_mean - centre))
        covariances = (known * of_known + added * of_added) / total
        return fitted | {"mean": centre, "factors": _factors(covariances, ridge)}

    def distance_maps(self, fitted: Fitted, test: Prepared) -> torch.Tensor:
        """Mahalanobis distances (B, H, H): at least 0, without a unit."""
        embeddings = torch.cat(test, dim=2)
        at_once = 1 if embeddings.device.type == "cpu" else CUDA_IMAGES  # 1: results do not depend on the batch
        parts = [embeddings] if torch.compiler.is_compiling() else embeddings.split(at_once)
        squared = torch.cat([_squared_distances(fitted, part) for part in parts])
        side = math.isqrt(squared.shape[1])
        return squared.clamp(min=0).sqrt().unflatten(1, (side, side))


def _padded_maps(embeddings: torch.Tensor, views: int, window: int) -> torch.Tensor:
    """Embeddings (n P, D) as maps (n, H + 2 w, H + 2 w, D), w = window // 2, whose borders are repeated."""
    side = math.isqrt(len(embeddings) // views)
    maps = embeddings.view(views, side, side, -1).permute(0, 3, 1, 2)
    return F.pad(maps, [window // 2] * 4, mode="replicate").permute(0, 2, 3, 1).contiguous()


def _window_means(maps: torch.Tensor, window: int) -> torch.Tensor:
    """The mean (P, D) of the window around each position, over all padded maps."""
    return F.avg_pool2d(maps.mean(dim=0).permute(2, 0, 1), window, stride=1).flatten(1).T.contiguous()


def _by_block(by_position: torch.Tensor) -> torch.Tensor:
    """The values (B, P, D) of B images by block, (P / FINER^2, B FINER^2, D)."""
    side = math.isqrt(by_position.shape[1]) // FINER
    blocks = by_position.view(-1, side, FINER, side, FINER, by_position.shape[2])
    return blocks.permute(1, 3, 0, 2, 4, 5).reshape(side * side, -1, by_position.shape[2])


def _by_position(by_block: torch.Tensor) -> torch.Tensor:
    """The inverse of `_by_block` for single values, (P / FINER^2, B FINER^2) -> (B, P)."""
    side = math.isqrt(len(by_block))
    return by_block.view(side, side, -1, FINER, FINER).permute(2, 0, 3, 1, 4).flatten(1)


def _block_means(mean: torch.Tensor) -> torch.Tensor:
    """The means (P, D) of the positions, averaged over each block: (P / FINER^2, D)."""
    return _by_block(mean[None]).mean(dim=1)


def _squares(rows: torch.Tensor) -> torch.Tensor:
    """x x^T (N, D, D) of rows x (N, D)."""
    return rows[:, :, None] * rows[:, None]


def _covariances(maps: torch.Tensor, mean: torch.Tensor, window: int) -> torch.Tensor:
    """The covariance (P / FINER^2, D, D) of the embeddings in all windows of a block, over all maps.

    It is the mean of x x^T less c c^T, with the mean c of x. x x^T is computed once per position and counts in a block
    as often as the position is in its windows.

    maps: from `_padded_maps`. mean: (P, D), from `_window_means`.
    """
    side = maps.shape[1]
    # (H + 2 w, blocks): the share of a row or column in all rows or columns of the windows of a block
    shares = F.avg_pool1d(F.avg_pool1d(torch.eye(side, dtype=maps.dtype), window, stride=1), FINER)
    of_columns = upload(shares.T, maps.device)
    means = maps.new_zeros(len(of_columns), len(of_columns), *[maps.shape[-1]] * 2)
    for row in range(side):
        embeddings = maps[:, row].transpose(0, 1)  # (H + 2 w, n, D)
        of_blocks = torch.tensordot(of_columns, embeddings.mT @ embeddings / len(maps), 1)  # (blocks, D, D)
        for block in shares[row].nonzero().flatten().tolist():
            means[block] += shares[row, block] * of_blocks
    return means.flatten(0, 1) - _squares(_block_means(mean))


def _factors(covariances: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """The factors (N, D, r) of covariances (N, D, D), r = min(RANK, D)."""
    variances, vectors = eigenvalues(covariances)
    variances, vectors = variances[:, -RANK:].clamp(min=0), vectors[:, :, -RANK:]
    return vectors * (variances / (variances + ridge)).sqrt()[:, None]


def _squared_distances(fitted: Fitted, embeddings: torch.Tensor) -> torch.Tensor:
    """Squared distances (B, P) of joined features (B, P, C)."""
    coordinates = torch.addmm(fitted["offset"], embeddings.flatten(0, 1), fitted["directions"])
    difference = damp(coordinates, fitted["damping"]).view(-1, *fitted["mean"].shape) - fitted["mean"]
    blocks = _by_block(difference)
    explained = (blocks @ fitted["factors"]).square().sum(dim=2)
    return _by_position(blocks.square().sum(dim=2) - explained) / fitted["ridge"]
