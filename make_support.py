"""Command: draw support sets (K normal pictures per round) and write them in the release's format.

python make_support.py --obj screw --shots 2 4 8 --rounds 10 --data_path ./MVTec/
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from datasets.mvtec import CATEGORIES, category_folder
from datasets.support import (
    DEFAULT_PATH,
    DRAW_SEED,
    draw_support_images,
    read_support_images,
    save_support_rounds,
    support_file,
)
from utils.utils import require_positive, run_command


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of make_support.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--obj", nargs="+", required=True, metavar="CATEGORY", help="categories to draw from")
    parser.add_argument("--shots", nargs="+", type=int, default=[2], metavar="K", help="pictures per round")
    parser.add_argument("--rounds", type=int, default=10, help="rounds per support set (test.py's --inferences)")
    parser.add_argument("--data_type", choices=list(CATEGORIES), default="mvtec")
    parser.add_argument("--data_path", type=Path, default=Path("./MVTec/"), help="folder that holds the categories")
    parser.add_argument("--support_path", type=Path, default=DEFAULT_PATH, help="where the sets are written")
    parser.add_argument("--img_size", type=int, default=224, help="side of the stored pictures in pixels")
    parser.add_argument("--seed", type=int, default=DRAW_SEED, help="another seed draws other pictures")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Writes every requested support set and prints which pictures it is made of."""
    args = get_args_parser().parse_args(argv)
    require_positive(args, "shots", "rounds", "img_size")
    for category in args.obj:
        folder = category_folder(args.data_path, args.data_type, category)
        for shot in args.shots:
            draws = draw_support_images(folder, shot, args.rounds, args.seed)
            target = support_file(args.support_path, category, shot, args.rounds)
            save_support_rounds(target, [read_support_images(paths, args.img_size) for paths in draws])
            print(f"wrote {target}")
            for number, paths in enumerate(draws):
                print(f"  round {number}: {' '.join(path.name for path in paths)}")


if __name__ == "__main__":
    run_command(main)
