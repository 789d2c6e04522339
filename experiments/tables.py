"""Tables of records and the published numbers. All numbers are percent, as in the paper, but for seconds.

The stages: experiments/results.py reads records, this file and experiments/comparison.py make tables of them,
experiments/formats.py renders tables.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation.metrics import METRIC_NAMES
from evaluation.round_metrics import TYPE_METRICS
from evaluation.statistics import p_value, summary
from experiments.results import RecordKey, Results, described, kind_name, training_seconds, weights_of

PUBLISHED = ("paper", "release")
PRINTED_DIGITS = 0.05  # published averages are rounded to one decimal
TABLE_METRICS = ("image_auroc", "pixel_auroc", "pro")  # each has a table of all columns
OTHER_METRICS = tuple(name for name in METRIC_NAMES if name not in TABLE_METRICS)
OTHER_WEIGHTS = ("last", "source", "best", "untrained")  # the first that a scorer has is that of its other metrics
DIFFERENCE = " - "  # in the names of columns of differences
PERCENT = (0.0, 100.0)  # the range of a metric
SECONDS = "seconds"  # the `metric` of tables of times
PAIRED, OVER_IMAGES = "_paired", "_images"  # how that of paired differences and of intervals over test images ends


class Entry(NamedTuple):
    """One table cell, in percent or seconds.

    sd: sample standard deviation over `rounds`, None for a single round. interval: 95 % interval, by default over
    rounds. trainings: the rounds of each training; empty for a published number. sd_trainings: standard deviation over
    the trainings' means. p, p_holm: of a paired difference, see experiments.comparison.
    """

    mean: float
    sd: float | None = None
    interval: tuple[float, float] | None = None
    trainings: tuple[tuple[float, ...], ...] = ()
    sd_trainings: float | None = None
    p: float | None = None
    p_holm: float | None = None

    @property
    def rounds(self) -> list[float]:
        """The value of each round, averaged over the trainings."""
        return np.mean(self.trainings, axis=0).tolist() if self.trainings else []


NO_TRUTH = Entry(math.nan)  # scored, but the metric is not in the record or undefined: images without ground truth


class ResultsTable(NamedTuple):
    """One metric at one shot, the metrics "other" or "defects" of one kind of weights, or SECONDS.

    rows: the categories, each with one entry per column; None where nothing was scored. Those of defect types are
    categories with a defect type. means: rows below them, None where a column lacks a category of the mean. intervals:
    whether the cells show the interval in place of the standard deviation.
    """

    title: str
    metric: str
    shot: int
    columns: list[str]
    rows: dict[str, list[Entry | None]]
    means: dict[str, list[Entry | None]]
    notes: list[str]
    intervals: bool = False


def read_published(data_type: str = "mvtec") -> dict[tuple[str, str, int], dict[str, float]]:
    """The published numbers in percent: (source, metric, shot) -> category -> value, with the printed "average"."""
    file = Path(__file__).with_name(f"published_{data_type}.csv")  # there is none for MPDD
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    lines, rows = [line for line in lines if not line.startswith("#")], {}
    for row in csv.DictReader(lines):
        key = row.pop("source"), row.pop("metric"), int(row.pop("shot"))
        rows[key] = {category: float(value) for category, value in row.items()}
    return rows


def value_table(results: Results, metric: str, shot: int) -> list[ResultsTable]:
    """The table of a metric: a column per kind, the published numbers, and the differences from them.

    None of PRO where no record has it, as in the records of version 0.1.
    """
    columns = {name: column_of(results, metric, shot, name) for name in results.kinds}
    scored = {name for column in columns.values() for name in known(column)}
    if metric == "pro" and not scored:
        return []
    notes = [note for name in columns for note in _lacking_note(results, metric, shot, name)]
    published = read_published(results.data_type)
    for source in PUBLISHED:
        if (source, metric, shot) in published:
            numbers = dict(published[source, metric, shot])
            notes += _average_notes(source, numbers.pop("average", None), list(numbers.values()), len(scored))
            columns[source] = {category: Entry(value) for category, value in numbers.items()}
    for source in PUBLISHED if "best" in columns else ():
        if source in columns:
            published_by = columns[source]
            columns[f"best{DIFFERENCE}{source}"] = {
                category: Entry(ours.mean - published_by[category].mean)
                for category, ours in columns["best"].items()
                if category in published_by
            }
    title = f"{METRIC_NAMES[metric]}, K = {shot}"
    return [make_table(title, metric, shot, results.categories, columns, notes)]


def make_table(
    title: str,
    metric: str,
    shot: int,
    categories: Sequence[str],
    columns: dict[str, dict[str, Entry]],
    notes: Sequence[str] = (),
    mean: Callable[[str, Sequence[str]], Entry] | None = None,
) -> ResultsTable:
    """A table with a row for each category, and rows of means, like for like, with notes that name their categories.

    There is a row of means for each set of categories that a column has. Columns that lack one of them, also published
    ones, have no mean in this row; so the numbers of a row are means over the same categories.

    mean: the mean of a column over categories, by default `mean_of` its entries.
    """
    mean = mean or (lambda column, names: mean_of([columns[column][name] for name in names]))
    rows = {category: [column.get(category) for column in columns.values()] for category in categories}
    own = {frozenset(known(column)) for name, column in columns.items() if name not in PUBLISHED} - {frozenset()}
    means, of_means = {}, []
    for chosen in sorted(own or {frozenset(categories)}, key=lambda names: (-len(names), sorted(names))):
        names = [name for name in categories if name in chosen]
        others = [name for name in categories if name not in chosen]
        label = f"mean of {len(names)} of {len(categories)}" if others else "mean"
        if label in means:
            label += f" ({', '.join(names)})"
        if others:
            few = ", ".join(names) if len(names) <= len(others) else f"all but {', '.join(others)}"
            of_means.append(f"{label}: {few}.")
        means[label] = [mean(name, names) if chosen <= set(known(column)) else None for name, column in columns.items()]
    return ResultsTable(title, metric, shot, list(columns), rows, means, [*of_means, *notes])


def mean_of(entries: Sequence[Entry], paired: bool = False) -> Entry:
    """The mean of categories. Its spread is that of the rounds' means; without one if the numbers of rounds differ."""
    trainings = [entry.trainings for entry in entries]
    if trainings[0] and len(set(map(np.shape, trainings))) == 1:
        return make_entry(np.mean(trainings, axis=0), paired)
    return Entry(float(np.mean([entry.mean for entry in entries])))


