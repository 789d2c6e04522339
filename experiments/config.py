"""The configuration of reproduce.py: every setting of train.py and test.py, and those of a table of experiments."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.config import ScoringConfig
from training.config import TrainingConfig
from utils.choices import FIGURE_FORMATS, WEIGHTS, category_name, is_trainable
from utils.config import AnyConfig, Config, flag, flags_of
from utils.errors import UserError
from utils.naming import DEFAULT_SAVE_DIR

SLURM_TEXTS = ("partition", "account", "qos", "constraint", "mem", "setup")  # setup: may be given several times
SLURM_NUMBERS = {"minutes": 1440, "gpus": 1, "cpus": 4, "requeue": 3}  # with their defaults
# Settings that the plan sets for each run: its category, its weights, and their files.
SET_BY_THE_PLAN = ("obj", "shot", "select", "save_dir", "checkpoint", "last", "untrained", "resume", "overwrite")
TABLE, EXTERNAL = "results of earlier runs", "another method's scores in the tables, see docs/extend.md"


def slurm_option(text: str) -> str:
    """One KEY=VALUE of --slurm.

    Raises:
        argparse.ArgumentTypeError: an unknown key, a number out of range, or a control character. (The value becomes
            part of a job's script, in which a second line would be executed as a command.)
    """
    key, sign, value = text.partition("=")
    if not sign or not value or key not in (*SLURM_TEXTS, *SLURM_NUMBERS):
        raise argparse.ArgumentTypeError(f"KEY=VALUE with one of {', '.join((*SLURM_TEXTS, *SLURM_NUMBERS))}")
    if not value.isprintable():
        raise argparse.ArgumentTypeError(f"{value!r} holds a line break or another control character")
    least = 1 if key in ("minutes", "cpus") else 0
    if key in SLURM_NUMBERS and not (value.isdecimal() and least <= int(value) <= (1 if key == "gpus" else 10**6)):
        raise argparse.ArgumentTypeError(f"{key} must be {'0 or 1' if key == 'gpus' else f'at least {least}'}")
    return text


@dataclass(frozen=True, kw_only=True)
class TableConfig(Config):
    """The flags that train.py and test.py do not have."""

    objs: tuple[str, ...] = flag(
        "all, or categories", default=("all",), group="data", convert=category_name, metavar="CATEGORY"
    )
    shots: tuple[int, ...] = flag(
        "support images per round; without it, make_support.py uses 2",
        default=(2, 4, 8),
        group="data",
        least=1,
        metavar="K",
        nargs="+",
    )
    select: tuple[str, ...] = flag(
        "best: by the target's test labels; source: without the target, by a second training per run, or with "
        "--held_out by the same training",
        default=("best",),
        group="training",
        choices=("best", "source"),
    )
    seeds: int = flag(
        "trainings per run, with --seed and the numbers after it; the tables give their spread", default=1, least=1
    )
    eval_only: Path | None = flag(
        f"score the checkpoints in DIR without training (without DIR: {DEFAULT_SAVE_DIR})",
        default=None,
        group="network",
        metavar="DIR",
        nargs="?",
        const=DEFAULT_SAVE_DIR,
    )
    scoring_batch_size: int | None = flag("--batch_size of test.py (default: its default)", default=None, least=1)
    output: Path = flag("records, tables, weights, logs", default=Path("./results/grid"))
    jobs: int | None = flag("parallel runs (default: the number of GPUs, or 1; slurm: all)", default=None, least=1)
    engine: str = flag("where the runs are executed", default="local", choices=("local", "slurm"))
    slurm: tuple[str, ...] = flag(
        "options of --engine slurm, such as partition=gpu mem=32G minutes=1440 'setup=module load cuda'; "
        f"keys: {', '.join(SLURM_TEXTS)}, {', '.join(f'{key} (default {n})' for key, n in SLURM_NUMBERS.items())}",
        default=(),
        convert=slurm_option,
        metavar="KEY=VALUE",
    )
    dry_run: bool = flag("print the plan without executing it", default=False)
    report: Path | None = flag(
        "print the tables of DIR and rewrite their files", default=None, group=TABLE, metavar="DIR"
    )
    readme: Path | None = flag(
        "with --report: also insert the tables in FILE", default=None, group=TABLE, metavar="FILE"
    )
    baseline: str | None = flag(
        "with --report or --compare: the baseline of all columns: a scorer, a kind of weights, a method of --import, "
        "a column, or a results folder (default: gaussian, and untrained)",
        default=None,
        group=TABLE,
        metavar="NAME",
    )
    columns: tuple[str, ...] | None = flag(
        "show these columns alone, such as 'untrained' 'untrained, neighbours'; --objs and --shots choose rows and "
        "tables (default: all)",
        default=None,
        group=TABLE,
        metavar="COLUMN",
    )
    only_scored: bool = flag("leave out categories and columns without a record", default=False, group=TABLE)
    figure: Path | None = flag(
        "with --report: draw the metrics of all columns by category (.pdf, .svg or .png)",
        default=None,
        group=TABLE,
        metavar="FILE",
    )
    examples: Path | None = flag(
        "with --report: draw support images, test images, ground truth and the saved maps of all columns",
        default=None,
        group=TABLE,
        metavar="FILE",
    )
    images: tuple[str, ...] | None = flag(
        "of --examples: test images as <defect>/<file name>, at most 15 (default: one of each defect type, 8 in all)",
        default=None,
        group=TABLE,
        metavar="NAME",
    )
    compare: tuple[Path, ...] | None = flag(
        "print the paired differences of two results folders, B - A",
        default=None,
        group=TABLE,
        nargs=2,
        metavar=("A", "B"),
    )
    format: str = flag("of --compare: Markdown, LaTeX or CSV", default="md", group=TABLE, choices=("md", "tex", "csv"))
    import_scores: Path | None = flag(
        "make a record of these image scores (short: --import)",
        default=None,
        group=EXTERNAL,
        metavar="CSV",
        aliases=("--import",),
    )
    name: str | None = flag("name of the method (default: none, --import needs it)", default=None, group=EXTERNAL)
    obj: str | None = flag(
        "the category that was scored (default: none, --import needs it)",
        default=None,
        group=EXTERNAL,
        convert=category_name,
        metavar="CATEGORY",
    )
    shot: int | None = flag(
        "support images per round (default: none, --import needs it)",
        default=None,
        group=EXTERNAL,
        least=1,
        metavar="K",
    )
    maps: Path | None = flag(
        "folder of round_0.npz, ... (default: none, no pixel metrics)", default=None, group=EXTERNAL, metavar="DIR"
    )
    overwrite: bool = flag("replace a record that was made of other scores", default=False, group=EXTERNAL)
    kind: str = flag("how its weights were chosen", default="last", group=EXTERNAL, choices=tuple(WEIGHTS))

    def check(self) -> None:
        """Raises UserError if flags contradict each other."""
        if self.eval_only and not is_trainable(self.backbone):
            raise UserError(f"{self.backbone} is not trained here, so there is nothing for --eval_only to score")
        for names, owner_is_given, owner in (
            (("readme", "figure", "examples"), self.report, "--report DIR"),
            (("baseline", "columns", "only_scored"), self.report or self.compare, "--report or --compare"),
            (("images",), self.examples, "--examples FILE"),
            (("name", "obj", "shot", "maps", "overwrite"), self.import_scores, "--import CSV"),
        ):
            for name in names:
                if getattr(self, name) and not owner_is_given:
                    more = f"; a table takes --{name}s" if name in ("obj", "shot") else ""
                    raise UserError(f"--{name} goes with {owner}{more}")
        for name in ("figure", "examples"):
            if (file := getattr(self, name)) and file.suffix not in FIGURE_FORMATS:
                raise UserError(f"--{name} {file}: figures are written as {', '.join(FIGURE_FORMATS)}")
        if len(set(self.shots)) < len(self.shots) or len(set(self.objs)) < len(self.objs):
            raise UserError("--shots and --objs must not contain duplicates")

    def part(self, kind: type[AnyConfig], **values: object) -> AnyConfig:
        """The configuration of one run: the settings that `kind` shares with this one, and those in `values`."""
        shared = {field.name for field in flags_of(kind)} - {*SET_BY_THE_PLAN, *values}
        return kind(**{name: getattr(self, name) for name in shared}, **values)


def _settings_of_runs() -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """The fields of train.py and test.py that a table shares among its runs, with their types."""
    table, settings = {field.name for field in flags_of(TableConfig)}, {}
    for kind in (TrainingConfig, ScoringConfig):
        hints = typing.get_type_hints(kind)
        for field in flags_of(kind):
            if field.name not in {*table, *SET_BY_THE_PLAN}:
                copied = dataclasses.field(default=field.default, metadata=field.metadata)
                settings.setdefault(field.name, (field.name, hints[field.name], copied))
    yield from settings.values()


_RunSettings = dataclasses.make_dataclass(
    "_RunSettings", _settings_of_runs(), bases=(Config,), frozen=True, kw_only=True
)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(TableConfig, _RunSettings):
    """All flags of reproduce.py."""
