"""Scores one category against few-shot support sets and reports image and pixel metrics.

python test.py --obj bottle --shot 2 --stn_mode rotation_scale
python test.py --obj bottle --shot 2 4 8 --untrained        several K; test features are computed once per checkpoint
"""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.config import ScoringConfig
from utils.config import Parser
from utils.errors import run_command


def get_args_parser() -> Parser[ScoringConfig]:
    """The command line of test.py: the flags of the release and those of this project."""
    return Parser(ScoringConfig, __doc__.splitlines()[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Scores the category, prints the metrics and writes the records."""
    config = get_args_parser().parse_config(argv)
    from evaluation.run import run  # slow: imports torch

    run(config)


if __name__ == "__main__":
    run_command(main, get_args_parser)
