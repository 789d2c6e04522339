"""The few-shot Gaussian: support features -> statistics per position -> Mahalanobis distance of test features.

RegAD section 3.3 (after PaDiM). By definition, at each of the P positions of the finest grid: join the three layers'
features (the coarser ones enlarged by repeating; C = 448 channels), take mean m and covariance S over the V support
views (divided by n = V - 1) with e = COVARIANCE_EPS added on the diagonal, and measure sqrt((f - m)^T S^-1 (f - m)).

The same number is had without the joined features and without a 448 x 448 matrix per position. Write A (V, C) for the
centred views, d = f - m, and R for the inverse of a matrix's lower Cholesky factor.

1. The smaller side decides (Woodbury identity). If V <= C, take R of e n I + A A^T and w = R A d; then
       distance^2 = (|d|^2 - |w|^2) / e;      if not, take R of S and w = R d; then      distance^2 = |w|^2.
2. A A^T, A d and |d|^2 are sums over the layers, and a coarse layer is constant on blocks of positions, so each term
   is computed on its layer's own grid.
3. If V exceeds the C1 channels of the finest layer, 1. is done for the coarser layers only (on a quarter of the
   positions), and the finest layer, with A1 and d1, is conditioned on them (chain rule of the Gaussian):
       distance^2 = distance^2 of the coarser layers + |R1 (d1 - X^T w)|^2
   where X = R A1 and R1 belongs to e (I + X^T X) if V <= C; if not, X = R S_c1, with S_c1 the covariance between the
   coarser layers and the finest, and R1 belongs to S_11 - X^T X. R1's matrix is what is left of S_11.

Everything runs in the dtype of the features, float32 in use. There the error against the definition in float64 is
below 1e-5 (norm of the difference over norm of the map); tests/scorers/test_gaussian.py holds it to that.

A layer is (P_l, N, C_l) here, finest layer first, with the positions in NESTED order: position i lies in block i // 4
of the next coarser grid. Any run of whole coarsest blocks can be worked on alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from scorers.base import FeatureMaps, Fitted, Prepared, Scorer
from utils.stages import StageClock

COVARIANCE_EPS = 0.01  # on the covariance's diagonal, release behaviour (and PaDiM's)
# Largest temporary of one chunk of positions. CPU: the freed memory of small blocks is used again at once, that of
# large ones goes back to the system. CUDA: few large kernels.
CHUNK_BYTES = {"cpu": 12 * 2**20, "cuda": 512 * 2**20}
# Test images of a stored detector are filled up to a multiple of this, so that each goes through the same arithmetic
# alone as among others: matrix products treat the columns beyond the last full vector differently.
IMAGE_GROUP = 32
CHOLESKY_BASE = 16  # largest matrix given to LAPACK, larger ones are split; fastest of 8..44 at sizes 44, 64 and 176

Layers = Sequence[torch.Tensor]


class SupportStatistics(NamedTuple):
    """The Gaussians of a support set at some positions, built by `fit`.

    means: per layer (P_l, 1, C_l). centred: A, per layer treated together (P_l, V, C_l). joint: their R, (P_j, k, k),
    k = min(V, their channels). regression: X^T (P_j, 4 C_1, k) and residual: R1 (P_1, C_1, C_1) of the
    finest layer, None where all layers are treated together.
    """

    means: list[torch.Tensor]
    centred: list[torch.Tensor]
    joint: torch.Tensor
    regression: torch.Tensor | None
    residual: torch.Tensor | None


class Gaussian(Scorer):
    """The release's scorer: a Gaussian per position and the Mahalanobis distance to it.

    Prepared features are the layers of the module's docstring with the images first, (N, P_l, C_l); in memory the
    positions come first.
    """

    name = "gaussian"

    def prepare(self, maps: FeatureMaps) -> Prepared:
        """Feature maps, each half as wide as the one before, as (N, P_l, C_l) in nested order."""
        return [layer.transpose(0, 1) for layer in nested_layers(maps)]

    def fit(self, support: Prepared) -> Fitted:
        """The statistics of all positions, see `SupportStatistics`; their names end in the layer's number."""
        layers = _positions_first(support)
        parts = [
            _to_tensors(fit([layer[r] for layer, r in zip(layers, rows, strict=True)])) for rows in _chunks(layers)
        ]
        return {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}

    def distance_maps(self, fitted: Fitted, test: Prepared) -> torch.Tensor:
        """Mahalanobis distances (B, H, H)."""
        layers, statistics = _positions_first(test), _from_tensors(fitted)
        if torch.compiler.is_compiling():  # chunks would depend on the number of images, which is not known then
            return _as_maps(squared_distance(statistics, layers), layers)
        count = layers[0].shape[1]
        padding = -count % IMAGE_GROUP
        squared = layers[0].new_empty(layers[0].shape[0], count + padding)
        for rows in _chunks(layers, fitted["joint"].shape[-1]):
            part = [F.pad(layer[r], (0, 0, 0, padding)) for layer, r in zip(layers, rows, strict=True)]
            squared[rows[0]] = squared_distance(_rows_of(statistics, rows), part)
        return _as_maps(squared[:, :count], layers)

    def measure(self, support: Prepared, test: Prepared, clock: StageClock) -> torch.Tensor:
        """Fits and measures a chunk of positions at a time, so that no statistics are kept."""
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
    """Squared distances (P, B) in nested order as distances (B, H, H)."""
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
    """The statistics of some positions, given per layer."""
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
    """Statistics of the support views' features; V >= 2, or ValueError."""
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
    """Regression and residual of SupportStatistics, for A1 = `finest` (4 P_j, V, C_1); `joined`: None if V <= C."""
    views, channels = finest.shape[1:]
    blocks = finest.unflatten(0, (-1, 4)).transpose(1, 2).flatten(2)  # the four positions side by side: (P_j, V, 4 C_1)
    cross = blocks if joined is None else joined.mT @ blocks / math.sqrt(views - 1)
    regression = cross.mT @ joint.mT  # X^T: (P_j, 4 C_1, k)
    x = regression.view(-1, channels, joint.shape[1])
    explained = x @ x.mT
    left = explained * COVARIANCE_EPS if joined is None else finest.mT @ finest / (views - 1) - explained
    return regression, inverse_cholesky(_add_diagonal(left, COVARIANCE_EPS))


