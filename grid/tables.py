"""Tables of the records of test.py beside the published numbers, as Markdown, CSV and LaTeX, and paired comparisons.

All numbers of a table are percent, as in the paper. For the HTML page, see grid.tables_page.
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

from datasets.mvtec import CATEGORIES
from evaluation.metrics import METRIC_NAMES
from evaluation.statistics import summary
from models.stn import RELEASE_BACKBONE
from scorers.registry import RELEASE_SCORER, SCORERS
from utils.errors import UserError

WEIGHTS = {  # the weights of a record, in the order of the columns: how they were selected
    "untrained": "before registration training",
    "last": "the last epoch, without selection",
    "source": "selected on held-out source categories; no image of the target category is read",
    "best": "selected by image + pixel AUROC on the target's own test labels, as in the published protocol. Test "
    "labels are not available in use, so these numbers are optimistic; they are comparable with the published ones",
}
HEADER_ARGUMENTS = {"data_type": "data type", "stn_mode": "STN mode", "img_size": "image size", "seed": "seed"}
PUBLISHED_FILE = Path(__file__).with_name("published_mvtec.csv")
PUBLISHED = ("paper", "release")
PRINTED_DIGITS = 0.05  # published averages are rounded to one decimal
TABLE_METRICS = ("image_auroc", "pixel_auroc")
OTHER_METRICS = tuple(name for name in METRIC_NAMES if name not in TABLE_METRICS)
GRID_FILE = "grid.json"  # the requested categories and shots, so that missing records can be shown
DIGEST_LETTERS = 8  # of a support set's SHA-256, enough to distinguish support sets
MISSING, NOT_PUBLISHED = "missing", ""
DIFFERENCE = " - "  # in the names of columns of differences
PERCENT = (0.0, 100.0)  # the range of a metric


class Entry(NamedTuple):
    """One table cell, in percent.

    sd: sample standard deviation over `rounds`, None for a single round. rounds: empty for a published number. of:
    "3 of 15" where a mean covers only some of the categories.
    """

    mean: float
    sd: float | None = None
    rounds: tuple[float, ...] = ()
    of: str = ""


NO_TRUTH = Entry(math.nan)  # scored, but the metric is undefined: images without ground truth


class Table(NamedTuple):
    """One metric at one shot, or the metrics "other" of one kind of weights.

    rows: the categories, then "mean", each with one entry per column; None where nothing was scored.
    """

    title: str
    metric: str
    shot: int
    columns: list[str]
    rows: dict[str, list[Entry | None]]
    notes: list[str]


class Results(NamedTuple):
    """The records of a folder by (category, shot, kind), with the categories, shots and scorers of its tables.

    A kind is a key of WEIGHTS, followed by the scorer where it is not the release's, see `kind_name`.
    """

    records: dict[tuple[str, int, str], dict]
    categories: list[str]
    shots: list[int]
    data_type: str
    scorers: list[str]


def kind_name(weights: str, scorer: str) -> str:
    """The column of a kind of weights scored by one scorer: `last`, or `last, neighbours`."""
    return weights if scorer == RELEASE_SCORER else f"{weights}, {scorer}"


def read_results(folder: Path) -> Results:
    """Reads all records of test.py in `folder`. Its sub-folders are not searched.

    Raises:
        UserError: no folder, no record, a damaged record, or records of several data types, STN modes or image sizes.
    """
    if not folder.is_dir():
        raise UserError(f"no results folder {folder}; create it with python reproduce.py --output {folder}")
    contents = [(path, _read_json(path)) for path in sorted(folder.glob("*.json")) if path.name != GRID_FILE]
    records = {}
    for path, content in contents:
        arguments = content.get("arguments", {})
        if not {"rounds", "weights"} <= set(content) or not {"obj", "shot", "data_type"} <= set(arguments):
            raise UserError(f"{path} is not a record of test.py; remove it from {folder}")
        kind = kind_name(content["weights"], content.get("scorer", RELEASE_SCORER))
        records[arguments["obj"], arguments["shot"], kind] = content
    if not records:
        raise UserError(f"no records of test.py in {folder}")
    for name in ("data_type", "stn_mode", "img_size", "backbone"):
        own = [content["arguments"] for content in records.values() if content.get("scorer", RELEASE_SCORER) in SCORERS]
        found = {arguments.get(name, RELEASE_BACKBONE) for arguments in own}
        if len(found) > 1:
            raise UserError(f"{folder} mixes records of --{name} {' and '.join(map(str, sorted(found)))}")
    asked = _read_json(folder / GRID_FILE) if (folder / GRID_FILE).is_file() else {"objs": [], "shots": []}
    data_type = next(iter(records.values()))["arguments"]["data_type"]
    found = {category for category, _, _ in records} | set(asked["objs"])
    order = CATEGORIES[data_type] if data_type == "mvtec" else ()
    categories = [*order, *sorted(found - set(order))]
    shots = sorted({shot for _, shot, _ in records} | set(asked["shots"]))
    others = {content.get("scorer", RELEASE_SCORER) for content in records.values()} - {RELEASE_SCORER}
    return Results(records, categories, shots, data_type, [RELEASE_SCORER, *sorted(others)])


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the record {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a record of test.py")
    return content


def read_published() -> dict[tuple[str, str, int], dict[str, float]]:
    """The published numbers in percent: (source, metric, shot) -> category -> value, with the printed "average"."""
    lines = [line for line in PUBLISHED_FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    rows = {}
    for row in csv.DictReader(lines):
        key = row.pop("source"), row.pop("metric"), int(row.pop("shot"))
        rows[key] = {category: float(value) for category, value in row.items()}
    return rows


def make_tables(results: Results) -> list[Table]:
    """Tables of image AUROC and of pixel AUROC for each shot, then of the other metrics for each shot.

    Where there are several scorers, each AUROC has tables of paired differences: of scorers, and of training.

    The AUROC tables have one column per kind of weights. For MVTec AD, they also have the published numbers and the
    differences from them.
    """
    tables = []
    for metric in TABLE_METRICS:
        tables += [_compared_table(results, metric, shot) for shot in results.shots]
        tables += [table for shot in results.shots for table in _paired_tables(results, metric, shot)]
    for shot in results.shots:
        tables += _other_table(results, shot)
    return tables


def _compared_table(results: Results, metric: str, shot: int) -> Table:
    columns = {name: _column(results, metric, shot, name) for name in _kinds(results)}
    notes = []
    if results.data_type == "mvtec":
        for source in PUBLISHED:
            cells = dict(read_published().get((source, metric, shot), {}))
            printed = cells.pop("average", None)
            columns[source] = {category: Entry(value) for category, value in cells.items()}
            notes += _average_note(source, metric, shot, printed, list(cells.values()))
        for source in PUBLISHED if "best" in columns else ():
            columns[f"best - {source}"] = _difference(columns["best"], columns[source])
    title = f"{METRIC_NAMES[metric]}, K = {shot}"
    return Table(title, metric, shot, list(columns), _rows(results.categories, columns), notes)


def _kinds(results: Results) -> list[str]:
    """The columns: the release's scorer with all kinds of weights, and every other combination that has records."""
    found = {key[2] for key in results.records}
    always = {kind_name(weights, RELEASE_SCORER) for weights in WEIGHTS if weights != "source"}
    if not any(kind in found for kind in WEIGHTS):  # only other scorers were run
        always = set()
    kinds = [kind_name(weights, scorer) for scorer in results.scorers for weights in WEIGHTS]
    return [kind for kind in kinds if kind in found | always]


