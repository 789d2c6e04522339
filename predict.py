"""Scores images against a few normal images of the same part; writes heat maps, decisions and a report.

python predict.py --support good_1.png good_2.png --input photos/ --output out
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from inspection.config import PredictConfig
from utils.config import Parser
from utils.errors import run_command


def get_args_parser() -> Parser[PredictConfig]:
    """The command line of predict.py."""
    return Parser(PredictConfig, __doc__.splitlines()[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Fits or loads the detector, scores all images, and writes the tables, the record and the report."""
    config = get_args_parser().parse_config(argv)
    from inspection.run import command  # slow: imports torch

    lines = sys.stdout if config.jsonl else None
    with redirect_stdout(sys.stderr if config.jsonl else sys.stdout):
        code = command(config, lines)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_command(main, get_args_parser)
