"""Measures the thresholds of predict.py on real categories, by default without training.

The features of a category's test images are computed once. Each draw contains as many support images as the largest K,
and further images for calibration. Its first K images give the detector for K. The thresholds for all RATES are
computed from leave-one-out scores, as in predict.py, and once more from the scores of the calibration images.

python -m benchmarks.threshold             print the table, write benchmarks/results/threshold_<scorer>_<device>.json
python -m benchmarks.threshold --report    print the table of that file
python -m benchmarks.threshold --choose    measure, then choose the prior of combined without each category in turn

The JSON file has one entry per category and K: means over the draws, and the highest value of all draws.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.measuring import evenly, measuring_parser, report_or_measure
from benchmarks.reference import TRUNK, draw_support_images
from datasets.mvtec import LabelledDataset, LabelledImage, category_folder, list_test_items
from datasets.support import read_support_images
from evaluation.scoring import TestFeatures, compute_test_features
from inspection.threshold import NormalScores, left_out_scores, normal_threshold, scored_views
from models.networks import RELEASE_IMG_SIZE, resolve_img_size, scoring_network
from models.regad import load_checkpoint
from models.stn import STNResNet, fuse_conv_bn
from scorers.base import Prepared, ScorePrior
from scorers.combined import Combined
from scorers.features import FeatureStore, write_support_images
from scorers.maps import score_maps_at
from scorers.registry import SCORERS, make_scorer
from scorers.views import VIEWS_PER_IMAGE
from utils.choices import DEFAULT_SCORER, LITE_BACKBONE, RELEASE_BACKBONE
from utils.devices import command_device
from utils.errors import run_command
from utils.stages import StageClock

RATES = (0.01, 0.05)  # of --false_positive_rate and --review_rate
KINDS = {"": "", "calibrated_": ", calibrated"}  # of the thresholds: from leave-one-out scores, or calibration images
MOST = 0.3  # of the rate of a draw, in the choice of the prior
# The priors that --choose tries: spread, images, bias, lift
CHOICES = tuple(
    Combined.prior._replace(spread=spread, images=images, bias=bias, lift=lift)
    for spread, images, bias, lift in itertools.product(
        (0.03, 0.04, 0.05, 0.06, 0.07),
        (4, 8, 12),
        (0.0, 0.05, 0.1, 0.15, 0.2, 0.25),
        (0.0, 0.01, 0.02, 0.03, 0.04, 0.05),
    )
)


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = measuring_parser(__doc__)
    parser.add_argument("--shots", nargs="+", type=int, default=[2, 4, 8], help="numbers of support images")
    parser.add_argument("--draws", type=int, default=6, help="draws of support and calibration images, seed 0")
    parser.add_argument("--calibration", type=int, default=20, help="further normal images of a calibration")
    parser.add_argument("--images", type=int, default=40, help="normal and defective test images each, at most")
    parser.add_argument("--scorer", choices=list(SCORERS), default=DEFAULT_SCORER, help="of the detectors")
    parser.add_argument("--weights", default=str(TRUNK), help="ImageNet weights of ResNet-18")
    parser.add_argument("--checkpoint", type=Path, help="with stn_mode rotation_scale, instead of --weights")
    parser.add_argument("--backbone", default=LITE_BACKBONE, help="of the detectors")
    parser.add_argument("--img_size", type=int, help="side of the network's input (default: that of the backbone)")
    parser.add_argument("--num_workers", type=int, default=2, help="threads that decode images")
    parser.add_argument("--choose", action="store_true", help="choose the prior for each category from the others")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all categories, prints the table and writes one JSON file."""
    args = get_args_parser().parse_args(argv)
    device = command_device(args.device)
    target = args.output / f"threshold_{args.scorer}_{device.type}.json"
    rounds: list[dict] = []

    def measure() -> dict:
        network, clock = fuse_conv_bn(_network(args).to(device)), StageClock(device)
        args.scorer = make_scorer(args.scorer)
        rounds.extend(row for name in args.obj for row in _measure(name, network, clock, args))
        return {"draws": args.draws, "summary": summarise(rounds), "seconds": clock.seconds}

    report_or_measure("benchmarks.threshold", args, target, device, measure, report)
    if args.choose and rounds:
        print(choose(rounds))