def _paired_tables(results: Results, metric: str, shot: int) -> list[Table]:
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
            tables.append(Table(title, f"{metric}_paired", shot, list(columns), rows, []))
    return tables


def _paired(results: Results, metric: str, shot: int, kinds: tuple[str, str]) -> dict[str, Entry]:
    """Category -> the second kind minus the first, where both were scored on the same support sets."""
    first, second = (_known(_column(results, metric, shot, kind)) for kind in kinds)
    pairs = {}
    for category in first:
        records = [results.records.get((category, shot, kind)) for kind in kinds]
        if category in second and support_name(records[0]) == support_name(records[1]) and _same_weights(*records):
            pairs[category] = _entry(np.subtract(second[category].rounds, first[category].rounds).tolist())
    return pairs


def _same_weights(one: dict, other: dict) -> bool:
    """Whether two records of one kind of weights are of the same file; records of different kinds are compared too."""
    files = [(record.get("checkpoint") or {}).get("sha256") for record in (one, other)]
    return one["weights"] != other["weights"] or files[0] == files[1]


def _other_table(results: Results, shot: int) -> list[Table]:
    """AP, F1-max and PRO of one kind of weights, the first of last, source, best and untrained that has them."""
    order = ("last", "source", "best", "untrained")
    for weights in [kind_name(weights, scorer) for weights in order for scorer in results.scorers]:
        columns = {METRIC_NAMES[metric]: _column(results, metric, shot, weights) for metric in OTHER_METRICS}
        if any(_known(column) for column in columns.values()):
            title = f"Other metrics, {weights} weights, K = {shot}"
            return [Table(title, "other", shot, list(columns), _rows(results.categories, columns), [])]
    return []


