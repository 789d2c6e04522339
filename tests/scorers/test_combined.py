"""The scorers positions and combined against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scorers import positions
from scorers.base import Scorer
from scorers.combined import (
    HIGHEST_LEVEL,
    LEAST_LEVEL,
    LEVEL_POWERS,
    MAP_WEIGHT,
    SCORE_WEIGHT,
    Combined,
    over_backbones,
)
from scorers.gaussian import Gaussian
from scorers.maps import border_weights, score_maps_at
from scorers.neighbours import Neighbours, NeighboursConfig
from scorers.positions import Positions
from tests.scorers.test_neighbours import feature_maps
from utils.stages import StageClock

VIEWS = len(Combined.views)


def coordinates(embeddings: np.ndarray, rows: np.ndarray, channels: list[int]) -> np.ndarray:
    """scorers/coordinates.py in float64: 128 directions, half-whitened; `rows` of the support decide."""
    scale = np.concatenate([np.full(len(part), 1 / np.sqrt(part.sum())) for part in _parts(rows, channels)])
    covariance = np.cov(rows.T) * np.outer(scale, scale)
    variances, vectors = np.linalg.eigh(covariance)
    directions = (vectors / (variances + (0.01 + 1e-5) * len(channels) / len(scale)) ** 0.25)[:, ::-1][:, :128]
    return ((embeddings - rows.mean(axis=0)) * scale) @ directions


def _parts(rows: np.ndarray, channels: list[int]) -> list[np.ndarray]:
    return np.split(rows.var(axis=0, ddof=1), np.cumsum(channels)[:-1])


def gaussians(rows: np.ndarray, window: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Means (P, D) and covariances (P / 4, D, D) of `positions`, from embeddings (n, P, D) in its coordinates."""
    side, reach = int(rows.shape[1] ** 0.5), window // 2
    borders = [(0, 0), (reach, reach), (reach, reach), (0, 0)]
    padded = np.pad(rows.reshape(len(rows), side, side, -1), borders, mode="edge")
    windows = {  # by row and column: the embeddings at the position and its neighbours in all views
        (y, x): padded[:, y : y + window, x : x + window].reshape(-1, rows.shape[2]) for y, x in np.ndindex(side, side)
    }
    blocks = [
        np.concatenate([windows[2 * y + a, 2 * x + b] for a, b in np.ndindex(2, 2)])
        for y, x in np.ndindex(side // 2, side // 2)
    ]
    means = np.stack([window.mean(axis=0) for window in windows.values()])
    return means, np.stack([np.cov(block.T, ddof=0) for block in blocks])


def definition(support: list[torch.Tensor], test: list[torch.Tensor], rank: int, window: int) -> np.ndarray:
    """The docstring of scorers/positions.py in float64, with an explicit inverse at each position: (B, P)."""
    channels = [layer.shape[2] for layer in support]
    rows, queries = (torch.cat(layers, dim=2).double().numpy() for layers in (support, test))
    flat = rows.reshape(-1, rows.shape[2])
    rows, queries = (coordinates(x, flat, channels) for x in (rows, queries))
    typical = (rows**2).sum(axis=2).mean()
    rows, queries = (x / np.sqrt((x**2).sum(axis=2, keepdims=True) + typical) for x in (rows, queries))
    means, covariances = gaussians(rows, window)
    ridge = np.mean([np.diag(covariance).mean() for covariance in covariances])
    found = []
    side = int(len(means) ** 0.5)
    for position, (y, x) in enumerate(np.ndindex(side, side)):
        variances, vectors = np.linalg.eigh(covariances[y // 2 * (side // 2) + x // 2])
        variances[:-rank] = 0
        inverse = vectors @ np.diag(1 / (variances.clip(0) + ridge)) @ vectors.T
        difference = queries[:, position] - means[position]
        found.append(np.einsum("bi,ij,bj->b", difference, inverse, difference))
    return np.sqrt(np.stack(found, axis=1))


@pytest.mark.parametrize(("count", "window"), [(2, 3), (26, 3), (2, 1), (2, 5)])
@pytest.mark.parametrize("rank", [4, 16, 100])
def test_positions_equal_the_definition(count, window, rank, monkeypatch):
    monkeypatch.setattr(positions, "RANK", rank)
    scorer = Positions(window)
    support, test = scorer.prepare(feature_maps(count, 2)), scorer.prepare(feature_maps(3, 3))
    found = scorer.measure(support, test, StageClock())
    np.testing.assert_allclose(found.flatten(1), definition(support, test, rank, window), rtol=2e-4)


def test_a_window_has_an_odd_side():
    with pytest.raises(ValueError, match="odd side, not 2"):
        Positions(2)


def test_positions_see_where_a_region_lies():
    """A part that is moved is far from the support at its positions, and as near as before anywhere."""
    generator = torch.Generator().manual_seed(0)
    part = [5 * torch.rand(1, c, side, side, generator=generator) for c, side in ((6, 16), (12, 8), (20, 4))]
    views = [layer + 0.1 * torch.rand(26, *layer.shape[1:], generator=generator) for layer in part]
    moved = [layer.roll(layer.shape[-1] // 2, dims=-1) for layer in part]
    scorers = {"positions": Positions(window=1), "with windows": Positions()}
    ratio = {}
    for name, scorer in (scorers | {"neighbours": Neighbours(NeighboursConfig(window=1))}).items():
        fitted = scorer.fit(scorer.prepare(views))
        still, gone = (scorer.distance_maps(fitted, scorer.prepare(one)).mean() for one in (part, moved))
        ratio[name] = float(gone / still)
    assert ratio["with windows"] > 2  # random neighbours, which no image has, are all in a window
    assert ratio["positions"] > 5 and ratio["neighbours"] == pytest.approx(1, abs=0.05)


def left_out_scaled(part: Scorer, support: list[torch.Tensor], test: list[torch.Tensor], images: int) -> torch.Tensor:
    """Distances of `part` to the support, divided by their mean over left-out support images, at the finer grid."""
    group, left_out = (VIEWS if images > 1 else 1), []  # a single image: its views are left out
    for start in range(0, len(support[0]) if images > 1 else 1, group):
        others = [torch.cat([layer[:start], layer[start + group :]]) for layer in support]
        own = [layer[start : start + 1] for layer in support]
        left_out.append(part.distance_maps(part.fit(part.prepare(others)), part.prepare(own)).mean())
    distances = part.distance_maps(part.fit(part.prepare(support)), part.prepare(test)) / torch.stack(left_out).mean()
    return torch.nn.functional.interpolate(distances[:, None], size=8, mode="bilinear")[:, 0].double()


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("backbones", [1, 2])
def test_combined_is_the_geometric_mean_of_distances_on_one_scale(images, backbones):
    networks = [(feature_maps(VIEWS * images, 2 + n), feature_maps(3, 5 + n)) for n in range(backbones)]
    support, test = ([layer for network in networks for layer in network[which]] for which in (0, 1))
    scorer = over_backbones(Combined(), [3] * backbones)
    found = scorer.measure(scorer.prepare(support), scorer.prepare(test), StageClock())
    parts = Neighbours(NeighboursConfig(zero_padding=False)), Positions()
    near, at_place = ([left_out_scaled(part, *network, images).log() for network in networks] for part in parts)
    for number, weight in enumerate((MAP_WEIGHT, SCORE_WEIGHT)):
        means = [weight * one + (1 - weight) * other for one, other in zip(near, at_place, strict=True)]
        expected = (sum(means) / backbones).exp()
        quartile = expected.flatten(1).sort(dim=1).values[:, 15, None, None]  # the 16th of 64
        expected = expected / quartile.clamp(LEAST_LEVEL, HIGHEST_LEVEL) ** LEVEL_POWERS[number]
        torch.testing.assert_close(found[:, number].double(), expected, rtol=1e-4, atol=1e-5)


def test_any_scorer_is_averaged_over_backbones():
    test = feature_maps(3, 3)
    for scorer in (Neighbours(), Gaussian()):
        support_views = [layer[: len(scorer.views) * 2] for layer in feature_maps(44, 2)]
        both = over_backbones(scorer, [3, 3])
        found = both.measure(both.prepare([*support_views, *support_views]), both.prepare([*test, *test]), StageClock())
        alone = scorer.measure(scorer.prepare(support_views), scorer.prepare(test), StageClock())
        ratio = found / alone[:, None]
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)
        assert over_backbones(scorer, [3]) is scorer


@pytest.mark.parametrize("scored", [1, 3])
def test_left_out_maps_are_those_of_refits(scored):
    scorer = Combined()
    support = scorer.prepare(feature_maps(VIEWS * 3, 2))
    (fitted, found), (_, expected) = (
        scorer.cross_fit(support, StageClock(), scored),
        Scorer.cross_fit(scorer, support, StageClock(), scored),
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(fitted["scale"], scorer.fit(support)["scale"], rtol=1e-5, atol=0)


def test_a_refit_keeps_the_scale():
    scorer = Combined()
    support = scorer.prepare(feature_maps(VIEWS * 3, 2))
    fitted = scorer.fit(support)
    again = scorer.refit(fitted, [tensor[:VIEWS] for tensor in support])
    assert torch.equal(again["scale"], fitted["scale"])
    assert again["neighbours_memory"].shape[1] < fitted["neighbours_memory"].shape[1]


def test_the_size_of_a_fit_does_not_depend_on_the_number_of_images():
    def size(images: int) -> int:
        scorer = Positions()
        return sum(tensor.nbytes for tensor in scorer.fit(scorer.prepare(feature_maps(VIEWS * images, 2))).values())

    assert size(2) == size(4)


def test_equal_support_images_give_finite_distances():
    scorer = Combined()
    one = [layer.repeat(2, 1, 1, 1) for layer in feature_maps(VIEWS, 2)]
    assert scorer.measure(scorer.prepare(one), scorer.prepare(feature_maps(2, 3)), StageClock()).isfinite().all()


def test_the_level_of_an_image_counts_less_than_a_defect():
    """All distances of an image doubled: the maps grow by less. A defect below a quarter of the image: unchanged."""
    maps = 0.25 + torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    defect = maps.clone()
    defect[:, :3, :3] *= 4
    scorer = Combined()
    plain, doubled, spotted = (scorer._means([one, one], torch.ones(2)) for one in (maps, 2 * maps, defect))
    for number, power in enumerate(LEVEL_POWERS):
        torch.testing.assert_close(doubled[:, number], plain[:, number] * 2 ** (1 - power))
        assert float(spotted[:, number, 0, 0] / plain[:, number, 0, 0]) == pytest.approx(4, rel=0.05)


def test_a_level_that_no_normal_image_has_is_a_deviation():
    """Beyond the highest level, maps grow as distances do: noise around a region, say, does not hide what is in it."""
    maps = 1.5 + torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain, doubled = (Combined()._means([one, one], torch.ones(2)) for one in (maps, 2 * maps))
    torch.testing.assert_close(doubled, 2 * plain)
    for number, power in enumerate(LEVEL_POWERS):
        torch.testing.assert_close(plain[:, number], maps / 1.25**power)


def test_a_copy_of_a_support_image_with_a_defect_has_a_finite_score():
    """Its level is 0, as most distances are."""
    maps = torch.zeros(1, 8, 8)
    maps[:, 4, 4] = 1
    found = Combined()._means([maps, maps], torch.ones(2))
    for number, power in enumerate(LEVEL_POWERS):
        assert float(found[0, number].amax()) == pytest.approx(0.25**-power)
        assert int((found[0, number] > 0).sum()) == 1


def test_one_view_is_no_support():
    with pytest.raises(ValueError, match="at least 2 support views"):
        Positions().fit(Positions().prepare(feature_maps(1, 2)))


def test_the_border_counts_less_in_the_image_score_only():
    distances = torch.zeros(2, 16, 16)
    distances[0, 0, 8] = distances[1, 8, 8] = 1  # at the border, and inside
    plain, maps = score_maps_at(distances, 64)
    scores, same_maps = score_maps_at(distances, 64, border_weight=0.9)
    assert torch.equal(maps, same_maps)
    assert float(scores[1]) == pytest.approx(float(plain[1]), rel=1e-4)
    assert float(scores[0] / plain[0]) == pytest.approx(0.92, abs=0.03)
    assert border_weights(64, 1.0) is None


def test_the_image_score_is_of_the_second_map():
    distances = torch.rand(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    inside = torch.ones(64, 64, dtype=torch.bool)
    inside[:, 32:] = False
    for region in (None, inside, inside.expand(2, 64, 64)):
        scores, maps = score_maps_at(distances, 64, region, border_weight=0.9)
        assert torch.equal(maps, score_maps_at(distances[:, 0], 64, region)[1])
        assert torch.equal(scores, score_maps_at(distances[:, 1], 64, region, border_weight=0.9)[0])