def make_entry(trainings: Sequence[Sequence[float]] | np.ndarray, paired: bool = False) -> Entry:
    """An entry of rounds in percent.

    trainings: the rounds of each training; of one, where there are no others. paired: they are differences.
    """
    table = np.asarray(trainings, dtype=float)
    if 1 in table.shape:  # one training or one round: the means over trainings are the sample
        table = table.mean(axis=0, keepdims=True)
    sample = table if len(table) > 1 else table[0]
    numbers = summary(sample, None if paired else PERCENT)
    return Entry(
        numbers["mean"],
        numbers["sd"],
        numbers["interval95"] and tuple(numbers["interval95"]),
        tuple(map(tuple, table.tolist())),
        numbers.get("sd_trainings"),
        p_value(sample) if paired and sample.size > 1 else None,
    )


def column_of(results: Results, metric: str, shot: int, kind: str, by_defect: bool = False) -> dict[str, Entry]:
    """Row -> the metric in the records of one shot and kind. The rows are categories, or their defect types."""
    column: dict[str, Entry] = {}
    for category in results.categories:
        column |= entries_of(results, metric, RecordKey(category, shot, kind), by_defect)
    return column


def entries_of(results: Results, metric: str, key: RecordKey, by_defect: bool = False) -> dict[str, Entry]:
    """Row -> the metric in the records with this key, as in `column_of` for one category."""
    if key not in results.records:
        return {}
    records = results.records[key]
    values = {key.category: [[numbers.get(metric) for numbers in record["rounds"]] for record in records]}
    if by_defect:
        values = {
            f"{key.category}, {defect}": [
                ((record.get("defects") or {}).get(defect, {}).get(metric) or {}).get("rounds", [None])
                for record in records
            ]
            for defect in records[0].get("defects", {})
        }
    return {
        row: NO_TRUTH if any(None in rounds for rounds in trainings) else make_entry(100 * np.array(trainings))
        for row, trainings in values.items()
    }


