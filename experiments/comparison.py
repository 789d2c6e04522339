"""The paired comparison of two results folders, as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from evaluation.metrics import METRIC_NAMES
from evaluation.statistics import summary
from experiments.results import Results, kind_name, support_name, weights_of
from experiments.tables import DIFFERENCE, Entry, column_of, known, latex_row
from scorers.registry import SCORERS
from utils.errors import UserError

COLUMNS = ("metric", "K", "weights", "mean difference B - A", "SD over categories", "95 % interval (Student t)")
COLUMNS += ("SD over rounds", "B better")


class Comparison(NamedTuple):
    """Differences B - A between two folders for one metric, shot and kind of weights, in percent.

    kind: of both, or "last, mymethod - last" where another method is compared with the release's scorer. categories:
    how many both folders have. better: in how many of them B is better. difference: summary of the differences over
    categories, see evaluation.statistics.summary. sd_of_rounds: SD over rounds of a category's paired differences,
    averaged over categories; None for single rounds.
    """

    metric: str
    shot: int
    kind: str
    categories: int
    better: int
    difference: dict
    sd_of_rounds: float | None


def compare(a: Results, b: Results) -> list[Comparison]:
    """Compares the records that both folders have, paired by category and support set.

    Another method that only one folder has is compared with the release's scorer in the other folder.

    Raises:
        UserError: no record in common, or different support sets.
    """
    kinds = list(_paired_kinds(a, b))
    common = [(key, (*key[:2], two)) for one, two in kinds for key in a.records if key[2] == one]
    common = [(one, two) for one, two in common if two in b.records]
    if not common:
        has = (", ".join(sorted({key[2] for key in results.records})) for results in (a, b))
        raise UserError(
            "the two results folders have no category, shot and kind of weights in common: {} and {}".format(*has)
        )
    for one, two in common:
        names = support_name(a.records[one]), support_name(b.records[two])
        if names[0] != names[1]:
            raise UserError(f"{one[0]}, K = {one[1]} was scored on different support sets: {names[0]} and {names[1]}")
    found = sorted({(one[1], one[2], two[2]) for one, two in common})
    return [made for metric in METRIC_NAMES for of in found if (made := _compare(metric, *of, a, b))]


def _paired_kinds(a: Results, b: Results) -> Iterator[tuple[str, str]]:
    """The kinds of A and B that are compared."""
    kinds = [{key[2] for key in results.records} for results in (a, b)]
    yield from ((kind, kind) for kind in sorted(kinds[0] & kinds[1]))
    for own, other, methods in ((1, 0, b.scorers), (0, 1, a.scorers)):
        foreign = {kind_name(weights_of(kind), name) for kind in kinds[own] for name in methods if name not in SCORERS}
        for kind in sorted(foreign & kinds[own] - kinds[other]):
            if weights_of(kind) in kinds[other]:
                yield (weights_of(kind), kind) if own else (kind, weights_of(kind))


def _compare(metric: str, shot: int, one: str, two: str, a: Results, b: Results) -> Comparison | None:
    """One comparison; None where no category has the metric in both."""
    columns = known(column_of(a, metric, shot, one)), known(column_of(b, metric, shot, two))
    pairs: list[tuple[Entry, Entry]] = [
        (columns[0][name], columns[1][name]) for name in columns[0] if name in columns[1]
    ]
    if not pairs:
        return None
    differences = [b.mean - a.mean for a, b in pairs]
    over_rounds = [np.subtract(b.rounds, a.rounds).std(ddof=1) for a, b in pairs if len(a.rounds) > 1]
    better = sum(difference > 0 for difference in differences)
    of_rounds = float(np.mean(over_rounds)) if over_rounds else None
    kind = one if one == two else f"{two}{DIFFERENCE}{one}"
    return Comparison(metric, shot, kind, len(pairs), better, summary(differences), of_rounds)


def _row(one: Comparison) -> list[str]:
    sd, interval = one.difference["sd"], one.difference["interval95"]
    spread = ("", "") if sd is None else (f"{sd:.2f}", f"{interval[0]:+.2f} to {interval[1]:+.2f}")
    rounds = "" if one.sd_of_rounds is None else f"{one.sd_of_rounds:.2f}"
    better = f"{one.better} of {one.categories}"
    return [
        METRIC_NAMES[one.metric],
        str(one.shot),
        one.kind,
        f"{one.difference['mean']:+.2f}",
        *spread,
        rounds,
        better,
    ]


def to_markdown(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as a Markdown table."""
    lines = [COLUMNS, ["---", "---:", "---", "---:", "---:", "---", "---:", "---"], *map(_row, comparisons)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_latex(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as a LaTeX table that needs booktabs."""
    lines = ["% requires \\usepackage{booktabs}", "\\begin{tabular}{lrlrrlrl}", "\\toprule"]
    lines += [f"{latex_row(COLUMNS)} \\midrule", *(latex_row(_row(one)) for one in comparisons)]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])


def to_csv(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as CSV with unrounded numbers, in percent."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["metric", "shot", "kind", "mean", "sd", "low95", "high95", "sd_of_rounds", "better", "categories"])
    for one in comparisons:
        interval = one.difference["interval95"] or ("", "")
        numbers = [one.difference["mean"], one.difference["sd"], *interval, one.sd_of_rounds]
        writer.writerow([one.metric, one.shot, one.kind, *numbers, one.better, one.categories])
    return stream.getvalue().rstrip("\n")


FORMATS = {"md": to_markdown, "tex": to_latex, "csv": to_csv}
