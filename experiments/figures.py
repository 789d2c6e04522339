"""Figures for a paper: the metrics of all columns by category, and example images with the maps of each column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.tables import DIFFERENCE, NO_TRUTH, OVER_IMAGES, PUBLISHED, Entry, ResultsTable
from reports.drawing import COLOUR_MAP, SPAN

if TYPE_CHECKING:
    from experiments.examples import CategoryExamples

# The colours of Okabe and Ito, which are distinct for colour-blind readers; published numbers are hollow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*")
PAGE_INCHES = (7.0, 9.5)  # the text of a page; figures fit in it
CATEGORY_INCHES, FRAME_INCHES, LABEL_INCHES = 0.34, 0.8, 0.9
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
    across, lines = (
        max(map(len, by_shot.values())),
        [max(len(_row_names(table)) for table in of) for of in by_shot.values()],
    )
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
        shape, colour, face = _style(columns, name)
        shift = (number - (len(shown) - 1) / 2) * 0.7 / len(shown)
        entries = {row: entry for row, entry in _entries(table, name).items() if row in names}
        points = [(names.index(row) + shift, entry, row) for row, entry in entries.items()]
        thin = _entries(over_images, name) if over_images and name in over_images.columns else {}
        for y, _, row in points:
            if row in thin and thin[row].interval:
                axis.plot(thin[row].interval, (y, y), color=colour, linewidth=THIN)
        axis.errorbar(
            [entry.mean for _, entry, _ in points],
            [y for y, _, _ in points],
            xerr=np.transpose([_reach(entry) for _, entry, _ in points]),
            fmt=shape,
            color=colour,
            markerfacecolor=face,
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


def _style(columns: Sequence[str], name: str) -> tuple[str, str, str]:
    """Shape, colour and face colour of a column."""
    number = columns.index(name)
    colour = COLOURS[number % len(COLOURS)]
    return SHAPES[number % len(SHAPES)], colour, "none" if name in PUBLISHED else colour


def _reach(entry: Entry) -> tuple[float, float]:
    """How far the interval reaches below and above the mean."""
    low, high = entry.interval or (entry.mean, entry.mean)
    return entry.mean - low, high - entry.mean


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


def examples_figure(categories: Sequence[CategoryExamples]) -> Figure:
    """A row per test image: support images, the test image, its ground truth, and the heat map of each column.

    It fits a page. The K support images are beside the rows of their category. One colour bar holds for all heat maps,
    as their scores are relative, see CategoryExamples.
    """
    columns = list(dict.fromkeys(name for of in categories for name in of.columns))
    titles = ["support", "test image", "ground truth", *columns]
    count = sum(len(of.names) for of in categories)
    cell = min((PAGE_INCHES[0] - LABEL_INCHES) / len(titles), (PAGE_INCHES[1] - FRAME_INCHES) / count)
    figure = Figure((PAGE_INCHES[0], count * cell + FRAME_INCHES), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.04, wspace=0, hspace=0)
    grid = figure.subplots(count, len(titles), squeeze=False)
    norm = LogNorm(1 / SPAN, SPAN)
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[], box_aspect=1)
        axis.spines[:].set_visible(False)
    for axis, title in zip(grid[0], titles, strict=True):
        axis.set_title(title.replace(", ", ",\n"), fontsize=FONT)
    rows = iter(grid)
    for of in categories:
        support = np.array_split(of.support, len(of.names))
        for number, name in enumerate(of.names):
            row = next(rows)
            label = f"{of.category}\n{name.split('/')[0]}"
            row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=FONT)
            shown = [_tiled(support[number]), of.images[number], of.masks[number]]
            for axis, panel in zip(row, shown, strict=False):
                if panel is not None:
                    axis.imshow(panel, cmap="gray", vmin=0, vmax=1)
            for axis, column in zip(row[len(shown) :], columns, strict=True):
                if column in of.columns:
                    axis.imshow(of.columns[column][number], cmap=COLOUR_MAP, norm=norm)
    bar = figure.colorbar(ScalarMappable(norm, COLOUR_MAP), ax=grid, location="bottom", shrink=0.5, aspect=40)
    bar.set_ticks((1 / SPAN, 1, SPAN), labels=(f"1/{SPAN:g}", "1", f"{SPAN:g}"), fontsize=FONT)
    bar.minorticks_off()
    bar.set_label("score / median image score of the normal test images", fontsize=FONT)
    return figure


def _tiled(images: np.ndarray) -> np.ndarray | None:
    """Images (K, S, S, 3) in a square grid, as one square image; None for none."""
    side = int(np.ceil(len(images) ** 0.5))
    padded = np.full((side**2, *images.shape[1:]), 255, np.uint8)
    padded[: len(images)] = images
    rows = [np.concatenate(list(padded[at : at + side]), axis=1) for at in range(0, len(padded), side or 1)]
    return np.concatenate(rows) if rows else None