def squared_distance(statistics: SupportStatistics, test: Layers) -> torch.Tensor:
    """Squared Mahalanobis distances (P, B) of test features (P_l, B, C_l). No unit, 0 at the mean, never negative."""
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
    squared.clamp_(min=0)  # rounding
    if not conditioned:
        return squared
    finest = deltas[0].mT.unflatten(0, (-1, 4)).flatten(1, 2)  # the four positions one below the other: (P_j, 4 C_1, B)
    unexplained = torch.baddbmm(finest, statistics.regression, whitened, alpha=-1).view_as(deltas[0].mT)  # d1 - X^T w
    own = (statistics.residual @ unexplained).square().sum(dim=1)
    return own + squared.repeat_interleave(4, dim=0)


def inverse_cholesky(matrices: torch.Tensor) -> torch.Tensor:
    """Inverses of the lower Cholesky factors of positive definite `matrices` (N, k, k); NaN where one is not.

    Halves the matrices until LAPACK's unblocked routine is cheap, so nearly all work is batched products.
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
    """Per-layer row ranges of whole coarsest blocks, so that no temporary is much larger than CHUNK_BYTES.

    layers: (P_l, N, C_l); others: how many images (or directions) each position is multiplied with, beside its own N.
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
    """Square feature maps (N, C_l, H_l, H_l), finest first, each half as wide as the one before, as (P_l, N, C_l)."""
    return [to_nested(layer, depth=len(features) - 1 - level) for level, layer in enumerate(features)]


def to_nested(layer: torch.Tensor, depth: int) -> torch.Tensor:
    """Square feature maps (N, C, H, H) as (P, N, C), positions in nested order; `depth` coarser grids lie below."""
    count, channels, side, _ = layer.shape
    split = layer.permute(2, 3, 0, 1).reshape(*_nested_sides(side, depth) * 2, count, channels)
    order = [axis for level in range(depth + 1) for axis in (level, level + depth + 1)]
    return split.permute(*order, -2, -1).reshape(side * side, count, channels)


def from_nested(maps: torch.Tensor, depth: int) -> torch.Tensor:
    """The way back for one channel: (P, B) in nested order -> (B, H, H)."""
    side = math.isqrt(maps.shape[0])
    split = maps.reshape(*[s for s in _nested_sides(side, depth) for _ in "xy"], -1)
    axes = range(2 * depth + 2)
    return split.permute(-1, *axes[::2], *axes[1::2]).reshape(-1, side, side)


def _nested_sides(side: int, depth: int) -> list[int]:
    return [side >> depth] + [2] * depth


def _views_are_fewer(layers: Layers) -> bool:
    """Whether V <= C, the choice between the two forms of the module's docstring."""
    return layers[0].shape[1] <= sum(layer.shape[2] for layer in layers)


def _add_diagonal(matrices: torch.Tensor, value: float) -> torch.Tensor:
    matrices.diagonal(dim1=-2, dim2=-1).add_(value)
    return matrices


def _sum_on_finest(terms: Layers) -> torch.Tensor:
    """Sum of per-layer terms (P_l, ...) on the finest grid; overwrites them."""
    total = terms[-1]
    for term in reversed(terms[:-1]):
        term.unflatten(0, (total.shape[0], -1)).add_(total.unsqueeze(1))
        total = term
    return total


def _join_on_finest(layers: Layers) -> torch.Tensor:
    """The joined features of the definition, (P, N, sum of C_l)."""
    positions = layers[0].shape[0]
    return torch.cat([layer.repeat_interleave(positions // layer.shape[0], dim=0) for layer in layers], dim=2)
