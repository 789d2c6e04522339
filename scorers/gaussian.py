"""The Gaussian scorer: support features -> statistics per position -> Mahalanobis distance of test features.

Source: RegAD section 3.3, after PaDiM. The definition, at each of the P positions of the finest grid:
- f joins the features of the three layers (C = 448 channels). The coarser layers are enlarged by repetition.
- m and S are mean and covariance over the V support views. S is divided by n = V - 1, and e = COVARIANCE_EPS is added
  to its diagonal.
- The distance is sqrt((f - m)^T S^-1 (f - m)).

This module computes the same distance without joining the features and without a 448 x 448 matrix per position.
A (V, C) denotes the centred views, d = f - m, and R the inverse of a matrix's lower Cholesky factor.

1. The smaller of V and C sets the matrix size (Woodbury identity).
   V <= C: R is computed from e n I + A A^T, and w = R A d. Then distance^2 = (|d|^2 - |w|^2) / e.
   V > C:  R is computed from S, and w = R d. Then distance^2 = |w|^2.
2. A A^T, A d and |d|^2 are sums over the layers. A coarse layer is constant on blocks of positions. Each term is
   therefore computed on the grid of its layer.
3. If V exceeds C1, the channels of the finest layer, step 1 is applied to the coarser layers only, on a quarter of the
   positions. The finest layer, with A1 and d1, is conditioned on them (chain rule of the Gaussian):
       distance^2 = distance^2 of the coarser layers + |R1 (d1 - X^T w)|^2
   V <= C: X = R A1, and R1 is computed from e (I + X^T X).
   V > C:  X = R S_c1, and R1 is computed from S_11 - X^T X, the conditional covariance of the finest layer.
   C counts the channels of the coarser layers here, S_c1 is the covariance between them and the finest layer, and S_11
   is the covariance of the finest layer.

All computations use the dtype of the features, float32 in practice. The relative error against the definition in
float64 is below 1e-5 (norm of the difference divided by the norm of the map). tests/scorers/test_gaussian.py checks it.

Convention: a layer is (P_l, N, C_l), finest layer first, with the positions in NESTED order. Position i lies in block
i // 4 of the next coarser grid. Any range of whole blocks of the coarsest grid can be processed alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from scorers.base import FeatureMaps, Fitted, Prepared, Scorer
from utils.stages import StageClock

COVARIANCE_EPS = 0.01  # added to the covariance's diagonal, as in the release and in PaDiM
# Largest temporary tensor of one chunk of positions. CPU: the allocator reuses small freed blocks and returns large
# ones to the system. CUDA: a few large kernels are fastest.
CHUNK_BYTES = {"cpu": 12 * 2**20, "cuda": 512 * 2**20}
# The images of a batch are padded to a multiple of this. The result for an image then does not depend on its batch:
# matrix products treat the columns beyond the last full vector register differently.
IMAGE_GROUP = 32
CHOLESKY_BASE = 16  # largest matrix given to LAPACK; larger ones are split. Fastest of 8..44 at sizes 44, 64, 176

Layers = Sequence[torch.Tensor]


class SupportStatistics(NamedTuple):
    """Gaussian statistics of a support set at a range of positions, computed by `fit`.

    The joint layers are all layers, or all but the finest one if that is conditioned on the others (step 3).

    means: m, per layer (P_l, 1, C_l). centred: A, per joint layer (P_l, V, C_l). joint: R of the joint layers,
    (P_j, k, k), with k = min(V, their channels). regression: X^T (P_j, 4 C_1, k); residual: R1 (P_1, C_1, C_1). Both
    are None if all layers are joint.
    """

    means: list[torch.Tensor]
    centred: list[torch.Tensor]
    joint: torch.Tensor
    regression: torch.Tensor | None
    residual: torch.Tensor | None


class Gaussian(Scorer):
    """The scorer of the release: one Gaussian per position, and the Mahalanobis distance to it.

    Prepared features are per layer (N, P_l, C_l), positions in nested order. In memory, the positions come first.
    """

    name = "gaussian"

    def prepare(self, maps: FeatureMaps) -> Prepared:
        """Converts square feature maps to (N, P_l, C_l) in nested order; each map is half as wide as the one before."""
        return [layer.transpose(0, 1) for layer in nested_layers(maps)]

    def fit(self, support: Prepared) -> Fitted:
        """The tensors of `SupportStatistics` for all positions; per-layer names end in the layer's number.

        Raises:
            ValueError: fewer than 2 support views.
        """
        layers = _positions_first(support)
        parts = [
            _to_tensors(fit([layer[r] for layer, r in zip(layers, rows, strict=True)])) for rows in _chunks(layers)
        ]
        return {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}

    def distance_maps(self, fitted: Fitted, test: Prepared) -> torch.Tensor:
        """Mahalanobis distances (B, H, H): at least 0, without a unit."""
        layers, statistics = _positions_first(test), _from_tensors(fitted)
        if torch.compiler.is_compiling():  # no chunks: their size depends on the number of images, unknown here
            return _as_maps(squared_distance(statistics, layers), layers)
        count = layers[0].shape[1]
        padding = -count % IMAGE_GROUP
        squared = layers[0].new_empty(layers[0].shape[0], count + padding)
        for rows in _chunks(layers, fitted["joint"].shape[-1]):
            part = [F.pad(layer[r], (0, 0, 0, padding)) for layer, r in zip(layers, rows, strict=True)]
            squared[rows[0]] = squared_distance(_rows_of(statistics, rows), part)
        return _as_maps(squared[:, :count], layers)

    def measure(self, support: Prepared, test: Prepared, clock: StageClock) -> torch.Tensor:
        """Fits and scores one chunk of positions at a time. The statistics of all positions are never in memory."""
        layers, of_test = _positions_first(support), _positions_first(test)
        squared = of_test[0].new_empty(of_test[0].shape[:2])
        for rows in _chunks(layers, of_test[0].shape[1]):
            with clock(self.name):
                statistics = fit([layer[r] for layer, r in zip(layers, rows, strict=True)])
            with clock("distance"):
                part = [layer[r] for layer, r in zip(of_test, rows, strict=True)]
                squared[rows[0]] = squared_distance(statistics, part)
        return _as_maps(squared, of_test)


def _positions_first(prepared: Prepared) -> list[torch.Tensor]:
    return [layer.transpose(0, 1) for layer in prepared]


def _as_maps(squared: torch.Tensor, layers: Layers) -> torch.Tensor:
    """Converts squared distances (P, B) in nested order to distances (B, H, H)."""
    return from_nested(squared.sqrt(), depth=len(layers) - 1)


def _to_tensors(statistics: SupportStatistics) -> Fitted:
    lists = {"mean": statistics.means, "centred": statistics.centred}
    tensors = {f"{name}{number}": layer for name, layers in lists.items() for number, layer in enumerate(layers)}
    others = {name: getattr(statistics, name) for name in ("joint", "regression", "residual")}
    return tensors | {name: tensor for name, tensor in others.items() if tensor is not None}


def _from_tensors(fitted: Fitted) -> SupportStatistics:
    means, centred = (
        [fitted[name] for name in sorted(fitted) if name.startswith(kind)] for kind in ("mean", "centred")
    )
    return SupportStatistics(means, centred, fitted["joint"], fitted.get("regression"), fitted.get("residual"))


def _rows_of(statistics: SupportStatistics, rows: Sequence[slice]) -> SupportStatistics:
    """The statistics of a range of positions; `rows` gives the range per layer."""
    conditioned = statistics.regression is not None
    together = rows[conditioned:]
    return SupportStatistics(
        [mean[r] for mean, r in zip(statistics.means, rows, strict=True)],
        [layer[r] for layer, r in zip(statistics.centred, together, strict=True)],
        statistics.joint[together[0]],
        statistics.regression[together[0]] if conditioned else None,
        statistics.residual[rows[0]] if conditioned else None,
    )


def fit(support: Layers) -> SupportStatistics:
    """Statistics of the support features, per layer (P_l, V, C_l).

    Raises:
        ValueError: fewer than 2 support views.
    """
    views = support[0].shape[1]
    if views < 2:
        raise ValueError(f"a covariance needs at least 2 support views, got {views}")
    means = [layer.mean(dim=1, keepdim=True) for layer in support]
    centred = [layer - mean for layer, mean in zip(support, means, strict=True)]
    conditioned = views > centred[0].shape[2] and len(centred) > 1
    together = centred[1:] if conditioned else centred
    if _views_are_fewer(together):
        joined = None
        gram = _sum_on_finest([a @ a.mT for a in together])  # A A^T: (P_j, V, V)
        joint = inverse_cholesky(_add_diagonal(gram, COVARIANCE_EPS * (views - 1)))
    else:
        joined = _join_on_finest(together) / math.sqrt(views - 1)  # (P_j, V, C_j)
        joint = inverse_cholesky(_add_diagonal(joined.mT @ joined, COVARIANCE_EPS))
    regression = residual = None
    if conditioned:
        regression, residual = _condition_finest(centred[0], joint, joined)
    return SupportStatistics(means, together, joint, regression, residual)


def _condition_finest(
    finest: torch.Tensor, joint: torch.Tensor, joined: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Regression and residual of SupportStatistics for A1 = `finest` (4 P_j, V, C_1). `joined` is None if V <= C."""
    views, channels = finest.shape[1:]
    blocks = finest.unflatten(0, (-1, 4)).transpose(1, 2).flatten(2)  # four positions side by side: (P_j, V, 4 C_1)
    cross = blocks if joined is None else joined.mT @ blocks / math.sqrt(views - 1)
    regression = cross.mT @ joint.mT  # X^T: (P_j, 4 C_1, k)
    x = regression.view(-1, channels, joint.shape[1])
    explained = x @ x.mT
    left = explained * COVARIANCE_EPS if joined is None else finest.mT @ finest / (views - 1) - explained
    return regression, inverse_cholesky(_add_diagonal(left, COVARIANCE_EPS))


