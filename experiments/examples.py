"""Example images for a figure: support images, test images, ground truth and the saved maps of each column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from skimage.util import montage

from datasets.layouts import LabelledImage
from datasets.mvtec import LabelledDataset, list_train_images
from datasets.support import find_support_rounds, read_support_images
from evaluation.per_image import image_name
from evaluation.run import choose_round
from evaluation.saved_maps import read_maps
from experiments.figures import FONT, FRAME_INCHES, PAGE_INCHES
from experiments.results import RecordKey, Results, rounds_of
from experiments.saved_scores import decoding, folder_of, maps_file, test_items
from reports.drawing import COLOUR_MAP, SPAN
from utils.errors import UserError

SHOWN, MOST = 8, 15  # test images of all categories: by default; that fit a page
LABEL_INCHES = 0.9  # for the names of the rows


class CategoryExamples(NamedTuple):
    """N test images of a category, at the size S of the first column's maps.

    names: <defect>/<file name>. support: (K, S, S, 3) uint8. images: (N, S, S, 3) uint8. masks: (N, S, S) bool.
    columns: by the kind of the record the score maps (N, S', S'), relative to the median image score of the normal test
    images.
    """

    category: str
    names: list[str]
    support: np.ndarray
    images: np.ndarray
    masks: np.ndarray
    columns: dict[str, np.ndarray]


def read_examples(
    results: Results, which: int | str = 0, names: Sequence[str] | None = None, data_path: Path | None = None
) -> list[CategoryExamples]:
    """Examples of every category of `results`, which has one number of shots.

    which: the round, see evaluation.run.choose_round; best, median and worst are those of the first column. names: of
    the test images, <defect>/<file name>; None: one of each defect type, SHOWN in all. data_path: where the data are
    now; None: where they were.

    Raises:
        UserError: several numbers of shots, columns of different support sets, more than MOST images, or data or maps
            are not there.
    """
    if len(results.shots) > 1:
        shots = ", ".join(map(str, results.shots))
        raise UserError(f"example images are of one number of shots, not of K = {shots}; choose one", ("shots",))
    examples = [_of_category(results, category, which, names, data_path) for category in results.categories]
    examples = [category for category in examples if category]
    shown = [name for category in examples for name in category.names]
    if lacking := set(names or ()) - set(shown):
        raise UserError(f"no test image {min(lacking)} in {', '.join(results.categories)}", ("images",))
    if len(shown) > MOST:
        raise UserError(
            f"{len(shown)} test images do not fit a page, at most {MOST} do; choose some", ("objs", "images")
        )
    return examples


def _of_category(
    results: Results, category: str, which: int | str, names: Sequence[str] | None, data_path: Path | None
) -> CategoryExamples | None:
    keys = [RecordKey(category, results.shots[0], kind) for kind in results.kinds]
    records = {key.kind: results.records[key][0] for key in keys if key in results.records}
    if not records:
        return None
    if len(set(map(rounds_of, records.values()))) > 1:
        raise UserError(f"the columns of {category} were scored on different support sets", ("columns",))
    first = next(iter(records.values()))
    number, items = choose_round(which, first["rounds"]), test_items(first, data_path)
    if not 0 <= number < len(first["rounds"]):
        raise UserError(f"{category} has {len(first['rounds'])} rounds, counted from 0", ("images_round",))
    chosen = [index for index, item in enumerate(items) if image_name(item) in (names or ())]
    if names is None:
        chosen = _of_each_type(items, max(1, SHOWN // len(results.categories)))
    if not chosen:
        return None
    columns = {}
    for kind, record in records.items():
        file = maps_file(record, number)
        if not file.is_file():
            raise UserError(f"no saved maps {file} of {kind}; score again with: python test.py --save_maps")
        columns[kind] = _relative(read_maps(file, items), items)[chosen]
    size = next(iter(columns.values())).shape[-1]
    shown = [items[index] for index in chosen]
    read = list(LabelledDataset(shown, size, **decoding(first, "keep_aspect", "bits", "mask_orientation")))
    return CategoryExamples(
        category,
        [*map(image_name, shown)],
        _support(first, number, size, data_path),
        np.stack([item["image"].permute(1, 2, 0).numpy() for item in read]),
        np.stack([item["mask"].numpy() for item in read]),
        columns,
    )


def _of_each_type(items: Sequence[LabelledImage], most: int) -> list[int]:
    """Indices of one image of each defect type, and of a normal one, at most `most`; defective ones come first."""
    first = {item.defect: index for index, item in reversed([*enumerate(items)])}
    defective_first = sorted(first.values(), key=lambda index: (not items[index].label, index))
    return sorted(defective_first[:most])


def _relative(maps: np.ndarray, items: Sequence[LabelledImage]) -> np.ndarray:
    """Maps (B, S, S) divided by the median image score of the normal images, or of all if none is normal."""
    scores = maps.max(axis=(1, 2))
    normal = scores[[not item.label for item in items]]
    return maps / max(np.median(normal if len(normal) else scores), np.finfo(np.float32).tiny)


def _support(record: dict, number: int, size: int, data_path: Path | None) -> np.ndarray:
    """The support images of a round: those that the record names, or those of its file."""
    config, names, folder = record["config"], record["support_set"]["names"], folder_of(record, data_path)
    if names is None:
        path = config.get("support_path")
        rounds = find_support_rounds(path and Path(path), folder, config["shot"], len(record["rounds"]), size)
        images = rounds.images[number]
    else:
        files = {path.name: path for path in list_train_images(folder)}
        if lacking := [name for name in names[number] if name not in files]:
            raise UserError(f"{folder} lacks the support image {lacking[0]} of the record", ("data_path",))
        images = read_support_images(
            [files[name] for name in names[number]], size, **decoding(record, "keep_aspect", "bits")
        )
    return (255 * images).round().byte().permute(0, 2, 3, 1).numpy()


def examples_figure(categories: Sequence[CategoryExamples]) -> Figure:
    """A row per test image: support images, the test image, its ground truth, and the heat map of each column.

    It fits a page. The K support images are beside the rows of their category. One colour bar holds for all heat maps,
    as their scores are relative, see CategoryExamples.
    """
    columns = list(dict.fromkeys(name for category in categories for name in category.columns))
    titles = ["support", "test image", "ground truth", *columns]
    count = sum(len(category.names) for category in categories)
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
    for category in categories:
        support = np.array_split(category.support, len(category.names))
        for number, name in enumerate(category.names):
            row = next(rows)
            label = f"{category.category}\n{name.split('/')[0]}"
            row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=FONT)
            support_grid = montage(support[number], fill=[255] * 3, channel_axis=-1) if len(support[number]) else None
            shown = [support_grid, category.images[number], category.masks[number]]
            for axis, panel in zip(row, shown, strict=False):
                if panel is not None:
                    axis.imshow(panel, cmap="gray", vmin=0, vmax=1)
            for axis, column in zip(row[len(shown) :], columns, strict=True):
                if column in category.columns:
                    axis.imshow(category.columns[column][number], cmap=COLOUR_MAP, norm=norm)
    bar = figure.colorbar(ScalarMappable(norm, COLOUR_MAP), ax=grid, location="bottom", shrink=0.5, aspect=40)
    bar.set_ticks((1 / SPAN, 1, SPAN), labels=(f"1/{SPAN:g}", "1", f"{SPAN:g}"), fontsize=FONT)
    bar.minorticks_off()
    bar.set_label("score / median image score of the normal test images", fontsize=FONT)
    return figure
