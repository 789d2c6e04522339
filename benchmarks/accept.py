"""Measures what a detector learns from good parts that it rejected (predict.py --accept).

python -m benchmarks.accept             measure, print the table, write benchmarks/results/accept_<device>.json
python -m benchmarks.accept --report    print the table of that file

A detector is fitted to K normal images with the default thresholds and scores further normal images. Those that it does
not call normal are accepted, 1, 2, 4, 8 of them; the decisions on all other normal and on defective images are counted.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Sequence

from benchmarks.changes import decisions
from benchmarks.measuring import evenly, measuring_parser, report_or_measure
from benchmarks.reference import draw_support_images
from datasets.mvtec import category_folder, list_test_items, list_train_images
from inspection.detector import FewShotDetector
from inspection.fitting import DEFAULT_RATE
from inspection.learning import accept
from inspection.results import DEFECTIVE, NORMAL
from models.efficientnet_lite import EfficientNetLite
from utils.devices import command_device
from utils.errors import run_command

ACCEPTED = (0, 1, 2, 4, 8)


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = measuring_parser(__doc__)
    parser.add_argument("--shot", type=int, default=4, help="support images")
    parser.add_argument("--images", type=int, default=80, help="further normal images of each category")
    parser.add_argument("--defects", type=int, default=30, help="defective images of each category")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all categories, prints the table and writes one JSON file."""
    args = get_args_parser().parse_args(argv)
    device = command_device(args.device)
    target = args.output / f"accept_{device.type}.json"

    def measure() -> dict:
        return {"rows": [row for category in args.obj for row in _measure(category, args)]}

    report_or_measure("benchmarks.accept", args, target, device, measure, lambda content: report(content["rows"]))


def _measure(category: str, args: argparse.Namespace) -> Iterator[dict]:
    """Yields one row per number of accepted images, as far as so many are rejected."""
    folder = category_folder(args.data_path, "folder", category)
    count = min(args.shot + args.images, len(list_train_images(folder)))
    paths = draw_support_images(folder, count, 1, seed=0)[0]
    defects = evenly([item.image for item in list_test_items(folder) if item.label], args.defects)
    base = FewShotDetector(EfficientNetLite(), args.device).fit(paths[: args.shot])
    base.calibrate(DEFAULT_RATE)
    normal = paths[args.shot :]
    rejected = [path for path, one in zip(normal, decisions(base, base.inspect(normal)), strict=True) if one != NORMAL]
    others = [path for path in normal if path not in rejected[: max(ACCEPTED)]]
    for number in (number for number in ACCEPTED if number <= len(rejected)):
        detector, begin = copy.copy(base), time.perf_counter()
        if number:
            accept(detector, rejected[:number], force=True)
        seconds = time.perf_counter() - begin
        of_normal, of_defects = (decisions(detector, detector.inspect(paths)) for paths in (others, defects))
        yield {
            "category": category,
            "rejected": len(rejected),
            "accepted": number,
            "normal_rejected": 1 - of_normal.count(NORMAL) / len(others),
            "defects_found": 1 - of_defects.count(NORMAL) / len(defects),
            "defects_defective": of_defects.count(DEFECTIVE) / len(defects),
            "threshold": detector.threshold.value,
            "seconds": seconds,
        }
    print(f"{category} measured", flush=True)


def report(rows: Sequence[dict]) -> str:
    """Markdown table: one row per category and number of accepted images."""
    lines = [
        "| category | rejected at first | accepted | others rejected | defects found | threshold | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        shares = f"{row['normal_rejected']:.0%} | {row['defects_found']:.0%}"
        cells = (
            row["category"],
            row["rejected"],
            row["accepted"],
            shares,
            f"{row['threshold']:.3f}",
            f"{row['seconds']:.1f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
