"""Tables of records and the published numbers, as Markdown, CSV and LaTeX.

All numbers are percent, as in the paper, but for the tables of seconds. For the HTML page, see experiments.tables_page.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation.metrics import METRIC_NAMES
from evaluation.statistics import crossed_summary, summary
from experiments.results import DIGEST_LETTERS, Results, kind_name, support_name, weights_of
from utils.choices import RELEASE_BACKBONE, RELEASE_SCORER, WEIGHTS

HEADER_SETTINGS = {"data_type": "data type", "stn_mode": "STN mode", "img_size": "image size", "seed": "seed"}
PUBLISHED_FILES = "published_{}.csv"  # in this folder, by data type; there is none for MPDD
PUBLISHED = ("paper", "release")
PRINTED_DIGITS = 0.05  # published averages are rounded to one decimal
TABLE_METRICS = ("image_auroc", "pixel_auroc")
OTHER_METRICS = tuple(name for name in METRIC_NAMES if name not in TABLE_METRICS)
OTHER_WEIGHTS = ("last", "source", "best", "untrained")  # the first that a scorer has is that of its other metrics
DEFECT_METRICS = ("image_auroc", "pixel_auroc", "pro")
MISSING, NOT_PUBLISHED = "missing", ""
DIFFERENCE = " - "  # in the names of columns of differences
PERCENT = (0.0, 100.0)  # the range of a metric
SECONDS = "seconds"  # the `metric` of tables of times


class Entry(NamedTuple):
    """One table cell, in percent or seconds.

    sd: sample standard deviation over `rounds`, None for a single round. rounds: empty for a published number. of:
    "3 of 15" where a mean covers only some of the categories. trainings: the rounds of each training, where there are
    several; `rounds` are then their means. sd_trainings: standard deviation over the trainings' means.
    """

    mean: float
    sd: float | None = None
    rounds: tuple[float, ...] = ()
    of: str = ""
    trainings: tuple[tuple[float, ...], ...] = ()
    sd_trainings: float | None = None


NO_TRUTH = Entry(math.nan)  # scored, but the metric is not in the record or undefined: images without ground truth


class ResultsTable(NamedTuple):
    """One metric at one shot, the metrics "other" or "defects" of one kind of weights, or SECONDS.

    rows: the categories, then "mean", each with one entry per column; None where nothing was scored. Those of "defects"
    are categories with a defect type, without a mean.
    """

    title: str
    metric: str
    shot: int
    columns: list[str]
    rows: dict[str, list[Entry | None]]
    notes: list[str]


def read_published(data_type: str = "mvtec") -> dict[tuple[str, str, int], dict[str, float]]:
    """The published numbers in percent: (source, metric, shot) -> category -> value, with the printed "average"."""
    file = Path(__file__).with_name(PUBLISHED_FILES.format(data_type))
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    lines, rows = [line for line in lines if not line.startswith("#")], {}
    for row in csv.DictReader(lines):
        key = row.pop("source"), row.pop("metric"), int(row.pop("shot"))
        rows[key] = {category: float(value) for category, value in row.items()}
    return rows


def make_tables(results: Results) -> list[ResultsTable]:
    """Tables of image AUROC and of pixel AUROC for each shot, then of the other metrics and of seconds for each shot.

    Where there are several scorers, each AUROC has tables of paired differences: of scorers, and of training.

    The AUROC tables have one column per kind of weights. Where there are published numbers, they also have these and
    the differences from them.
    """
    tables = []
    for metric in TABLE_METRICS:
        tables += [_compared_table(results, metric, shot) for shot in results.shots]
        tables += [table for shot in results.shots for table in _paired_tables(results, metric, shot)]
    for shot in results.shots:
        tables += _other_tables(results, shot)
    for shot in results.shots:
        tables += _seconds_table(results, shot)
    return tables


def _compared_table(results: Results, metric: str, shot: int) -> ResultsTable:
    columns = {name: column_of(results, metric, shot, name) for name in _kinds(results)}
    notes = [note for name in columns for note in _lacking_note(results, metric, shot, name)]
    published, scored = (
        read_published(results.data_type),
        {name for column in columns.values() for name in known(column)},
    )
    for source in PUBLISHED:
        if (source, metric, shot) in published:
            numbers = dict(published[source, metric, shot])
            notes += _average_notes(source, numbers.pop("average", None), list(numbers.values()), len(scored))
            columns[source] = {category: Entry(value) for category, value in numbers.items()}
    for source in PUBLISHED if "best" in columns else ():
        if source in columns:
            columns[f"best{DIFFERENCE}{source}"] = _minus(columns["best"], columns[source])
    title = f"{METRIC_NAMES[metric]}, K = {shot}"
    return ResultsTable(title, metric, shot, list(columns), _rows(results.categories, columns), notes)


def _lacking_note(results: Results, metric: str, shot: int, kind: str) -> list[str]:
    """A sentence on the records of this kind without the metric; none if all have it."""
    records = {key[0]: record for key, record in results.records.items() if key[1:] == (shot, kind)}
    lacking = [category for category, record in records.items() if metric not in record["rounds"][0]]
    if not lacking:
        return []
    where = "any record" if len(lacking) == len(records) else f"the records of {', '.join(lacking)}"
    return [f"{kind}: {METRIC_NAMES[metric]} is not in {where} (n/a)."]


def _kinds(results: Results) -> list[str]:
    """The columns: every combination of weights and scorer that was planned or has records."""
    found = {key[2] for key in results.records} | set(results.planned)
    return [kind for scorer in results.scorers for weights in WEIGHTS if (kind := kind_name(weights, scorer)) in found]


def _paired_tables(results: Results, metric: str, shot: int) -> list[ResultsTable]:
    """Paired differences, round by round on the same support sets: of each further scorer, and of training."""
    differences = {
        f"{scorer} minus {RELEASE_SCORER}": [(weights, kind_name(weights, scorer)) for weights in WEIGHTS]
        for scorer in results.scorers[1:]
    }
    if len(results.scorers) > 1:
        differences["last minus untrained"] = [
            (kind_name("untrained", scorer), kind_name("last", scorer)) for scorer in results.scorers
        ]
    tables = []
    for title, kinds in differences.items():
        columns = {f"{second} - {first}": _paired(results, metric, shot, (first, second)) for first, second in kinds}
        columns = {name: column for name, column in columns.items() if column}
        if columns:
            rows = _rows(results.categories, columns)
            title = f"{METRIC_NAMES[metric]}, K = {shot}: {title}, paired"
            tables.append(ResultsTable(title, f"{metric}_paired", shot, list(columns), rows, []))
    return tables


def _paired(results: Results, metric: str, shot: int, kinds: tuple[str, str]) -> dict[str, Entry]:
    """Category -> the second kind minus the first, where both were scored on the same support sets."""
    first, second = (known(column_of(results, metric, shot, kind)) for kind in kinds)
    pairs = {}
    for category in first:
        records = [results.records.get((category, shot, kind)) for kind in kinds]
        if category in second and support_name(records[0]) == support_name(records[1]) and _same_weights(*records):
            one, other = (_trainings(of[category]) for of in (first, second))
            both = min(len(one), len(other)) if 1 not in (len(one), len(other)) else None
            pairs[category] = _entry(np.subtract(other[:both], one[:both]).tolist())
    return pairs


def _same_weights(one: dict, other: dict) -> bool:
    """Whether two records of one kind of weights are of the same file; records of different kinds are compared too.

    A record without a file is of another method, or of untrained weights.
    """
    files = [(record.get("checkpoint") or {}).get("sha256") for record in (one, other)]
    return one["weights"] != other["weights"] or None in files or files[0] == files[1]


def _other_tables(results: Results, shot: int) -> list[ResultsTable]:
    """AP, F1-max and PRO, and the metrics by defect type, of each scorer's first kind of weights that has them."""
    tables = []
    for scorer in results.scorers:
        kinds = [kind_name(weights, scorer) for weights in OTHER_WEIGHTS]
        for make in (_other_table, _defects_table):
            tables += [made for kind in kinds if (made := make(results, shot, kind))][:1]
    return tables


