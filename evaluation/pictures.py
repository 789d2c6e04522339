"""Pictures of scores: heat-maps laid over inputs, outlines, panels side by side. Arrays in, arrays out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.utils import whole_file

COLOUR_MAP = "inferno"  # its lightness rises evenly, so it reads in grey and with colour blindness
OPACITY = 0.75  # of the heat-map at its brightest; it fades to nothing at the lower limit
# Outlines, in colours that neither the colour map nor most parts have.
HOT = (255, 190, 0)  # around what is hot, see models.threshold.Threshold.region
CALLED = (0, 230, 255)  # around what lies above the threshold
GAP = 6  # pixels between panels
JPEG_QUALITY = 90
CAPTION_HEIGHT = 22  # pixels


def colour_limits(typical: float) -> tuple[float, float]:
    """The scores at which colours begin and end, from the typical score of normal pictures alone: one scale for all."""
    return typical / 2, typical * 1.5


def heat_map(scores: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Scores (H, W) as colours (H, W, 3) uint8; `limits`: the scores of the first and the last colour."""
    return _colours()[_levels(scores, limits)]


def overlay(image: np.ndarray, scores: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """The heat-map of scores (H, W) over an image (H, W, 3) uint8; the higher a score, the less of the image shows."""
    levels = Image.fromarray(_levels(scores, limits))
    opacity = levels.point([round(OPACITY * level) for level in range(256)])
    levels.putpalette(_colours().tobytes())
    return np.asarray(Image.composite(levels.convert("RGB"), Image.fromarray(image), opacity))


def outline(image: np.ndarray, region: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """The image (H, W, 3) with a line along the inside of the border of `region` (H, W) bool."""
    inside = region
    for _ in range(max(1, round(max(region.shape) / 250))):
        inside = _eroded(inside)
    drawn = image.copy()
    drawn.reshape(-1, 3)[np.flatnonzero(region & ~inside)] = colour
    return drawn


def _eroded(region: np.ndarray) -> np.ndarray:
    """The region (H, W) bool without its outermost pixels, as scipy's binary_erosion, in a tenth of the time."""
    inner = np.zeros_like(region)
    inner[1:-1, 1:-1] = region[1:-1, 1:-1] & region[:-2, 1:-1] & region[2:, 1:-1] & region[1:-1, :-2] & region[1:-1, 2:]
    return inner


def beside(panels: Sequence[np.ndarray]) -> np.ndarray:
    """Panels (H, W, 3) uint8 in a row with white gaps."""
    gap = np.full((panels[0].shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)


def captioned(image: np.ndarray, text: str, colour: str = "black") -> np.ndarray:
    """The image (H, W, 3) with a line of text above it; text that is too long is cut."""
    strip = Image.new("RGB", (image.shape[1], CAPTION_HEIGHT), "white")
    ImageDraw.Draw(strip).text((4, 3), text, fill=colour, font=_font())
    return np.concatenate([np.asarray(strip), image])


def save_picture(path: Path, image: np.ndarray) -> None:
    """Writes (H, W[, 3]) uint8 or (H, W) uint16 as JPEG or PNG, by the name's ending."""
    options = {"quality": JPEG_QUALITY} if path.suffix == ".jpg" else {"compress_level": 1}
    with whole_file(path) as aside:
        Image.fromarray(image).save(aside, format="JPEG" if path.suffix == ".jpg" else "PNG", **options)


def _levels(scores: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    low, high = limits
    return np.clip((scores - low) * (255 / max(high - low, 1e-12)), 0, 255).astype(np.uint8)


@functools.cache
def _colours() -> np.ndarray:
    """The colour map as a table (256, 3) uint8."""
    return matplotlib.colormaps[COLOUR_MAP](np.arange(256), bytes=True)[:, :3]


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    """A font that comes with matplotlib, with all European letters."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 13)
