"""Draws support sets (K normal images per round), or finds and checks the images of existing ones.

python make_support.py --obj screw --shots 2 4 8 --rounds 10 --data_path ./MVTec/
"""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.config import SupportSetConfig
from utils.config import Parser
from utils.errors import run_command


def get_args_parser() -> Parser[SupportSetConfig]:
    """The command line of make_support.py."""
    return Parser(SupportSetConfig, __doc__.splitlines()[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Does the task that the arguments select, and prints the images of every round."""
    config = get_args_parser().parse_config(argv)
    from evaluation.support_sets import run  # slow: imports torch

    run(config)


if __name__ == "__main__":
    run_command(main, get_args_parser)
