"""Cuts large images into overlapping tiles and puts the score maps of the tiles together.

An image that is reduced to the network's input loses its small defects. A tile is cut from the image and resized to
the network's input on its own, so its details keep their size. The map of the image has the scale of the network's
input: S pixels of the map are one tile.

Neighbouring tiles overlap by at least OVERLAP of their side, so any defect up to that size lies whole in a tile. Where
tiles overlap, their maps are averaged with weights that fall to zero at the border of each tile (`cross_fade`).
Features near the border of a tile see padding instead of the image; a weight of zero there leaves no seam.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from inspection.images import as_tensor
from utils.choices import AUTO, OFF, Tile

OVERLAP = 0.25  # of a tile's side: the least overlap of neighbouring tiles
MAX_SHRINK = 4  # longer side of an image divided by S, up to which `auto` does not cut it
AUTO_SHRINK = 1  # the shrink of a tile where `auto` cuts support images: none, small defects are to be found
FIT_TILES = 2048  # tiles that a detector is fitted to, over all support images; bounds time and memory
SUBSET_SEED = 0  # for the tiles of each support image, where there are more


class Tiling(NamedTuple):
    """How images are cut.

    width, height: of a tile, in pixels of the image. above: images with a longer side above this are cut. of_support:
    whether a tile is as large as a whole support image; otherwise support images are cut as well.
    """

    width: int
    height: int
    above: int
    of_support: bool

    def layout(self, width: int, height: int, size: int) -> Layout | None:
        """The tiles of an image of `width` x `height` for network inputs of side `size`; None if it stays whole."""
        if max(width, height) <= self.above:
            return None
        across, down = max(1, round(width * size / self.width)), max(1, round(height * size / self.height))
        return Layout(width, height, across, down, size)


def resolve_tiling(tile: Tile, sizes: Sequence[tuple[int, int]], size: int, keep_aspect: bool) -> Tiling | None:
    """How a detector cuts images; None with OFF.

    A side in pixels cuts support and other images. AUTO cuts images that would shrink more than MAX_SHRINK: into tiles
    as large as the support images if these do not shrink that much themselves, otherwise into tiles that shrink
    AUTO_SHRINK times.

    sizes: (width, height) of the support images; their median counts. size: side S of the network's input.
    """
    if tile == OFF:
        return None
    if tile != AUTO:
        return Tiling(tile, tile, tile, False)
    width, height = (int(side) for side in np.median(sizes, axis=0))
    if max(width, height) > MAX_SHRINK * size:
        return Tiling(AUTO_SHRINK * size, AUTO_SHRINK * size, MAX_SHRINK * size, False)
    if keep_aspect:  # such a support image is padded to a square
        width = height = max(width, height)
    return Tiling(width, height, MAX_SHRINK * size, True)


def describe_tiling(tiling: Tiling | None) -> str:
    """How images are cut, as text."""
    if tiling is None:
        return "off, every image is scored as a whole"
    tile = f"{tiling.width} x {tiling.height} pixels{', as the support images' if tiling.of_support else ''}"
    return f"images with a side above {tiling.above} pixels are cut into tiles of {tile}"


def shrink_warning(width: int, height: int, size: int) -> str | None:
    """A sentence where a whole image shrinks more than MAX_SHRINK to the network's input of side `size`, else None."""
    shrink = max(width, height) / size
    if shrink <= MAX_SHRINK:
        return None
    return (
        f"warning: images of {width} x {height} pixels shrink {shrink:.1f} times to {size} x {size}, and small defects "
        "with them; tiles keep them"
    )


