"""The plan of a grid: its cells, their commands, a key of all inputs per cell, and a time estimate."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from datasets.manifest import category_manifest
from datasets.mvtec import (
    CATEGORIES,
    category_folder,
    held_out_category,
    list_source_images,
    list_test_items,
    list_train_images,
)
from datasets.support import DEFAULT_SUPPORT_PATH
from experiments.code import code_version
from experiments.engines import cores_per_job, job_environment, visible_gpus
from experiments.estimate import format_duration, measure_apart, scoring_seconds, training_seconds
from experiments.results import WEIGHTS, kind_name
from experiments.runs import Cell, Fingerprints, is_begun, is_finished
from models.networks import network_name
from models.regad import selection
from models.timm_features import PREFIX
from scorers.registry import make_scorers, record_ending
from utils.errors import UserError
from utils.files import digest
from utils.naming import CheckpointFiles

RECIPE = {"lr": 0.0001, "momentum": 0.9, "amp": "off"}  # the defaults of train.py


class Plan:
    """The cells of the grid given by the command-line arguments of reproduce.py."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.categories = _categories(args)
        self.tests = {name: list_test_items(self._folder(name)) for name in self.categories}
        self.normal = {name: list_train_images(self._folder(name)) for name in self.categories}
        same = args.source_path is None or args.source_path.resolve() == args.data_path.resolve()
        self.source_root = None if same else args.source_path  # another data set than that of the targets
        self.sources = {}  # the training images of each category, the target of a cell included
        if not args.eval_only:
            self.sources = list_source_images(args.data_path, args.data_type, "", args.sources, args.source_path)
        self.files, self.code = Fingerprints(), code_version()
        self.scorers = [scorer.name for scorer in make_scorers(args.scorer)]
        self.network = network_name(args.backbone, args.stn_mode)

    def cells(self) -> list[Cell]:
        """The cells in running order: one untrained cell per category, then the trained cells.

        With --eval_only, the cells of the checkpoints that exist.

        Raises:
            UserError: --eval_only finds no checkpoint.
        """
        if self.args.eval_only:
            cells = [cell for name in self.categories for cell in self._found_cells(name)]
            if not cells:
                raise UserError(f"no checkpoint of the grid in {self.args.eval_only}, see save_checkpoints/README.md")
            return cells
        untrained = [self._untrained_cell(name) for name in self.categories]
        if self.args.backbone.startswith(PREFIX):  # timm backbones are not trained in this project
            return untrained
        trained = [
            self._trained_cell(name, shot, select)
            for shot in self.args.shots
            for name in self.categories
            for select in self.args.select
        ]
        return [*untrained, *trained]

    def asked(self, cells: Sequence[Cell]) -> dict:
        """What all `cells` of the grid will give: categories, shots, and the kinds of columns, for grid.json."""
        weights = {name for cell in cells for name in cell.weights}
        kinds = [kind_name(name, scorer) for scorer in self.scorers for name in WEIGHTS if name in weights]
        return {"objs": self.categories, "shots": self.args.shots, "kinds": kinds}

    def print_plan(self, cells: Sequence[Cell]) -> list[Cell]:
        """Prints one line per cell and a time estimate. Returns the cells to run."""
        output = self.args.output
        to_run = [cell for cell in cells if not is_finished(output, cell)]
        seconds = self._seconds(to_run) if to_run and self.args.engine == "local" else {}
        for cell in cells:
            state = "finished" if cell not in to_run else "resume" if is_begun(output, cell) else "new"
            about = f": about {format_duration(seconds[cell])}" if cell in seconds else ""
            print(f"  {state:9} {cell.name}{about}")
        print(f"{len(cells)} cells, {len(cells) - len(to_run)} finished, {len(to_run)} to run", end="")
        jobs = min(count_jobs(self.args), max(1, len(to_run)))
        print(f": about {format_duration(sum(seconds.values()) / jobs)} with --jobs {jobs}" if seconds else "")
        return to_run

    def _folder(self, category: str) -> Path:
        return category_folder(self.args.data_path, self.args.data_type, category)

    def _sources_of(self, category: str) -> dict[str, list[Path]]:
        """The training images of each category that the cells of the target `category` train on."""
        return {name: paths for name, paths in self.sources.items() if self.source_root or name != category}

    def _source_flags(self, category: str) -> list[str]:
        """--sources and --source_path of train.py, where they were given."""
        args, names = self.args, list(self._sources_of(category))
        if args.sources and not names:
            raise UserError(f"--sources names {category} alone, which is a target: it must not be trained on")
        flags = ["--sources", *names] if args.sources else []
        return flags + (["--source_path", str(args.source_path)] if args.source_path else [])

    def _held_out(self, category: str) -> Path:
        """The folder of the source category that selects the epoch of the target `category` with --select source."""
        sources = self._sources_of(category)
        if not sources:
            raise UserError(f"no category to train on besides {category}; --select source needs two, one is held out")
        held_out = held_out_category(sources, category)
        return category_folder(self.source_root, "folder", held_out) if self.source_root else self._folder(held_out)

    def _data_flags(self, category: str) -> list[str]:
        args = self.args
        flags = ["--obj", category, "--data_type", args.data_type, "--data_path", str(args.data_path)]
        flags += ["--inferences", str(args.inferences), "--stn_mode", args.stn_mode, "--img_size", str(args.img_size)]
        flags += ["--seed", str(args.seed), "--weights", args.weights, "--backbone", args.backbone]
        flags += ["--device", args.device, "--num_workers", str(args.num_workers)]
        flags += ["--bits", str(args.bits)]
        return flags + (["--support_path", str(args.support_path)] if args.support_path else [])

    def _test(self, category: str, shots: Sequence[int], *flags: str) -> tuple[str, ...]:
        """The test.py command that scores one kind of weights."""
        output = ("--scorer", *self.args.scorer, "--output", str(self.args.output), "--overwrite")
        return ("test.py", *self._data_flags(category), "--shot", *map(str, shots), *flags, *output)

    def _records(self, category: str, shots: Sequence[int], kind: str) -> tuple[str, ...]:
        """The record files that test.py writes: one per K and scorer."""
        endings = [kind + record_ending(name) for name in self.scorers]
        return tuple(f"{category}_{shot}_{self.network}{ending}.json" for shot in shots for ending in endings)

    def _untrained_cell(self, category: str) -> Cell:
        records = self._records(category, self.args.shots, "_untrained")
        command = self._test(category, self.args.shots, "--untrained")
        name = f"{category}_{'-'.join(map(str, self.args.shots))}_{self.network}_untrained"
        shots, key = tuple(self.args.shots), self._key(category, self.args.shots, self.args.scorer, "untrained")
        return Cell(name, category, shots, (command,), key, None, records, ("untrained",))

    def _trained_cell(self, category: str, shot: int, select: str) -> Cell:
        args, which = self.args, "" if select == "best" else "_source"
        save_dir = args.output / f"save_checkpoints{which}"
        train = ["train.py", *self._data_flags(category), "--shot", str(shot), "--epochs", str(args.epochs)]
        train += ["--batch_size", str(args.batch_size), "--select", select, "--eval_every", str(args.eval_every)]
        train += ["--lr", str(args.lr), "--momentum", str(args.momentum), "--amp", args.amp]
        train += self._source_flags(category)
        train += ["--scorer", args.scorer[0], "--save_dir", str(save_dir), "--cache_dir", args.cache_dir, "--resume"]
        commands = [tuple(train), self._test(category, [shot], "--save_dir", str(save_dir))]
        records = [*self._records(category, [shot], which)]
        if select == "best":
            commands.append(self._test(category, [shot], "--save_dir", str(save_dir), "--last"))
            records += self._records(category, [shot], "_last")
        weights = CheckpointFiles.of(save_dir, self.network, shot, category).selected
        decisive = (select, args.epochs, args.batch_size, args.eval_every, *self._changed_recipe())
        key = self._key(category, [shot], args.scorer, *decisive)
        training = self._key(category, [shot], args.scorer[:1], *decisive)
        name = weights.stem.removesuffix("_model") + which
        scored = ("last", "best") if select == "best" else (select,)
        return Cell(name, category, (shot,), tuple(commands), key, weights.parent, tuple(records), scored, training)

    def _changed_recipe(self) -> list[tuple[str, object]]:
        """The arguments of RECIPE that are not the defaults, so that the keys of default runs stay as they were."""
        given = {name: getattr(self.args, name) for name in RECIPE}
        return [(name, value) for name, value in given.items() if value != RECIPE[name]]

    def _found_cells(self, category: str) -> list[Cell]:
        """The cells of a category's existing checkpoints. A cell covers all K, so that equal files are scored once."""
        args = self.args
        found: dict[tuple[str, str], dict[int, Path]] = {}  # (rule, flag for test.py) -> shot -> file
        for flag, which in (("--last", "last"), ("", "selected")):
            for shot in args.shots:
                file = getattr(CheckpointFiles.of(args.eval_only, self.network, shot, category), which)
                rule = selection(file)[0] if file.is_file() else None
                if rule and shot not in found.get((rule, "--last"), {}):
                    found.setdefault((rule, flag), {})[shot] = file
                elif not rule and not flag:
                    print(f"no checkpoint {file}: the table will show the cell as missing")
        return [self._found_cell(category, *kind, files) for kind, files in found.items()]

    def _found_cell(self, category: str, rule: str, flag: str, files: dict[int, Path]) -> Cell:
        shots, ending = tuple(files), "" if rule == "best" else f"_{rule}"
        flags = ["--save_dir", str(self.args.eval_only), *filter(None, [flag])]
        records = self._records(category, shots, ending)
        key = self._key(category, shots, self.args.scorer, flag, self.files.of(list(files.values())))
        name = f"{category}_{'-'.join(map(str, shots))}_{self.network}{ending}{flag.replace('--', '_')}_eval"
        return Cell(name, category, shots, (self._test(category, shots, *flags),), key, None, records, (rule,))

    def _key(self, category: str, shots: Sequence[int], scorers: Sequence[str], *decisive: object) -> str:
        """A digest of all that affects the metrics: arguments, data and code, but not the location of the data."""
        args, files = self.args, self.files
        weights = files.of([Path(args.weights)]) if Path(args.weights).is_file() else args.weights
        support = [file for shot in shots for file in self._support_files(category, shot)]
        trains = "best" in decisive or "source" in decisive
        data = {category: files.of(self.normal[category])}
        if trains:
            place = "source_path/" if self.source_root else ""  # where a source may have the target's name
            data |= {f"{place}{name}": files.of(paths) for name, paths in self._sources_of(category).items()}
        test = list(self.tests[category])
        if "source" in decisive:
            held_out = self._held_out(category)
            test += list_test_items(held_out)
            support += [file for shot in shots for file in self._support_files(held_out.name, shot)]
        return digest(
            {
                "arguments": [
                    *(category, shots, args.stn_mode, args.img_size, args.seed, args.inferences, args.bits, decisive)
                ],
                "weights": weights,
                "scored": [args.backbone, [self._scorer_key(name) for name in scorers]],
                "data": [
                    data,
                    files.of([item.image for item in test]),
                    files.of([mask for item in test for mask in item.masks]),
                ],
                "support": files.of(support),
                "code": self.code,
            }
        )

    def _scorer_key(self, name: str) -> object:
        """The name of a scorer; for a custom scorer, also the digest of its file."""
        file, _, _ = name.rpartition(":")
        return [name.removeprefix(file), self.files.of([Path(file)])] if file else name

    def _support_files(self, category: str, shot: int) -> list[Path]:
        root = self.args.support_path or DEFAULT_SUPPORT_PATH
        files = [*(root / category).glob(f"{shot}_{self.args.inferences}*"), category_manifest(root, category)]
        return sorted(file for file in files if file.is_file())

    def _seconds(self, cells: Sequence[Cell]) -> dict[Cell, float]:
        """Estimated seconds per cell, from a measurement with the CPU cores and GPU of one job; empty if it fails."""
        args = self.args
        gpus, cores = visible_gpus(args.device), cores_per_job(count_jobs(args))
        speed = measure_apart(args, job_environment(cores, gpus[0] if gpus else None))
        if speed is None:
            return {}
        seconds = {}
        for cell in cells:
            scoring = scoring_seconds(speed, len(self.tests[cell.category]), cell.shots, args.inferences)
            trainings = sum(script == "train.py" for script, *_ in cell.commands)
            seconds[cell] = (len(cell.commands) - trainings) * scoring
            if trainings:
                images = sum(map(len, self._sources_of(cell.category).values()))
                scored = scoring / args.eval_every
                seconds[cell] += training_seconds(speed, images, cell.shots[0], args.epochs, scored)
        return seconds


def _categories(args: argparse.Namespace) -> list[str]:
    if args.objs != ["all"]:
        return args.objs
    if CATEGORIES[args.data_type] is not None:
        return list(CATEGORIES[args.data_type])
    names = list_source_images(args.data_path, args.data_type, target="")
    return [name for name in names if (args.data_path / name / "test").is_dir()]


def take_shard(cells: list[Cell], shard: str | None) -> list[Cell]:
    """Every N-th cell, starting at the I-th, for a shard "I/N"; all cells for None.

    Raises:
        UserError: `shard` has another format.
    """
    if shard is None:
        return cells
    first, _, count = shard.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UserError(f"--shard takes I/N with I from 0 to N-1, for example 0/4, not {shard!r}")
    return cells[int(first) :: int(count)]


def count_jobs(args: argparse.Namespace) -> int:
    """Number of parallel cells on this machine."""
    return args.jobs or max(1, len(visible_gpus(args.device)))