def squared_distance(statistics: SupportStatistics, test: Layers) -> torch.Tensor:
    """Squared Mahalanobis distances (P, B) of test features (P_l, B, C_l): at least 0, without a unit."""
    deltas = [layer - mean for layer, mean in zip(test, statistics.means, strict=True)]
    conditioned = statistics.regression is not None
    together, centred = deltas[conditioned:], statistics.centred
    if _views_are_fewer(centred):
        whitened = statistics.joint @ _sum_on_finest([a @ d.mT for a, d in zip(centred, together, strict=True)])
        norms = _sum_on_finest([d.square().sum(dim=2) for d in together])  # |d|^2: (P_j, B)
        squared = (norms - whitened.square().sum(dim=1)) / COVARIANCE_EPS  # w: (P_j, V, B)
    else:
        whitened = statistics.joint @ _join_on_finest(together).mT  # w: (P_j, C_j, B)
        squared = whitened.square().sum(dim=1)
    squared.clamp_(min=0)  # rounding can make it negative
    if not conditioned:
        return squared
    finest = deltas[0].mT.unflatten(0, (-1, 4)).flatten(1, 2)  # four positions stacked: (P_j, 4 C_1, B)
    unexplained = torch.baddbmm(finest, statistics.regression, whitened, alpha=-1).view_as(deltas[0].mT)  # d1 - X^T w
    own = (statistics.residual @ unexplained).square().sum(dim=1)
    return own + squared.repeat_interleave(4, dim=0)


