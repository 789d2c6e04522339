"""Writes the tables as files. The HTML page is self-contained and has a figure per metric and shot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from experiments.results import Results, read_results, weights_of
from experiments.tables import (
    DIFFERENCE,
    MISSING,
    NO_TRUTH,
    PUBLISHED,
    TABLE_METRICS,
    Entry,
    ResultsTable,
    format_row,
    header,
    make_tables,
    to_latex,
    to_markdown,
    write_csv,
)
from reports.render import get_template
from utils.errors import UserError
from utils.files import whole_file
from utils.text import read_text

README_MARKS = ("<!-- results: begin -->", "<!-- results: end -->")

# The colours of Okabe and Ito, which are distinct for colour-blind readers. Marks of published numbers are hollow.
MARKS = {
    **{"untrained": ("o", "#999999"), "last": ("s", "#0072b2"), "source": ("^", "#009e73"), "best": ("D", "#d55e00")},
    **{"paper": ("o", "#000000"), "release": ("s", "#cc79a7")},
}
CATEGORY_INCHES, FRAME_INCHES, WIDTH_INCHES = 0.34, 1.3, 8.4


def to_html(results: Results, tables: Sequence[ResultsTable]) -> str:
    """A self-contained HTML page of the tables, with a figure for each table of image or pixel AUROC."""
    figures = [_figure(table) if table.metric in TABLE_METRICS else "" for table in tables]
    return get_template("tables.html").render(
        facts=header(results),
        tables=zip(tables, figures, strict=True),
        format_row=format_row,
        missing=MISSING,
    )


def _figure(table: ResultsTable) -> Markup:
    """An SVG with a line per category, a mark per column and bars of one SD over rounds; empty without any number."""
    shown = [name for name in table.columns if _mark(name) and any(_drawable(table, name))]
    if not shown:
        return Markup()
    figure = Figure(figsize=(WIDTH_INCHES, FRAME_INCHES + CATEGORY_INCHES * len(table.rows)), layout="constrained")
    axis = figure.subplots()
    for number, name in enumerate(shown):
        shift = (number - (len(shown) - 1) / 2) * 0.7 / len(shown)
        points = [(y + shift, entry) for y, entry in enumerate(_drawable(table, name)) if entry]
        shape, colour = _mark(name)
        axis.errorbar(
            [entry.mean for _, entry in points],
            [y for y, _ in points],
            xerr=[entry.sd or 0 for _, entry in points],
            fmt=shape,
            color=colour,
            markerfacecolor="none" if name in PUBLISHED else colour,
            markeredgecolor="black" if ", " in name else colour,
            markersize=5,
            elinewidth=1,
            label=name,
        )
    axis.set_yticks(range(len(table.rows)), [name.replace("$", r"\$") for name in table.rows])
    axis.set_ylim(len(table.rows) - 0.5, -0.5)
    axis.axhline(len(table.rows) - 1.5, color="#888888", linewidth=0.8)
    axis.set_xlabel(f"{table.title}, percent; bars: one SD over rounds")
    axis.grid(axis="x", color="#dddddd")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(shown), frameon=False)
    return _as_svg(figure)


def _mark(column: str) -> tuple[str, str] | None:
    """Shape and colour of a column. A further scorer has those of the same weights, with a black edge."""
    return None if DIFFERENCE in column else MARKS.get(weights_of(column))


def _drawable(table: ResultsTable, name: str) -> list[Entry | None]:
    """The entries of a column, None where there is no number to draw."""
    entries = (row[table.columns.index(name)] for row in table.rows.values())
    return [None if entry is NO_TRUTH else entry for entry in entries]


def _as_svg(figure: Figure) -> Markup:
    """The figure as an SVG element. Matplotlib escapes its texts."""
    text = io.StringIO()
    # with a fixed salt and no date, equal numbers give equal files
    with matplotlib.rc_context({"svg.hashsalt": "regad", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return Markup(svg[svg.index("<svg") :])


def write_tables(folder: Path, readme: Path | None = None) -> None:
    """Prints the tables of a results folder and writes them into the same folder as Markdown, CSV, LaTeX and HTML.

    readme: a file in which the tables replace the text between README_MARKS.

    Raises:
        UserError: unusable records, see experiments.tables.read_results, or no marks in `readme`.
    """
    results = read_results(folder)
    tables = make_tables(results)
    markdown = to_markdown(results, tables)
    print(markdown)
    texts = {"md": markdown, "tex": to_latex(results, tables), "html": to_html(results, tables)}
    for ending, text in texts.items():
        with whole_file(folder / f"tables.{ending}") as aside:
            aside.write_text(text, encoding="utf-8")
    with whole_file(folder / "tables.csv") as aside:
        write_csv(aside, tables)
    print(f"written: {folder}/tables.md, .csv, .tex, .html")
    if readme:
        _put_into(readme, markdown)


def _put_into(readme: Path, markdown: str) -> None:
    """Replaces the text between the two marks."""
    try:
        text = read_text(readme)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {readme} (--readme): {getattr(error, 'strerror', None) or error}") from error
    begin, end = README_MARKS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"{readme} needs a line {begin} and a line {end} to put the tables between")
    before, after = text.split(begin)[0], text.split(end)[1]
    with whole_file(readme) as aside:
        aside.write_text(f"{before}{begin}\n{markdown}{end}{after}", encoding="utf-8")
