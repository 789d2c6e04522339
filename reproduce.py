"""Command: the paper's tables, category by category and shot by shot; plans, runs, goes on after a kill, prints.

python reproduce.py --objs all --shots 2 4 8 --data_path ./MVTec/ --output results/mvtec      the whole table
python reproduce.py ... --dry_run                       what exists, what will run, how long it will take
python reproduce.py ... --eval_only ./save_checkpoints  score the weights there, train nothing
python reproduce.py --report results/mvtec              print the tables again
python reproduce.py --compare results/a results/b       paired comparison of two folders
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from datasets.cache import default_cache_dir
from datasets.manifest import DEFAULT_PATH, category_manifest
from datasets.mvtec import (
    CATEGORIES,
    add_data_flags,
    category_folder,
    held_out_category,
    list_source_images,
    list_test_items,
    list_train_images,
)
from grid.cells import Cell, Fingerprints, code_version, digest, is_begun, is_finished
from grid.engines import Cluster, cores_per_job, run_local, run_on_cluster, visible_gpus
from grid.estimate import format_duration, measure, scoring_seconds, training_seconds
from grid.tables import GRID_FILE, compare, format_comparison, read_results
from grid.tables_page import write_tables
from models.regad import checkpoint_file, last_file, selection
from models.stn import STN_MODES
from utils.utils import (
    DEFAULT_SEED,
    UserError,
    require_positive,
    resolve_device,
    run_command,
    write_json,
)

SLURM_CLUSTER = "slurm"  # submitit's name; tests put "local" here


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of reproduce.py."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit code: 0 all done, 1 some cells failed, 2 a mistake in the call.",
    )
    grid = parser.add_argument_group("grid")
    grid.add_argument("--objs", nargs="+", default=["all"], metavar="CATEGORY", help="all, or names")
    grid.add_argument("--shots", nargs="+", type=int, default=[2, 4, 8], metavar="K")
    grid.add_argument("--stn_mode", choices=list(STN_MODES), default="rotation_scale")
    add_data_flags(grid)
    grid.add_argument("--support_path", type=Path, help="default: ./support_set, or drawn with seed 0")
    grid.add_argument("--inferences", type=int, default=10, metavar="ROUNDS", help="rounds per support set")
    grid.add_argument(
        "--eval_only",
        nargs="?",
        type=Path,
        const=Path("./save_checkpoints"),
        metavar="DIR",
        help="train nothing, score the weights that are in DIR (default ./save_checkpoints)",
    )
    training = parser.add_argument_group("training, see train.py")
    training.add_argument("--weights", default="imagenet", help="trunk to start from: imagenet, none, or a file")
    training.add_argument("--epochs", type=int, default=50)
    training.add_argument("--batch_size", type=int, default=32)
    training.add_argument("--img_size", type=int, default=224)
    training.add_argument("--seed", type=int, default=DEFAULT_SEED)
    training.add_argument(
        "--select",
        nargs="+",
        choices=("best", "source"),
        default=["best"],
        help="source: a second training per cell, whose epoch is chosen without the target",
    )
    training.add_argument("--eval_every", type=int, default=1, metavar="EPOCHS", help="how often an epoch is scored")
    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, default=Path("./results/grid"), help="records, tables, weights, logs")
    run.add_argument("--jobs", type=int, help="cells at a time; default: the number of GPUs, or 1; slurm: all")
    run.add_argument("--engine", choices=("local", "slurm"), default="local")
    run.add_argument("--shard", metavar="I/N", help="only every N-th cell, from the I-th (0 to N-1) on")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    run.add_argument("--num_workers", type=int, default=2, help="processes per cell that decode pictures")
    run.add_argument("--cache_dir", default=str(default_cache_dir()), help="decoded pictures, shared by all cells")
    run.add_argument("--dry_run", action="store_true", help="print the plan and an estimate, run nothing")
    slurm = parser.add_argument_group("slurm (needs requirements-cluster.txt)")
    slurm.add_argument("--slurm_partition", metavar="NAME")
    slurm.add_argument("--slurm_minutes", type=int, default=1440, help="time limit of a cell")
    slurm.add_argument("--slurm_gpus", type=int, default=1, help="GPUs per cell, 0 or 1")
    slurm.add_argument("--slurm_cpus", type=int, default=4, help="cores per cell")
    slurm.add_argument("--slurm_requeue", type=int, default=3, help="how often a cell that ran out of time goes on")
    results = parser.add_argument_group("results, nothing is run")
    results.add_argument("--report", type=Path, metavar="DIR", help="print the tables of DIR and write them anew")
    results.add_argument("--readme", type=Path, metavar="FILE", help="with --report: put them into FILE too")
    results.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="paired differences B - A")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Plans, runs what is not finished, prints the tables."""
    args = get_args_parser().parse_args(argv)
    if args.compare:
        print(format_comparison(compare(*map(read_results, args.compare))))
        return
    if args.report:
        write_tables(args.report, args.readme)
        return
    _check(args)
    plan = Plan(args)
    cells = _shard(plan.cells(), args.shard)
    to_run = plan.print_plan(cells)
    if args.dry_run:
        return
    write_json(args.output / GRID_FILE, {"objs": plan.categories, "shots": args.shots})
    failed = _run(args, to_run)
    if any(args.output.glob("*_*.json")):
        write_tables(args.output)
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(cells)} cells failed; the same command tries them again", file=sys.stderr)
        sys.exit(1)


