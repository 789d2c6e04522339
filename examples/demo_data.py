"""Draws a small data set in MVTec AD's layout: four objects with three defect types each.

python -m examples.demo_data --output demo/data

An image is drawn in two steps: a scene (the object, slightly turned and shifted) and its photograph (light and noise).
A defect changes the scene only. Masks are therefore exact: they mark the pixels whose scene colour changed.

Convention: coordinates (u, v) are in half sides of the image, v points down. Before the object is turned and shifted,
(-1, -1) is the top left corner of the image and (1, 1) the bottom right one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.random import Generator
from PIL import Image

from utils.config import Config, Parser, flag
from utils.errors import UserError, run_command
from utils.files import require_writable, whole_file

MIN_SIZE = 64  # pixels; in smaller images scratches are not visible
MAX_TURN = 0.08  # radians, about 5 degrees
MAX_SHIFT = 0.05  # half sides
VISIBLE = 10  # of 255; a pixel of the scene that changes by as much belongs to the mask; well above NOISE
NOISE = 2.5  # standard deviation, of 255
LIGHT = (0.84, 0.92)  # range of the light in the image centre; below 1, so that bright metal is not clipped
LIGHT_SLOPE = 0.08  # largest difference of the light between a corner and the centre
FAST_PNG = 1  # zlib level; higher levels are several times slower and gain little on noise


class Scene:
    """A scene before it is photographed.

    `colours` (S, S, 3) float32 holds the colours in 0..255; `u` and `v` (S, S) hold the coordinates of each pixel on
    the turned and shifted object. A subclass draws its object in `__init__` and has one method per name in `defects`,
    which takes a Generator and draws that defect.

    Shapes are signed distances (S, S), negative inside: np.minimum is a union, np.maximum an intersection.
    """

    defects: tuple[str, ...] = ()

    def __init__(self, rng: Generator, size: int) -> None:
        turn, right, down = rng.uniform(-1, 1, 3) * (MAX_TURN, MAX_SHIFT, MAX_SHIFT)
        axis = (np.arange(size) + 0.5) * (2 / size) - 1
        x, y = np.meshgrid(axis - right, axis - down)
        self.u = (np.cos(turn) * x + np.sin(turn) * y).astype(np.float32)
        self.v = (np.cos(turn) * y - np.sin(turn) * x).astype(np.float32)
        self.colours = np.zeros((size, size, 3), np.float32)

    def paint(self, shape: np.ndarray, colour: object, opacity: float = 1.0, soft: float = 0.0) -> None:
        """Paints a shape with a colour (3,) or colours (S, S, 3). The edge is antialiased or fades over `soft`."""
        cover = np.clip(0.5 - shape / (2 / len(shape) + soft), 0, 1) * opacity
        self.colours += cover[..., None] * (np.asarray(colour, np.float32) - self.colours)

    def disc(self, u: float, v: float, radius: float) -> np.ndarray:
        """The shape of a disc around (u, v)."""
        return np.sqrt((self.u - u) ** 2 + (self.v - v) ** 2) - radius

    def box(self, u: float, v: float, half_width: float, half_height: float) -> np.ndarray:
        """The shape of a rectangle around (u, v)."""
        return np.maximum(np.abs(self.u - u) - half_width, np.abs(self.v - v) - half_height)

    def boxes(self, boxes: Iterable[Sequence[float]]) -> np.ndarray:
        """The union of several `box` shapes, each given as (u, v, half_width, half_height)."""
        return reduce(np.minimum, (self.box(*map(float, box)) for box in boxes))

    def stroke(self, points: Sequence[tuple[float, float]], width: float) -> np.ndarray:
        """The shape of a line through `points` with round ends."""
        nearest = np.full_like(self.u, np.inf)
        for (u, v), (end_u, end_v) in pairwise(points):
            du, dv = end_u - u, end_v - v
            along = np.clip(((self.u - u) * du + (self.v - v) * dv) / (du * du + dv * dv), 0, 1)
            nearest = np.minimum(nearest, self.disc(u + along * du, v + along * dv, width / 2))
        return nearest

    def blob(self, rng: Generator, u: float, v: float, radius: float, rough: float = 0.25) -> np.ndarray:
        """The shape of a disc with a wavy outline; `rough` scales the waves."""
        angle = np.arctan2(self.v - v, self.u - u)
        waves = (rng.uniform(-rough, rough) / k**0.7 * np.sin(k * angle + rng.uniform(0, 7)) for k in range(2, 8))
        return self.disc(u, v, radius * (1 + sum(waves)))


def crooked(rng: Generator, start: tuple[float, float], angle: float, length: float, bend: float) -> list:
    """Seven points (u, v) of a line from `start`. Each step has the direction `angle`, plus up to `bend` radians."""
    angles = angle + rng.uniform(-bend, bend, 6)
    steps = np.stack([np.cos(angles), np.sin(angles)], axis=1) * (length / 6)
    return np.cumsum([start, *steps], axis=0).tolist()


def streaks(rng: Generator, place: np.ndarray, width: float) -> np.ndarray:
    """Random streaks in -1..1, each about `width` wide, along the coordinate `place`: brushed metal, fibres."""
    table = np.linspace(-2, 2, round(4 / width))
    return np.interp(place, table, rng.uniform(-1, 1, table.size)).astype(np.float32)


def clouds(rng: Generator, size: int, width: float) -> np.ndarray:
    """A smooth random field (size, size, 1): lumps about `width` wide, standard deviation slightly below 1."""
    coarse = rng.standard_normal((round(2 / width), round(2 / width)), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))[..., None]


class Weave(Scene):
    """Cloth of light and blue threads. Defects: a cut thread, a stain, a torn hole."""

    defects = ("cut", "stain", "hole")
    PITCH, GAP = 0.15, (34, 30, 32)
    DYES = np.array([(206, 186, 150), (72, 98, 138)], np.float32)  # vertical threads, horizontal threads

    def __init__(self, rng: Generator, size: int) -> None:
        super().__init__(rng, size)
        across = np.stack([self.u, self.v]) / self.PITCH + 0.5 + 0.08 * clouds(rng, size, 0.5)[..., 0]
        self.number = np.floor(across)  # number of the thread, in each direction
        middle = 2 * (across - self.number) - 1
        rise = np.cos(np.pi / 2 * middle[::-1]) * (1 - 2 * (self.number.sum(axis=0) % 2))
        rise[1] *= -1  # of two crossing threads, one is above the other
        height = np.where(np.abs(middle) < rng.uniform(0.8, 0.86), rise + 1 - middle**2, -np.inf)
        shade = 0.62 + 0.24 * np.sqrt(1 - middle**2) + 0.14 * rise - 0.07 * middle
        for place, number, one in zip((self.u, self.v), self.number, shade, strict=True):
            one += 0.05 * (streaks(rng, place, 0.015) + streaks(rng, number, 1))  # fibres; brightness of each thread
        self.threads = shade[..., None] * self.DYES[:, None, None]
        self.colours += np.where((height[0] > height[1])[..., None], *self.threads)  # the upper thread is visible
        self.colours[np.isinf(height.max(axis=0))] = self.GAP

    def fray(self, rng: Generator, start: tuple[float, float], angle: float, dye: int) -> None:
        self.paint(self.stroke(crooked(rng, start, angle, rng.uniform(0.06, 0.15), 0.5), 0.024), 1.1 * self.DYES[dye])

    def cut(self, rng: Generator) -> None:
        dye, number, start, length = rng.integers(2), rng.integers(-4, 5), rng.uniform(-0.7, 0.1), rng.uniform(0.5, 0.7)
        along = np.abs((self.v, self.u)[dye] - start - length / 2) - length / 2
        gone = np.where(self.number[dye] == number, along, np.inf)
        self.paint(gone, 0.55 * self.threads[1 - dye])  # the crossing threads below the cut
        for place, direction in ((start, 0), (start + length, np.pi)):
            end = (number * self.PITCH, place) if dye == 0 else (place, number * self.PITCH)
            for turn in rng.uniform(-0.8, 0.8, 3):
                self.fray(rng, end, direction + turn + (1 - dye) * np.pi / 2, dye)

    def stain(self, rng: Generator) -> None:
        spot = self.blob(rng, *rng.uniform(-0.6, 0.6, 2), rng.uniform(0.18, 0.25))
        self.paint(spot, self.colours * (0.62, 0.42, 0.25), soft=0.03)

    def hole(self, rng: Generator) -> None:
        (u, v), radius = rng.uniform(-0.6, 0.6, 2), rng.uniform(0.14, 0.2)
        self.paint(self.blob(rng, u, v, radius, rough=0.3), (14, 13, 15))
        for angle in rng.uniform(0, 2 * np.pi, 10):
            self.fray(rng, (u - radius * np.cos(angle), v - radius * np.sin(angle)), angle, rng.integers(2))


class Ring(Scene):
    """A machined metal ring with six holes on a dark background. Defects: a scratch, a chipped rim, rust."""

    defects = ("scratch", "chip", "rust")
    OUTER, INNER, HOLES = 0.74, 0.34, 6
    MIDDLE = (OUTER + INNER) / 2

    def __init__(self, rng: Generator, size: int) -> None:
        super().__init__(rng, size)
        self.colours += np.array((40, 42, 48), np.float32) + 2 * clouds(rng, size, 0.02)
        radius, angle = np.hypot(self.u, self.v), np.arctan2(self.v, self.u)
        self.body = np.maximum(radius - self.OUTER, self.INNER - radius)
        for turn in 2 * np.pi / self.HOLES * np.arange(self.HOLES):
            hole = self.disc(self.MIDDLE * np.cos(turn), self.MIDDLE * np.sin(turn), 0.065)
            self.body = np.maximum(self.body, -hole)
        gleam = 30 * np.cos(2 * (angle - rng.normal(0.8, 0.08))) + 10 * np.cos(6 * (angle - rng.normal(0.3, 0.08)))
        bevel = 42 * np.clip(1 + self.body / 0.045, 0, 1) * np.cos(angle + 2.2) * np.sign(radius - self.MIDDLE)
        self.paint(self.body - 0.05, (12, 12, 14), opacity=0.6, soft=0.12)
        self.ground = self.colours.copy()
        self.paint(self.body, (158 + gleam + bevel + 9 * streaks(rng, radius, 0.012))[..., None] * (0.97, 1, 1.04))

    def place(self, rng: Generator, radius: float) -> tuple[float, float, float]:
        """A point (u, v) at `radius`, about half-way between two holes, and its angle in radians."""
        angle = 2 * np.pi / self.HOLES * (rng.integers(self.HOLES) + 0.5) + rng.uniform(-0.15, 0.15)
        return radius * np.cos(angle), radius * np.sin(angle), angle

    def scratch(self, rng: Generator) -> None:
        u, v, angle = self.place(rng, self.INNER + 0.05)
        angle += rng.choice((-1, 1)) * rng.uniform(0.5, 0.9)
        line = crooked(rng, (u, v), angle, rng.uniform(0.4, 0.5), 0.15)
        for shift, colour in ((0.012, (58, 56, 58)), (-0.012, (247, 247, 247))):  # a dark edge and a bright edge
            flank = self.stroke([(u + shift, v + shift) for u, v in line], 0.03)
            self.paint(np.maximum(flank, self.body), colour)

    def chip(self, rng: Generator) -> None:
        u, v, _ = self.place(rng, self.OUTER + 0.02)
        bite = self.blob(rng, u, v, rng.uniform(0.12, 0.16), rough=0.12)
        self.paint(np.maximum(bite - 0.03, self.body), (232, 232, 236))
        self.paint(bite, self.ground)

    def rust(self, rng: Generator) -> None:
        u, v, _ = self.place(rng, self.MIDDLE + rng.uniform(-0.08, 0.08))
        spot = np.maximum(self.blob(rng, u, v, rng.uniform(0.13, 0.18), rough=0.35), self.body)
        thickness = 1 + 0.2 * clouds(rng, len(spot), 0.05)
        self.paint(spot, np.clip(np.array((150, 84, 42)) * thickness, 0, 230), opacity=0.92, soft=0.03)


class Board(Scene):
    """A printed circuit board. Defects: a missing part, a solder bridge between two pins, a scratch."""

    defects = ("missing", "bridge", "scratch")
    TIN, COPPER, DARK = (190, 190, 186), (214, 158, 100), (42, 42, 46)
    CHIPS = ((-0.3, -0.3, 0.19, 0.27), (0.42, 0.4, 0.14, 0.18))  # arguments of Scene.box, as LYING and UPRIGHT
    LYING = tuple((u, v, 0.11, 0.06) for u, v in ((0.3, -0.62), (0.3, -0.4), (0.45, -0.1), (-0.3, 0.62), (0.25, 0.76)))
    UPRIGHT = tuple((u, v, 0.06, 0.11) for u, v in ((0.66, -0.5), (0.72, -0.1), (-0.42, 0.25), (-0.18, 0.25)))
    PIN_PITCH = 0.09
    LINES = (  # corners (u, v) of the conductors, which are parallel to the axes
        *[((-0.1, v), (-0.095 - v, v), (-0.095 - v, v + 0.52), (0.3, v + 0.52)) for v in (-0.255, -0.165, -0.075)],
        *[((-0.5, v), (-0.535 + v, v), (-0.535 + v, 0.6)) for v in (-0.255, -0.165, -0.075)],
        *[((-0.8, v), (-0.1, v)) for v in (-0.525, -0.435, -0.345)],
        *[((0.55, v), (0.8, v)) for v in (0.265, 0.355, 0.445, 0.535)],
        ((-0.42, 0.25), (-0.42, 0.62), (-0.18, 0.62), (-0.18, 0.25)),
    )

    def __init__(self, rng: Generator, size: int) -> None:
        super().__init__(rng, size)
        grain = 2 * clouds(rng, size, 0.03)
        self.colours += (172, 168, 162) + grain
        self.solid(self.box(0, 0, 0.9, 0.9), (20, 92 + rng.uniform(-5, 5), 54) + grain)
        ends = [(a, b) for line in self.LINES for a, b in pairwise(np.array(line))]
        self.paint(self.boxes((*(a + b) / 2, *np.abs(b - a) / 2 + 0.017) for a, b in ends), (62, 146, 88))
        for u, v in ((-0.78, -0.78), (-0.78, 0.78), (0.78, -0.78), (0.78, 0.78)):
            self.paint(np.abs(self.disc(u, v, 0.06)) - 0.016, self.COPPER)
        self.paint(self.boxes((*pin, 0.045, 0.026) for chip in self.CHIPS for pin in self.pins(chip)), self.TIN)
        self.paint(np.abs(self.boxes(self.LYING + self.UPRIGHT) + 0.02) - 0.02, self.TIN)
        self.bare = self.colours.copy()
        self.solid(self.boxes(self.CHIPS), self.DARK)
        self.paint(self.boxes((u, v, half_width - 0.08, 0.012) for u, v, half_width, _ in self.CHIPS), (150, 150, 150))
        lying, upright = (rng.normal(parts, (0.004, 0.004, 0, 0)) for parts in (self.LYING, self.UPRIGHT))
        self.solid(self.boxes([*lying, *upright]), (226, 226, 222))  # their metal ends stay visible
        self.paint(self.boxes(lying * (1, 1, 0.55, 1)), (182, 136, 86))
        self.paint(self.boxes(upright * (1, 1, 1, 0.55)), self.DARK)

    def solid(self, shape: np.ndarray, colour: object) -> None:
        """Paints a raised part with a soft shadow."""
        self.paint(shape - 0.015, (10, 20, 14), opacity=0.55, soft=0.05)
        self.paint(shape, colour)

    def pins(self, chip: tuple[float, ...]) -> list[tuple[float, float]]:
        """Centres (u, v) of a chip's pins from the top, left and right alternately."""
        u, v, half_width, half_height = chip
        count = round(2 * half_height / self.PIN_PITCH)
        rows = v + self.PIN_PITCH * (np.arange(count) - (count - 1) / 2)
        return [(side, row) for row in rows.tolist() for side in (u - half_width - 0.03, u + half_width + 0.03)]

    def missing(self, rng: Generator) -> None:
        u, v, half_width, half_height = rng.choice([*self.LYING, *self.UPRIGHT, self.CHIPS[1]]).tolist()
        self.paint(self.box(u, v, half_width + 0.05, half_height + 0.05), self.bare)

    def bridge(self, rng: Generator) -> None:
        u, v = rng.choice(self.pins(self.CHIPS[rng.integers(2)])[:-2]).tolist()
        middle = v + self.PIN_PITCH / 2
        self.solid(self.blob(rng, u, middle, rng.uniform(0.08, 0.1), rough=0.15), (214, 216, 220))
        self.paint(self.disc(u - 0.02, middle - 0.02, 0.02), (244, 244, 246), soft=0.03)

    def scratch(self, rng: Generator) -> None:
        u, v = rng.uniform(-0.65, 0.65, 2).tolist()
        inwards = np.arctan2(-v, -u) + rng.uniform(-0.6, 0.6)
        groove = self.stroke(crooked(rng, (u, v), inwards, rng.uniform(0.6, 0.85), 0.2), 0.036)
        self.paint(groove, (120, 70, 40))
        self.paint(groove + 0.006, (232, 190, 140))


