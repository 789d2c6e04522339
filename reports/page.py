"""The HTML report: one self-contained page that opens from disk and needs no network.

All pages are Jinja2 templates, with style sheets and scripts inlined, so that each page is one file.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from reports.drawing import colour_stops, place
from utils.files import whole_file

TEMPLATES = Path(__file__).parent / "templates"
PAGE_IMAGES = 500  # rows with a preview in one page: 17 to 29 MB with the images of six categories, 92 MB with noise
NORMAL_PANELS = 100  # largest number of support images, and of calibration images, with panels
PANEL_SIDE = 400  # pixels of the longer side of a panel in the enlarged view
THUMBNAIL_SIDE = 128  # pixels of the longer side of a thumbnail
PREVIEW_QUALITY = 75  # of JPEG
CHART_WIDTH, CHART_HEIGHT = 240, 64  # pixels


class Preview(NamedTuple):
    """The images of a row. thumbnail: a data URI. panels: (title, data URI) of the enlarged view."""

    thumbnail: str = ""
    panels: Sequence[tuple[str, str]] = ()


NO_PREVIEW = Preview()


class PageRow(NamedTuple):
    """One image of the page.

    score: None if the image could not be scored; `error` has the reason. defect_type: "good" or the name of a defect,
    None without labels. decision: "normal", "review" or "defective" if it does not depend on the score; None: by the
    thresholds of the page, which the reader moves. reason: of `decision`. boxes: regions above the threshold as (x, y,
    width, height, area, peak), in pixels of the image; peak is a score. time: ISO 8601; days are shown separately.
    """

    name: str
    score: float | None
    defect_type: str | None = None
    preview: Preview = NO_PREVIEW
    decision: str | None = None
    reason: str | None = None
    error: str | None = None
    boxes: Sequence[Sequence[float]] = ()
    time: str | None = None


class Reference(NamedTuple):
    """A normal image that was used for fitting or calibration, or an image with a known defect.

    role: "support" (score: leave-one-out), "calibration" or "known defect". score: None if there is none. decision,
    reason: as in `PageRow`.
    """

    name: str
    role: str
    score: float | None
    preview: Preview = NO_PREVIEW
    decision: str | None = None
    reason: str | None = None


class PageTable(NamedTuple):
    """A table of texts. The first column is aligned to the left, the others to the right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Chart(NamedTuple):
    """A measure of the images in the order of time, drawn as a line between its limits.

    values: at least two, the first the oldest. days: the numbers of the values with which a new day begins.
    """

    title: str
    values: Sequence[float]
    low: float
    high: float
    days: Sequence[int] = ()

    def x(self, number: int) -> float:
        """The horizontal place of a value in a drawing CHART_WIDTH wide."""
        return round(CHART_WIDTH * number / (len(self.values) - 1), 1)

    def y(self, value: float) -> float:
        """The vertical place of a value: `high` and `low` are drawn at a quarter and three quarters of CHART_HEIGHT."""
        share = (self.high - value) / (self.high - self.low)
        return round(CHART_HEIGHT * min(1.0, max(0.0, 0.25 + 0.5 * share)), 1)

    @property
    def points(self) -> str:
        """The line as points of SVG."""
        return " ".join(f"{self.x(number)},{self.y(value)}" for number, value in enumerate(self.values))


class Page(NamedTuple):
    """The content of a page.

    subtitle: below the title. threshold: an image with a higher score is defective; None: the reader sets one. review:
    an image with a higher score is for review; None: only by `PageRow.decision`. adopt: the command that adopts a
    threshold, with {} in its place. sign_off: whether a printed page has a line to sign. warnings: sentences, shown
    first. facts: name and value, such as date and detector. typical: a typical score of a normal image; scores are also
    shown as its multiples. colours: the scores of the first and the last colour of all heat maps; None if each heat map
    has its own. outlines: CSS colour and meaning of each outline.
    """

    title: str
    threshold: float | None = None
    rows: Iterable[PageRow] = ()
    facts: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    references: Sequence[Reference] = ()
    tables: Sequence[PageTable] = ()
    typical: float | None = None
    colours: tuple[float, float] | None = None
    outlines: Sequence[tuple[str, str]] = ()
    subtitle: str = ""
    review: float | None = None
    adopt: str = ""
    sign_off: bool = False
    charts: Sequence[Chart] = ()


def write_page(path: Path, page: Page) -> None:
    """Writes a page with a histogram of the scores, a threshold slider and a sortable table of the rows.

    With labels, the page also has a ROC curve and a table by defect type. Rows are written one by one, as all previews
    may not fit into memory.

    Raises:
        ValueError: a score or the threshold is NaN or infinite.
    """
    values = {
        **page._asdict(),
        "references": [_plain(reference) for reference in page.references],
        "rows": map(_plain, page.rows),
        "chart_size": (CHART_WIDTH, CHART_HEIGHT),
        "gradient": ", ".join(colour_stops()),
        "mark": place(page.threshold, page.colours) if page.colours and page.threshold is not None else None,
    }
    with whole_file(path) as aside:  # file names may contain any bytes
        get_template("page.html").stream(values).dump(str(aside), encoding="utf-8", errors="backslashreplace")


def _plain(row: PageRow | Reference) -> dict:
    """The values of a row as page.js reads them."""
    values = row._asdict()
    return values | values.pop("preview")._asdict()


def make_preview(panels: Mapping[str, Image.Image], thumbnail: str) -> Preview:
    """The preview of an image. panels: title and RGB image. thumbnail: the title of the panel for the table."""
    small = [(title, as_data_uri(panel, PANEL_SIDE)) for title, panel in panels.items()]
    return Preview(as_data_uri(panels[thumbnail], THUMBNAIL_SIDE), small)


def as_data_uri(image: Image.Image, side: int = PANEL_SIDE) -> str:
    """An RGB image, reduced to at most `side` pixels on its longer side, as a JPEG in a data URI."""
    factor = min(1.0, side / max(image.size))
    if factor < 1:
        width, height = (max(1, round(factor * length)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=PREVIEW_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def get_template(name: str) -> Template:
    """A template of reports/templates.

    Every value is escaped, and an undefined value is an error. In templates, `source("page.css")` inserts a file of the
    same folder unescaped, and the filter `tojson` gives JSON that cannot end a script element, and raises an error for
    NaN.
    """
    return _environment.get_template(name)


_environment = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
# the text of a style sheet or a script is not parsed as a template
_environment.globals["source"] = lambda name: Markup((TEMPLATES / name).read_text(encoding="utf-8"))
_environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