def _other_table(results: Results, shot: int, kind: str) -> ResultsTable | None:
    columns = {METRIC_NAMES[metric]: column_of(results, metric, shot, kind) for metric in OTHER_METRICS}
    if not any(known(column) for column in columns.values()):
        return None
    title = f"Other metrics, {kind} weights, K = {shot}"
    return ResultsTable(title, "other", shot, list(columns), _rows(results.categories, columns), [])


def _defects_table(results: Results, shot: int, kind: str) -> ResultsTable | None:
    """A row for each category and defect type, whose images are compared with all normal ones."""
    rows: dict[str, list[Entry | None]] = {}
    for category in results.categories:
        defects = results.records.get((category, shot, kind), {}).get("defects", {})
        for defect, numbers in defects.items():
            found = [numbers.get(metric) for metric in DEFECT_METRICS]
            rows[f"{category}, {defect}"] = [
                _entry([[100 * value for value in one["rounds"]]]) if one else NO_TRUTH for one in found
            ]
    columns = [METRIC_NAMES[metric] for metric in DEFECT_METRICS]
    return (
        ResultsTable(f"By defect type, {kind} weights, K = {shot}", "defects", shot, columns, rows, [])
        if rows
        else None
    )


def _seconds_table(results: Results, shot: int) -> list[ResultsTable]:
    """The seconds of scoring for each kind of weights, and those of training before them where they are known."""
    columns: dict[str, dict[str, Entry]] = {}
    for (category, of_shot, kind), record in results.records.items():
        if of_shot == shot:
            trained = "training, source" if weights_of(kind) == "source" else "training"
            if (category, shot, kind) in results.training:
                columns.setdefault(trained, {})[category] = Entry(results.training[category, shot, kind])
            if record.get("seconds"):
                columns.setdefault(kind, {})[category] = Entry(sum(record["seconds"].values()))
    order = [name for name in ("training", "training, source", *_kinds(results)) if name in columns]
    if not order:
        return []
    shown = {name if name.startswith("training") else f"scoring, {name}": columns[name] for name in order}
    notes = ["Scoring with several scorers in one command counts for each of them."] if len(results.scorers) > 1 else []
    return [ResultsTable(f"Seconds, K = {shot}", SECONDS, shot, list(shown), _rows(results.categories, shown), notes)]


