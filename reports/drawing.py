"""Draws scores with Pillow: heat maps, overlays, outlines, captions, and panels side by side. All images are RGB."""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.files import whole_file

COLOUR_MAP = "inferno"  # of even lightness steps: readable in grey and with colour blindness
OPACITY = 0.75  # of the heat map at the upper colour limit; 0 at the lower one
SPAN = 2.5  # from the threshold, the middle of the colours, to the last colour, as a factor; to the first likewise
SHADES = 1000  # the first colour is at least the last one divided by this
# Colours of outlines, which differ from the colour map and from most parts.
ELEVATED = (255, 190, 0)  # around elevated scores, see inspection.threshold.Threshold.region
FLAGGED = (0, 230, 255)  # around regions above the threshold, and around the ground truth
DECISION_COLOURS = {"normal": (70, 105, 140), "review": (138, 90, 0), "defective": (179, 38, 30)}  # on white
GAP = 6  # pixels between panels
LEAST_SHEET = 420  # pixels of the width of a sheet, for its words
JPEG_QUALITY = 90
CAPTION_HEIGHT = 22  # pixels
TITLE_SHARE = 30  # a title's strip is at least this part of the longer side of its panel


def colour_limits(threshold: float, typical: float | None = None) -> tuple[float, float]:
    """The scores of the first and the last colour: SPAN times below and above the threshold, which is above 0.

    Colours follow the logarithm of the score, so that they show how many times the threshold a score is. typical: the
    score of a typical normal image, whose heat map is to be seen where the threshold is far above it.
    """
    threshold = max(threshold, float(np.finfo(np.float32).tiny))
    return min(threshold, typical or threshold) / SPAN, threshold * SPAN


def place(score: float, limits: tuple[float, float]) -> float:
    """Where the colour of a score lies between the first, 0, and the last, 1."""
    low, high = limits
    return min(1.0, max(0.0, math.log(max(score, low) / low) / math.log(high / low)))


def heat_map(scores: np.ndarray, limits: tuple[float, float]) -> Image.Image:
    """Scores (H, W) as colours. limits: the scores of the first and the last colour."""
    return _coloured(_levels(scores, limits))


def overlay(image: Image.Image, scores: np.ndarray, limits: tuple[float, float]) -> Image.Image:
    """The image with the heat map of scores (H, W) laid over it, which is more opaque where scores are higher."""
    levels = _levels(scores, limits)
    opacity = levels.point([round(OPACITY * level) for level in range(256)])
    return Image.composite(_coloured(levels), image, opacity)


def outline(image: Image.Image, region: np.ndarray, colour: tuple[int, int, int]) -> Image.Image:
    """The image with a line along the inner border of `region` (H, W) bool."""
    if not region.any():
        return image
    inside = region
    for _ in range(_line_width(region.shape)):
        inside = _eroded(inside)
    drawn = image.copy()
    drawn.paste(colour, mask=Image.fromarray((region & ~inside).view(np.uint8) * np.uint8(255)))
    return drawn


def _line_width(size: Sequence[int]) -> int:
    """Pixels; such that a line is seen when the whole image is."""
    return max(1, round(max(size) / 250))


def _eroded(region: np.ndarray) -> np.ndarray:
    """The region (H, W) bool without its outermost pixels. Equals scipy's binary_erosion and is much faster."""
    inner = np.zeros_like(region)
    inner[1:-1, 1:-1] = region[1:-1, 1:-1] & region[:-2, 1:-1] & region[2:, 1:-1] & region[1:-1, :-2] & region[1:-1, 2:]
    return inner