class Teeth(Scene):
    """A toothed steel rack on a light table. Defects: a broken tooth, a bent tooth, a crack below the teeth."""

    defects = ("broken", "bent", "crack")
    PITCH, TIP, ROOT, BOTTOM = 0.4, -0.5, -0.05, 0.68
    TIP_HALF_WIDTH, FLANK = 0.06, 0.2  # FLANK: how much a tooth widens on each side, per unit of height
    LEFT, RIGHT = -1, 2  # the teeth that are fully visible: the first one, and one past the last

    def __init__(self, rng: Generator, size: int) -> None:
        super().__init__(rng, size)
        self.table = np.array((206, 214, 220), np.float32) + 1.5 * clouds(rng, size, 0.1)
        shade = 104 + rng.uniform(-4, 4) + 9 * streaks(rng, self.v, 0.012)
        self.steel = shade[..., None] * np.array((0.96, 1, 1.05), np.float32)
        self.shape = self.outline()
        self.forge(self.shape)

    def outline(self, bent: int = 0, lean: float = 0.0) -> np.ndarray:
        """The shape of the rack. Tooth number `bent` leans sideways by `lean` per unit of height."""
        shape = np.maximum(self.ROOT - self.v, self.v - self.BOTTOM)
        for number in range(-3, 4):
            u = self.u - number * self.PITCH - (number == bent) * lean * (self.ROOT - self.v)
            flanks = np.abs(u) - self.TIP_HALF_WIDTH - self.FLANK * (self.v - self.TIP)
            tooth = np.maximum(flanks, np.maximum(self.TIP - self.v, self.v - self.ROOT - 0.1))
            shape = np.minimum(shape, tooth)
        return np.maximum(shape, -np.minimum(self.disc(-0.4, 0.28, 0.085), self.disc(0.4, 0.28, 0.085)))

    def forge(self, shape: np.ndarray) -> None:
        """Paints the rack `shape` on the table: steel, a bevel along its outline and a groove."""
        self.colours = self.table.copy()
        self.paint(shape, (62, 64, 68))
        self.paint(shape + 0.012, (158, 162, 166))
        self.paint(shape + 0.042, self.steel)
        self.paint(np.maximum(np.abs(self.v - 0.52) - 0.02, shape), (48, 50, 54))

    def broken(self, rng: Generator) -> None:
        u, height = self.u - self.PITCH * rng.integers(self.LEFT, self.RIGHT), rng.uniform(0.14, 0.28)
        jagged = self.TIP + height + rng.uniform(-0.5, 0.5) * u + 0.035 * streaks(rng, u, 0.04)
        self.forge(np.maximum(self.shape, -np.maximum(np.abs(u) - self.PITCH / 2, self.v - jagged)))

    def bent(self, rng: Generator) -> None:
        lean = rng.choice((-1, 1)) * rng.uniform(0.25, 0.5)
        self.forge(self.outline(rng.integers(self.LEFT, self.RIGHT), lean))

    def crack(self, rng: Generator) -> None:
        start = (self.PITCH * (rng.integers(self.LEFT, self.RIGHT) - 0.5), self.ROOT)
        line = crooked(rng, start, np.pi / 2 + rng.uniform(-0.3, 0.3), rng.uniform(0.4, 0.55), 0.7)
        self.paint(np.maximum(self.stroke(line, 0.036), self.shape), (24, 24, 28))


