"""The runs of reproduce.py: a table of experiments, the tables of earlier results, a comparison, external results."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.config import ExperimentConfig
from experiments.engines import run_local, run_on_cluster, visible_gpus
from experiments.external_results import import_record
from experiments.plan import Plan
from experiments.report import print_comparison, print_report, write_tables
from experiments.results import GRID_FILE, read_results
from experiments.runs import Run, require_locks
from utils.errors import format_elapsed
from utils.files import require_writable, write_json


def run(config: ExperimentConfig) -> None:
    """Does what the configuration asks for: compares, reports, imports, or executes the runs of a table.

    Raises:
        UserError: data, results or settings cannot be used.
    """
    if config.compare:
        print_comparison(config)
    elif config.report:
        require_writable(config.report, "--report", folder=True)
        if config.readme:
            require_writable(config.readme, "--readme")
        for name in ("figure", "examples"):
            if file := getattr(config, name):
                require_writable(file, f"--{name}")
        print_report(config)
    elif config.import_scores:
        require_writable(config.output, "--output", folder=True)
        import_record(config)
    else:
        make_table(config)


def make_table(config: ExperimentConfig) -> None:
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
    if any(config.output.glob("*_*.json")):
        write_tables(read_results(config.output))
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
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
