"""Tables as Markdown, CSV, LaTeX and HTML, with a header on the records that they were made of."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence

from evaluation.resampling import DRAWS
from experiments.figures import table_figure
from experiments.results import DIGEST_LETTERS, Results, support_name, weights_of
from experiments.tables import (
    DIFFERENCE,
    NO_TRUTH,
    OVER_IMAGES,
    PAIRED,
    PUBLISHED,
    SECONDS,
    TABLE_METRICS,
    Entry,
    ResultsTable,
)
from reports.figures import as_svg
from reports.page import get_template
from utils.choices import RELEASE_BACKBONE, RELEASE_SCORER, WEIGHTS

HEADER_SETTINGS = (("data type", "data_type"), ("STN mode", "stn_mode"), ("image size", "img_size"), ("seed", "seed"))
MISSING, NO_CELL = "missing", "--"  # NO_CELL: in LaTeX
EXPLAINED = {
    PAIRED: (
        "paired differences",
        "with Student's 95 % interval over support sets and the p-value of the paired t-test, corrected by Holm's "
        "method for all differences of the table; those of means for their row. The row 'over categories' has the "
        "interval and the test over categories instead: what to expect of other categories",
    ),
    OVER_IMAGES: (
        "over test images",
        f"95 % intervals for the support sets that were used: bootstrap with {DRAWS} test sets, drawn from the normal "
        "and from the defective images",
    ),
}
CAPTIONS = {
    PAIRED: "In percent, with the 95 % interval over support sets and the p-value of the paired t-test, corrected by "
    "Holm's method",
    OVER_IMAGES: "In percent, with the 95 % interval over test images (bootstrap)",
}
SMALLEST_P = 0.001  # smaller p-values are printed as below it
CSV_COLUMNS = ("shot", "metric", "category", "column", "percent", "sd", "low95", "high95", "rounds", SECONDS)
CSV_COLUMNS += ("sd_trainings", "p", "p_holm")


def header(results: Results) -> list[tuple[str, str]]:
    """(name, value) pairs that describe the records: commit, dates, device, arguments, support sets, weights."""
    records = [first for first, *_ in results.records.values()]
    configs = [record["config"] for record in records]
    dates = sorted(record["date"] for record in records)
    spread = "mean ± sample standard deviation over rounds (one support set each), in percent"
    if (trainings := max(map(len, results.records.values()))) > 1:
        spread += f"; then ± that over up to {trainings} trainings"
    lines = [
        ("commit", _distinct(record["commit"] or "not given" for record in records)),
        ("date", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"),
        ("device", _distinct(record["device"] for record in records)),
        *((label, _distinct(config.get(name, "not given") for config in configs)) for label, name in HEADER_SETTINGS),
        ("backbone", _distinct(config.get("backbone", RELEASE_BACKBONE) for config in configs)),
        ("scorers", _distinct(record.get("scorer", RELEASE_SCORER) for record in records)),
        ("rounds", _distinct(len(record["rounds"]) for record in records)),
        ("support sets", _support_sets(results)),
        ("spread", spread),
    ]
    for weights, explanation in WEIGHTS.items():
        of_weights = [record for key, (record, *_) in results.records.items() if weights_of(key.kind) == weights]
        if of_weights:
            lines.append((weights, f"{_epochs(of_weights) if weights != 'untrained' else ''}{explanation}."))
    return lines


def _support_sets(results: Results) -> str:
    """The number of support sets, their origin, and one SHA-256 over all of them."""
    names = {key[:2]: support_name(results.records[key][0]) for key in sorted(results.records)}
    digest = hashlib.sha256(json.dumps(list(names.values())).encode()).hexdigest()[:DIGEST_LETTERS]
    origins = _distinct(name.split()[0] for name in names.values())
    return f"{len(names)} ({origins}), SHA-256 {digest}..."


def _epochs(records: Sequence[dict]) -> str:
    epochs = {record.get("epoch") for record in records} - {None}
    if not epochs:
        return ""
    return f"epoch {min(epochs)}: " if len(epochs) == 1 else f"epochs {min(epochs)} to {max(epochs)}: "


def _distinct(values: Iterable[object]) -> str:
    """The distinct values, in order of appearance."""
    return ", ".join(dict.fromkeys(map(str, values)))


def format_row(table: ResultsTable, entries: Sequence[Entry | None]) -> list[str]:
    """The texts of one row of `table`, see format_entry. The cells of means that no column has are empty."""
    texts = [format_entry(entry, name, table.intervals) for entry, name in zip(entries, table.columns, strict=True)]
    is_mean = any(entries is mean for mean in table.means.values())
    return ["" if (table.metric == SECONDS or is_mean) and text == MISSING else text for text in texts]


def format_entry(entry: Entry | None, column: str, interval: bool = False) -> str:
    """The text of a cell.

    `93.9 ± 0.4`; `+0.3` for a difference; `missing` if it was not run; `n/a` without ground truth; empty if it was not
    published. interval: `93.9 (93.1 to 94.7)` instead, and for a difference `+0.3 (-0.1 to +0.7), p 0.084`.
    """
    if entry is None:
        return "" if column in PUBLISHED or DIFFERENCE in column else MISSING
    if entry is NO_TRUTH:
        return "n/a"
    sign = "+" if DIFFERENCE in column else ""
    text = _number(entry.mean, sign)
    if not interval:
        return text + "".join(f" ± {sd:.1f}" for sd in (entry.sd, entry.sd_trainings) if sd is not None)
    if entry.interval:
        text += f" ({_number(entry.interval[0], sign)} to {_number(entry.interval[1], sign)})"
    return text + ("" if entry.p_holm is None else f", {format_p(entry.p_holm)}")


def _number(value: float, sign: str) -> str:
    return f"{round(value, 1) + 0.0:{sign}.1f}"  # + 0.0: no -0.0


def format_p(value: float) -> str:
    """A p-value as text: `p 0.012`, or `p < 0.001`."""
    return f"p < {SMALLEST_P}" if value < SMALLEST_P else f"p {value:.3f}"


def explanations(tables: Sequence[ResultsTable]) -> list[tuple[str, str]]:
    """(name, sentence) pairs on the kinds of tables with intervals."""
    return [kind for ending, kind in EXPLAINED.items() if any(table.metric.endswith(ending) for table in tables)]


def to_markdown(tables: Sequence[ResultsTable], results: Results | None = None) -> str:
    """Tables as Markdown. results: the records they are of, for a header."""
    facts = [*(header(results) if results else ()), *explanations(tables)]
    lines = [f"- {name}: {value}" for name, value in facts]
    for table in tables:
        lines += ["", f"### {table.title}", "", f"| category | {' | '.join(table.columns)} |"]
        lines.append("|---" + "|---:" * len(table.columns) + "|")
        rows = [*table.rows.items(), *table.means.items()]
        lines += [f"| {name} | {' | '.join(format_row(table, entries))} |" for name, entries in rows]
        lines += ["", *table.notes] if table.notes else []
    return "\n".join(lines).lstrip("\n") + "\n"


def to_csv(tables: Sequence[ResultsTable]) -> str:
    """One line per table cell: mean, SD, 95 % interval, every round and p-values, unrounded, in percent.

    The lines of SECONDS have their number in the last column instead.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for table in tables:
        for category, entries in (table.rows | table.means).items():
            for column, entry in zip(table.columns, entries, strict=True):
                writer.writerow([table.shot, table.metric, category, column, *_csv_numbers(entry, table.metric)])
    return stream.getvalue()