def _network(args: argparse.Namespace) -> STNResNet:
    """The network, of the checkpoint if there is one; sets the image size that was not given."""
    if args.checkpoint:
        args.img_size = args.img_size or RELEASE_IMG_SIZE
        return load_checkpoint(args.checkpoint, "rotation_scale", args.img_size).stn
    args.img_size = resolve_img_size(args.backbone, args.img_size)
    weights = args.weights if args.backbone == RELEASE_BACKBONE else "imagenet"
    return scoring_network(args.backbone, "rotation_scale", args.img_size, None, weights)


def summarise(rounds: Sequence[dict]) -> list[dict]:
    """One entry per category and K, from one row per draw: means, and the highest rate of a draw."""
    groups = dict.fromkeys((row["category"], row["shot"]) for row in rounds)
    entries = []
    for category, shot in groups:
        rows = [row for row in rounds if (row["category"], row["shot"]) == (category, shot)]
        values = {key: float(np.mean([row[key] for row in rows])) for key in _keys()}
        highest = {f"highest_{key}": max(row[key] for row in rows) for key in _keys() if "above" in key}
        entries.append({"category": category, "shot": shot, **values, **highest})
    return entries


def _keys() -> list[str]:
    """The columns of a round: the share of good images above a threshold and of defective ones below it."""
    return [f"{kind}{side}_{rate}" for kind in KINDS for rate in RATES for side in ("above", "below")]


def report(content: dict) -> str:
    """Markdown table: one row per category and K and per kind of threshold, then the means over the categories."""
    names = [f"good above {rate:.0%} | highest | defects below {rate:.0%}" for rate in RATES]
    lines = [f"| category | K | {' | '.join(names)} |", "|---|---" + "|---:" * 3 * len(RATES) + "|"]
    entries = content["summary"]
    shots = list(dict.fromkeys(row["shot"] for row in entries))
    for name in [*dict.fromkeys(row["category"] for row in entries), "all"]:
        own = [row for row in entries if name in ("all", row["category"])]
        for kind, label in KINDS.items():
            for shot in shots if not kind else shots[-1:]:
                rows = [row for row in own if row["shot"] == shot]
                cells = [cell for rate in RATES for cell in _cells(rows, kind, rate)]
                lines.append(f"| {name} | {shot}{label} | {' | '.join(f'{cell:.0%}' for cell in cells)} |")
    return "\n".join(lines)


def _cells(rows: Sequence[dict], kind: str, rate: float) -> tuple[float, float, float]:
    """Mean and highest share of good images above, and mean share of defects below."""
    above, below = (np.mean([row[f"{kind}{side}_{rate}"] for row in rows]) for side in ("above", "below"))
    return above, max(row[f"highest_{kind}above_{rate}"] for row in rows), below


def _measure(category: str, network: STNResNet, clock: StageClock, args: argparse.Namespace) -> Iterator[dict]:
    """Yields one result row per draw and K."""
    folder = category_folder(args.data_path, "folder", category)
    items = _some(list_test_items(folder), args.images)
    dataset, labels = LabelledDataset(items, args.img_size), [item.label for item in items]
    test = compute_test_features(network, [args.scorer], dataset, labels, clock, None, args.num_workers)
    largest = max(args.shots)
    images = largest + args.calibration
    for number, paths in enumerate(draw_support_images(folder, images, args.draws, seed=0)):
        support = _features(paths[:largest], network, clock, args, with_views=True)
        calibration = _features(paths[largest:], network, clock, args, with_views=False)
        for shot in args.shots:
            first = support.part(0, shot)[args.scorer.name]
            row = _judge(first, calibration.prepared[args.scorer.name], test, clock, args)
            print(f"{category}, K = {shot}, draw {number}: above 5 % {row['above_0.05']:.0%}", flush=True)
            yield {"category": category, "shot": shot, "support": [path.name for path in paths[:shot]], **row}


def _some(items: Sequence[LabelledImage], count: int) -> list[LabelledImage]:
    """At most `count` normal and as many defective images, evenly spread."""
    kept = []
    for label in (0, 1):
        kept += evenly([item for item in items if item.label == label], count)
    return kept


def _features(
    paths: Sequence[Path], network: STNResNet, clock: StageClock, args: argparse.Namespace, with_views: bool
) -> FeatureStore:
    """The prepared features of images, of all their views or of the images alone."""
    store = FeatureStore([args.scorer], len(paths), with_views)
    images = read_support_images(paths, args.img_size).to(clock.device)
    with clock("network"):
        if with_views:
            write_support_images(store, range(len(images)), network, images, VIEWS_PER_IMAGE)
        else:
            for at, image in enumerate(images):
                store.write(at, network.features(image[None]))
    return store


