"""Reproduces the tables of the paper: trains and scores every category and K, resumes interrupted runs.

python reproduce.py --objs all --shots 2 4 8 --data_path ./MVTec/ --output results/mvtec      the full table
python reproduce.py ... --dry_run                       show finished cells, pending cells and estimated time
python reproduce.py ... --eval_only ./save_checkpoints  score existing checkpoints without training
python reproduce.py --report results/mvtec              print the tables of a results folder
python reproduce.py --compare results/a results/b       paired comparison of two folders
python reproduce.py --import scores.csv --name mymethod --obj bottle --shot 2    a record of another method's scores
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from datasets.cache import default_cache_dir
from datasets.mvtec import CATEGORIES
from experiments.comparison import FORMATS, compare
from experiments.engines import Cluster, run_local, run_on_cluster, visible_gpus
from experiments.estimate import format_duration
from experiments.external_results import import_record
from experiments.plan import RECIPE, Plan, count_jobs, take_shard
from experiments.results import GRID_FILE, WEIGHTS, read_results
from experiments.runs import Cell, require_locks
from experiments.tables_page import write_tables
from models.networks import resolve_img_size
from models.stn import BACKBONES, STN_MODES
from models.timm_features import PREFIX
from scorers.registry import add_scorer_flag
from utils import flags
from utils.errors import UserError, require_positive, run_command
from utils.files import require_writable, write_json

SLURM_CLUSTER = "slurm"  # name of the submitit executor; tests use "local"


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of reproduce.py."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit code: 0 all cells finished, 1 some cells failed, 2 invalid arguments or data.",
    )
    grid = parser.add_argument_group("grid")
    grid.add_argument(
        "--objs", type=flags.category_name, nargs="+", default=["all"], metavar="CATEGORY", help="all, or categories"
    )
    grid.add_argument("--shots", nargs="+", type=int, default=[2, 4, 8], metavar="K")
    flags.add_network_flags(grid, STN_MODES, list(BACKBONES))
    flags.add_data_flags(grid, CATEGORIES)
    flags.add_bits_flag(grid, "the training images")
    flags.add_support_flags(grid)
    add_scorer_flag(grid, several=True)
    grid.add_argument(
        "--eval_only",
        nargs="?",
        type=Path,
        const=flags.DEFAULT_SAVE_DIR,
        metavar="DIR",
        help="score the checkpoints in DIR without training (default ./save_checkpoints)",
    )
    training = parser.add_argument_group("training, see train.py")
    flags.add_weights_flag(training, "initial backbone weights")
    flags.add_source_flags(training)
    training.add_argument("--epochs", type=int, default=50)
    training.add_argument("--batch_size", type=int, default=32)
    training.add_argument("--lr", type=float, default=RECIPE["lr"], help="learning rate")
    training.add_argument("--momentum", type=float, default=RECIPE["momentum"])
    training.add_argument("--amp", choices=("off", "bf16"), default=RECIPE["amp"])
    flags.add_seed_flag(training)
    training.add_argument(
        "--select",
        nargs="+",
        choices=("best", "source"),
        default=["best"],
        help="source: a second training per cell, whose epoch is selected without the target",
    )
    training.add_argument("--eval_every", type=int, default=1, metavar="EPOCHS", help="epochs between scorings")
    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, default=Path("./results/grid"), help="records, tables, weights, logs")
    run.add_argument("--jobs", type=int, help="parallel cells; default: the number of GPUs, or 1; slurm: all")
    run.add_argument("--engine", choices=("local", "slurm"), default="local")
    run.add_argument("--shard", metavar="I/N", help="only every N-th cell, starting at the I-th (0 to N-1)")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    run.add_argument("--num_workers", type=int, default=2, help="processes per cell that decode images")
    run.add_argument("--cache_dir", default=str(default_cache_dir()), help="image cache, shared by all cells")
    run.add_argument("--dry_run", action="store_true", help="print the plan and an estimate without running it")
    slurm = parser.add_argument_group("slurm (needs requirements-cluster.txt)")
    for name in ("partition", "account", "qos"):
        slurm.add_argument(f"--slurm_{name}", type=_one_line, metavar="NAME")
    slurm.add_argument("--slurm_constraint", type=_one_line, metavar="FEATURES", help="of the nodes, such as a100|h100")
    slurm.add_argument("--slurm_mem", type=_one_line, metavar="SIZE", help="memory per cell, such as 32G")
    slurm.add_argument(
        "--slurm_setup",
        nargs="+",
        type=_one_line,
        metavar="LINE",
        help="shell lines that a job runs first, as they are",
    )
    slurm.add_argument("--slurm_minutes", type=int, default=1440, help="time limit of a cell")
    slurm.add_argument("--slurm_gpus", type=int, default=1, help="GPUs per cell, 0 or 1")
    slurm.add_argument("--slurm_cpus", type=int, default=4, help="cores per cell")
    slurm.add_argument("--slurm_requeue", type=int, default=3, help="how often a cell is requeued after its time limit")
    results = parser.add_argument_group("results of earlier runs")
    results.add_argument("--report", type=Path, metavar="DIR", help="print the tables of DIR and rewrite their files")
    results.add_argument("--readme", type=Path, metavar="FILE", help="with --report: also insert them in FILE")
    results.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="paired differences B - A")
    method = parser.add_argument_group("another method's scores in the tables, see docs/extend.md")
    method.add_argument(
        "--import", dest="import_scores", type=Path, metavar="CSV", help="make a record of these image scores"
    )
    method.add_argument("--name", help="the method's name")
    method.add_argument("--obj", type=flags.category_name, metavar="CATEGORY", help="the category that was scored")
    method.add_argument("--shot", type=int, metavar="K", help="support images per round")
    method.add_argument("--maps", type=Path, metavar="DIR", help="round_0.npz, ... for the pixel metrics")
    method.add_argument("--overwrite", action="store_true", help="replace a record that was made of other scores")
    method.add_argument("--kind", choices=list(WEIGHTS), default="last", help="how its weights were chosen")
    results.add_argument("--format", choices=list(FORMATS), default="md", help="of --compare: Markdown, LaTeX or CSV")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Plans the cells, runs those that are not finished, and prints the tables."""
    args = get_args_parser().parse_args(argv)
    if args.compare:
        print(FORMATS[args.format](compare(*map(read_results, args.compare))))
        return
    if args.report:
        require_writable(args.report, "--report", folder=True)
        if args.readme:
            require_writable(args.readme, "--readme")
        write_tables(args.report, args.readme)
        return
    if args.import_scores:
        require_writable(args.output, "--output", folder=True)
        require_positive(args, "shot", "inferences", "img_size")
        args.img_size = resolve_img_size(args.backbone, args.img_size)
        import_record(args)
        return
    _check(args)
    plan = Plan(args)
    planned = plan.cells()
    cells = take_shard(planned, args.shard)
    to_run = plan.print_plan(cells)
    if args.dry_run:
        return
    write_json(args.output / GRID_FILE, plan.asked(planned))
    failed = _run(args, to_run)
    if any(args.output.glob("*_*.json")):
        write_tables(args.output)
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(cells)} cells failed; run the same command to retry them", file=sys.stderr)
        sys.exit(1)