def _csv_numbers(entry: Entry | None, metric: str) -> list[object]:
    """The columns of CSV_COLUMNS from the fifth on."""
    if metric == SECONDS:
        return [*[""] * 5, entry and entry.mean, *[""] * 3]
    if entry is None or entry is NO_TRUTH:
        return ["" if entry is None else "n/a", *[""] * 8]
    rounds = " ".join(map(str, entry.rounds))
    of_trainings = "" if entry.sd_trainings is None else entry.sd_trainings
    return [entry.mean, entry.sd, *(entry.interval or ("", "")), rounds, "", of_trainings, entry.p, entry.p_holm]


def to_latex(tables: Sequence[ResultsTable], results: Results | None = None) -> str:
    """The tables as LaTeX that needs booktabs, with the header as comments; without those of seconds.

    Rows and columns without any number of the records are left out; the best number of a row is bold.
    """
    facts = [*(header(results) if results else ()), *explanations(tables)]
    lines = [f"% {name}: {value}" for name, value in facts]
    lines.append("% requires \\usepackage{booktabs}")
    for table in (table for table in tables if table.metric != SECONDS):
        lines += ["", *_latex_table(table)]
    return "\n".join(lines) + "\n"


def _latex_table(table: ResultsTable) -> list[str]:
    rows = [*table.rows.values(), *table.means.values()]
    shown = [place for place, _ in enumerate(table.columns) if any(row[place] for row in rows)]
    caption = "In percent, mean ± standard deviation over support sets"
    caption += "; the best of each row in bold" if table.metric in TABLE_METRICS else ""
    if table.intervals:
        caption = next(text for ending, text in CAPTIONS.items() if table.metric.endswith(ending))
    title = f"{table.title[0].upper()}{table.title[1:]}. {caption}."
    label = re.sub(r"[^a-z0-9]+", "-", table.title.lower()).strip("-")
    lines = ["\\begin{table}", "\\centering", f"\\caption{{{escape_latex(title)}}}", f"\\label{{tab:{label}}}"]
    differences = [place for place in shown if table.intervals and DIFFERENCE in table.columns[place]]
    for places in ([place for place in shown if place not in differences], differences):  # side by side, too wide
        lines += _latex_columns(table, shown, places) if places else []
    if table.notes:
        lines.append(f"\\par\\footnotesize {' '.join(map(escape_latex, table.notes))}")
    return [*lines, "\\end{table}"]


