"""A figure for a paper: the metrics of all columns by category."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.tables import DIFFERENCE, NO_TRUTH, OVER_IMAGES, PUBLISHED, Entry, ResultsTable

# The colours of Okabe and Ito, which are distinct for colour-blind readers; published numbers are hollow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*")
PAGE_INCHES = (7.0, 9.5)  # the text of a page; figures fit in it
CATEGORY_INCHES, FRAME_INCHES = 0.34, 0.8
FONT = 8  # points
THICK, THIN = 2, 0.7  # points, of the bars of intervals


def table_figure(tables: Sequence[ResultsTable], over_images: Sequence[ResultsTable] = ()) -> Figure | None:
    """A panel for each table of a metric: a line per category, a mark per column, bars of the 95 % interval.

    Panels of one shot are side by side. None if there is no number. over_images: tables of intervals over test images,
    which are drawn as thin lines.
    """
    tables = [table for table in tables if any(_entries(table, name) for name in _drawn(table))]
    if not tables:
        return None
    shots = dict.fromkeys(table.shot for table in tables)
    by_shot = {shot: [table for table in tables if table.shot == shot] for shot in shots}
    across = max(map(len, by_shot.values()))
    lines = [max(len(_row_names(table)) for table in of_shot) for of_shot in by_shot.values()]
    line = min(CATEGORY_INCHES, (PAGE_INCHES[1] - FRAME_INCHES * (len(lines) + 1)) / sum(lines))
    heights = [FRAME_INCHES + line * count for count in lines]
    figure = Figure((PAGE_INCHES[0], sum(heights) + FRAME_INCHES), layout="constrained")
    axes = figure.subplots(len(by_shot), across, squeeze=False, height_ratios=heights)
    columns = list(dict.fromkeys(name for table in tables for name in _drawn(table)))
    thin = {(table.metric.removesuffix(OVER_IMAGES), table.shot): table for table in over_images}
    for row, of_shot in zip(axes, by_shot.values(), strict=True):
        for axis, table in zip(row, of_shot, strict=False):
            _draw_panel(axis, table, columns, thin.get((table.metric, table.shot)))
        for axis in row[1 : len(of_shot)]:
            axis.tick_params(labelleft=False)
        for axis in row[len(of_shot) :]:
            axis.set_axis_off()
    legends = [axis.get_legend_handles_labels() for axis in axes.flat]
    handles = {label: handle for of_axis in legends for handle, label in zip(*of_axis, strict=True)}
    if any(entry.interval for table in tables for name in _drawn(table) for entry in _entries(table, name).values()):
        handles["95 % over support sets"] = Line2D([], [], color="black", linewidth=THICK)
    if thin:
        handles["95 % over test images"] = Line2D([], [], color="black", linewidth=THIN)
    figure.legend(
        handles.values(), handles, loc="outside upper center", ncols=min(4, len(handles)), frameon=False, fontsize=FONT
    )
    return figure


def _draw_panel(axis: Axes, table: ResultsTable, columns: Sequence[str], over_images: ResultsTable | None) -> None:
    names = _row_names(table)
    shown = [name for name in columns if name in table.columns]
    for number, name in enumerate(shown):
        shape, colour = SHAPES[columns.index(name) % len(SHAPES)], COLOURS[columns.index(name) % len(COLOURS)]
        entries = {row: entry for row, entry in _entries(table, name).items() if row in names}
        shift = (number - (len(shown) - 1) / 2) * 0.7 / len(shown)
        places, means = [names.index(row) + shift for row in entries], [entry.mean for entry in entries.values()]
        thin = _entries(over_images, name) if over_images and name in over_images.columns else {}
        for row, y in zip(entries, places, strict=True):
            if row in thin and thin[row].interval:
                axis.plot(thin[row].interval, (y, y), color=colour, linewidth=THIN)
        intervals = np.array([entry.interval or (entry.mean, entry.mean) for entry in entries.values()])
        axis.errorbar(
            means,
            places,
            xerr=np.abs(intervals.T - means),
            fmt=shape,
            color=colour,
            markerfacecolor="none" if name in PUBLISHED else colour,
            markersize=4.5,
            elinewidth=THICK,
            label=name,
        )
    axis.tick_params(labelsize=FONT)
    axis.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.axhline(sum(name in table.rows for name in names) - 0.5, color="#888888", linewidth=0.8)
    axis.set_xlabel(f"{table.title} (%)", fontsize=FONT)
    axis.grid(axis="x", color="#dddddd")
    axis.spines[["top", "right"]].set_visible(False)


def _drawn(table: ResultsTable) -> list[str]:
    return [name for name in table.columns if DIFFERENCE not in name]


def _entries(table: ResultsTable, column: str) -> dict[str, Entry]:
    """Row -> the number of a column, where there is one."""
    place = table.columns.index(column)
    rows = {**table.rows, **table.means}
    return {name: row[place] for name, row in rows.items() if row[place] and row[place] is not NO_TRUTH}


def _row_names(table: ResultsTable) -> list[str]:
    """The rows with a number of a column that was scored."""
    own = [name for name in _drawn(table) if name not in PUBLISHED]
    named = {row for name in own for row in _entries(table, name)}
    return [name for name in (*table.rows, *table.means) if name in named]