def inverse_cholesky(matrices: torch.Tensor) -> torch.Tensor:
    """Inverses of the lower Cholesky factors of `matrices` (N, k, k); NaN for a matrix that is not positive definite.

    The matrices are halved recursively down to CHOLESKY_BASE, so that nearly all work is done in batched products.
    """
    size = matrices.shape[-1]
    if size <= CHOLESKY_BASE:
        factors, info = torch.linalg.cholesky_ex(matrices)
        factors = factors.masked_fill((info > 0)[:, None, None], torch.nan)
        identity = torch.eye(size, dtype=matrices.dtype, device=matrices.device).expand_as(factors)
        return torch.linalg.solve_triangular(factors, identity, upper=False)
    half = size // 2
    inverse = torch.zeros_like(matrices)
    first = inverse_cholesky(matrices[:, :half, :half])
    across = matrices[:, half:, :half] @ first.mT
    second = inverse_cholesky(matrices[:, half:, half:] - across @ across.mT)
    inverse[:, :half, :half], inverse[:, half:, half:] = first, second
    inverse[:, half:, :half] = -(second @ (across @ first))
    return inverse


def _chunks(layers: Layers, others: int = 1) -> Iterator[list[slice]]:
    """Yields per-layer row ranges of whole coarsest blocks that keep temporary tensors near or below CHUNK_BYTES.

    layers: (P_l, N, C_l). others: the number of images or directions that each position is multiplied with, besides
    its own N.
    """
    count, blocks = layers[0].shape[1], layers[-1].shape[0]
    ratios = [layer.shape[0] // blocks for layer in layers]
    channels = layers[0].shape[2]
    per_position = max(count, channels) * max(count, others, channels)
    budget = CHUNK_BYTES.get(layers[0].device.type, CHUNK_BYTES["cpu"])
    step = max(1, budget // (layers[0].element_size() * ratios[0] * per_position))
    for start in range(0, blocks, step):
        yield [slice(start * ratio, min(start + step, blocks) * ratio) for ratio in ratios]


def nested_layers(features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Converts square feature maps (N, C_l, H_l, H_l), finest first, to (P_l, N, C_l) in nested order.

    Each map is half as wide as the one before.
    """
    return [to_nested(layer, depth=len(features) - 1 - level) for level, layer in enumerate(features)]


def to_nested(layer: torch.Tensor, depth: int) -> torch.Tensor:
    """Converts square feature maps (N, C, H, H) to (P, N, C) in nested order; depth: the number of coarser grids."""
    count, channels, side, _ = layer.shape
    split = layer.permute(2, 3, 0, 1).reshape(*_nested_sides(side, depth) * 2, count, channels)
    order = [axis for level in range(depth + 1) for axis in (level, level + depth + 1)]
    return split.permute(*order, -2, -1).reshape(side * side, count, channels)


def from_nested(maps: torch.Tensor, depth: int) -> torch.Tensor:
    """Inverse of `to_nested` for one channel: (P, B) in nested order -> (B, H, H)."""
    side = math.isqrt(maps.shape[0])
    split = maps.reshape(*[s for s in _nested_sides(side, depth) for _ in "xy"], -1)
    axes = range(2 * depth + 2)
    return split.permute(-1, *axes[::2], *axes[1::2]).reshape(-1, side, side)


def _nested_sides(side: int, depth: int) -> list[int]:
    return [side >> depth] + [2] * depth


def _views_are_fewer(layers: Layers) -> bool:
    """Whether V <= C: selects between the two forms of step 1 in the module's docstring."""
    return layers[0].shape[1] <= sum(layer.shape[2] for layer in layers)


def _add_diagonal(matrices: torch.Tensor, value: float) -> torch.Tensor:
    matrices.diagonal(dim1=-2, dim2=-1).add_(value)
    return matrices


def _sum_on_finest(terms: Layers) -> torch.Tensor:
    """Sum of per-layer terms (P_l, ...) on the finest grid; the terms are overwritten."""
    total = terms[-1]
    for term in reversed(terms[:-1]):
        term.unflatten(0, (total.shape[0], -1)).add_(total.unsqueeze(1))
        total = term
    return total


def _join_on_finest(layers: Layers) -> torch.Tensor:
    """The joined features f of the definition, (P, N, sum of C_l)."""
    positions = layers[0].shape[0]
    return torch.cat([layer.repeat_interleave(positions // layer.shape[0], dim=0) for layer in layers], dim=2)