def _latex_columns(table: ResultsTable, shown: Sequence[int], places: Sequence[int]) -> list[str]:
    """Some columns of a table, with the rows that have a number in one of the columns `shown`, published ones aside."""
    names = ["category", *(escape_latex(table.columns[place]) for place in places)]
    lines = ["\\par\\smallskip", f"\\begin{{tabular}}{{l{'r' * len(places)}}}", "\\toprule"]
    lines += [" & ".join(names) + " \\\\", "\\midrule"]
    own = [place for place in shown if table.columns[place] not in PUBLISHED]
    lines += [_latex_row(table, name, row, places) for name, row in table.rows.items() if any(row[at] for at in own)]
    means = [_latex_row(table, name, row, places) for name, row in table.means.items() if any(row)]
    return [*lines, *(["\\midrule", *means] if means else []), "\\bottomrule", "\\end{tabular}"]


def _latex_row(table: ResultsTable, name: str, entries: Sequence[Entry | None], places: Sequence[int]) -> str:
    """A row. The highest printed number is bold where columns are methods; differences do not count."""
    numbers = {}
    if table.metric in TABLE_METRICS and not table.intervals:
        numbers = {
            place: round(entry.mean, 1)
            for place, entry in enumerate(entries)
            if entry and entry is not NO_TRUTH and DIFFERENCE not in table.columns[place]
        }
    texts, cells = format_row(table, entries), [escape_latex(name)]
    for place in places:
        text = escape_latex(NO_CELL if texts[place] == MISSING else texts[place])
        if len(numbers) > 1 and numbers.get(place) == max(numbers.values()):
            number, space, rest = text.partition(" ")
            text = f"\\textbf{{{number}}}{space}{rest}"
        cells.append(text)
    return " & ".join(cells) + " \\\\"


def escape_latex(text: str) -> str:
    """Plain text as LaTeX, with signs of numbers in mathematics."""
    replaced = {"_": "\\_", "%": "\\%", "&": "\\&", "#": "\\#", "$": "\\$", "±": "$\\pm$", " - ": " $-$ ", "<": "$<$"}
    for letter in ("\\", "{", "}", "~", "^"):
        text = text.replace(letter, " ")
    for old, new in replaced.items():
        text = text.replace(old, new)
    return re.sub(r"(?<![\w$-])([+-])(?=\d)", r"$\1$", text)


def to_html(tables: Sequence[ResultsTable], results: Results) -> str:
    """A self-contained HTML page of the tables, with a figure for each table of a metric in all columns."""
    figures = [table_figure([table]) if table.metric in TABLE_METRICS else None for table in tables]
    return get_template("tables.html").render(
        facts=[*header(results), *explanations(tables)],
        tables=[(table, figure and as_svg(figure)) for table, figure in zip(tables, figures, strict=True)],
        format_row=format_row,
        missing=MISSING,
    )


FORMATS = {"md": to_markdown, "tex": to_latex, "csv": to_csv}