def _check(args: argparse.Namespace) -> None:
    counts = ("shots", "inferences", "epochs", "batch_size", "img_size", "eval_every", "slurm_minutes", "slurm_cpus")
    require_positive(args, *counts, *(["jobs"] if args.jobs is not None else []))
    require_writable(args.output, "--output", folder=True)
    if args.cache_dir != "none" and not args.eval_only:
        require_writable(Path(args.cache_dir), "--cache_dir", folder=True)
    args.img_size = resolve_img_size(args.backbone, args.img_size)
    for name in ("lr", "momentum"):
        if not 0 <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} must not be negative or infinite, got {getattr(args, name)}")
    if args.eval_only and args.backbone.startswith(PREFIX):
        raise UserError(f"{args.backbone} is not trained here, so there is nothing for --eval_only to score")
    if args.readme:
        raise UserError("--readme goes with --report DIR")
    for name in ("name", "obj", "shot", "maps", "overwrite"):
        if getattr(args, name):
            more = f"; a grid takes --{name}s" if name in ("obj", "shot") else ""
            raise UserError(f"--{name} goes with --import CSV{more}")
    if len(set(args.shots)) < len(args.shots) or len(set(args.objs)) < len(args.objs):
        raise UserError("--shots and --objs must not contain duplicates")


def _run(args: argparse.Namespace, cells: list[Cell]) -> dict[str, str]:
    """Runs the cells. Returns the names of failed cells with the reasons."""
    failed: dict[str, str] = {}
    begin, done = time.monotonic(), 0

    def report(cell: Cell, reason: str | None) -> None:
        """Counts and prints a completed cell, with the elapsed time and the reason if it failed."""
        nonlocal done
        done += 1
        if reason:
            failed[cell.name] = reason
        took = format_duration(time.monotonic() - begin)
        print(f"[{done}/{len(cells)}, {took}] {cell.name}: {reason or 'finished'}", flush=True)

    if not cells:
        return failed
    alone = args.shard is not None  # no other command has these cells
    if not alone:
        require_locks(args.output)
    if args.engine == "local":
        run_local(args.output, cells, count_jobs(args), visible_gpus(args.device), report, alone)
    else:
        run_on_cluster(args.output, cells, args.jobs or len(cells), _cluster(args), report, alone)
    return failed


def _cluster(args: argparse.Namespace) -> Cluster:
    options = {"partition": args.slurm_partition, "account": args.slurm_account, "qos": args.slurm_qos}
    options |= {"constraint": args.slurm_constraint, "mem": args.slurm_mem, "setup": args.slurm_setup}
    return Cluster(SLURM_CLUSTER, args.slurm_minutes, args.slurm_gpus, args.slurm_cpus, args.slurm_requeue, options)


def _one_line(text: str) -> str:
    """A value for the script of a cluster's job, in which a second line would be a command of its own."""
    if not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} holds a line break or another control character")
    return text


if __name__ == "__main__":
    run_command(main)