class Layout(NamedTuple):
    """The tiles of one image.

    width, height: of the image. across, down: width and height of its map. size: side S of a tile in the map.
    Convention: places in the map in pixels, origin top left. Where the image is smaller than a tile, the tile protrudes
    on both sides, and reflection fills it.
    """

    width: int
    height: int
    across: int
    down: int
    size: int

    @property
    def columns(self) -> list[int]:
        """The left sides of the tiles in the map."""
        return _places(self.across, self.size)

    @property
    def rows(self) -> list[int]:
        """The upper sides of the tiles in the map."""
        return _places(self.down, self.size)

    def __str__(self) -> str:
        columns, rows = len(self.columns), len(self.rows)
        return f"{self.width} x {self.height} pixels in {columns} x {rows} = {columns * rows} tiles"

    @property
    def corners(self) -> list[tuple[int, int]]:
        """The upper left corners (left, top) of all tiles in the map, row by row."""
        return [(left, top) for top in self.rows for left in self.columns]

    def cut(self, image: Image.Image, left: int, top: int) -> torch.Tensor:
        """One tile of `image` as network input (3, S, S) uint8. Resized by LANCZOS, as whole images."""
        x0, x1 = max(left, 0), min(left + self.size, self.across)
        y0, y1 = max(top, 0), min(top + self.size, self.down)
        fx, fy = self.width / self.across, self.height / self.down
        box = (x0 * fx, y0 * fy, min(x1 * fx, self.width), min(y1 * fy, self.height))
        part = np.asarray(image.resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS, box=box))
        part = part if part.ndim == 3 else part[..., None].repeat(3, axis=2)
        around = ((y0 - top, top + self.size - y1), (x0 - left, left + self.size - x1), (0, 0))
        return as_tensor(np.pad(part, around, mode="symmetric"))

    def cut_groups(
        self, image: Image.Image, corners: Sequence[tuple[int, int]], group: int
    ) -> Iterator[tuple[Sequence[tuple[int, int]], torch.Tensor]]:
        """`group` of the corners at a time, and their tiles (n, 3, S, S) uint8."""
        for start in range(0, len(corners), group):
            chosen = corners[start : start + group]
            yield chosen, torch.stack([self.cut(image, *corner) for corner in chosen])


def _places(length: int, size: int) -> list[int]:
    """Starts of tiles of length `size` that cover `length` evenly and overlap by OVERLAP at least."""
    if length <= size:
        return [-((size - length) // 2)]
    count = math.ceil((length - size) / (size * (1 - OVERLAP))) + 1
    return [round(number * (length - size) / (count - 1)) for number in range(count)]


@functools.cache
def cross_fade(size: int) -> np.ndarray:
    """Weights (S,) of the positions of a tile along one side: 1 inside, falling to 0 at the border over OVERLAP."""
    inside = np.minimum(np.arange(size) + 0.5, size - np.arange(size) - 0.5)
    return np.minimum(1, inside / (OVERLAP * size)).astype(np.float32)


def fitting_corners(layouts: Sequence[Layout | None]) -> list[list[tuple[int, int]]]:
    """The tiles of each support image that the detector is fitted to; none where an image stays whole.

    At most FIT_TILES in all, the same number of every image, drawn at random with a fixed seed.
    """
    generator = torch.Generator().manual_seed(SUBSET_SEED)
    most = max(1, FIT_TILES // max(1, len(layouts)))
    chosen = []
    for layout in layouts:
        corners = layout.corners if layout else []
        order = torch.randperm(len(corners), generator=generator)[:most].sort().values
        chosen.append([corners[number] for number in order.tolist()])
    return chosen


def joined_map(
    image: Image.Image, layout: Layout, maps_of: Callable[[torch.Tensor], np.ndarray], group: int
) -> np.ndarray:
    """The score map (down, across) of an image, float32.

    maps_of: score maps (n, S, S) of tiles (n, 3, S, S) uint8. group: number of tiles in memory at the same time.
    """
    total, weights = np.zeros((2, layout.down, layout.across), np.float32)
    fade = np.outer(cross_fade(layout.size), cross_fade(layout.size))
    for corners, tiles in layout.cut_groups(image, layout.corners, group):
        for (left, top), scores in zip(corners, maps_of(tiles), strict=True):
            y0, x0 = max(top, 0), max(left, 0)
            onto = slice(y0, top + layout.size), slice(x0, left + layout.size)
            height, width = total[onto].shape
            inside = slice(y0 - top, y0 - top + height), slice(x0 - left, x0 - left + width)
            total[onto] += fade[inside] * scores[inside]
            weights[onto] += fade[inside]
    return total / weights