def _column(results: Results, metric: str, shot: int, weights: str) -> dict[str, Entry]:
    column = {}
    for category in results.categories:
        record = results.records.get((category, shot, weights))
        if record is not None and metric in record["rounds"][0]:
            values = [numbers[metric] for numbers in record["rounds"]]
            column[category] = NO_TRUTH if None in values else _entry([100 * value for value in values])
    return column


def _known(column: dict[str, Entry]) -> dict[str, Entry]:
    return {category: entry for category, entry in column.items() if entry is not NO_TRUTH}


def _entry(rounds: Sequence[float], of: str = "") -> Entry:
    numbers = summary(rounds)
    return Entry(numbers["mean"], numbers["sd"], tuple(rounds), of)


def _difference(ours: dict[str, Entry], published: dict[str, Entry]) -> dict[str, Entry]:
    return {
        category: Entry(ours[category].mean - published[category].mean) for category in ours if category in published
    }


def _rows(categories: Sequence[str], columns: dict[str, dict[str, Entry]]) -> dict[str, list[Entry | None]]:
    rows = {category: [column.get(category) for column in columns.values()] for category in categories}
    return rows | {"mean": [_mean(column, len(categories)) for column in columns.values()]}


def _mean(column: dict[str, Entry], categories: int) -> Entry | None:
    """Mean over categories. Its SD is that of the rounds' means; it is absent if the numbers of rounds differ."""
    entries = list(_known(column).values())
    if not entries:
        return NO_TRUTH if column else None
    of = "" if len(entries) == categories else f"{len(entries)} of {categories}"
    counts = {len(entry.rounds) for entry in entries}
    if len(counts) == 1 and counts != {0}:
        return _entry(np.mean([entry.rounds for entry in entries], axis=0).tolist(), of)
    return Entry(float(np.mean([entry.mean for entry in entries])), of=of)


def _average_note(source: str, metric: str, shot: int, printed: float | None, cells: list[float]) -> list[str]:
    mean = float(np.mean(cells)) if cells else 0.0
    if printed is None or abs(mean - printed) <= PRINTED_DIGITS:
        return []
    where = f"The {source} prints {printed:.1f} as its average of {METRIC_NAMES[metric]} at K = {shot}"
    return [f"{where}. The mean of its cells is {mean:.1f}, as shown here."]