def _check(args: argparse.Namespace) -> None:
    counts = ("shots", "inferences", "epochs", "batch_size", "img_size", "eval_every", "slurm_minutes", "slurm_cpus")
    require_positive(args, *counts, *(["jobs"] if args.jobs is not None else []))
    if args.readme:
        raise UserError("--readme goes with --report DIR")
    if len(set(args.shots)) < len(args.shots) or len(set(args.objs)) < len(args.objs):
        raise UserError("--shots and --objs must not name anything twice")


class Plan:
    """The cells of the grid that the arguments ask for, and what their numbers depend on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.categories = _categories(args)
        self.tests = {name: list_test_items(self._folder(name)) for name in self.categories}
        if args.eval_only:
            self.sources = {name: list_train_images(self._folder(name)) for name in self.categories}
        else:
            self.sources = list_source_images(args.data_path, args.data_type, target="")
        self.files, self.code = Fingerprints(), code_version()

    def cells(self) -> list[Cell]:
        """In the order of running: an untrained cell per category, then the trained ones; or the weights found."""
        if self.args.eval_only:
            cells = [cell for name in self.categories for cell in self._found_cells(name)]
            if not cells:
                raise UserError(f"no checkpoint of the grid in {self.args.eval_only}, see save_checkpoints/README.md")
            return cells
        trained = [
            self._trained_cell(name, shot, select)
            for shot in self.args.shots
            for name in self.categories
            for select in self.args.select
        ]
        return [*(self._untrained_cell(name) for name in self.categories), *trained]

    def print_plan(self, cells: Sequence[Cell]) -> list[Cell]:
        """Prints one line per cell and an estimate of the time; gives the cells that are to be run."""
        output = self.args.output
        to_run = [cell for cell in cells if not is_finished(output, cell)]
        seconds = self._seconds(to_run) if to_run and self.args.engine == "local" else {}
        for cell in cells:
            state = "finished" if cell not in to_run else "goes on" if is_begun(output, cell) else "new"
            about = f": about {format_duration(seconds[cell])}" if cell in seconds else ""
            print(f"  {state:9} {cell.name}{about}")
        print(f"{len(cells)} cells, {len(cells) - len(to_run)} finished, {len(to_run)} to run", end="")
        jobs = min(_jobs(self.args), max(1, len(to_run)))
        print(f": about {format_duration(sum(seconds.values()) / jobs)} with --jobs {jobs}" if seconds else "")
        return to_run

    def _folder(self, category: str) -> Path:
        return category_folder(self.args.data_path, self.args.data_type, category)

    def _data_flags(self, category: str) -> list[str]:
        args = self.args
        flags = ["--obj", category, "--data_type", args.data_type, "--data_path", str(args.data_path)]
        flags += ["--inferences", str(args.inferences), "--stn_mode", args.stn_mode, "--img_size", str(args.img_size)]
        flags += ["--seed", str(args.seed), "--weights", args.weights]
        flags += ["--device", args.device, "--num_workers", str(args.num_workers)]
        return flags + (["--support_path", str(args.support_path)] if args.support_path else [])

    def _test(self, category: str, shots: Sequence[int], *flags: str) -> tuple[str, ...]:
        """The command that scores one kind of weights."""
        output = ("--output", str(self.args.output))
        return ("test.py", *self._data_flags(category), "--shot", *map(str, shots), *flags, *output)

    def _record(self, category: str, shot: int, kind: str) -> str:
        return f"{category}_{shot}_{self.args.stn_mode}{kind}.json"

    def _untrained_cell(self, category: str) -> Cell:
        records = tuple(self._record(category, shot, "_untrained") for shot in self.args.shots)
        command = self._test(category, self.args.shots, "--untrained")
        name = f"{category}_{'-'.join(map(str, self.args.shots))}_{self.args.stn_mode}_untrained"
        shots, key = tuple(self.args.shots), self._key(category, self.args.shots, "untrained")
        return Cell(name, category, shots, (command,), key, None, records)

    def _trained_cell(self, category: str, shot: int, select: str) -> Cell:
        args, which = self.args, "" if select == "best" else "_source"
        save_dir = args.output / f"save_checkpoints{which}"
        train = ["train.py", *self._data_flags(category), "--shot", str(shot), "--epochs", str(args.epochs)]
        train += ["--batch_size", str(args.batch_size), "--select", select, "--eval_every", str(args.eval_every)]
        train += ["--save_dir", str(save_dir), "--cache_dir", args.cache_dir, "--resume"]
        commands = [tuple(train), self._test(category, [shot], "--save_dir", str(save_dir))]
        records = [self._record(category, shot, which)]
        if select == "best":
            commands.append(self._test(category, [shot], "--save_dir", str(save_dir), "--last"))
            records.append(self._record(category, shot, "_last"))
        weights = checkpoint_file(save_dir, args.stn_mode, shot, category)
        key = self._key(category, [shot], select, args.epochs, args.batch_size, args.eval_every)
        name = weights.stem.removesuffix("_model") + which
        return Cell(name, category, (shot,), tuple(commands), key, weights.parent, tuple(records))

    def _found_cells(self, category: str) -> list[Cell]:
        """Existing weights of a category: one cell for all shots, so that equal files are scored together."""
        args = self.args
        found: dict[tuple[str, str], dict[int, Path]] = {}  # (rule, flag for test.py) -> shot -> file
        for flag, place in (("--last", last_file), ("", checkpoint_file)):
            for shot in args.shots:
                file = place(args.eval_only, args.stn_mode, shot, category)
                rule = selection(file)[0] if file.is_file() else None
                if rule and shot not in found.get((rule, "--last"), {}):
                    found.setdefault((rule, flag), {})[shot] = file
                elif not rule and not flag:
                    print(f"no weights {file}: the table will show the cell as missing")
        return [self._found_cell(category, *kind, files) for kind, files in found.items()]

    def _found_cell(self, category: str, rule: str, flag: str, files: dict[int, Path]) -> Cell:
        shots, ending = tuple(files), "" if rule == "best" else f"_{rule}"
        flags = ["--save_dir", str(self.args.eval_only), *filter(None, [flag])]
        records = tuple(self._record(category, shot, ending) for shot in shots)
        key = self._key(category, shots, flag, self.files.of(list(files.values())))
        name = f"{category}_{'-'.join(map(str, shots))}_{self.args.stn_mode}{ending}{flag.replace('--', '_')}_eval"
        return Cell(name, category, shots, (self._test(category, shots, *flags),), key, None, records)

    def _key(self, category: str, shots: Sequence[int], *decisive: object) -> str:
        """A digest of what the numbers depend on: arguments, data, code. Not of where the data lie."""
        args, files = self.args, self.files
        weights = files.of([Path(args.weights)]) if Path(args.weights).is_file() else args.weights
        support = [file for shot in shots for file in self._support_files(category, shot)]
        trains = "best" in decisive or "source" in decisive
        pictures = self.sources if trains else {category: self.sources[category]}
        test = list(self.tests[category])
        if "source" in decisive:
            test += list_test_items(self._folder(held_out_category(self.sources, category)))
        data = {name: files.of(paths) for name, paths in pictures.items()}
        return digest(
            {
                "arguments": [category, shots, args.stn_mode, args.img_size, args.seed, args.inferences, decisive],
                "weights": weights,
                "data": [
                    data,
                    files.of([item.image for item in test]),
                    files.of([item.mask for item in test if item.mask]),
                ],
                "support": files.of(support),
                "code": self.code,
            }
        )

    def _support_files(self, category: str, shot: int) -> list[Path]:
        root = self.args.support_path or DEFAULT_PATH
        files = [*(root / category).glob(f"{shot}_{self.args.inferences}*"), category_manifest(root, category)]
        return sorted(file for file in files if file.is_file())

    def _seconds(self, cells: Sequence[Cell]) -> dict[Cell, float]:
        """Estimated from a measurement on this machine, with a job's share of its cores."""
        args = self.args
        torch.set_num_threads(cores_per_job(_jobs(args)))
        speed = measure(resolve_device(args.device), args.stn_mode, args.img_size)
        seconds = {}
        for cell in cells:
            scoring = scoring_seconds(speed, len(self.tests[cell.category]), cell.shots, args.inferences)
            trainings = sum(script == "train.py" for script, *_ in cell.commands)
            seconds[cell] = (len(cell.commands) - trainings) * scoring
            if trainings:
                pictures = sum(len(paths) for name, paths in self.sources.items() if name != cell.category)
                scored = scoring / args.eval_every
                seconds[cell] += training_seconds(speed, pictures, cell.shots[0], args.epochs, scored)
        return seconds