CATEGORIES: dict[str, type[Scene]] = {"weave": Weave, "ring": Ring, "board": Board, "teeth": Teeth}


def render(
    category: str, folder: str, index: int, size: int = 256, seed: int = 0, flawless: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """One image (size, size, 3) uint8 RGB and its mask (size, size) bool, True exactly where the defect is visible.

    `folder` is train/good, test/good or test/<defect>. With `flawless` the defect is left out; outside the mask, the
    images with and without it are equal. The result depends on the arguments only.
    """

    def stream(purpose: str) -> Generator:
        return np.random.default_rng([seed, crc32(f"{category}/{folder}/{purpose}".encode()), index])

    scene = CATEGORIES[category](stream("scene"), size)
    normal, defect = scene.colours.copy(), Path(folder).name
    if defect in scene.defects and not flawless:
        getattr(scene, defect)(stream("defect"))
    mask = np.abs(scene.colours - normal).max(axis=2) >= VISIBLE
    return photograph(stream("camera"), np.where(mask[..., None], scene.colours, normal)), mask


def photograph(rng: Generator, colours: np.ndarray) -> np.ndarray:
    """The colours of a scene (S, S, 3) in 0..255 under uneven light and with noise, as uint8."""
    across = np.linspace(-1, 1, len(colours), dtype=np.float32)
    towards, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, LIGHT_SLOPE)
    light = slope * (np.cos(towards) * across + np.sin(towards) * across[:, None]) / np.sqrt(2) + rng.uniform(*LIGHT)
    noisy = colours * light[..., None] + NOISE * rng.standard_normal((*light.shape, 1), np.float32)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def write_dataset(
    output: Path,
    categories: Iterable[str] = tuple(CATEGORIES),
    train: int = 12,
    good: int = 6,
    defective: int = 4,
    size: int = 256,
    seed: int = 0,
) -> None:
    """Writes each category to `output`/<category> in MVTec AD's layout, with `defective` images per defect type.

    Raises:
        UserError: a number is too small, or a category's folder holds images that are not part of this data set.
    """
    if min(train, good, defective) < 1 or size < MIN_SIZE or seed < 0:
        raise UserError(f"each number of images must be 1 or more, the size {MIN_SIZE} or more, the seed 0 or more")
    for category in categories:
        defects = CATEGORIES[category].defects
        counts = {"train/good": train, "test/good": good, **{f"test/{defect}": defective for defect in defects}}
        plan = [(folder, index) for folder, count in counts.items() for index in range(count)]
        _reject_strangers(output / category, {f"{folder}/{index:03d}.png" for folder, index in plan})
        write = partial(_write_image, output, category, size=size, seed=seed)
        with ThreadPoolExecutor() as pool:  # NumPy, zlib and the disk work at the same time
            list(pool.map(write, *zip(*plan, strict=True)))  # list() raises the errors of the threads