def column_of(results: Results, metric: str, shot: int, weights: str) -> dict[str, Entry]:
    """Category -> the metric in the records of one shot and kind."""
    column = {}
    for category in results.categories:
        record = results.records.get((category, shot, weights))
        if record is not None:
            every = [record, *results.repeats.get((category, shot, weights), [])]
            values = [[numbers.get(metric) for numbers in one["rounds"]] for one in every]
            lacks = any(None in rounds for rounds in values)
            column[category] = NO_TRUTH if lacks else _entry((100 * np.array(values)).tolist())
    return column


def known(column: dict[str, Entry]) -> dict[str, Entry]:
    """The entries that are numbers."""
    return {category: entry for category, entry in column.items() if entry is not NO_TRUTH}


def _entry(trainings: Sequence[Sequence[float]], of: str = "") -> Entry:
    """trainings: the rounds of each training; of one, where there are no others."""
    if len(trainings) > 1 and len(trainings[0]) > 1:
        numbers, each = crossed_summary(trainings), tuple(map(tuple, trainings))
        rounds = tuple(np.mean(trainings, axis=0).tolist())
        return Entry(numbers["mean"], numbers["sd"], rounds, of, each, numbers["sd_trainings"])
    rounds = np.mean(trainings, axis=0).tolist() if len(trainings) > 1 else trainings[0]
    numbers = summary(rounds)
    return Entry(numbers["mean"], numbers["sd"], tuple(rounds), of)


def _trainings(entry: Entry) -> np.ndarray:
    """The rounds of each training (trainings, rounds); where there is one, in one row."""
    return np.array(entry.trainings or [entry.rounds])


def _minus(ours: dict[str, Entry], published: dict[str, Entry]) -> dict[str, Entry]:
    return {
        category: Entry(ours[category].mean - published[category].mean) for category in ours if category in published
    }


def _rows(categories: Sequence[str], columns: dict[str, dict[str, Entry]]) -> dict[str, list[Entry | None]]:
    """The rows of `categories`, and "mean". That of published numbers is of the categories that were scored here."""
    own = {name for source, column in columns.items() if source not in PUBLISHED for name in known(column)}
    means = [
        _mean({name: value for name, value in column.items() if not own or name in own}, len(categories))
        for column in columns.values()
    ]
    rows = {category: [column.get(category) for column in columns.values()] for category in categories}
    return rows | {"mean": means}


