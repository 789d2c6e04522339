"""Figures for a paper: the metrics of all columns by category, and example images with the maps of each column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from experiments.tables import DIFFERENCE, NO_TRUTH, OVER_IMAGES, PUBLISHED, Entry, ResultsTable
from reports.drawing import overlay
from utils.files import whole_file

if TYPE_CHECKING:
    from experiments.examples import CategoryExamples

# The colours of Okabe and Ito, which are distinct for colour-blind readers; published numbers are hollow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*")
CATEGORY_INCHES, FRAME_INCHES, PANEL_INCHES = 0.34, 1.1, 3.1
ONE_PANEL_INCHES = 8.4
CELL_INCHES, CELL_DPI = 1.15, 220


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
    heights = [FRAME_INCHES + CATEGORY_INCHES * max(len(_row_names(table)) for table in of) for of in by_shot.values()]
    width = ONE_PANEL_INCHES if across == 1 else across * PANEL_INCHES
    figure = Figure(figsize=(width, sum(heights) + 0.3), layout="constrained")
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
    if across == 1:
        axes[-1, 0].set_xlabel(f"{axes[-1, 0].get_xlabel()}; bars: 95 % interval over support sets")
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(4, len(handles)), frameon=False)
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
                axis.plot(thin[row].interval, (y, y), color=colour, linewidth=0.7)
        axis.errorbar(
            [entry.mean for _, entry, _ in points],
            [y for y, _, _ in points],
            xerr=np.transpose([_reach(entry) for _, entry, _ in points]),
            fmt=shape,
            color=colour,
            markerfacecolor=face,
            markersize=4.5,
            elinewidth=2,
            label=name,
        )
    axis.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.axhline(len(names) - len(_entries_of_means(table)) - 0.5, color="#888888", linewidth=0.8)
    axis.set_xlabel(f"{table.title} (%)")
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


def _entries_of_means(table: ResultsTable) -> list[str]:
    return [name for name in _row_names(table) if name in table.means]


def _row_names(table: ResultsTable) -> list[str]:
    """The rows with a number of a column that was scored."""
    own = [name for name in _drawn(table) if name not in PUBLISHED]
    named = {row for name in own for row in _entries(table, name)}
    return [name for name in (*table.rows, *table.means) if name in named]


def examples_figure(categories: Iterable[CategoryExamples]) -> Figure:
    """A row per test image: the support images, the test image, its ground truth, and the heat map of each column.

    Heat maps of a column and category have one scale, set by its normal test images.
    """
    categories = list(categories)
    columns = list(dict.fromkeys(name for of in categories for name in of.columns))
    titles = ["support", "test image", "ground truth", *columns]
    count = sum(len(of.images) for of in categories)
    figure = Figure(figsize=(len(titles) * CELL_INCHES + 0.3, count * CELL_INCHES + 0.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    grid = figure.subplots(count, len(titles), squeeze=False)
    for axis, title in zip(grid[0], titles, strict=True):
        axis.set_title(title.replace(", ", ",\n"), fontsize=7)
    rows = iter(grid)
    for of_category in categories:
        for number, name in enumerate(of_category.names):
            row = next(rows)
            row[0].set_ylabel(f"{of_category.category}\n{name.split('/')[0]}", fontsize=7)
            image, mask = of_category.images[number], of_category.masks[number]
            panels = [_tiled(of_category.support) if number == 0 else None, image, 255 * mask.astype(np.uint8)]
            for column in columns:
                maps = of_category.columns.get(column)
                panels.append(maps and overlay(Image.fromarray(maps.images[number]), maps.maps[number], maps.limits))
            for axis, panel in zip(row, panels, strict=True):
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
                if panel is not None:
                    axis.imshow(panel, cmap="gray", vmin=0, vmax=255)
    return figure


def _tiled(images: np.ndarray) -> np.ndarray:
    """Images (K, S, S, 3) in a square grid, as one square image."""
    side = int(np.ceil(len(images) ** 0.5))
    padded = np.full((side**2, *images.shape[1:]), 255, np.uint8)
    padded[: len(images)] = images
    return np.concatenate([np.concatenate(list(padded[at : at + side]), axis=1) for at in range(0, len(padded), side)])


def save_for_paper(path: Path, figure: Figure) -> None:
    """Writes a figure in one of FIGURE_FORMATS, by its suffix. Text stays text."""
    metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix, {})
    with whole_file(path) as aside, matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):
        figure.savefig(aside, format=path.suffix[1:], dpi=CELL_DPI, metadata=metadata)
