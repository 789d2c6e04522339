"""The nearest-neighbour scorer against its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter
from sklearn.neighbors import NearestNeighbors

from scorers import neighbours
from scorers.neighbours import Neighbours, NeighboursConfig
from utils.stages import StageClock

SIDES, CHANNELS = (16, 8, 4), (6, 12, 20)


def feature_maps(count: int, seed: int) -> list[torch.Tensor]:
    """Correlated positive features, (count, C_l, H_l, H_l) per layer."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for side, channels in zip(SIDES, CHANNELS, strict=True):
        mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(1))
        x = torch.randn(count, channels, side, side, generator=generator)
        layers.append(torch.relu(torch.einsum("ij,njhw->nihw", mixing, x) + 1))
    return layers


def definition(support: list[torch.Tensor], test: list[torch.Tensor], components: int = 10) -> np.ndarray:
    """The definition in the docstring of scorers/neighbours.py, in float64 and without chunks: distances (B, 4, 4)."""

    def regions(maps: list[torch.Tensor]) -> np.ndarray:
        fine, coarse = (uniform_filter(m.double().numpy(), (1, 1, 3, 3), mode="constant") for m in maps[1:])
        fine = fine.reshape(*fine.shape[:2], 4, 2, 4, 2).mean(axis=(3, 5))
        return np.concatenate([fine, coarse], axis=1).transpose(0, 2, 3, 1).reshape(-1, 32)

    rows, queries = regions(support), regions(test)
    scale = np.repeat(
        [1 / np.sqrt(rows[:, part].var(axis=0, ddof=1).sum()) for part in np.split(range(32), [12])], CHANNELS[1:]
    )
    variances, vectors = np.linalg.eigh(np.cov(rows.T) * np.outer(scale, scale))
    directions = (vectors / (variances + (0.01 + 1e-5) * 2 / 32) ** 0.25)[:, ::-1][:, :components]
    memory, queries = (((x - rows.mean(axis=0)) * scale) @ directions for x in (rows, queries))
    typical = (memory**2).sum(axis=1).mean()
    memory, queries = (x / np.sqrt((x**2).sum(axis=1, keepdims=True) + typical) for x in (memory, queries))
    return NearestNeighbors(n_neighbors=1).fit(memory).kneighbors(queries)[0].reshape(-1, 4, 4)


@pytest.mark.parametrize("images_at_once", [1, 2, 3])
def test_equals_the_definition(images_at_once, monkeypatch):
    monkeypatch.setattr(Neighbours, "_images_at_once", lambda *_: images_at_once)
    scorer, support, test = Neighbours(NeighboursConfig(components=10)), feature_maps(44, 2), feature_maps(3, 3)
    found = scorer.measure(scorer.prepare(support), scorer.prepare(test), StageClock())
    np.testing.assert_allclose(found, definition(support, test), rtol=1e-4)


def test_a_support_view_has_no_distance_and_anything_else_has_some():
    scorer, support = Neighbours(), feature_maps(22, 2)
    prepared = scorer.prepare(support)
    fitted = scorer.fit(prepared)
    assert scorer.distance_maps(fitted, prepared).max() == 0
    distances = scorer.distance_maps(fitted, scorer.prepare(feature_maps(5, 3)))
    assert distances.min() > 0.05 and distances.max() < 2


def test_where_a_region_lies_plays_no_part():
    """Rotating a test image by 90 degrees rotates its map by 90 degrees."""
    scorer = Neighbours()
    fitted, test = scorer.fit(scorer.prepare(feature_maps(22, 2))), feature_maps(2, 3)
    upright = scorer.distance_maps(fitted, scorer.prepare(test))
    turned = scorer.distance_maps(fitted, scorer.prepare([layer.rot90(1, (2, 3)) for layer in test]))
    torch.testing.assert_close(turned, upright.rot90(1, (1, 2)), rtol=1e-4, atol=1e-5)


def test_memory_is_limited_and_drawn_the_same_every_time():
    scorer, support = Neighbours(NeighboursConfig(bank_size=100)), feature_maps(22, 2)
    first, second = (scorer.fit(scorer.prepare(support)) for _ in range(2))
    assert first["memory"].shape[1] == 100
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_layer_without_variance_is_no_obstacle():
    scorer, support = Neighbours(), feature_maps(22, 2)
    support[1] = torch.zeros_like(support[1])
    distances = scorer.measure(scorer.prepare(support), scorer.prepare(support), StageClock())
    assert torch.isfinite(distances).all()


def test_the_prototype_is_one_of_the_choices():
    """Layers 2 and 3 on the finer grid, with a random subset of the rows and without steps 2 and 3."""
    scorer = Neighbours(NeighboursConfig(finer=2, components=None, whitening=0, damped=False, bank_size=500))
    support, test = scorer.prepare(feature_maps(22, 2)), scorer.prepare(feature_maps(2, 3))
    rows = torch.cat(support, dim=2).flatten(0, 1)
    kept = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(neighbours.SUBSET_SEED))[:500]]
    expected = torch.cdist(torch.cat(test, dim=2).flatten(0, 1), kept).amin(dim=1).view(2, 8, 8)
    torch.testing.assert_close(scorer.measure(support, test, StageClock()), expected, rtol=1e-4, atol=1e-4)
