"""Measures the false alarms of the threshold of predict.py on real categories, by default without training.

The test features of a category are computed once. Each draw contains as many support images as the largest K. Its first
K images give the detector for K. The threshold is computed from leave-one-out scores, as in predict.py.

python -m benchmarks.threshold             print the table, write benchmarks/results/threshold_<scorer>_<device>.json
python -m benchmarks.threshold --report    print the table of that file
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.reference import DATA, TRUNK, draw_support_images
from benchmarks.scoring import RESULTS
from datasets.mvtec import LabelledDataset, category_folder, list_test_items
from datasets.support import read_support_images
from evaluation.metrics import auroc, rank
from evaluation.scoring import TestFeatures, compute_test_features
from inspection.detector import DEFAULT_SCORER
from inspection.threshold import leave_one_out, normal_threshold
from models.regad import load_checkpoint, untrained
from models.stn import STNResNet, folded
from scorers.base import Prepared
from scorers.features import FeatureStore, write_support_image
from scorers.maps import score_maps_at
from scorers.registry import SCORERS, make_scorer
from scorers.views import VIEWS_PER_IMAGE
from utils.devices import command_device
from utils.errors import run_command
from utils.files import require_writable, write_json
from utils.records import plain_arguments, provenance
from utils.stages import StageClock

COLUMNS = {
    "false_alarms": "false alarms",
    "worst": "of the worst draw",
    "defects_called": "defects called",
    "defects_at_rate": "at a rate as asked",
    "auroc": "AUROC",
    "normal_spread": "spread of normal logs",
    "left_out_spread": "of left-out logs",
    "left_out_shift": "left out minus normal",
}
CATEGORIES = ["screw", "magnetic_tile", "solar_mono", "solar_poly", "bottle", "transistor", "grid"]
PERCENT = ("false_alarms", "worst", "defects_called", "defects_at_rate")


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--obj", nargs="+", default=CATEGORIES)
    parser.add_argument("--shots", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--draws", type=int, default=4, help="draws of support images, seed 0")
    parser.add_argument("--false_alarm", type=float, default=0.05)
    parser.add_argument("--scorer", choices=list(SCORERS), default=DEFAULT_SCORER)
    parser.add_argument("--data_path", type=Path, default=DATA)
    parser.add_argument("--weights", default=str(TRUNK))
    parser.add_argument("--checkpoint", type=Path, help="with stn_mode rotation_scale, instead of --weights")
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--report", action="store_true", help="print the table of the JSON file without measuring")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all categories, prints the table and writes one JSON file."""
    args = get_args_parser().parse_args(argv)
    device = command_device(args.device)
    target = args.output / f"threshold_{args.scorer}_{device.type}.json"
    if args.report:
        print(report(json.loads(target.read_text())))
        return
    require_writable(args.output, "--output", folder=True)
    begin, arguments = time.perf_counter(), plain_arguments(args)
    args.scorer = make_scorer(args.scorer)
    if args.checkpoint:
        network = load_checkpoint(args.checkpoint, "rotation_scale", args.img_size).stn
    else:
        network = untrained(args.weights, img_size=args.img_size).stn
    network, clock = folded(network.to(device)), StageClock(device)
    rounds = [row for name in args.obj for row in _measure(name, network, clock, args)]
    content = {"arguments": arguments, **provenance(device), "rounds": rounds, "seconds": clock.seconds}
    content["total_seconds"] = time.perf_counter() - begin
    write_json(target, content)
    print(report(content))
    print(f"{content['total_seconds']:.0f} s; written: {target}")


def report(content: dict) -> str:
    """Markdown table of the results: one row per category and K, means over the draws."""
    lines = [f"| category | K | {' | '.join(COLUMNS.values())} |", "|---" * (2 + len(COLUMNS)) + "|"]
    keys = dict.fromkeys((row["category"], row["shot"]) for row in content["rounds"])
    for key in keys:
        rows = [row for row in content["rounds"] if (row["category"], row["shot"]) == key]
        values = {name: np.mean([row[name] for row in rows]) for name in COLUMNS if name != "worst"}
        values["worst"] = max(row["false_alarms"] for row in rows)
        cells = [f"{values[name]:.0%}" if name in PERCENT else f"{values[name]:.2f}" for name in COLUMNS]
        lines.append(f"| {' | '.join([key[0], str(key[1]), *cells])} |")
    return "\n".join(lines)


def _measure(category: str, network: STNResNet, clock: StageClock, args: argparse.Namespace) -> Iterator[dict]:
    """Yields one result row per draw and K."""
    folder = category_folder(args.data_path, "folder", category)
    items = list_test_items(folder)
    dataset, labels = LabelledDataset(items, args.img_size), [item.label for item in items]
    test = compute_test_features(network, [args.scorer], dataset, labels, clock, None, args.num_workers)
    largest = max(args.shots)
    for number, paths in enumerate(draw_support_images(folder, largest, args.draws, seed=0)):
        store = FeatureStore([args.scorer], largest, with_views=True)
        images = read_support_images(paths, args.img_size).to(clock.device)
        with clock("network"):
            for at, image in enumerate(images):
                write_support_image(store, at, network, image, VIEWS_PER_IMAGE)
        for shot in args.shots:
            support = store.part(0, shot)[args.scorer.name]
            row = _judge(support, test, clock, args)
            print(f"{category}, K = {shot}, draw {number}: {row['false_alarms']:.0%} false alarms", flush=True)
            yield {"category": category, "shot": shot, "support": [path.name for path in paths[:shot]], **row}


def _judge(support: Prepared, test: TestFeatures, clock: StageClock, args: argparse.Namespace) -> dict:
    """Applies the threshold of one support set to the test images.

    false_alarms, defects_called: shares of normal and defective test images with a score above the threshold.
    defects_at_rate: the same for defective images, with the threshold that has exactly the requested rate.
    normal_spread: standard deviation of the logarithms of the normal test scores. left_out_spread: the same for the
    left-out views, from which the threshold is computed. left_out_shift: mean logarithm of the scores of the left-out
    views minus that of the normal test scores.
    """
    distances = args.scorer.measure(support, test.features.prepared[args.scorer.name], clock)
    scores = score_maps_at(distances, args.img_size)[0].cpu().numpy()
    left_out, left_out_maps = leave_one_out(args.scorer, support, args.img_size, clock)
    threshold = normal_threshold(left_out, left_out_maps, args.false_alarm, "").value
    normal, defective = scores[~test.labels], scores[test.labels]
    exact = np.quantile(normal, 1 - args.false_alarm)
    return {
        "threshold": threshold,
        "false_alarms": float((normal > threshold).mean()),
        "defects_called": float((defective > threshold).mean()),
        "defects_at_rate": float((defective > exact).mean()),
        "auroc": auroc(rank(scores, test.labels)),
        "normal_spread": float(np.log(normal).std(ddof=1)),
        "left_out_spread": float(np.log(left_out).std()),
        "left_out_shift": float(np.log(left_out).mean() - np.log(normal).mean()),
    }


if __name__ == "__main__":
    run_command(main)
