"""What reproduce.py makes of the records of a folder: tables, comparisons, and figures for a paper."""

from __future__ import annotations

from pathlib import Path

from experiments.comparison import DEFAULT_BASELINES, Pair, paired_tables, pairs_between, pairs_of
from experiments.config import ExperimentConfig
from experiments.figures import table_figure
from experiments.formats import FORMATS, to_csv, to_html, to_latex, to_markdown
from experiments.results import Results, read_results
from experiments.saved_scores import over_images
from experiments.tables import OVER_IMAGES, TABLE_METRICS, ResultsTable, other_tables, seconds_table, value_table
from reports.figures import save_as
from utils.errors import UserError
from utils.files import whole_file
from utils.text import read_text

README_MARKS = ("<!-- results: begin -->", "<!-- results: end -->")


def make_tables(results: Results, baseline: str | None = None, data_path: Path | None = None) -> list[ResultsTable]:
    """All tables of a folder.

    Image AUROC, pixel AUROC and PRO with a column per kind of weights and scorer, published numbers and the differences
    from them; the other metrics, and those by defect type; paired differences; intervals over test images where the
    scores lie beside the records; seconds.

    baseline: what paired differences are from: a column, scorer, kind of weights, method, or another results folder;
    they are then of all metrics and defect types. None: of the first three metrics, from DEFAULT_BASELINES.
    data_path: where the data are now, for the intervals of pixel metrics.

    Raises:
        UserError: there is no such baseline.
    """
    groups = _comparisons(results, baseline)
    every_pair = list({pair.name: pair for _, pairs in groups for pair in pairs}.values())
    brief = baseline is None
    return [
        *(table for metric in TABLE_METRICS for shot in results.shots for table in value_table(results, metric, shot)),
        *(table for shot in results.shots for table in other_tables(results, shot)),
        *(table for title, pairs in groups for table in paired_tables(title, pairs, brief)),
        *over_images(results, every_pair, data_path, brief),
        *(table for shot in results.shots for table in seconds_table(results, shot)),
    ]


def _comparisons(results: Results, baseline: str | None) -> list[tuple[str, list[Pair]]]:
    """The pairs of each baseline, with a title."""
    if baseline is None:
        groups = [(f"differences from {name}", pairs_of(results, name)) for name in DEFAULT_BASELINES]
        return [(title, pairs) for title, pairs in groups if pairs]
    if pairs := pairs_of(results, baseline):
        return [(f"differences from {baseline}", pairs)]
    if Path(baseline).is_dir():
        return [(f"differences from {Path(baseline).name}", pairs_between(read_results(Path(baseline)), results))]
    raise UserError(
        f"{baseline} is neither a results folder nor another column, scorer, method or kind of weights in "
        f"{results.folder}, which has {' | '.join(results.kinds)}",
        ("baseline",),
    )


def compare(a: Results, b: Results, baseline: str | None = None, data_path: Path | None = None) -> list[ResultsTable]:
    """Tables of the differences B - A in all metrics, paired by category and support set; see `pairs_between`."""
    pairs = pairs_between(a, b, baseline)
    only_pairs = b._replace(kinds=[])
    return paired_tables(f"{b.folder.name} minus {a.folder.name}", pairs) + over_images(only_pairs, pairs, data_path)


def read_selected(folder: Path, config: ExperimentConfig) -> Results:
    """The records of a folder that --objs, --shots and --columns choose."""
    objs = None if config.objs == ("all",) else config.objs
    shots = config.shots if "shots" in config.given else None
    return read_results(folder).part(objs, shots, config.columns, config.only_scored)


def print_comparison(config: ExperimentConfig) -> None:
    """Prints the differences of two folders."""
    tables = compare(*(read_selected(folder, config) for folder in config.compare), config.baseline, _data_path(config))
    print(FORMATS[config.format](tables))


def print_report(config: ExperimentConfig) -> None:
    """Prints the tables of a folder and writes them, and draws the figures that were asked for."""
    results = read_selected(config.report, config)
    tables = write_tables(results, config.readme, config.baseline, _data_path(config))
    if config.figure:
        shown = [table for table in tables if table.metric in TABLE_METRICS]
        figure = table_figure(shown, [table for table in tables if table.metric.endswith(OVER_IMAGES)])
        if figure is None:
            raise UserError(f"{config.report} has no number to draw")
        save_as(config.figure, figure)
        print(f"figure: {config.figure}")
    if config.examples:
        from experiments.examples import examples_figure, read_examples  # slow: imports scikit-learn

        examples = read_examples(results, config.images_round, config.images, _data_path(config))
        save_as(config.examples, examples_figure(examples))
        print(f"figure: {config.examples}")


def _data_path(config: ExperimentConfig) -> Path | None:
    return config.data_path if "data_path" in config.given else None


def write_tables(
    results: Results, readme: Path | None = None, baseline: str | None = None, data_path: Path | None = None
) -> list[ResultsTable]:
    """Prints the tables of a results folder and writes them into it as Markdown, CSV, LaTeX and HTML. Returns them.

    readme: a file in which the tables replace the text between README_MARKS. baseline, data_path: see `make_tables`.

    Raises:
        UserError: no such baseline, or no marks in `readme`.
    """
    tables = make_tables(results, baseline, data_path)
    markdown = to_markdown(tables, results)
    print(markdown)
    texts = {"md": markdown, "csv": to_csv(tables), "tex": to_latex(tables, results), "html": to_html(tables, results)}
    for ending, text in texts.items():
        with whole_file(results.folder / f"tables.{ending}") as aside:
            aside.write_text(text, encoding="utf-8")
    print(f"written: {results.folder}/tables.md, .csv, .tex, .html")
    if readme:
        _put_into(readme, markdown)
    return tables


def _put_into(readme: Path, markdown: str) -> None:
    """Replaces the text between the two marks."""
    try:
        text = read_text(readme)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {readme} (--readme): {getattr(error, 'strerror', None) or error}") from error
    begin, end = README_MARKS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"{readme} needs a line {begin} and a line {end} to put the tables between")
    before, after = text.split(begin)[0], text.split(end)[1]
    with whole_file(readme) as aside:
        aside.write_text(f"{before}{begin}\n{markdown}{end}{after}", encoding="utf-8")
