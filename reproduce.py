"""Reproduces the tables of the paper: trains and scores every category and K, resumes interrupted runs.

python reproduce.py --objs all --shots 2 4 8 --data_path ./MVTec/ --output results/mvtec      the full table
python reproduce.py ... --dry_run                       show finished and pending runs
python reproduce.py ... --eval_only ./save_checkpoints  score existing checkpoints without training
python reproduce.py --report results/mvtec              print the tables of a results folder
python reproduce.py --compare results/a results/b       paired comparison of two folders
python reproduce.py --import scores.csv --name mymethod --obj bottle --shot 2    a record of another method's scores
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.config import ExperimentConfig
from utils.config import Parser
from utils.errors import run_command


def get_args_parser() -> Parser[ExperimentConfig]:
    """The command line of reproduce.py: every flag of train.py and test.py, and those of a table."""
    return Parser(
        ExperimentConfig,
        __doc__.splitlines()[0],
        "Exit code: 0 all runs finished, 1 some runs failed, 2 invalid arguments or data.",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Plans the runs, executes those that are not finished, and prints the tables."""
    config = get_args_parser().parse_config(argv)
    from experiments.run import run  # slow: imports torch

    run(config)


if __name__ == "__main__":
    run_command(main, get_args_parser)