def hstack(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels of equal size in a row, with white gaps."""
    width, height = panels[0].size
    row = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height), "white")
    for number, panel in enumerate(panels):
        row.paste(panel, (number * (width + GAP), 0))
    return row


def split_panels(path: Path, count: int, side: int) -> list[Image.Image]:
    """The `count` panels of a JPEG file of `hstack(add_titles(...))`, without their titles; of one panel, the image.

    The file may be a `sheet`. Panels with a side above twice `side` are decoded at a fraction of their size, which is
    much faster.

    Raises:
        OSError: there is no such image, or it is damaged.
    """
    with Image.open(path) as drawn:
        left, upper, right, lower = _row_of_panels(drawn)
        full = right - left, lower - upper
        width, top = (full[0] + GAP) // count - GAP, _strip_height(full, count) if count > 1 else 0
        share = min(1.0, 2 * side / max(width, full[1]))
        size = drawn.size
        drawn.draft("RGB", tuple(max(1, round(share * length)) for length in size))
        decoded = drawn.convert("RGB")
    x, y = decoded.width / size[0], decoded.height / size[1]
    lefts = [left + number * (width + GAP) for number in range(count)]
    wide, bottom = max(1, round(x * width)), max(round(y * lower), round(y * (upper + top)) + 1)
    return [decoded.crop((round(x * at), round(y * (upper + top)), round(x * at) + wide, bottom)) for at in lefts]


def _row_of_panels(drawn: Image.Image) -> tuple[int, int, int, int]:
    """The box of the panels in an opened file: the whole of it, unless its comment says otherwise."""
    try:
        left, upper, right, lower = json.loads(drawn.info["comment"])
    except (KeyError, ValueError, TypeError):  # no sheet, or another program's comment
        return 0, 0, *drawn.size
    return left, upper, right, lower


def _strip_height(size: tuple[int, int], count: int) -> int:
    """The height of the titles above `count` panels that are `size` (width, height) in all."""
    width = (size[0] + GAP) // count - GAP
    heights = range(1, size[1])
    fits = (h for h in heights if h + max(CAPTION_HEIGHT, max(width, h) // TITLE_SHARE) == size[1])
    return size[1] - next(fits, size[1])


def add_titles(panels: Mapping[str, Image.Image]) -> list[Image.Image]:
    """Each panel below its title, which is larger on larger images."""
    height = max(CAPTION_HEIGHT, *(max(panel.size) // TITLE_SHARE for panel in panels.values()))
    return [captioned(panel, title, height=height) for title, panel in panels.items()]


def sheet(
    row: Image.Image,
    name: str,
    verdict: str,
    colour: tuple[int, int, int],
    limits: tuple[float, float],
    threshold: float | None,
) -> Image.Image:
    """A row of panels below a name and a verdict, above the scale of the heat maps: it explains itself in a mail.

    `info["comment"]` is the box of the row (left, upper, right, lower), for `save_image` and `split_panels`.
    """
    line = max(CAPTION_HEIGHT, row.height // TITLE_SHARE)
    width = max(row.width, LEAST_SHEET)
    drawn = Image.new("RGB", (width, row.height + 5 * line), "white")
    drawn.paste(row, (0, int(2.5 * line)))
    canvas, font, margin = ImageDraw.Draw(drawn), _font(round(0.65 * line)), line // 5
    wanted = round(0.8 * line)
    fits = int(wanted * (width - 2 * margin) / max(1.0, _font(wanted).getlength(verdict)))
    canvas.text((margin, line // 6), verdict, fill=colour, font=_font(max(1, min(wanted, fits))))
    canvas.text((margin, int(1.4 * line)), _end_of(_one_line(name), font, width - 2 * margin), fill="black", font=font)
    _draw_scale(drawn, limits, threshold, int(2.8 * line) + row.height, line)
    drawn.info["comment"] = json.dumps([0, int(2.5 * line), row.width, int(2.5 * line) + row.height])
    return drawn


def _end_of(name: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The name, without its beginning where it is too wide."""
    begins = (name if not start else f"\u2026{name[start:]}" for start in range(len(name)))
    return next((text for text in begins if font.getlength(text) <= width), "")


def _draw_scale(drawn: Image.Image, limits: tuple[float, float], threshold: float | None, top: int, line: int) -> None:
    """The colours of the heat map with the scores of the first and the last one, and the threshold."""
    width, font = min(drawn.width, 24 * line), _font(round(0.6 * line))
    ramp = _coloured(Image.fromarray(np.linspace(0, 255, width).astype(np.uint8)[None].repeat(line // 2, axis=0)))
    drawn.paste(ramp, (0, top))
    canvas = ImageDraw.Draw(drawn)
    words = [(f"\u2264 {limits[0]:.3g}", 0.0, "la"), (f"\u2265 {limits[1]:.3g}", 1.0, "ra")]
    if threshold is not None:
        at = place(threshold, limits)
        canvas.line((at * width, top, at * width, top + 0.7 * line), fill="black", width=max(1, line // 16))
        words.append((f"threshold {threshold:.3g}", at, "ma"))
    for text, at, anchor in words:
        canvas.text((at * width, top + 0.75 * line), text, fill="black", font=font, anchor=anchor)


def captioned(image: Image.Image, text: str, colour: str = "black", height: int = CAPTION_HEIGHT) -> Image.Image:
    """The image with a line of text in a strip of `height` pixels above it. Text wider than the image is cut."""
    drawn = Image.new("RGB", (image.width, image.height + height), "white")
    drawn.paste(image, (0, height))
    font = _font(round(0.6 * height))
    ImageDraw.Draw(drawn).text((height // 5, height // 7), _one_line(text), fill=colour, font=font)
    return drawn


def _one_line(text: str) -> str:
    """Text that fonts can draw: line feeds and what else has no shape, which file names may hold, are escaped."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def boxed(image: Image.Image, boxes: Sequence[Sequence[float]]) -> Image.Image:
    """The image with a numbered frame around each box, from 1.

    boxes: x, y, width and height come first.

    Convention: a box covers the columns x .. x + width - 1 and the rows y .. y + height - 1. Frames lie outside of it
    as far as the image reaches.
    """
    if not boxes:
        return image
    drawn = image.copy()
    canvas, line = ImageDraw.Draw(drawn), _line_width(image.size)
    font = _font(max(10, max(image.size) // TITLE_SHARE))
    for number, (x, y, width, height, *_) in enumerate(boxes, 1):
        left, top = max(0, x - 2 * line), max(0, y - 2 * line)
        right = min(image.width - 1, x + width - 1 + 2 * line)
        bottom = min(image.height - 1, y + height - 1 + 2 * line)
        canvas.rectangle((left, top, right, bottom), outline=FLAGGED, width=line)
        _number(canvas, str(number), (left, top, right, bottom), font)
    return drawn


def _number(canvas: ImageDraw.ImageDraw, text: str, frame: tuple, font: ImageFont.FreeTypeFont) -> None:
    """Writes a number on a dark ground above a frame, or inside it where the image ends."""
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(frame[0], canvas.im.size[0] - width)
    y = frame[1] - height if frame[1] >= height else frame[1]
    canvas.rectangle((x, y, x + width - 1, y + height - 1), fill="black")
    canvas.text((x + 2 - left, y + 2 - top), text, fill=FLAGGED, font=font)


def save_image(path: Path, image: Image.Image) -> None:
    """Writes an image as JPEG if the file name ends in .jpg, and as PNG otherwise."""
    jpeg = {"quality": JPEG_QUALITY, "comment": image.info.get("comment", "")}
    options = jpeg if path.suffix == ".jpg" else {"compress_level": 1}
    encoded = io.BytesIO()  # Pillow's JPEG writer overlooks that a full disk took only a part
    image.save(encoded, format="JPEG" if path.suffix == ".jpg" else "PNG", **options)
    with whole_file(path, durable=False) as aside:  # a drawing can be repeated: waiting for the disk took half its time
        aside.write_bytes(encoded.getbuffer())


def _levels(scores: np.ndarray, limits: tuple[float, float]) -> Image.Image:
    """Scores (H, W) as grey levels, 0 at the lower limit and 255 at the upper one, by their logarithms."""
    high = limits[1]
    low = max(limits[0], high / SHADES, np.finfo(np.float32).tiny)
    levels = np.log(np.clip(scores, low, max(high, low)) / low)
    levels *= 255 / max(math.log(max(high, low) / low), 1e-12)
    return Image.fromarray(levels.astype(np.uint8))


def _coloured(levels: Image.Image) -> Image.Image:
    """Grey levels (mode L) in the colours of the colour map. Changes `levels`."""
    levels.putpalette(_colours())
    return levels.convert("RGB")


def css_colour(colour: tuple[int, int, int]) -> str:
    """An outline's colour in CSS."""
    return "#" + bytes(colour).hex()


def colour_stops(count: int = 17) -> list[str]:
    """Evenly spaced colours of the colour map as CSS colours, the lowest first."""
    return [matplotlib.colors.to_hex(colour) for colour in matplotlib.colormaps[COLOUR_MAP](np.linspace(0, 1, count))]


@functools.cache
def _colours() -> bytes:
    """The colour map as a palette."""
    return matplotlib.colormaps[COLOUR_MAP](np.arange(256), bytes=True)[:, :3].tobytes()


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """A font of `size` pixels that comes with matplotlib and covers all European scripts."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)