def _mean(column: dict[str, Entry], categories: int) -> Entry | None:
    """Mean over categories. Its SD is that of the rounds' means; it is absent if the numbers of rounds differ."""
    entries = list(known(column).values())
    if not entries:
        return NO_TRUTH if column else None
    of = "" if len(entries) == categories else f"{len(entries)} of {categories}"
    shapes = {_trainings(entry).shape for entry in entries}
    if len(shapes) == 1 and entries[0].rounds:
        return _entry(np.mean([_trainings(entry) for entry in entries], axis=0).tolist(), of)
    return Entry(float(np.mean([entry.mean for entry in entries])), of=of)


def _average_notes(source: str, printed: float | None, values: list[float], scored: int) -> list[str]:
    """Where the mean of all published `values` is not in the table, or not what the source prints."""
    every, notes = float(np.mean(values)), []
    if 0 < scored < len(values):
        notes.append(f"{source}: the mean of all {len(values)} categories is {every:.1f}.")
    if printed is not None and abs(every - printed) > PRINTED_DIGITS:
        notes.append(f"{source}: prints {printed:.1f} as its average, the mean of its cells is {every:.1f}.")
    return notes


def header(results: Results) -> list[tuple[str, str]]:
    """(name, value) pairs that describe the records: commit, dates, device, arguments, support sets, weights."""
    records = list(results.records.values())
    lines = [("commit", _distinct(record["commit"] or "not given" for record in records))]
    dates = sorted(record["date"] for record in records)
    lines.append(("date", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"))
    lines.append(("device", _distinct(record["device"] for record in records)))
    for name, label in HEADER_SETTINGS.items():
        lines.append((label, _distinct(record["config"].get(name, "not given") for record in records)))
    lines.append(("backbone", _distinct(record["config"].get("backbone", RELEASE_BACKBONE) for record in records)))
    lines.append(("scorers", _distinct(record.get("scorer", RELEASE_SCORER) for record in records)))
    lines.append(("rounds", _distinct(len(record["rounds"]) for record in records)))
    lines.append(("support sets", _support_sets(results)))
    spread = "mean ± sample standard deviation over rounds (one support set each), in percent"
    if results.repeats:
        spread += f"; then ± that over up to {1 + max(map(len, results.repeats.values()))} trainings"
    lines.append(("spread", spread))
    shown = [name for name in WEIGHTS if any(weights_of(key[2]) == name for key in results.records)]
    lines += [(name, f"{_epochs(results, name)}{WEIGHTS[name]}.") for name in shown]
    return lines


def _support_sets(results: Results) -> str:
    """The number of support sets, their origin, and one SHA-256 over all of them."""
    names = {key[:2]: support_name(record) for key, record in sorted(results.records.items())}
    digest = hashlib.sha256(json.dumps(list(names.values())).encode()).hexdigest()[:DIGEST_LETTERS]
    kinds = _distinct(name.split()[0] for name in names.values())
    return f"{len(names)} ({kinds}), SHA-256 {digest}..."


def _epochs(results: Results, weights: str) -> str:
    epochs = {record.get("epoch") for key, record in results.records.items() if weights_of(key[2]) == weights}
    epochs -= {None}
    if not epochs or weights == "untrained":
        return ""
    return f"epoch {min(epochs)}: " if len(epochs) == 1 else f"epochs {min(epochs)} to {max(epochs)}: "


def _distinct(values: Iterable[object]) -> str:
    """The distinct values, in order of appearance."""
    return ", ".join(dict.fromkeys(map(str, values)))


def format_row(table: ResultsTable, entries: Sequence[Entry | None]) -> list[str]:
    """The texts of one row of `table`, see format_entry."""
    texts = [format_entry(entry, name) for entry, name in zip(entries, table.columns, strict=True)]
    return ["" if table.metric == SECONDS and text == MISSING else text for text in texts]


def format_entry(entry: Entry | None, column: str) -> str:
    """The text of a cell.

    `93.9 ± 0.4`; `+0.3` for a difference; `missing` if it was not run; `n/a` without ground truth; empty if it was not
    published.
    """
    if entry is None:
        return NOT_PUBLISHED if column in PUBLISHED or DIFFERENCE in column else MISSING
    if entry is NO_TRUTH:
        return "n/a"
    text = f"{entry.mean:+.1f}" if DIFFERENCE in column else f"{entry.mean:.1f}"
    text += "".join(f" ± {sd:.1f}" for sd in (entry.sd, entry.sd_trainings) if sd is not None)
    return text + (f" ({entry.of})" if entry.of else "")


def to_markdown(results: Results, tables: Sequence[ResultsTable]) -> str:
    """Header and tables as Markdown."""
    lines = [f"- {name}: {value}" for name, value in header(results)]
    for table in tables:
        lines += ["", f"### {table.title}", "", f"| category | {' | '.join(table.columns)} |"]
        lines.append("|---" + "|---:" * len(table.columns) + "|")
        lines += [f"| {name} | {' | '.join(format_row(table, entries))} |" for name, entries in table.rows.items()]
        lines += ["", *table.notes] if table.notes else []
    return "\n".join(lines) + "\n"


def write_csv(path: Path, tables: Sequence[ResultsTable]) -> None:
    """Writes one line per table cell: mean, SD, Student's 95 % interval and every round, unrounded, in percent.

    The lines of SECONDS have their number in the last column instead.
    """
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            [
                "shot",
                "metric",
                "category",
                "column",
                "percent",
                "sd",
                "low95",
                "high95",
                "rounds",
                SECONDS,
                "sd_trainings",
            ]
        )
        for table in tables:
            for category, entries in table.rows.items():
                for column, entry in zip(table.columns, entries, strict=True):
                    is_time = table.metric == SECONDS
                    numbers = [*[""] * 5, entry and entry.mean] if is_time else [*_csv_numbers(entry, column), ""]
                    of_trainings = "" if entry is None or entry.sd_trainings is None else entry.sd_trainings
                    writer.writerow([table.shot, table.metric, category, column, *numbers, of_trainings])


def _csv_numbers(entry: Entry | None, column: str) -> list[object]:
    if entry is None or entry is NO_TRUTH:
        return ["" if entry is None else "n/a", *[""] * 4]
    limits = None if DIFFERENCE in column else PERCENT
    interval = None
    if entry.rounds:
        found = crossed_summary(entry.trainings, limits) if entry.trainings else summary(entry.rounds, limits)
        interval = found["interval95"]
    return [entry.mean, entry.sd, *(interval or ("", "")), " ".join(map(str, entry.rounds))]


def to_latex(results: Results, tables: Sequence[ResultsTable]) -> str:
    """The tables as LaTeX that needs booktabs, with the header as comments; without those of seconds."""
    lines = [f"% {name}: {value}" for name, value in header(results)] + ["% requires \\usepackage{booktabs}"]
    for table in (table for table in tables if table.metric != SECONDS):
        lines += ["", "\\begin{table}", "\\centering", f"\\caption{{{escape_latex(table.title)}, percent.}}"]
        lines += [f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}", "\\toprule"]
        lines.append(latex_row(["category", *table.columns]) + " \\midrule")
        for name, entries in table.rows.items():
            rule = "\\midrule\n" if name == "mean" else ""
            lines.append(rule + latex_row([name, *format_row(table, entries)]))
        lines += ["\\bottomrule", "\\end{tabular}", *(f"\\\\ {escape_latex(note)}" for note in table.notes)]
        lines.append("\\end{table}")
    return "\n".join(lines) + "\n"


def latex_row(cells: Sequence[str]) -> str:
    """A row of a LaTeX table."""
    return " & ".join(map(escape_latex, cells)) + " \\\\"


def escape_latex(text: str) -> str:
    """Plain text as LaTeX, with signs of numbers in mathematics."""
    replaced = {"_": "\\_", "%": "\\%", "&": "\\&", "#": "\\#", "$": "\\$", "±": "$\\pm$", " - ": " $-$ "}
    for letter in ("\\", "{", "}", "~", "^"):
        text = text.replace(letter, " ")
    for old, new in replaced.items():
        text = text.replace(old, new)
    return f"${text[0]}${text[1:]}" if text[:1] in ("+", "-") else text
