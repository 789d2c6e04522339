"""The tables as files; as HTML with a image per metric and shot, in one file that needs nothing else."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from grid.tables import (
    MISSING,
    NO_TRUTH,
    PUBLISHED,
    TABLE_METRICS,
    Entry,
    Results,
    Table,
    format_entry,
    header,
    make_tables,
    read_results,
    to_latex,
    to_markdown,
    write_csv,
)
from utils.errors import UserError
from utils.files import whole_file

README_MARKS = ("<!-- results: begin -->", "<!-- results: end -->")

# Okabe and Ito's colours, which colour-blind readers can tell apart; published numbers are hollow.
MARKS = {
    **{"untrained": ("o", "#999999"), "last": ("s", "#0072b2"), "source": ("^", "#009e73"), "best": ("D", "#d55e00")},
    **{"paper": ("o", "#000000"), "release": ("s", "#cc79a7")},
}
CATEGORY_INCHES, FRAME_INCHES, WIDTH_INCHES = 0.34, 1.3, 8.4
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 66rem; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; margin: .6rem 0 1.6rem; font-variant-numeric: tabular-nums; }
th, td { padding: .18rem .5rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1.5px solid #1c1c1c; border-top: 1.5px solid #1c1c1c; }
tbody tr:last-child td { border-top: 1px solid #888; border-bottom: 1.5px solid #1c1c1c; font-weight: 600; }
td.missing { color: #a33; font-style: italic; font-weight: 400; }
dl { display: grid; grid-template-columns: 8rem 1fr; gap: .15rem 1rem; margin: 0; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } svg { max-width: 100%; height: auto; }
.note { margin-top: -1.2rem; font-size: .9em; }
"""


def to_html(results: Results, tables: Sequence[Table]) -> str:
    """The whole page."""
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in header(results))
    sections = "".join(_section(table) for table in tables)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>RegAD: results</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><h1>RegAD: results</h1>\n<dl>{facts}</dl>\n{sections}</body></html>\n"
    )


def _section(table: Table) -> str:
    names = "".join(f"<th>{escape(name)}</th>" for name in ["category", *table.columns])
    rows = "".join(
        f"<tr><td>{escape(category)}</td>{''.join(map(_cell, entries, table.columns))}</tr>\n"
        for category, entries in table.rows.items()
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    image = _image(table) if table.metric in TABLE_METRICS else ""
    body = f"<table><thead><tr>{names}</tr></thead><tbody>\n{rows}</tbody></table>"
    return f'<h2>{escape(table.title)}</h2>\n{image}<div class="scroll">{body}</div>{notes}\n'


def _cell(entry: Entry | None, column: str) -> str:
    text = format_entry(entry, column)
    return f"<td{' class=missing' if text == MISSING else ''}>{escape(text)}</td>"


def _image(table: Table) -> str:
    """An SVG: a line per category, a mark per column, bars of one SD over rounds. Empty where all is missing."""
    shown = [name for name in table.columns if name in MARKS and any(_of_column(table, name))]
    if not shown:
        return ""
    figure = Figure(figsize=(WIDTH_INCHES, FRAME_INCHES + CATEGORY_INCHES * len(table.rows)), layout="constrained")
    axis = figure.subplots()
    for number, name in enumerate(shown):
        shift = (number - (len(shown) - 1) / 2) * 0.7 / len(shown)
        points = [(y + shift, entry) for y, entry in enumerate(_of_column(table, name)) if entry]
        shape, colour = MARKS[name]
        axis.errorbar(
            [entry.mean for _, entry in points],
            [y for y, _ in points],
            xerr=[entry.sd or 0 for _, entry in points],
            fmt=shape,
            color=colour,
            markerfacecolor="none" if name in PUBLISHED else colour,
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


def _of_column(table: Table, name: str) -> list[Entry | None]:
    """A column's entries, None where there is no number to draw."""
    entries = (row[table.columns.index(name)] for row in table.rows.values())
    return [None if entry is NO_TRUTH else entry for entry in entries]


def _as_svg(figure: Figure) -> str:
    text = io.StringIO()
    # a fixed salt and no date: the same numbers give the same page
    with matplotlib.rc_context({"svg.hashsalt": "regad", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def write_tables(folder: Path, readme: Path | None = None) -> None:
    """Prints the tables of a results folder and writes them beside the records, in four formats.

    Raises:
        UserError: no records, or no place for them in `readme`.
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
    """Replaces what stands between the two marks."""
    text = readme.read_text(encoding="utf-8")
    begin, end = README_MARKS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"{readme} needs a line {begin} and a line {end}; the tables go between them")
    before, after = text.split(begin)[0], text.split(end)[1]
    with whole_file(readme) as aside:
        aside.write_text(f"{before}{begin}\n{markdown}{end}{after}", encoding="utf-8")
