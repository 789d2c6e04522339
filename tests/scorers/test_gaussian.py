"""The fast Gaussian scorer against its definition, in all its forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import plain
from scorers import gaussian
from scorers.gaussian import Gaussian, fit, from_nested, inverse_cholesky, nested_layers, to_nested
from utils.stages import StageClock

SIDES, CHANNELS = (8, 4, 2), (6, 12, 20)  # 38 channels


def feature_maps(count: int, seed: int, dtype=torch.float64) -> list[torch.Tensor]:
    """Correlated positive features, (count, C_l, H_l, H_l) per layer; variances near 0.3, on real data below 0.2."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for side, channels in zip(SIDES, CHANNELS, strict=True):
        mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x = torch.randn(count, channels, side, side, generator=generator, dtype=torch.float64)
        layers.append(0.15 * torch.relu(torch.einsum("ij,njhw->nihw", mixing, x) + 1).to(dtype))
    return layers


def fast_distances(support: list[torch.Tensor], test: list[torch.Tensor], budget: int = 2**40) -> torch.Tensor:
    """Distances (B, H, W) of the fast implementation in chunks; checks that stored tensors give the same."""
    scorer = Gaussian()
    support, test = scorer.prepare(support), scorer.prepare(test)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gaussian.CHUNK_BYTES, "cpu", budget)
        at_once = scorer.measure(support, test, StageClock())
        stored = scorer.distance_maps(scorer.fit(support), test)
    torch.testing.assert_close(stored, at_once, rtol=1e-12 if at_once.dtype == torch.float64 else 1e-5, atol=1e-12)
    return at_once


# 5 views: all layers joint, V x V; 22: V x V for the coarse layers, the finest conditioned; 36: C x C for the
# coarse layers (32 channels), the finest conditioned; 60: more views than all channels
@pytest.mark.parametrize("views", [2, 5, 6, 7, 22, 32, 33, 36, 60])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_definition(views, dtype, bound):
    support, test = feature_maps(views, 2, dtype), feature_maps(4, 3, dtype)
    exact = plain.distances(
        plain.embedding([layer.double() for layer in support]), plain.embedding([layer.double() for layer in test])
    )
    found = fast_distances(support, test).flatten(1)
    assert found.dtype == dtype
    assert (found - exact).norm() / exact.norm() < bound


@pytest.mark.parametrize("views", [5, 22, 36])
def test_chunks_change_nothing(views):
    support, test = feature_maps(views, 2), feature_maps(3, 3)
    whole, pieces = fast_distances(support, test), fast_distances(support, test, budget=1)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("views", [5, 22, 36])
def test_zero_at_the_mean_and_only_there(views):
    support = feature_maps(views, 2)
    mean = [layer.mean(dim=0, keepdim=True) for layer in support]
    assert fast_distances(support, mean).max() < 1e-6
    away = [layer + 0.1 for layer in mean]
    assert fast_distances(support, away).min() > 0.1


def test_order_of_views_and_constant_shift_change_nothing():
    support, test = feature_maps(22, 2), feature_maps(3, 3)
    reference = fast_distances(support, test)
    order = torch.randperm(22, generator=torch.Generator().manual_seed(0))
    shifted = fast_distances([layer[order] + 3 for layer in support], [layer + 3 for layer in test])
    torch.testing.assert_close(shifted, reference, rtol=1e-9, atol=1e-9)


def test_identical_views_leave_the_added_diagonal_only():
    """For equal views, the covariance is 0.01 I, so the distance is ten times the Euclidean distance."""
    one, test = feature_maps(1, 2), feature_maps(3, 3)
    support = [layer.expand(22, -1, -1, -1) for layer in one]
    euclidean = (plain.embedding(test) - plain.embedding(one)).norm(dim=1)
    torch.testing.assert_close(fast_distances(support, test).flatten(1), 10 * euclidean)


def test_one_view_is_refused():
    with pytest.raises(ValueError, match="at least 2 support views"):
        fit(nested_layers(feature_maps(1, 2)))


def test_nested_order_literally():
    grid = torch.arange(16.0).view(1, 1, 4, 4)
    nested = to_nested(grid, depth=1)[:, 0, 0]
    assert nested.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert torch.equal(from_nested(nested[:, None], depth=1), grid[:, 0])


@pytest.mark.parametrize(("side", "depth"), [(4, 0), (8, 2), (56, 2), (60, 2), (80, 3)])
def test_nesting_puts_each_block_together(side, depth):
    fine = torch.arange(float(side * side)).view(1, 1, side, side)
    assert torch.equal(from_nested(to_nested(fine, depth)[..., 0], depth), fine[:, 0])
    if depth:
        coarse = torch.randn(1, 1, side // 2, side // 2)
        enlarged = coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        repeated = to_nested(coarse, depth - 1).repeat_interleave(4, dim=0)
        assert torch.equal(to_nested(enlarged, depth), repeated)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 44, 64, 100])
def test_inverse_cholesky(size):
    a = np.random.default_rng(size).standard_normal((5, size, size + 3))
    matrices = a @ a.transpose(0, 2, 1) + 0.1 * np.eye(size)
    expected = np.linalg.inv(np.linalg.cholesky(matrices))
    np.testing.assert_allclose(inverse_cholesky(torch.from_numpy(matrices)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [8, 40])
def test_inverse_cholesky_says_nan_instead_of_nonsense(size):
    matrices = torch.eye(size, dtype=torch.float64).repeat(2, 1, 1)
    matrices[1, -1, -1] = -1
    found = inverse_cholesky(matrices)
    assert torch.equal(found[0], torch.eye(size, dtype=torch.float64))
    assert found[1].isnan().any()