def known(column: dict[str, Entry]) -> dict[str, Entry]:
    """The entries that are numbers."""
    return {category: entry for category, entry in column.items() if entry is not NO_TRUTH}


def _lacking_note(results: Results, metric: str, shot: int, kind: str) -> list[str]:
    """A sentence on the records of this kind without the metric; none if all have it."""
    records = {key.category: record for key, (record, *_) in results.records.items() if key[1:] == (shot, kind)}
    lacking = [category for category, record in records.items() if metric not in record["rounds"][0]]
    if not lacking:
        return []
    where = "any record" if len(lacking) == len(records) else f"the records of {', '.join(lacking)}"
    return [f"{kind}: {METRIC_NAMES[metric]} is not in {where} (n/a)."]


def other_tables(results: Results, shot: int) -> list[ResultsTable]:
    """AP and F1-max, and the metrics by defect type, of each scorer's first kind of weights that has them."""
    tables = []
    for scorer in results.scorers:
        kinds = [kind_name(weights, scorer) for weights in OTHER_WEIGHTS]
        for make in (_other_table, _defects_table):
            tables += [made for kind in kinds for made in make(results, shot, kind)][:1]
    return tables


def _other_table(results: Results, shot: int, kind: str) -> list[ResultsTable]:
    columns = {METRIC_NAMES[metric]: column_of(results, metric, shot, kind) for metric in OTHER_METRICS}
    if not any(known(column) for column in columns.values()):
        return []
    return [make_table(f"Other metrics, K = {shot}: {described(kind)}", "other", shot, results.categories, columns)]


def _defects_table(results: Results, shot: int, kind: str) -> list[ResultsTable]:
    """A row for each category and defect type, whose images are compared with all normal ones."""
    columns = {METRIC_NAMES[metric]: column_of(results, metric, shot, kind, by_defect=True) for metric in TYPE_METRICS}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = {name: [column.get(name) for column in columns.values()] for name in names}
    title = f"By defect type, K = {shot}: {described(kind)}"
    return [ResultsTable(title, "defects", shot, list(columns), rows, {}, [])] if rows else []


def seconds_table(results: Results, shot: int) -> list[ResultsTable]:
    """The seconds of scoring for each kind of weights, and those of training before them where they are known."""
    columns: dict[str, dict[str, Entry]] = {}
    for key, (record, *_) in results.records.items():
        if key.shot == shot:
            if seconds := training_seconds(record):
                trained = "training, source" if weights_of(key.kind) == "source" else "training"
                columns.setdefault(trained, {})[key.category] = Entry(seconds)
            if record.get("seconds"):
                columns.setdefault(key.kind, {})[key.category] = Entry(sum(record["seconds"].values()))
    order = [name for name in ("training", "training, source", *results.kinds) if name in columns]
    if not order:
        return []
    shown = {name if name.startswith("training") else f"scoring, {name}": columns[name] for name in order}
    notes = ["Scoring with several scorers in one command counts for each of them."] if len(results.scorers) > 1 else []
    return [make_table(f"Seconds, K = {shot}", SECONDS, shot, results.categories, shown, notes)]


def _average_notes(source: str, printed: float | None, values: list[float], scored: int) -> list[str]:
    """Where the mean of all published `values` is not in the table, or not what the source prints."""
    every, notes = float(np.mean(values)), []
    if 0 < scored < len(values):
        notes.append(f"{source}: the mean of all {len(values)} categories is {every:.1f}.")
    if printed is not None and abs(every - printed) > PRINTED_DIGITS:
        notes.append(f"{source}: prints {printed:.1f} as its average, the mean of its cells is {every:.1f}.")
    return notes
