"""Runs reproduce.py: executes the runs of a table, makes tables and figures of records, imports other scores."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.comparison import DEFAULT_BASELINES, Pair, paired_tables, pairs_between, pairs_of
from experiments.config import ExperimentConfig
from experiments.engines import run_local, run_on_cluster, visible_gpus
from experiments.external_results import import_record
from experiments.figures import table_figure
from experiments.formats import FORMATS, to_csv, to_html, to_latex, to_markdown
from experiments.plan import Plan
from experiments.results import GRID_FILE, Results, read_results
from experiments.runs import Run, require_locks
from experiments.saved_scores import over_images
from experiments.tables import OVER_IMAGES, TABLE_METRICS, ResultsTable, other_tables, seconds_table, value_table
from reports.figures import save_as
from utils.errors import UserError, format_elapsed
from utils.files import require_writable, whole_file, write_json
from utils.text import read_text

README_MARKS = ("<!-- results: begin -->", "<!-- results: end -->")


def run(config: ExperimentConfig) -> None:
    """Does what the configuration asks for: compares, reports, imports, or executes the runs of a table.

    Raises:
        UserError: data, results or settings cannot be used.
    """
    data_path = config.data_path if "data_path" in config.given else None
    if config.compare:
        a, b = (_read_selected(folder, config) for folder in config.compare)
        print(FORMATS[config.format](compare(a, b, config.baseline, data_path)))
    elif config.report:
        _report(config, data_path)
    elif config.import_scores:
        require_writable(config.output, "--output", folder=True)
        import_record(config)
    else:
        _execute_table(config)


def _read_selected(folder: Path, config: ExperimentConfig) -> Results:
    """The records of a folder that --objs, --shots and --columns choose."""
    objs = None if config.objs == ("all",) else config.objs
    shots = config.shots if "shots" in config.given else None
    return read_results(folder).part(objs, shots, config.columns, config.only_scored)


def _report(config: ExperimentConfig, data_path: Path | None) -> None:
    """Prints the tables of a folder and writes them, and draws the figures that were asked for."""
    require_writable(config.report, "--report", folder=True)
    for name in ("readme", "figure", "examples"):
        if file := getattr(config, name):
            require_writable(file, f"--{name}")
    results = _read_selected(config.report, config)
    tables = write_tables(results, config.readme, config.baseline, data_path)
    if config.figure:
        shown = [table for table in tables if table.metric in TABLE_METRICS]
        figure = table_figure(shown, [table for table in tables if table.metric.endswith(OVER_IMAGES)])
        if figure is None:
            raise UserError(f"{config.report} has no number to draw")
        save_as(config.figure, figure)
        print(f"figure: {config.figure}")
    if config.examples:
        from experiments.examples import examples_figure, read_examples  # slow: imports scikit-image

        examples = read_examples(results, config.images_round, config.images, data_path)
        save_as(config.examples, examples_figure(examples))
        print(f"figure: {config.examples}")


def _execute_table(config: ExperimentConfig) -> None:
    """Plans the runs, executes those that are not finished, and prints the tables. Exits with 1 if some failed."""
    require_writable(config.output, "--output", folder=True)
    if config.cache_dir != "none" and not config.eval_only:
        require_writable(Path(config.cache_dir), "--cache_dir", folder=True)
    plan = Plan(config)
    runs = plan.runs()
    to_do = plan.print_plan(runs)
    if config.dry_run:
        return
    write_json(config.output / GRID_FILE, plan.asked(runs))
    failed = _execute(plan, to_do) if to_do else {}
    for name, reason in failed.items():  # before the tables, for which a foreign file in the folder is an error
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    if any(config.output.glob("*_*.json")):
        write_tables(read_results(config.output))
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed; run the same command to retry them", file=sys.stderr)
        sys.exit(1)


def _execute(plan: Plan, runs: Sequence[Run]) -> dict[str, str]:
    """Executes the runs. Returns the names of failed runs with the reasons."""
    config, failed = plan.config, {}
    begin, done = time.monotonic(), 0

    def report(run: Run, reason: str | None) -> None:
        """Counts and prints a completed run, with the elapsed and the expected time and the reason if it failed."""
        nonlocal done
        done += 1
        if reason:
            failed[run.name] = reason
        took = time.monotonic() - begin
        left = f", about {format_elapsed(took / done * (len(runs) - done))} left" if done < len(runs) else ""
        print(f"[{done}/{len(runs)}, {format_elapsed(took)}{left}] {run.name}: {reason or 'finished'}", flush=True)

    require_locks(config.output)
    if config.engine == "local":
        gpus = visible_gpus(config.device)
        run_local(config.output, runs, config.jobs or max(1, len(gpus)), gpus, report)
    else:
        run_on_cluster(config.output, runs, config.jobs or len(runs), config.slurm, report)
    return failed


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
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise UserError(f"{readme} needs a line {begin} and below it a line {end} to put the tables between")
    before, after = text.split(begin)[0], text.split(end)[1]
    with whole_file(readme) as aside:
        aside.write_text(f"{before}{begin}\n{markdown}{end}{after}", encoding="utf-8")
