"""The Gaussian scorer: support features -> statistics per position -> Mahalanobis distance of test features.

Source: RegAD section 3.3, after PaDiM. The definition, at each position of the finest grid:
- f joins the features of the three layers (C = 448 channels). The coarser layers are enlarged by repetition.
- m and S are mean and covariance over the V support views. S is divided by n = V - 1, and e = COVARIANCE_EPS is added
  to its diagonal.
- The distance is sqrt((f - m)^T S^-1 (f - m)).

This module computes the same distance. A (V, C) denotes the centred views, d = f - m, and R the inverse of a matrix's
lower Cholesky factor. The smaller of V and C sets the matrix size (Woodbury identity):
- V <= C: R is computed from e n I + A A^T, and w = R A d. Then distance^2 = (|d|^2 - |w|^2) / e. A A^T, A d and |d|^2
  are sums over the layers. Each term is computed on the grid of its layer, then enlarged.
- V > C: R is computed from S, and w = R d. Then distance^2 = |w|^2.

All computations use the dtype of the features, float32 in practice. The relative error against the definition in
float64 is below 1e-5 (norm of the difference divided by the norm of the map). tests/scorers/test_gaussian.py checks it.

Convention: a layer is (H_l, W_l, N, C_l), finest layer first, each grid half as wide as the one before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F

from scorers.base import FeatureMaps, Fitted, Prepared, Scorer
from utils.stages import StageClock

COVARIANCE_EPS = 0.01  # added to the covariance's diagonal, as in the release and in PaDiM
# Rows of the coarsest grid that are processed together. CPU: small temporary tensors stay in the caches, and the
# allocator reuses them. CUDA: a few large kernels are fastest.
ROWS_AT_ONCE = {"cpu": 1, "cuda": 8}
# The images of a batch are padded to a multiple of this. The result for an image then does not depend on its batch:
# matrix products treat the columns beyond the last full vector register differently. A single image is not padded,
# which saves two thirds of the time; its distances differ by rounding, 1e-7 of the largest.
IMAGE_GROUP = 32

Layers = Sequence[torch.Tensor]


class Gaussian(Scorer):
    """The scorer of the release: one Gaussian per position, and the Mahalanobis distance to it.

    Prepared features are per layer (N, H_l, W_l, C_l), stored with the positions first.
    """

    name = "gaussian"

    def prepare(self, maps: FeatureMaps) -> Prepared:
        """Converts feature maps (N, C_l, H_l, W_l) to (N, H_l, W_l, C_l)."""
        return [layer.permute(2, 3, 0, 1).contiguous().permute(2, 0, 1, 3) for layer in maps]

    def fit(self, support: Prepared) -> Fitted:
        """The statistics of all positions.

        mean0, mean1, ...: m, per layer (H_l, W_l, 1, C_l). centred0, ...: A, per layer (H_l, W_l, V, C_l), only if
        V <= C. joint: R, (H, W, k, k) with k = min(V, C).

        Raises:
            ValueError: fewer than 2 support views.
        """
        layers = _positions_first(support)
        parts = [_statistics(part) for part in _in_rows(layers, layers[-1])]
        return {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}

    def distance_maps(self, fitted: Fitted, test: Prepared) -> torch.Tensor:
        """Mahalanobis distances (B, H, W): at least 0, without a unit."""
        layers = _positions_first(test)
        if torch.compiler.is_compiling():  # the number of images is unknown when a detector is exported
            return _squared_distances(fitted, layers).sqrt().permute(2, 0, 1)
        count = layers[0].shape[2]
        padding = (0, 0, 0, 0 if count == 1 else -count % IMAGE_GROUP)
        fitted_rows = _in_rows(fitted.values(), layers[-1])
        squared = [
            _squared_distances(dict(zip(fitted, statistics, strict=True)), [F.pad(layer, padding) for layer in rows])
            for statistics, rows in zip(fitted_rows, _in_rows(layers, layers[-1]), strict=True)
        ]
        return torch.cat(squared)[..., :count].sqrt().permute(2, 0, 1)

    def measure(self, support: Prepared, test: Prepared, clock: StageClock, like: Fitted | None = None) -> torch.Tensor:
        """Fits and scores a few rows of the grid at a time, to save the memory of the statistics of all positions."""
        del like  # the distances have no scale that depends on the fit
        squared, views, images = [], _positions_first(support), _positions_first(test)
        for view_rows, image_rows in zip(_in_rows(views, views[-1]), _in_rows(images, images[-1]), strict=True):
            with clock(self.name):
                statistics = _statistics(view_rows)
            with clock("distance"):
                squared.append(_squared_distances(statistics, image_rows))
        return torch.cat(squared).sqrt().permute(2, 0, 1)


def _positions_first(prepared: Prepared) -> list[torch.Tensor]:
    return [layer.permute(1, 2, 0, 3) for layer in prepared]


def _in_rows(tensors: Iterable[torch.Tensor], coarsest: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields the parts of `tensors` (H_l, ...) that cover ROWS_AT_ONCE rows of the grid of `coarsest`, in order."""
    at_once = ROWS_AT_ONCE.get(coarsest.device.type, ROWS_AT_ONCE["cpu"])
    return zip(*(tensor.split(at_once * len(tensor) // len(coarsest)) for tensor in tensors), strict=True)


def _statistics(support: Layers) -> Fitted:
    """The tensors of `Gaussian.fit` from support features (H_l, W_l, V, C_l)."""
    views = support[0].shape[2]
    if views < 2:
        raise ValueError(f"a covariance needs at least 2 support views, got {views}")
    means = [layer.mean(dim=2, keepdim=True) for layer in support]
    centred = [layer - mean for layer, mean in zip(support, means, strict=True)]
    fitted = {f"mean{number}": mean for number, mean in enumerate(means)}
    if views <= sum(layer.shape[3] for layer in support):
        fitted |= {f"centred{number}": a for number, a in enumerate(centred)}
        matrices, added = _sum_on_finest([a @ a.mT for a in centred]), COVARIANCE_EPS * (views - 1)
    else:
        joined = _join_on_finest(centred)
        matrices, added = joined.mT @ joined / (views - 1), COVARIANCE_EPS
    matrices.diagonal(dim1=-2, dim2=-1).add_(added)
    return fitted | {"joint": inverse_cholesky(matrices)}


def _squared_distances(fitted: Fitted, test: Layers) -> torch.Tensor:
    """Squared Mahalanobis distances (H, W, B) of test features (H_l, W_l, B, C_l): at least 0."""
    deltas = [layer - fitted[f"mean{number}"] for number, layer in enumerate(test)]
    if "centred0" not in fitted:
        return (fitted["joint"] @ _join_on_finest(deltas).mT).square().sum(dim=2)
    whitened = fitted["joint"] @ _sum_on_finest([fitted[f"centred{i}"] @ d.mT for i, d in enumerate(deltas)])
    norms = _sum_on_finest([d.square().sum(dim=3) for d in deltas])
    return ((norms - whitened.square().sum(dim=2)) / COVARIANCE_EPS).clamp(min=0)  # rounding can make it negative


def inverse_cholesky(matrices: torch.Tensor) -> torch.Tensor:
    """Inverses of the lower Cholesky factors of `matrices` (..., k, k); NaN where one is not positive definite."""
    factors, info = torch.linalg.cholesky_ex(matrices)
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device).expand_as(factors)
    inverse = torch.linalg.solve_triangular(factors, identity, upper=False)
    return inverse.masked_fill((info > 0)[..., None, None], torch.nan)


def _sum_on_finest(terms: Layers) -> torch.Tensor:
    """Sum of per-layer terms (H_l, W_l, ...) on the finest grid; the terms are overwritten."""
    total = terms[-1]
    for term in reversed(terms[:-1]):
        term.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).add_(total[:, None, :, None])
        total = term
    return total


def _join_on_finest(layers: Layers) -> torch.Tensor:
    """The joined features f of the definition, (H, W, N, sum of C_l)."""
    height, width = layers[0].shape[:2]
    enlarged = [
        layer.repeat_interleave(height // len(layer), dim=0).repeat_interleave(width // layer.shape[1], dim=1)
        for layer in layers
    ]
    return torch.cat(enlarged, dim=3)


def convert_fitted_369ac53(fitted: Fitted) -> Fitted:
    """The tensors of `Gaussian.fit` from those in detector files of commit 369ac53 or earlier; others are returned.

    Those are (P_l, ...), with position i in block i // 4 of the next coarser grid. If V exceeds C_0, the finest layer
    is conditioned on the coarser ones: `joint` R_c is theirs, and `centred` begins with layer 1. Then distance^2 =
    distance^2 of the coarser layers + |R_0 (d_0 - X^T w)|^2, with `residual` R_0 (P_0, C_0, C_0) and `regression` X^T
    (P_1, 4 C_0, k), where X = R_c A_0 for V <= their channels and otherwise X = R_c S_c0.
    """
    if fitted["joint"].dim() == 4:
        return fitted
    means = [name for name in sorted(fitted) if name.startswith("mean")]
    converted = {name: fitted[name] for name in means}
    centred = [fitted[name] for name in sorted(fitted) if name.startswith("centred")]
    joint, residual = fitted["joint"], fitted.get("residual")
    if residual is not None:
        channels = residual.shape[-1]
        x = fitted["regression"].unflatten(1, (4, channels)).flatten(0, 1).mT  # (P_0, k, C_0)
        coarse = joint.repeat_interleave(4, dim=0)
        if joint.shape[-1] == centred[0].shape[1]:  # V <= C
            centred = [torch.linalg.solve_triangular(coarse, x, upper=False), *centred]
            gram = torch.zeros_like(coarse)
            for a in centred:
                gram += (a @ a.mT).repeat_interleave(len(gram) // len(a), dim=0)
            gram.diagonal(dim1=-2, dim2=-1).add_(COVARIANCE_EPS * (gram.shape[-1] - 1))
            joint = inverse_cholesky(gram)
        else:
            centred = []
            of_finest = torch.cat([torch.zeros_like(x), residual], dim=1)
            joint = torch.cat([of_finest, torch.cat([coarse, -residual @ x.mT @ coarse], dim=1)], dim=2)
    converted |= {f"centred{number}": a for number, a in enumerate(centred)} | {"joint": joint}
    side = math.isqrt(len(fitted[means[-1]]))
    return {name: _from_blocks(tensor, side) for name, tensor in converted.items()}


def _from_blocks(tensor: torch.Tensor, coarsest: int) -> torch.Tensor:
    """Reorders (P, ...) of `convert_fitted_369ac53` to (H, W, ...); coarsest: side of the coarsest grid."""
    halvings = int(math.log2(math.isqrt(len(tensor)) // coarsest))
    blocks = tensor.unflatten(0, (coarsest, coarsest, *[2, 2] * halvings))
    axes = range(2 * halvings + 2)
    rows_then_columns = blocks.permute(*axes[::2], *axes[1::2], -2, -1)
    return rows_then_columns.flatten(0, halvings).flatten(1, halvings + 1)
