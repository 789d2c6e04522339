"""The HTML report: one self-contained page that opens from disk; no network, nothing to install."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

from PIL import Image

from utils.files import whole_file

TEMPLATE = Path(__file__).parent / "templates" / "page.html"
PAGE_IMAGES = 500  # previews in one page, so that it stays below some 20 MB; all rows are counted
PREVIEW_WIDTH, PREVIEW_HEIGHT, PREVIEW_QUALITY = 960, 2000, 75  # pixels of all panels together, of JPEG


class PageRow(NamedTuple):
    """One image of the page. kind: its folder (good or a defect), None without labels. image: a data URI or ""."""

    name: str
    score: float
    kind: str | None
    image: str


def write_page(path: Path, title: str, notes: Sequence[str], rows: Sequence[PageRow], threshold: float | None) -> None:
    """Histogram, threshold slider and sortable table of `rows`; with kinds also the ROC curve and a table by kind.

    Without a threshold the page decides nothing until its reader chooses one.
    """
    texts = {"title": html.escape(title), "notes": "".join(f"<li>{html.escape(note)}</li>" for note in notes)}
    before, after = (Template(half) for half in TEMPLATE.read_text(encoding="utf-8").split("$data"))
    # names may be of any bytes; row by row, because all previews together are large
    with whole_file(path) as aside, aside.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(before.substitute(texts) + f'{{"threshold": {json.dumps(threshold, allow_nan=False)}, "rows": [')
        for number, row in enumerate(rows):
            data = json.dumps(row._asdict(), allow_nan=False)
            data = data.replace("<", "\\u003c")  # so that no name can end the script element
            stream.write("," * (number > 0) + data)
        stream.write("]}" + after.substitute(texts))


def as_data_uri(image: Image.Image) -> str:
    """An image in RGB, at most PREVIEW_WIDTH wide and PREVIEW_HEIGHT high, as a JPEG in a data URI."""
    factor = math.ceil(max(1, image.width / PREVIEW_WIDTH, image.height / PREVIEW_HEIGHT))
    image = image.reduce(factor)  # much faster than any other resize
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=PREVIEW_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
