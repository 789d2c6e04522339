"""The HTML report: one self-contained page that opens from disk and needs no network."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from reports.render import get_template
from utils.files import whole_file

PAGE_IMAGES = 500  # previews in one page, which keep it below about 20 MB; rows without a preview are shown too
PREVIEW_WIDTH, PREVIEW_HEIGHT = 960, 2000  # pixels, of all panels together
PREVIEW_QUALITY = 75  # of JPEG


class PageRow(NamedTuple):
    """One image of the page.

    kind: "good" or the name of a defect, None without labels. image: the preview as a data URI, or "" without one.
    """

    name: str
    score: float
    kind: str | None
    image: str


def write_page(path: Path, title: str, notes: Sequence[str], rows: Sequence[PageRow], threshold: float | None) -> None:
    """Writes a page with a histogram of the scores, a threshold slider and a sortable table of `rows`.

    With kinds, the page also has a ROC curve and a table by kind. Without a threshold, images are called normal or
    defective only once the reader sets one. Rows are written one by one, because all previews together are large.

    Raises:
        ValueError: a score or the threshold is NaN or infinite.
    """
    values = {"title": title, "notes": notes, "threshold": threshold, "rows": (row._asdict() for row in rows)}
    with whole_file(path) as aside:
        page = get_template("page.html").stream(values)
        page.dump(str(aside), encoding="utf-8", errors="backslashreplace")  # file names may hold any bytes


def as_data_uri(image: Image.Image) -> str:
    """An RGB image, reduced to at most PREVIEW_WIDTH x PREVIEW_HEIGHT pixels, as a JPEG in a data URI."""
    factor = math.ceil(max(1, image.width / PREVIEW_WIDTH, image.height / PREVIEW_HEIGHT))
    stream = io.BytesIO()
    image.reduce(factor).save(stream, format="JPEG", quality=PREVIEW_QUALITY)  # reduce is faster than resize
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
