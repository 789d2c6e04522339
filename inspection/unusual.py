"""Recognises images that are unlike the support images as a whole: another part, a lamp that is off, a turned mount.

A defect changes some regions of an image. An image that differs everywhere is no part of this kind, and calling it
normal or defective would mislead. Three rules, all from the support images alone:

- Contrast. The standard deviation of the grey values is below LEAST_CONTRAST times the least of a support image: black,
  white and grey frames, a lamp that is off.
- Features. Mean and standard deviation of each channel of the two coarsest layers are compared with those of each
  support view. The image is unlike the support if the distance to the nearest view exceeds LEAST_LIMIT, or
  LEAVE_ONE_OUT times the median distance of a support image to the others if that is larger.
- Direction. Where each support image is clearly more similar to the other support images than to their copies turned by
  90, 180 or 270 degrees, parts lie in a fixed direction. An image that is clearly more similar to a turned copy is then
  turned. For parts that look alike from several sides, there is no such rule.

A distance is relative: |a - b| / sqrt(|a| |b|), averaged over the compared tensors. The constants were chosen on the
categories on which `python -m benchmarks.unusual` measures the rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from scorers.base import FeatureMaps, Fitted, Prepared
from scorers.views import GREY_VIEW, ROTATION_ANGLES, TRANSLATED_VIEWS, TURNED_VIEWS, VIEWS_PER_IMAGE

LAYERS = 2  # compared, counted from the coarsest
GRID = 4  # cells per side, for the direction and for copies
LEAST_CONTRAST = 0.25  # times the least contrast of a support image
LEAST_LIMIT = 0.3  # relative distance of features
LEAVE_ONE_OUT = 1.4  # times the median leave-one-out distance
CLEARLY = 0.9  # ratio of two distances, for the direction
NEAR_COPY = 0.035  # relative distance of the grids
NEAR_VIEW = 0.3  # times the distance to the image's own rotated views, whichever is smaller
MOST_TILES = 256  # of large support images, whose statistics are kept
TINY = 1e-12


class Likeness:
    """What is kept of each image to compare it as a whole, and the comparison with the support images.

    It takes part in a FeatureStore like a scorer. Prepared features: mean (N, C) and standard deviation (N, C) of each
    layer, then means in GRID x GRID cells (N, GRID * GRID * C) of each layer.
    """

    name = "likeness"
    views = tuple(view for view in range(VIEWS_PER_IMAGE) if view not in TRANSLATED_VIEWS and view != GREY_VIEW)

    def prepare(self, maps: FeatureMaps) -> Prepared:
        """Channel statistics and grids of feature maps (N, C, H, W), coarsest layers only."""
        layers = [layer.float() for layer in maps[-LAYERS:]]
        statistics = [part for layer in layers for part in (layer.mean(dim=(2, 3)), layer.std(dim=(2, 3)))]
        return statistics + [F.adaptive_avg_pool2d(layer, GRID).flatten(1) for layer in layers]

    def fit(self, support: Prepared, contrasts: torch.Tensor) -> Fitted:
        """What `measure` needs, from the prepared features of all views of K images and their contrasts (K,).

        Of many images without views, as tiles are, MOST_TILES are kept; they show no direction and no copies.

        limit: of the distance of features. direction: 1 if the parts lie in a fixed direction, else 0. near: distance
        below which an image is a near copy.
        """
        split, has_views = _statistics(support), len(support[0]) > len(contrasts)
        views = len(self.views) if has_views else 1
        statistics = [part.unflatten(0, (-1, views)) for part in support[:split]]  # (K, V, C)
        grids = [part.unflatten(0, (-1, views)) for part in support[split:]]
        if not has_views:
            statistics, grids = [_evenly(part, MOST_TILES) for part in statistics], [part[:1] for part in grids]
        left_out = self._left_out(statistics)
        limit = max(LEAST_LIMIT, LEAVE_ONE_OUT * float(left_out.median())) if len(left_out) else LEAST_LIMIT
        upright, turned = self._directions(grids) if has_views else ([part[:, 0] for part in grids], grids)
        near = self._near(grids) if has_views else contrasts.new_zeros(1)
        fitted = {
            "limit": contrasts.new_tensor(limit),
            "direction": contrasts.new_tensor(float(self._is_fixed(upright, turned))),
            "contrast": LEAST_CONTRAST * contrasts.min(),
            "near": near.clamp(min=TINY),
        }
        fitted |= {f"statistic{n}": part.flatten(0, 1).contiguous() for n, part in enumerate(statistics)}
        fitted |= {f"upright{n}": part for n, part in enumerate(upright)}
        return fitted | {f"turned{n}": part.flatten(0, 1) for n, part in enumerate(turned)}

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
        """Why each of B images is unusual, as a phrase; empty for an image that is not. measured: from `measure`."""
        return [_phrase(*row) for row in measured]

    def twins(self, support: Prepared) -> dict[int, int]:
        """For each support image that is nearly equal to an earlier one, the number of that image.

        support: prepared features of all views.
        """
        grids = [part.view(-1, len(self.views), part.shape[1]) for part in support[_statistics(support) :]]
        upright = [grid[:, 0] for grid in grids]
        near = (_relative(upright, upright) < self._near(grids)).tolist()
        found: dict[int, int] = {}
        for number, row in enumerate(near):
            earlier = [n for n in range(number) if row[n] and n not in found]
            if earlier:
                found[number] = earlier[0]
        return found

    def copies(self, fitted: Fitted, test: Prepared) -> list[int | None]:
        """For each of B images the support image of which it is a copy or a near copy, or None."""
        distances = _relative(test[_statistics(test) :], _named(fitted, "upright")) / fitted["near"]
        nearest = distances.min(dim=1)
        pairs = zip(nearest.values.tolist(), nearest.indices.tolist(), strict=True)
        return [index if value < 1 else None for value, index in pairs]

    def _near(self, grids: Sequence[torch.Tensor]) -> torch.Tensor:
        """The distance (K,) below which an image is a near copy of a support image; grids: (K, V, D) per layer."""
        rotated = slice(1, 1 + len(ROTATION_ANGLES))
        own = [
            _relative([grid[n, :1] for grid in grids], [grid[n, rotated] for grid in grids])
            for n in range(len(grids[0]))
        ]
        return (NEAR_VIEW * torch.cat(own).amin(dim=1)).clamp(max=NEAR_COPY)

    def _left_out(self, statistics: Sequence[torch.Tensor]) -> torch.Tensor:
        """Distance of each support image (K,) to the nearest view of the others; empty for one image."""
        count = len(statistics[0])
        if count < 2:
            return torch.empty(0)
        distances = _relative([part[:, 0] for part in statistics], [part.flatten(0, 1) for part in statistics])
        own = torch.eye(count, dtype=torch.bool, device=distances.device)
        own = own.repeat_interleave(statistics[0].shape[1], dim=1)
        return distances.masked_fill(own, torch.inf).amin(dim=1)

    def _directions(self, grids: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The grids of the support images (K, D), and of their turned copies (K, 3, D), of each layer."""
        turned = [self.views.index(view) for view in TURNED_VIEWS]
        return [grid[:, 0].contiguous() for grid in grids], [grid[:, turned].contiguous() for grid in grids]

    def _is_fixed(self, upright: list[torch.Tensor], turned: list[torch.Tensor]) -> bool:
        """Whether every support image is clearly more similar to the others than to their turned copies."""
        count = len(upright[0])
        if count < 2:
            return False
        own = torch.eye(count, dtype=torch.bool, device=upright[0].device)
        straight = _relative(upright, upright).masked_fill(own, torch.inf).amin(dim=1)
        copies = _relative(upright, [part.flatten(0, 1) for part in turned])
        copies = copies.masked_fill(own.repeat_interleave(len(TURNED_VIEWS), dim=1), torch.inf).amin(dim=1)
        return bool((straight < CLEARLY * copies).all())


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


def _evenly(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of the rows, at even distances."""
    return rows[:: -(-len(rows) // most)]


def _named(fitted: Fitted, stem: str) -> list[torch.Tensor]:
    """The tensors `stem`0, `stem`1, ... in order."""
    return [fitted[f"{stem}{n}"] for n in range(sum(name.startswith(stem) for name in fitted))]


def _relative(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> torch.Tensor:
    """Relative distances (A, B) between rows, averaged over pairs of tensors (A, D) and (B, D)."""
    total = 0.0
    for rows, columns in zip(one, other, strict=True):
        scale = (rows.norm(dim=1)[:, None] * columns.norm(dim=1)).sqrt().clamp(min=TINY)
        total = total + torch.cdist(rows, columns) / scale
    return total / len(one)


def _nearest(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> torch.Tensor:
    return _relative(one, other).amin(dim=1)
