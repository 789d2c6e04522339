"""Recognises images that are unlike the support images as a whole: another part, a lamp that is off, a turned mount.

A defect changes some regions of an image. An image that differs everywhere is no part of this kind, and calling it
normal or defective would mislead. Three rules, all from the support images alone:

- Contrast. The standard deviation of the grey values is below LEAST_CONTRAST times the least of a support image: black,
  white and grey frames, a lamp that is off.
- Features. Mean and standard deviation of each channel of the two coarsest layers are compared with those of each
  support view. The image is unlike the support if the distance to the nearest view exceeds LEAST_LIMIT, or
  LOO_FACTOR times the median distance of a support image to the others if that is larger.
- Direction. Where each support image is clearly more similar to the other support images than to these turned by 90,
  180 or 270 degrees, parts lie in a fixed direction. An image that is clearly more similar to a turned support image is
  then turned. For parts that look alike from several sides, there is no such rule.

A distance is relative: |a - b| / sqrt(|a| |b|), averaged over the compared tensors. The constants were chosen on the
categories on which `python -m benchmarks.out_of_distribution` measures the rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from scorers.base import FeatureMaps, Fitted, Prepared
from scorers.views import GREY_VIEW, TRANSLATED_VIEWS, TURNED_VIEWS, VIEWS_PER_IMAGE

LAYERS = 2  # compared, counted from the coarsest
GRID = 4  # cells per side, for the direction
LEAST_CONTRAST = 0.25  # times the least contrast of a support image
LEAST_LIMIT = 0.4  # relative distance of features
LOO_FACTOR = 1.4  # times the median leave-one-out distance
CLEARLY = 0.9  # ratio of two distances, for the direction
MOST_TILES = 256  # of large support images, whose statistics are kept
TINY = 1e-12


class OutOfDistributionCheck:
    """What is kept of each image to compare it as a whole, and the comparison with the support images.

    It takes part in a FeatureStore like a scorer. Prepared features: mean (N, C) and standard deviation (N, C) of each
    layer, then means in GRID x GRID cells (N, GRID * GRID * C) of each layer.
    """

    name = "out_of_distribution"
    views = tuple(view for view in range(VIEWS_PER_IMAGE) if view not in TRANSLATED_VIEWS and view != GREY_VIEW)

    def prepare(self, maps: FeatureMaps) -> Prepared:
        """Channel statistics and grids of feature maps (N, C, H, W), coarsest layers only."""
        layers = [layer.float() for layer in maps[-LAYERS:]]
        statistics = [part for layer in layers for part in _mean_and_deviation(layer)]
        return statistics + [F.adaptive_avg_pool2d(layer, GRID).flatten(1) for layer in layers]

    def fit(self, support: Prepared, contrasts: torch.Tensor) -> Fitted:
        """What `measure` needs, from the prepared features of all views of K images and their contrasts (K,).

        Of many images without views, as tiles are, MOST_TILES are kept; they show no direction.

        limit: of the distance of features. direction: 1 if the parts lie in a fixed direction, else 0. Files of
        earlier versions also hold "near", which is ignored.
        """
        has_views = len(support[0]) > len(contrasts)
        statistics, grids = self._by_image(support, len(self.views) if has_views else 1)
        if not has_views:
            step = -(-len(contrasts) // MOST_TILES)
            statistics, grids = [part[::step] for part in statistics], [part[:1] for part in grids]
        upright, turned, direction = [part[:, 0] for part in grids], grids, False
        if has_views:
            turned = [part[:, [self.views.index(view) for view in TURNED_VIEWS]] for part in grids]
            direction = self._has_direction(upright, turned)
        distances = _loo_distances([part[:, 0] for part in statistics], statistics)
        limit = max(LEAST_LIMIT, LOO_FACTOR * float(distances.median())) if len(distances) > 1 else LEAST_LIMIT
        fitted = {
            "limit": contrasts.new_tensor(limit),
            "direction": contrasts.new_tensor(float(direction)),
            "contrast": LEAST_CONTRAST * contrasts.min(),
        }
        fitted |= {f"statistic{n}": part.flatten(0, 1).contiguous() for n, part in enumerate(statistics)}
        fitted |= {f"upright{n}": part.contiguous() for n, part in enumerate(upright)}
        return fitted | {f"turned{n}": part.flatten(0, 1).contiguous() for n, part in enumerate(turned)}

    def measure(self, fitted: Fitted, test: Prepared, contrasts: torch.Tensor) -> torch.Tensor:
        """What `reasons` needs of B images, (B, 4): low contrast, distance of features, its limit, turned.

        It stays on the device, so that it can be copied to the host together with the scores.
        """
        split = _statistics(test)
        distance = _nearest(test[:split], _named(fitted, "statistic"))
        straight = _nearest(test[split:], _named(fitted, "upright"))
        turned = (_nearest(test[split:], _named(fitted, "turned")) < CLEARLY * straight) * fitted["direction"]
        low = (contrasts < fitted["contrast"]).to(distance)
        return torch.stack([low, distance, fitted["limit"].expand_as(distance), turned], dim=1)

    def reasons(self, measured: Sequence[Sequence[float]]) -> list[str]:
        """Why each of B images is unusual, as a phrase; "" for an image that is not. measured: from `measure`."""
        return [_phrase(*row) for row in measured]

    def statistics(self, prepared: Prepared) -> Prepared:
        """The channel statistics among prepared features, (N, C) each."""
        return prepared[: _statistics(prepared)]

    def _by_image(self, prepared: Prepared, views: int) -> tuple[Prepared, Prepared]:
        """Statistics and grids as (K, views, ...)."""
        parts = [part.unflatten(0, (-1, views)) for part in prepared]
        return parts[: _statistics(prepared)], parts[_statistics(prepared) :]

    def _has_direction(self, upright: list[torch.Tensor], turned: list[torch.Tensor]) -> bool:
        """Whether every support image is clearly more similar to the others than to these turned."""
        straight = _loo_distances(upright, [part[:, None] for part in upright])
        return len(straight) > 1 and bool((straight < CLEARLY * _loo_distances(upright, turned)).all())


def _mean_and_deviation(layer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (N, C) over the positions of a layer (N, C, H, W).

    torch.std is slow over the positions of a channels-last layer. A layer with one position has no deviation.
    """
    mean, count = layer.mean(dim=(2, 3), keepdim=True), layer[0, 0].numel()
    variance = (layer - mean).square().sum(dim=(2, 3)) / max(1, count - 1)
    return mean.flatten(1), variance.sqrt()


