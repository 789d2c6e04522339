"""Tables of paired differences between columns of results of one folder or two.

Two columns are paired round by round, as their rounds have the same support sets. A difference has Student's 95 %
interval over support sets (and trainings) and the p-value of the paired t-test, corrected by Holm's method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evaluation.metrics import METRIC_NAMES
from evaluation.round_metrics import TYPE_METRICS
from evaluation.statistics import holm
from experiments.results import RecordKey, Results, rounds_of, scorer_of, weights_of
from experiments.tables import (
    DIFFERENCE,
    NO_TRUTH,
    PAIRED,
    TABLE_METRICS,
    Entry,
    ResultsTable,
    entries_of,
    known,
    make_entry,
    make_table,
    mean_of,
)
from utils.choices import RELEASE_SCORER
from utils.errors import UserError

DEFAULT_BASELINES = (RELEASE_SCORER, "untrained")  # for the tables of one folder
OVER_CATEGORIES = "over categories"  # title of a row of means


class Pair(NamedTuple):
    """A column of results and the baseline that is subtracted from it."""

    baseline: Results
    baseline_kind: str
    results: Results
    kind: str

    @property
    def name(self) -> str:
        """The name of the column of differences."""
        if self.baseline is self.results:
            return f"{self.kind}{DIFFERENCE}{self.baseline_kind}"
        folders = self.baseline.folder, self.results.folder
        a, b = map(str, folders) if folders[0].name == folders[1].name else (folder.name for folder in folders)
        if self.kind == self.baseline_kind:
            return f"{self.kind}: {b}{DIFFERENCE}{a}"
        return f"{b}: {self.kind}{DIFFERENCE}{a}: {self.baseline_kind}"

    def keys(self, category: str, shot: int) -> tuple[RecordKey, RecordKey]:
        """The keys of the records of the baseline and of the column."""
        return RecordKey(category, shot, self.baseline_kind), RecordKey(category, shot, self.kind)

    def records(self, category: str, shot: int) -> tuple[dict, dict] | None:
        """The records of the baseline and of the column, with the first seed; None where one is missing."""
        before, after = self.keys(category, shot)
        if before not in self.baseline.records or after not in self.results.records:
            return None
        return self.baseline.records[before][0], self.results.records[after][0]


def pairs_of(results: Results, baseline: str, other: Results | None = None) -> list[Pair]:
    """Every column of `results` with its baseline.

    baseline: a column, or the scorer, method or kind of weights of columns. A column is paired with the baseline column
    of the same weights, or of the same scorer if the baseline is a kind of weights. Without such a column, it is paired
    with the only baseline column, if there is one. other: the results with the baseline, if not `results`.
    """
    source, pairs = other or results, []
    candidates = [kind for kind in _scored(source) if baseline in (kind, weights_of(kind), scorer_of(kind))]
    shared = scorer_of if baseline in map(weights_of, candidates) else weights_of
    for kind in _scored(results):
        matching = [candidate for candidate in candidates if shared(candidate) == shared(kind)] or candidates
        if len(matching) == 1 and (other or matching[0] != kind):
            pairs.append(Pair(source, matching[0], results, kind))
    return pairs


def _scored(results: Results) -> list[str]:
    """The columns that have a record."""
    kinds = {key.kind for key in results.records}
    return [kind for kind in results.kinds if kind in kinds]


def pairs_between(a: Results, b: Results, baseline: str | None = None) -> list[Pair]:
    """The pairs of columns of two folders, B - A, with records of the same categories and shots.

    baseline: a column of A for every column of B, see `pairs_of`. Without it, columns of the same name are paired. A
    column without a namesake is paired with the release's scorer of the same weights in the other folder.

    Raises:
        UserError: there are no such records, or their support sets differ.
    """
    common = []
    for pair in pairs_of(b, baseline, a) if baseline else _common_pairs(a, b):
        places = [key[:2] for key in b.records if key.kind == pair.kind and pair.records(*key[:2])]
        for category, shot in places:
            support_sets = [rounds_of(record) for record in pair.records(category, shot)]
            if support_sets[0] != support_sets[1]:
                with_rounds = support_sets[0][0] == support_sets[1][0]
                sets = [f"{name}, {rounds} rounds" if with_rounds else name for name, rounds in support_sets]
                raise UserError(f"{category}, K = {shot} was scored on different support sets: {' and '.join(sets)}")
        common += [pair] if places else []
    if not common:
        kinds_a, kinds_b = (", ".join(sorted({key.kind for key in results.records})) for results in (a, b))
        what = f"{baseline} and another column" if baseline else "category, shot and kind of weights"
        raise UserError(
            f"the two results folders have no {what} in common: {a.folder} has {kinds_a}, {b.folder} has {kinds_b}"
        )
    return common


def _common_pairs(a: Results, b: Results) -> list[Pair]:
    kinds_a, kinds_b = _scored(a), _scored(b)
    pairs = [(kind, kind) for kind in kinds_b if kind in kinds_a]
    pairs += [(weights_of(kind), kind) for kind in kinds_b if kind not in kinds_a and weights_of(kind) in kinds_a]
    pairs += [(kind, weights_of(kind)) for kind in kinds_a if kind not in kinds_b and weights_of(kind) in kinds_b]
    return [Pair(a, kind_a, b, kind_b) for kind_a, kind_b in pairs]


def paired_tables(title: str, pairs: Sequence[Pair], brief: bool = False) -> list[ResultsTable]:
    """Tables with a column for each pair: of every metric at every shot, then by defect type.

    brief: of TABLE_METRICS, without defect types.
    """
    metrics, of_defects = (TABLE_METRICS, ()) if brief else (METRIC_NAMES, TYPE_METRICS)
    shots = pairs[0].results.shots if pairs else []
    tables = [_paired_table(title, pairs, metric, shot) for metric in metrics for shot in shots]
    tables += [_paired_table(title, pairs, metric, shot, True) for metric in of_defects for shot in shots]
    return [table for table in tables if table]


def _paired_table(
    title: str, pairs: Sequence[Pair], metric: str, shot: int, by_defect: bool = False
) -> ResultsTable | None:
    columns = {pair.name: _differences(pair, metric, shot, by_defect) for pair in pairs}
    columns = {name: column for name, column in columns.items() if known(column)}
    if not columns:
        return None
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    names = list(rows) if by_defect else pairs[0].results.categories
    title = f"{METRIC_NAMES[metric]}{' by defect type' if by_defect else ''}, K = {shot}: {title}, paired"

    def mean(column: str, names: Sequence[str]) -> Entry:
        return mean_of([columns[column][name] for name in names], paired=True)

    table = make_table(title, f"{metric}{PAIRED}", shot, names, columns, mean=mean)
    means = {} if by_defect else table.means | _over_categories(columns)
    better = {name: [entry.mean > 0 for entry in known(column).values()] for name, column in columns.items()}
    note = "; ".join(f"{name} in {sum(higher)} of {len(higher)}" for name, higher in better.items())
    return table._replace(
        intervals=True,
        rows=_holm({name: table.rows[name] for name in names if name in rows}),
        means={name: _holm({name: entries})[name] for name, entries in means.items()},
        notes=[f"Higher: {note}.", *(table.notes if means else [])],
    )


def _differences(pair: Pair, metric: str, shot: int, by_defect: bool) -> dict[str, Entry]:
    """Row -> the differences, where both columns were scored on the same support sets."""
    column: dict[str, Entry] = {}
    for category in pair.results.categories:
        records = pair.records(category, shot)
        if not records or rounds_of(records[0]) != rounds_of(records[1]):
            continue
        if pair.baseline is pair.results and not _same_weights(*records):
            continue
        key_before, key_after = pair.keys(category, shot)
        before = entries_of(pair.baseline, metric, key_before, by_defect)
        after = entries_of(pair.results, metric, key_after, by_defect)
        column |= {row: _difference(entry, after[row]) for row, entry in before.items() if row in after}
    return column


def _difference(baseline: Entry, entry: Entry) -> Entry:
    """The rounds of an entry minus those of its baseline. A single training is paired with each of several."""
    if NO_TRUTH in (baseline, entry):
        return NO_TRUTH
    before, after = np.array(baseline.trainings), np.array(entry.trainings)
    both = min(len(before), len(after)) if 1 not in (len(before), len(after)) else None
    return make_entry(after[:both] - before[:both], paired=True)


def _same_weights(before: dict, after: dict) -> bool:
    """Whether two records of one kind of weights are of the same file; records of different kinds are compared too.

    A record without a file is of another method, or of untrained weights.
    """
    files = [(record.get("checkpoint") or {}).get("sha256") for record in (before, after)]
    return before["weights"] != after["weights"] or None in files or files[0] == files[1]


def _over_categories(columns: dict[str, dict[str, Entry]]) -> dict[str, list[Entry | None]]:
    """A row: the mean over categories, with the interval and p-value over categories instead of support sets."""
    means = [np.array([[entry.mean for entry in known(column).values()]]) for column in columns.values()]
    row = [make_entry(values, paired=True)._replace(trainings=()) if values.size > 1 else None for values in means]
    return {OVER_CATEGORIES: row} if any(row) else {}


def _holm(rows: dict[str, list[Entry | None]]) -> dict[str, list[Entry | None]]:
    """The rows with p-values corrected for the number of differences in them."""
    tested = [entry for entries in rows.values() for entry in entries if entry and entry.p is not None]
    corrected = iter(holm([entry.p for entry in tested]))
    return {
        name: [entry._replace(p_holm=next(corrected)) if entry and entry.p is not None else entry for entry in entries]
        for name, entries in rows.items()
    }