def _categories(args: argparse.Namespace) -> list[str]:
    if args.objs != ["all"]:
        return args.objs
    if CATEGORIES[args.data_type] is not None:
        return list(CATEGORIES[args.data_type])
    names = list_source_images(args.data_path, args.data_type, target="")
    return [name for name in names if (args.data_path / name / "test").is_dir()]


def _shard(cells: list[Cell], shard: str | None) -> list[Cell]:
    if shard is None:
        return cells
    first, _, count = shard.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UserError(f"--shard takes I/N with I from 0 to N-1, for example 0/4, not {shard!r}")
    return cells[int(first) :: int(count)]


def _jobs(args: argparse.Namespace) -> int:
    return args.jobs or max(1, len(visible_gpus(args.device)))


def _run(args: argparse.Namespace, cells: list[Cell]) -> dict[str, str]:
    """Runs the cells; gives the names of those that failed, with the reasons."""
    failed: dict[str, str] = {}
    begin, done = time.monotonic(), 0

    def report(cell: Cell, reason: str | None) -> None:
        """Counts and prints a cell that ended, with the reason if it failed, and the time since the start."""
        nonlocal done
        done += 1
        if reason:
            failed[cell.name] = reason
        took = format_duration(time.monotonic() - begin)
        print(f"[{done}/{len(cells)}, {took}] {cell.name}: {reason or 'finished'}", flush=True)

    if not cells:
        return failed
    if args.engine == "local":
        run_local(args.output, cells, _jobs(args), visible_gpus(args.device), report)
    else:
        cluster = Cluster(
            *(SLURM_CLUSTER, args.slurm_partition, args.slurm_minutes),
            *(args.slurm_gpus, args.slurm_cpus, args.slurm_requeue),
        )
        run_on_cluster(args.output, cells, args.jobs or len(cells), cluster, report)
    return failed


if __name__ == "__main__":
    run_command(main)