def _reject_strangers(root: Path, expected: set[str]) -> None:
    """Raises UserError for images of an earlier data set: they would be read together with the new ones."""
    found = {str(path.relative_to(root)) for half in ("train", "test") for path in root.glob(f"{half}/*/[!.]*")}
    if strangers := sorted(found - expected):
        raise UserError(f"{root} holds another data set ({strangers[0]} is not part of this one); give a new --output")


def _write_image(output: Path, category: str, folder: str, index: int, size: int, seed: int) -> None:
    image, mask = render(category, folder, index, size, seed)
    files = {f"{folder}/{index:03d}.png": image}
    if mask.any():
        files[f"ground_truth/{Path(folder).name}/{index:03d}_mask.png"] = mask * np.uint8(255)
    for name, values in files.items():
        with whole_file(output / category / name) as aside:
            Image.fromarray(values).save(aside, format="PNG", compress_level=FAST_PNG)


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """The flags of the command."""

    output: Path = flag("folder to write the categories into", group="data")
    train: int = flag("normal training images per category", default=12, group="data")
    good: int = flag("normal test images per category", default=6, group="data")
    defective: int = flag("test images per defect type", default=4, group="data")
    size: int = flag("side of the images, pixels", default=256, group="data")
    seed: int = flag("seed of the images", default=0, group="data")


def get_args_parser() -> Parser[DemoConfig]:
    """The command line of examples.demo_data."""
    return Parser(DemoConfig, __doc__.splitlines()[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the data set and prints the folder of each category."""
    config = get_args_parser().parse_config(argv)
    require_writable(config.output, "--output", folder=True)
    for category, scene in CATEGORIES.items():
        counts = config.train, config.good, config.defective
        write_dataset(config.output, [category], *counts, config.size, config.seed)
        print(f"wrote {config.output / category} (defects: {', '.join(scene.defects)})")


if __name__ == "__main__":
    run_command(main, get_args_parser)