def _judge(
    support: Prepared, calibration: Prepared, test: TestFeatures, clock: StageClock, args: argparse.Namespace
) -> dict:
    """Applies the thresholds of one support set to the test images.

    above_..., below_...: for each rate, the shares of normal test images above the threshold from leave-one-out scores,
    and of defective ones below it. calibrated_...: the same with the threshold from the calibration images. normal,
    defective, loo_scores: scores.
    """
    fitted, distances = args.scorer.cross_fit(support, clock, scored_views(args.scorer))

    def score(features: Prepared) -> NormalScores:
        scores, maps = score_maps_at(
            args.scorer.distance_maps(fitted, features), args.img_size, border_weight=args.scorer.border_weight
        )
        return NormalScores(scores.cpu().numpy()[:, None], maps.cpu().numpy(), is_loo=False)

    scores = np.concatenate([score(part).scores[:, 0] for part in test.features.parts(args.scorer.name)])
    loo = left_out_scores(args.scorer, distances, args.img_size)
    normal, defective = scores[~test.truth.labels], scores[test.truth.labels]
    row = {"normal": normal.tolist(), "defective": defective.tolist(), "loo_scores": loo.scores[:, 0].tolist()}
    for kind, seen in zip(KINDS, (loo, score(calibration)), strict=True):
        for rate in RATES:
            value = normal_threshold(seen, rate, args.scorer.prior, "").value
            row |= {
                f"{kind}above_{rate}": float((normal > value).mean()),
                f"{kind}below_{rate}": float((defective <= value).mean()),
            }
    return row


def choose(rounds: Sequence[dict]) -> str:
    """Chooses the prior on all categories but one, for each category, and applies it to that one."""
    names = list(dict.fromkeys(row["category"] for row in rounds))
    tried = {choice: np.array([_shares(choice, row) for row in rounds]) for choice in CHOICES}
    category, shot = (np.array([row[key] for row in rounds]) for key in ("category", "shot"))
    lines = [
        "| category | prior chosen without it | good above 1 % | 5 % | highest 5 % | defects below 1 % | 5 % |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    blind = np.zeros((len(rounds), 4))

    def cells(shares: np.ndarray) -> str:
        values = [*shares[:, :2].mean(axis=0), shares[:, 1].max(), *shares[:, 2:].mean(axis=0)]
        return " | ".join(f"{value:.1%}" for value in values)

    for name in names:
        own = category == name
        choice = min(tried, key=lambda one: _badness(tried[one][~own], shot[~own]))
        blind[own] = tried[choice][own]
        lines.append(f"| {name} | {_numbers(choice)} | {cells(blind[own])} |")
    lines += [f"| all, K = {count} | | {cells(blind[shot == count])} |" for count in dict.fromkeys(shot)]
    best = min(tried, key=lambda one: _badness(tried[one], shot))
    return "\n".join([*lines, f"on all categories: {_numbers(best)}"])


def _numbers(prior: ScorePrior) -> str:
    return f"spread {prior.spread}, images {prior.images}, bias {prior.bias}, lift {prior.lift}"


def _shares(prior: ScorePrior, row: dict) -> list[float]:
    """Of one round with another prior: good images above the thresholds for RATES, then defective ones below."""
    scores = np.array(row["loo_scores"])[:, None]
    seen = NormalScores(scores, np.empty((len(scores), 0, 0)), is_loo=True)
    values = [normal_threshold(seen, rate, prior, "").value for rate in RATES]
    above = [float((np.array(row["normal"]) > value).mean()) for value in values]
    return above + [float((np.array(row["defective"]) <= value).mean()) for value in values]


def _badness(shares: np.ndarray, shot: np.ndarray) -> float:
    """The share of missed defects, and how far the rates are beyond these aims, a little below what is asked for.

    0.9 % and 4 % on average, and no higher rate with a higher K. A draw counts with at most MOST: no choice helps where
    normal images are of another kind than all support images.
    """
    total = shares[:, 2:].mean() * 2
    for above, aim in zip(shares[:, :2].clip(max=MOST).T, (0.009, 0.04), strict=True):
        by_shot = [above[shot == count].mean() for count in sorted(set(shot))]
        total += 8 * max(0.0, above.mean() - aim)
        total += 3 * sum(max(0.0, after - before) for before, after in itertools.pairwise(by_shot))
    return float(total)


if __name__ == "__main__":
    run_command(main)
