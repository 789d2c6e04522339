"""Saves plots for the screen and for print."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from reports.drawing import JPEG_QUALITY
from utils.files import whole_file

# No date and no random identifiers: the same figure gives the same file.
METADATA = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}


def save_figure(path: Path, figure: Figure) -> None:
    """Writes `path`, a PNG, and the same plot as PDF and SVG."""
    for suffix in METADATA:
        save_as(path.with_suffix(suffix), figure, dpi=100)


def save_as(path: Path, figure: Figure, dpi: int = 220) -> None:
    """Writes a figure in the format of the suffix. Text stays text. dpi: of pixels, in PDF and SVG those of images."""
    fonts = {"svg.hashsalt": "RegAD", "pdf.fonttype": 42, "svg.fonttype": "none"}
    with whole_file(path) as aside, matplotlib.rc_context(fonts):
        figure.savefig(aside, format=path.suffix[1:], dpi=dpi, metadata=METADATA[path.suffix])


def as_svg(figure: Figure) -> Markup:
    """The figure as an SVG element. Matplotlib escapes its texts."""
    text = io.StringIO()
    # with a fixed salt and no date, equal figures give equal files
    with matplotlib.rc_context({"svg.hashsalt": "regad", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return Markup(svg[svg.index("<svg") :])


def save_raster(path: Path, figure: Figure, dpi: int) -> None:
    """Writes a figure as one file: JPEG if the suffix is .jpg, otherwise PNG."""
    is_jpeg = path.suffix == ".jpg"
    options = {"format": "jpeg", "pil_kwargs": {"quality": JPEG_QUALITY}} if is_jpeg else {"format": "png"}
    encoded = io.BytesIO()  # see reports.drawing.save_image
    figure.savefig(encoded, dpi=dpi, **options)
    with whole_file(path) as aside:
        aside.write_bytes(encoded.getbuffer())
