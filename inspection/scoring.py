"""Network, scorer, tiles and region together: from images of any form to scores and score maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from datasets.images import restore_map, to_square, unit_range
from datasets.masks import to_square_mask
from inspection.images import Decoded, ImageInput, as_pixels, as_tensor
from inspection.out_of_distribution import OutOfDistributionCheck, contrast
from inspection.region import inside_map, pixels
from inspection.tiles import Layout, Tiling, joined_map
from models.stn import STNResNet, fuse_conv_bn
from scorers.base import Fitted, Prepared, Scorer
from scorers.combined import over_backbones
from scorers.features import FeatureStore, images_per_pass
from scorers.maps import score_maps_at
from scorers.views import support_views
from utils.devices import upload
from utils.stages import StageClock

NETWORK_GROUP, SCORE_GROUP = 4, 32  # on the CPU: images per network pass, fastest on two cores; and per group
CHECK = OutOfDistributionCheck()


class ImageResult(NamedTuple):
    """One image: score, map, why it differs from the support as a whole, its network input, whether it was cut."""

    score: np.float32
    map: np.ndarray
    reason: str
    square: torch.Tensor
    is_cut: bool


class ImageScoring:
    """How images are read, cut and scored, given what a scorer has fitted.

    bits: the bit depth of 16-bit grey images. tiling: how large images are cut; None if they are not. region: (H, W)
    bool, where images are scored; None: everywhere. check: what CHECK has fitted; empty: every score decides.
    """

    def __init__(
        self,
        network: STNResNet,
        scorer: Scorer,
        clock: StageClock,
        keep_aspect: bool,
        bits: int,
        region: np.ndarray | None,
    ) -> None:
        self.network, self.fast_network = network.to(clock.device), fuse_conv_bn(network)
        self.scorer = over_backbones(scorer, getattr(network, "backbone_layers", ()))
        self.clock, self.size = clock, network.img_size
        if region is not None:
            is_mask = isinstance(region, np.ndarray) and region.dtype == bool and region.ndim == 2
            if not (is_mask and region.any()):
                raise ValueError("a region is an array (H, W) bool that is True somewhere")
        self.keep_aspect, self.bits, self.region = keep_aspect, bits, region
        self.tiling: Tiling | None = None
        self.check: Fitted = {}

    @cached_property
    def pass_images(self) -> int:
        """Images per network pass."""
        return images_per_pass(self.fast_network, self.clock.device, NETWORK_GROUP)

    @property
    def group_images(self) -> int:
        """Images that are scored together: their features are in memory at the same time."""
        return SCORE_GROUP if self.clock.device.type == "cpu" else self.pass_images

    def layout_of(self, width: int, height: int) -> Layout | None:
        """The tiles into which an image of this size is cut; None if it is scored as a whole."""
        return self.tiling and self.tiling.layout(width, height, self.size)

    @property
    def cuts_support(self) -> bool:
        """Whether the support images were cut, so that the detector is fitted to tiles."""
        return self.tiling is not None and not self.tiling.of_support

    def restore(self, scores: np.ndarray, width: int, height: int) -> np.ndarray:
        """A score map at the size of its image, (height, width) float32; see `datasets.images.restore_map`."""
        return restore_map(scores, width, height, self.keep_aspect and self.layout_of(width, height) is None)

    def results(self, images: Iterable[ImageInput | Decoded], fitted: Fitted) -> Iterator[ImageResult]:
        """The results of images, in order."""
        squares: list[torch.Tensor] = []
        for image in images:
            with self.clock("decode"):
                decoded, square = image if isinstance(image, Decoded) else self.decode(image)
                layout = self.layout_of(*decoded.size) if decoded else None
            if layout is None:
                squares.append(square)
            if layout is not None or len(squares) == self.group_images:
                yield from self._whole_results(squares, fitted)
                squares = []
            if layout is not None:
                yield self._cut_result(decoded, square, layout, fitted)
        yield from self._whole_results(squares, fitted)

    def reduced_results(self, images: Iterable[ImageInput], fitted: Fitted) -> list[ImageResult]:
        """The results of images, with S x S values of each map in place of it (`inspection.region.pixels`)."""
        reduced = []
        for result in self.results(images, fitted):
            inside = inside_map(self.region, *result.map.shape[::-1]) if result.is_cut else self.square_region
            reduced.append(result._replace(map=pixels(result.map, inside, self.size)))
        return reduced

    def _whole_results(self, squares: list[torch.Tensor], fitted: Fitted) -> Iterator[ImageResult]:
        """The results of at most `group_images` images that are not cut."""
        if squares:
            scored = self.score_squares(self.on_device(squares), fitted, self.inside)
            for result in zip(*scored, squares, strict=True):
                yield ImageResult(*result, is_cut=False)

    def _cut_result(self, image: Image.Image, square: torch.Tensor, layout: Layout, fitted: Fitted) -> ImageResult:
        """The result of an image that is cut. It has a reason if most of its tiles have one."""
        reasons: list[str] = []

        def maps_of(tiles: torch.Tensor) -> np.ndarray:
            _, maps, of_tiles = self.score_squares(self.on_device(tiles), fitted, None)
            reasons.extend(of_tiles)
            return maps

        scores = joined_map(image, layout, maps_of, self.pass_images)
        inside = inside_map(self.region, layout.across, layout.down)
        scores = scores if inside is None else scores * inside
        unlike = [reason for reason in reasons if reason]
        reason = f"most tiles: {unlike[0]}" if 2 * len(unlike) > len(reasons) else ""
        return ImageResult(scores.max(), scores, reason, square, is_cut=True)

    def score_squares(
        self, inputs: torch.Tensor, fitted: Fitted, inside: torch.Tensor | None
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Scores, maps and reasons of network inputs (B, 3, S, S).

        Maps are 0 where `inside`, (S, S) or (B, S, S), is False.
        """
        with self.clock("network"):
            prepared = self.features(inputs)
        with self.clock("distance"):
            distances = self.scorer.distance_maps(fitted, prepared[self.scorer.name])
            measured = [CHECK.measure(self.check, prepared[CHECK.name], contrast(inputs))] if self.check else []
        with self.clock("smoothing"):
            scores, maps = score_maps_at(distances, self.size, inside, self.scorer.border_weight)
            columns = [scores[:, None], maps.flatten(1), *measured]
            values = torch.cat(columns, dim=1).cpu().numpy()  # one copy: each copy from a device waits for it
        scores, maps = values[:, 0], values[:, 1 : maps[0].numel() + 1].reshape(maps.shape)
        reasons = CHECK.reasons(values[:, -measured[0].shape[1] :].tolist()) if measured else [""] * len(inputs)
        return scores, maps, reasons

    def scores_of(self, distances: torch.Tensor) -> np.ndarray:
        """Image scores (B,) of distance maps of images that are not cut."""
        parts = [
            score_maps_at(maps, self.size, self.inside, self.scorer.border_weight)[0] for maps in distances.split(1)
        ]
        return torch.cat(parts).cpu().numpy()

    @property
    def square_region(self) -> np.ndarray | None:
        """The region in the network's input, (S, S) bool."""
        return None if self.region is None else to_square_mask(self.region, self.size, self.keep_aspect)

    @property
    def inside(self) -> torch.Tensor | None:
        """`square_region` on the device."""
        return None if self.region is None else upload(torch.from_numpy(self.square_region), self.clock.device)

    @property
    def inside_views(self) -> torch.Tensor | None:
        """The region moved with each support view that the scorer uses, (views, S, S) bool."""
        if self.region is None:
            return None
        return support_views(self.inside.float().expand(1, 3, -1, -1))[list(self.scorer.views), 0] > 0.5

    def features(self, inputs: torch.Tensor) -> dict[str, Prepared]:
        """Prepared features of inputs (B, 3, S, S) in [0, 1], for the scorer and for CHECK, by name."""
        store = FeatureStore([self.scorer, CHECK], len(inputs))
        for start in range(0, len(inputs), self.pass_images):
            store.write(start, self.fast_network.features(inputs[start : start + self.pass_images]))
        return store.prepared

    def decode(self, image: ImageInput) -> Decoded:
        """Decodes an image; the errors are those of `inspection.images.as_pixels`."""
        pixels = as_pixels(image, self.size, self.bits)
        if isinstance(pixels, torch.Tensor):
            return Decoded(None, pixels)
        return Decoded(pixels, as_tensor(to_square(pixels, self.size, self.keep_aspect)))

    def on_device(self, squares: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor:
        """Squares (B, 3, S, S) of `Decoded` as network inputs on the device; uint8 is converted there."""
        if not isinstance(squares, torch.Tensor):
            is_mixed = len({square.dtype for square in squares}) > 1
            squares = torch.stack([unit_range(square) for square in squares] if is_mixed else list(squares))
        return unit_range(upload(squares, self.clock.device))
