"""Command: read every image and mask of a data set; print a table of its content and every problem.

python check_data.py --data_type folder --data_path ./my_data
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets.check import check_category, check_support, format_reports
from datasets.images import limit_pixels
from datasets.mvtec import CATEGORIES, category_names
from utils.errors import UserError, require_positive, run_command
from utils.flags import DEFAULT_SUPPORT_PATH, add_data_flags, add_max_pixels_flag, category_name

PROBLEMS = 1  # exit code if there are problems; 2 is a mistake in the arguments


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of check_data.py."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit code: 0 no problems, 1 problems, 2 wrong arguments.",
    )
    parser.add_argument(
        "--obj", type=category_name, nargs="+", metavar="CATEGORY", help="default: all categories of the data type"
    )
    add_data_flags(parser, CATEGORIES)
    parser.add_argument("--support", action="store_true", help="also check support sets and manifests")
    parser.add_argument("--support_path", type=Path, default=DEFAULT_SUPPORT_PATH, help="their folder")
    add_max_pixels_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table and the problems; exits with PROBLEMS if there are any."""
    args = get_args_parser().parse_args(argv)
    require_positive(args, "max_pixels")
    limit_pixels(args.max_pixels)
    if not args.data_path.is_dir():
        raise UserError(f"no data folder {args.data_path}; give the folder that holds the categories with --data_path")
    names = args.obj or category_names(args.data_path, args.data_type)
    if not names:
        raise UserError(f"{args.data_path} holds no category: no sub-folder has train/good")
    reports = [check_category(args.data_path, args.data_type, name) for name in names]
    print(format_reports(reports))
    problems = [problem for report in reports for problem in report.problems]
    if args.support:
        problems += [problem for name in names for problem in check_support(args.support_path, args.data_path, name)]
    print(f"{len(problems)} problem(s)" if problems else "no problems")
    for problem in problems:
        print(f"  {problem}")
    if problems:
        sys.exit(PROBLEMS)


if __name__ == "__main__":
    run_command(main)