def _phrase(low: float, distance: float, limit: float, turned: float) -> str:
    if low:
        return "hardly any contrast"
    if distance > limit:
        return f"unlike the support images ({distance:.3f}, limit {limit:.3f})"
    return "turned" if turned else ""


def contrast(inputs: torch.Tensor) -> torch.Tensor:
    """Standard deviation (B,) of the grey values of images (B, 3, S, S) in [0, 1]."""
    return inputs.mean(dim=1).flatten(1).std(dim=1)


def _statistics(prepared: Prepared) -> int:
    """How many of the prepared tensors are channel statistics, two per layer; a network may have one layer only."""
    return 2 * (len(prepared) // 3)


def _named(fitted: Fitted, stem: str) -> list[torch.Tensor]:
    """The tensors `stem`0, `stem`1, ... in order."""
    return [fitted[f"{stem}{n}"] for n in range(sum(name.startswith(stem) for name in fitted))]


def relative_distances(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> torch.Tensor:
    """Relative distances (A, B) between rows, averaged over pairs of tensors (A, D) and (B, D)."""
    total = 0.0
    for rows, columns in zip(one, other, strict=True):
        scale = (rows.norm(dim=1)[:, None] * columns.norm(dim=1)).sqrt().clamp(min=TINY)
        total = total + torch.cdist(rows, columns) / scale
    return total / len(one)


def _nearest(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> torch.Tensor:
    return relative_distances(one, other).amin(dim=1)


def _loo_distances(images: Sequence[torch.Tensor], views: Sequence[torch.Tensor]) -> torch.Tensor:
    """Distance of each image (K, D) to the nearest of the views (K, V, D) of the others, (K,); infinite if K is 1."""
    distances = relative_distances(images, [part.flatten(0, 1) for part in views])
    own = torch.eye(len(images[0]), dtype=torch.bool, device=distances.device)
    return distances.masked_fill(own.repeat_interleave(views[0].shape[1], dim=1), torch.inf).amin(dim=1)
