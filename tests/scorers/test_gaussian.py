"""The fast Gaussian scorer against its definition, in both forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import plain
from scorers import gaussian
from scorers.features import FeatureStore
from scorers.gaussian import Gaussian, convert_fitted_369ac53, inverse_cholesky
from utils.errors import UserError
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


def fast_distances(support: list[torch.Tensor], test: list[torch.Tensor]) -> torch.Tensor:
    """Distances (B, H, W) of the fast implementation; checks that stored tensors give the same."""
    scorer = Gaussian()
    support, test = scorer.prepare(support), scorer.prepare(test)
    at_once = scorer.measure(support, test, StageClock())
    stored = scorer.distance_maps(scorer.fit(support), test)
    torch.testing.assert_close(stored, at_once, rtol=1e-12 if at_once.dtype == torch.float64 else 1e-5, atol=1e-12)
    return at_once


# up to 38 views the matrices are V x V, for more C x C
@pytest.mark.parametrize("views", [2, 5, 22, 38, 39, 60])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_definition(views, dtype, bound):
    support, test = feature_maps(views, 2, dtype), feature_maps(4, 3, dtype)
    exact = plain.distances(
        plain.embedding([layer.double() for layer in support]), plain.embedding([layer.double() for layer in test])
    )
    found = fast_distances(support, test).flatten(1)
    assert found.dtype == dtype
    assert (found - exact).norm() / exact.norm() < bound


@pytest.mark.parametrize("views", [22, 60])
def test_rows_at_once_change_nothing(views, monkeypatch):
    support, test = feature_maps(views, 2), feature_maps(3, 3)
    by_row = fast_distances(support, test)
    monkeypatch.setitem(gaussian.ROWS_AT_ONCE, "cpu", 8)
    torch.testing.assert_close(fast_distances(support, test), by_row, rtol=1e-12, atol=0)


@pytest.mark.parametrize("views", [2, 7, 11, 15])  # the four forms that 369ac53 used
def test_tensors_of_earlier_detector_files(views):
    saved = torch.load(Path(__file__).parents[1] / "data/369ac53/gaussian.pt", weights_only=True)
    fitted = {name.split(".")[1]: tensor for name, tensor in saved.items() if name.startswith(f"{views}.")}
    expected, scorer = fitted.pop("distances"), Gaussian()
    converted = convert_fitted_369ac53(fitted)
    found = scorer.distance_maps(converted, scorer.prepare([saved[f"test{layer}"] for layer in range(3)]))
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert convert_fitted_369ac53(converted) is converted


@pytest.mark.parametrize("views", [22, 60])
def test_zero_at_the_mean_and_only_there(views):
    support = feature_maps(views, 2)
    mean = [layer.mean(dim=0, keepdim=True) for layer in support]
    assert fast_distances(support, mean).max() < 1e-6
    away = [layer + 0.1 for layer in mean]
    assert fast_distances(support, away).min() > 0.1


def test_features_that_exceed_the_memory_are_refused_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("utils.devices.MEMORY_FILE", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2097152 kB\n")
    maps = [torch.rand(1, c, s, s) for c, s in ((64, 56), (128, 28), (256, 14))]
    FeatureStore([Gaussian()], 10).write(0, maps)
    with pytest.raises(UserError, match=r"features of 10000 images need 13\.1 GB of memory, 2\.0 GB are free"):
        FeatureStore([Gaussian()], 10_000).write(0, maps)
    (tmp_path / "meminfo").unlink()
    FeatureStore([Gaussian()], 10).write(0, maps)


def test_an_image_alone_is_not_padded(monkeypatch):
    """Its distances are those of a padded batch up to rounding."""
    scorer, generator = Gaussian(), torch.Generator().manual_seed(0)
    maps = [torch.rand(25, c, s, s, generator=generator) for c, s in ((64, 8), (128, 4), (256, 2))]
    fitted = scorer.fit(scorer.prepare([layer[:22] for layer in maps]))
    together = scorer.distance_maps(fitted, scorer.prepare([layer[22:] for layer in maps]))
    monkeypatch.setattr(torch.nn.functional, "pad", lambda tensor, padding: tensor if not any(padding) else 1 / 0)
    alone = scorer.distance_maps(fitted, scorer.prepare([layer[22:23] for layer in maps]))
    torch.testing.assert_close(alone, together[:1], rtol=1e-5, atol=1e-5 * float(together.max()))


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
        Gaussian().fit(Gaussian().prepare(feature_maps(1, 2)))


@pytest.mark.parametrize("size", [1, 44])
def test_inverse_cholesky(size):
    a = np.random.default_rng(size).standard_normal((5, size, size + 3))
    matrices = a @ a.transpose(0, 2, 1) + 0.1 * np.eye(size)
    expected = np.linalg.inv(np.linalg.cholesky(matrices))
    np.testing.assert_allclose(inverse_cholesky(torch.from_numpy(matrices)), expected, rtol=1e-9, atol=1e-9)


def test_inverse_cholesky_says_nan_instead_of_nonsense():
    matrices = torch.eye(8, dtype=torch.float64).repeat(2, 1, 1)
    matrices[1, -1, -1] = -1
    found = inverse_cholesky(matrices)
    assert torch.equal(found[0], torch.eye(8, dtype=torch.float64))
    assert found[1].isnan().all()
