"""Reads every image and mask of a data set; prints a table of its content and every problem.

python check_data.py --data_type folder --data_path ./my_data
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.config import DataConfig, MaskConfig, MaxPixelsConfig
from utils.choices import DEFAULT_SUPPORT_PATH, category_name
from utils.config import Parser, flag
from utils.errors import UserError, run_command
from utils.text import one_line

PROBLEMS = 1  # exit code if there are problems; 2 for invalid arguments


@dataclass(frozen=True, kw_only=True)
class CheckConfig(MaskConfig, MaxPixelsConfig, DataConfig):
    """The flags of check_data.py."""

    obj: tuple[str, ...] = flag(
        "categories (default: all)", default=(), group="data", convert=category_name, metavar="CATEGORY"
    )
    support: bool = flag("also check support sets and manifests", default=False)
    support_path: Path = flag("folder of the support sets", default=DEFAULT_SUPPORT_PATH)


def get_args_parser() -> Parser[CheckConfig]:
    """The command line of check_data.py."""
    return Parser(CheckConfig, __doc__.splitlines()[0], "Exit code: 0 no problems, 1 problems, 2 invalid arguments.")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table and the problems; exits with PROBLEMS if there are any."""
    config = get_args_parser().parse_config(argv)
    from datasets.check import check_category, check_support, format_reports  # slow: imports torch
    from datasets.images import limit_pixels
    from datasets.mvtec import category_names, require_data_folder

    limit_pixels(config.max_pixels)
    require_data_folder(config.data_path)
    names = config.obj or category_names(config.data_path, config.data_type)
    if not names:
        raise UserError(f"{config.data_path} holds no category: no sub-folder has train/good")
    reports = [check_category(config.data_path, config.data_type, name, config.mask_orientation) for name in names]
    print(format_reports(reports))
    problems = [problem for report in reports for problem in report.problems]
    if config.support:
        for name in names:
            problems += check_support(config.support_path, config.data_path, name)
    print(f"{len(problems)} problem(s)" if problems else "no problems")
    for problem in problems:
        print(f"  {one_line(problem)}")
    if problems:
        sys.exit(PROBLEMS)


if __name__ == "__main__":
    run_command(main, get_args_parser)