def header(results: Results) -> list[tuple[str, str]]:
    """(name, value) pairs that describe the records: commit, dates, device, arguments, support sets, weights."""
    records = list(results.records.values())
    lines = [("commit", _distinct(record["commit"] for record in records))]
    dates = sorted(record["date"] for record in records)
    lines.append(("date", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"))
    lines.append(("device", _distinct(record["device"] for record in records)))
    for name, label in HEADER_ARGUMENTS.items():
        lines.append((label, _distinct(record["arguments"].get(name, "not given") for record in records)))
    lines.append(("backbone", _distinct(record["arguments"].get("backbone", RELEASE_BACKBONE) for record in records)))
    lines.append(("scorers", _distinct(record.get("scorer", RELEASE_SCORER) for record in records)))
    lines.append(("rounds", _distinct(len(record["rounds"]) for record in records)))
    lines.append(("support sets", _support_sets(results)))
    lines.append(("spread", "mean ± sample standard deviation over rounds (one support set each), in percent"))
    shown = [name for name in WEIGHTS if any(key[2].split(", ")[0] == name for key in results.records)]
    lines += [(name, f"{_epochs(results, name)}{WEIGHTS[name]}.") for name in shown]
    return lines


def support_name(record: dict) -> str:
    """Identifies the support sets of a record: the file name, or "drawn", and the first digits of a SHA-256."""
    support = record["support_set"]
    names, file = support["names"], support.get("path")
    digest = support["sha256"] if names is None else hashlib.sha256(json.dumps(names).encode()).hexdigest()
    return f"{Path(file).name if file else 'drawn'} {digest[:DIGEST_LETTERS]}"


def _support_sets(results: Results) -> str:
    """The number of support sets, their origin, and one SHA-256 over all of them."""
    names = {key[:2]: support_name(record) for key, record in sorted(results.records.items())}
    digest = hashlib.sha256(json.dumps(list(names.values())).encode()).hexdigest()[:DIGEST_LETTERS]
    kinds = _distinct(name.split()[0] for name in names.values())
    return f"{len(names)} ({kinds}), SHA-256 {digest}..."


def _epochs(results: Results, weights: str) -> str:
    epochs = {record.get("epoch") for key, record in results.records.items() if key[2].split(", ")[0] == weights}
    epochs -= {None}
    if not epochs or weights == "untrained":
        return ""
    return f"epoch {min(epochs)}: " if len(epochs) == 1 else f"epochs {min(epochs)} to {max(epochs)}: "


def _distinct(values: Iterable[object]) -> str:
    """The distinct values, in order of appearance."""
    return ", ".join(dict.fromkeys(map(str, values)))


def format_row(table: Table, entries: Sequence[Entry | None]) -> list[str]:
    """The texts of one row of `table`, see format_entry."""
    return [format_entry(entry, name) for entry, name in zip(entries, table.columns, strict=True)]


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
    text += "" if entry.sd is None else f" ± {entry.sd:.1f}"
    return text + (f" ({entry.of})" if entry.of else "")


def to_markdown(results: Results, tables: Sequence[Table]) -> str:
    """Header and tables as Markdown."""
    lines = [f"- {name}: {value}" for name, value in header(results)]
    for table in tables:
        lines += ["", f"### {table.title}", "", f"| category | {' | '.join(table.columns)} |"]
        lines.append("|---" + "|---:" * len(table.columns) + "|")
        lines += [f"| {name} | {' | '.join(format_row(table, entries))} |" for name, entries in table.rows.items()]
        lines += ["", *table.notes] if table.notes else []
    return "\n".join(lines) + "\n"


def write_csv(path: Path, tables: Sequence[Table]) -> None:
    """Writes one line per table cell: mean, SD, Student's 95 % interval and every round, unrounded, in percent."""
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["shot", "metric", "category", "column", "percent", "sd", "low95", "high95", "rounds"])
        for table in tables:
            for category, entries in table.rows.items():
                for column, entry in zip(table.columns, entries, strict=True):
                    writer.writerow([table.shot, table.metric, category, column, *_csv_numbers(entry, column)])


def _csv_numbers(entry: Entry | None, column: str) -> list[object]:
    if entry is None or entry is NO_TRUTH:
        return ["" if entry is None else "n/a", *[""] * 4]
    limits = None if DIFFERENCE in column else PERCENT
    interval = summary(entry.rounds, limits)["interval95"] if entry.rounds else None
    return [entry.mean, entry.sd, *(interval or ("", "")), " ".join(map(str, entry.rounds))]


def to_latex(results: Results, tables: Sequence[Table]) -> str:
    """The tables as LaTeX that needs booktabs, with the header as comments."""
    lines = [f"% {name}: {value}" for name, value in header(results)] + ["% requires \\usepackage{booktabs}"]
    for table in tables:
        lines += ["", "\\begin{table}", "\\centering", f"\\caption{{{_escape_latex(table.title)}, percent.}}"]
        lines += [f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}", "\\toprule"]
        lines.append(_latex_row(["category", *table.columns]) + " \\midrule")
        for name, entries in table.rows.items():
            rule = "\\midrule\n" if name == "mean" else ""
            lines.append(rule + _latex_row([name, *format_row(table, entries)]))
        lines += ["\\bottomrule", "\\end{tabular}", *(f"\\\\ {_escape_latex(note)}" for note in table.notes)]
        lines.append("\\end{table}")
    return "\n".join(lines) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_escape_latex, cells)) + " \\\\"


