"""The scores and maps that lie beside a record: by which test images, and how its metrics vary over these images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.layouts import LabelledImage
from datasets.mvtec import category_folder, list_test_items, read_masks
from evaluation.metrics import METRIC_NAMES, region_weights
from evaluation.per_image import image_name, read_labelled_scores
from evaluation.resampling import count_images, count_pixels, draw_copies, percentile_interval, resample
from evaluation.saved_maps import read_maps
from experiments.comparison import Pair
from experiments.results import RecordKey, Results
from experiments.tables import (
    DIFFERENCE,
    OVER_IMAGES,
    PERCENT,
    TABLE_METRICS,
    Entry,
    ResultsTable,
    entries_of,
    known,
    make_table,
)
from utils.choices import AUTO_BITS
from utils.errors import UserError
from utils.naming import RecordFiles, round_maps


def maps_file(record: dict, number: int) -> Path:
    """The saved maps of a round: beside the record, or where an imported method's maps were."""
    beside = RecordFiles.of(record["file"].parent, record["file"].stem).maps
    given = record["config"].get("maps")
    return round_maps(Path(given) if given and not beside.is_dir() else beside, number)


def folder_of(record: dict, data_path: Path | None = None) -> Path:
    """The folder of the category of a record. data_path: where the data are now; None: where they were.

    Raises:
        UserError: there is none.
    """
    config = record["config"]
    return category_folder(data_path or Path(config["data_path"]), config["data_type"], config["obj"])


def test_items(record: dict, data_path: Path | None = None) -> list[LabelledImage]:
    """The test images of a record; see `folder_of`."""
    return list_test_items(folder_of(record, data_path), need_both=False)


def decoding(record: dict, *names: str) -> dict[str, bool | int | str]:
    """The settings `names` with which the files of a record were decoded; those that it lacks had their defaults."""
    config = record["config"]
    return {name: config[name] for name in names if config.get(name) not in (None, AUTO_BITS)}


def deviations(results: Results, key: RecordKey, data_path: Path | None = None) -> dict[str, np.ndarray]:
    """How far each metric of a record, its mean over rounds, is from it for each drawn test set, (draws,) in percent.

    The image metrics are there if the scores lie beside the record, the pixel metrics if the maps of all rounds and
    the data do. Of several trainings, the rounds of all are counted.
    """
    records = results.records[key]
    files = [record["file"].with_suffix(".csv") for record in records]
    if not all(file.is_file() for file in files):
        return {}
    trainings = [read_labelled_scores(file) for file in files]
    names, labels, _ = trainings[0]
    if labels.all() or not labels.any():
        return {}
    copies = draw_copies(labels, seed=[*key.category.encode()])  # the same for all methods, others for each category
    counts = (count_images(scores, labels) for training in trainings for scores in training.scores)
    metrics = resample(counts, copies, "image")
    maps = [maps_file(record, number) for record in records for number in range(len(record["rounds"]))]
    if all(file.is_file() for file in maps):
        metrics |= _of_maps(records[0], maps, names, copies, data_path)
    return {name: 100 * values for name, values in metrics.items()}


def _of_maps(
    record: dict, maps: list[Path], names: list[str], copies: np.ndarray, data_path: Path | None
) -> dict[str, np.ndarray]:
    try:
        items = sorted(test_items(record, data_path), key=image_name)
    except UserError as error:
        print(f"note: no intervals of pixel metrics over test images: {error}")
        return {}
    if [image_name(item) for item in items] != names:
        print(f"note: no intervals of pixel metrics over test images: {maps[0].parent} is of other test images")
        return {}
    size = read_maps(maps[0], items).shape[-1]
    truth = _truth(tuple(items), size, **decoding(record, "keep_aspect", "mask_orientation"))
    return resample((count_pixels(read_maps(file, items), *truth) for file in maps), copies, "pixel") if truth else {}


@functools.lru_cache(maxsize=1)  # all columns of a category follow each other
def _truth(items: tuple[LabelledImage, ...], size: int, **how: bool | str) -> tuple | None:
    masks, valid_mask = read_masks(items, size, **how)
    return None if masks is None else (masks, valid_mask, region_weights(masks))


def over_images(
    results: Results, pairs: Sequence[Pair] = (), data_path: Path | None = None, brief: bool = False
) -> list[ResultsTable]:
    """Tables of intervals over test images, for each metric and shot: of every column, and of the pairs.

    brief: of TABLE_METRICS.
    """
    sources = {source.folder: source for pair in pairs for source in (pair.baseline, pair.results)}
    sources[results.folder] = results
    varied = {
        (folder, key): deviations(source, key, data_path)
        for folder, source in sources.items()
        for category in source.categories
        for key in source.records
        if key.category == category
    }
    tables = [
        _image_table(results, pairs, metric, shot, varied)
        for metric in (TABLE_METRICS if brief else METRIC_NAMES)
        for shot in results.shots
    ]
    return [table for table in tables if table]


def _image_table(
    results: Results, pairs: Sequence[Pair], metric: str, shot: int, varied: dict[tuple[Path, RecordKey], dict]
) -> ResultsTable | None:
    def drawn(source: Results, key: RecordKey) -> np.ndarray | None:
        """The number of a record, then that of each drawn test set; None where one of them is lacking."""
        entry = known(entries_of(source, metric, key)).get(key.category)
        deviating = varied.get((source.folder, key), {}).get(metric)
        return None if entry is None or deviating is None else entry.mean + np.append(0, deviating)

    columns: dict[str, dict[str, np.ndarray]] = {name: {} for name in (*results.kinds, *(pair.name for pair in pairs))}
    for category in results.categories:
        for kind in results.kinds:
            if (values := drawn(results, RecordKey(category, shot, kind))) is not None:
                columns[kind][category] = values
        for pair in pairs:
            before, after = map(drawn, (pair.baseline, pair.results), pair.keys(category, shot))
            if before is not None and after is not None:
                columns[pair.name][category] = after - before
    columns = {name: column for name, column in columns.items() if column}
    if not columns:
        return None

    def mean(column: str, names: Sequence[str]) -> Entry:
        return _entry(np.mean([columns[column][name] for name in names], axis=0), column)

    entries = {
        name: {category: _entry(values, name) for category, values in column.items()}
        for name, column in columns.items()
    }
    title = f"{METRIC_NAMES[metric]}, K = {shot}: over test images"
    table = make_table(title, f"{metric}{OVER_IMAGES}", shot, results.categories, entries, mean=mean)
    return table._replace(intervals=True, rows={name: row for name, row in table.rows.items() if any(row)})


def _entry(values: np.ndarray, column: str) -> Entry:
    low, high = percentile_interval(values[1:])
    interval = (low, high) if DIFFERENCE in column else (max(low, PERCENT[0]), min(high, PERCENT[1]))
    return Entry(float(values[0]), interval=interval)