def _escape_latex(text: str) -> str:
    replaced = {"_": "\\_", "%": "\\%", "&": "\\&", "#": "\\#", "$": "\\$", "±": "$\\pm$", " - ": " $-$ "}
    for letter in ("\\", "{", "}", "~", "^"):
        text = text.replace(letter, " ")
    for old, new in replaced.items():
        text = text.replace(old, new)
    return f"${text[0]}${text[1:]}" if text[:1] in ("+", "-") else text


class Comparison(NamedTuple):
    """Differences B - A between two folders for one metric, shot and kind of weights, in percent.

    categories: how many both folders have. better: in how many of them B is better. difference: summary of the
    differences over categories, see evaluation.statistics.summary. sd_of_rounds: SD over rounds of a category's paired
    differences, averaged over categories; None for single rounds.
    """

    metric: str
    shot: int
    weights: str
    categories: int
    better: int
    difference: dict
    sd_of_rounds: float | None


def compare(a: Results, b: Results) -> list[Comparison]:
    """Compares the records that both folders have, paired by category and support set.

    Raises:
        UserError: no record in common, or different support sets.
    """
    common = [key for key in a.records if key in b.records]
    if not common:
        raise UserError("the two results folders have no category, shot and kind of weights in common")
    for key in common:
        names = [support_name(results.records[key]) for results in (a, b)]
        if names[0] != names[1]:
            raise UserError(f"{key[0]}, K = {key[1]} was scored on different support sets: {names[0]} and {names[1]}")
    comparisons = []
    for metric in METRIC_NAMES:
        for shot, weights in sorted({key[1:] for key in common}):
            columns = [_known(_column(results, metric, shot, weights)) for results in (a, b)]
            pairs = [(columns[0][name], columns[1][name]) for name in columns[0] if name in columns[1]]
            if pairs:
                comparisons.append(_compare(metric, shot, weights, pairs))
    return comparisons


def _compare(metric: str, shot: int, weights: str, pairs: list[tuple[Entry, Entry]]) -> Comparison:
    differences = [b.mean - a.mean for a, b in pairs]
    over_rounds = [np.subtract(b.rounds, a.rounds).std(ddof=1) for a, b in pairs if len(a.rounds) > 1]
    better = sum(difference > 0 for difference in differences)
    of_rounds = float(np.mean(over_rounds)) if over_rounds else None
    return Comparison(metric, shot, weights, len(pairs), better, summary(differences), of_rounds)


def format_comparison(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as a Markdown table."""
    lines = ["| metric | K | weights | mean difference B - A | SD over categories | 95 % interval (Student t) | "]
    lines[0] += "SD over rounds | B better |"
    lines.append("|---|---:|---|---:|---:|---|---:|---|")
    for one in comparisons:
        sd, interval = one.difference["sd"], one.difference["interval95"]
        spread = ("", "") if sd is None else (f"{sd:.2f}", f"{interval[0]:+.2f} to {interval[1]:+.2f}")
        rounds = "" if one.sd_of_rounds is None else f"{one.sd_of_rounds:.2f}"
        cells = (METRIC_NAMES[one.metric], one.shot, one.weights, f"{one.difference['mean']:+.2f}", *spread, rounds)
        lines.append(f"| {' | '.join(map(str, cells))} | {one.better} of {one.categories} |")
    return "\n".join(lines)
