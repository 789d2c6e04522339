"""Compares backbones, scorers and variants of scorers on real categories without training.

A method is a backbone and a scorer. All methods are scored on the same support sets and test images, so differences are
paired over rounds. A variant differs from a scorer of the project in one choice.

python -m benchmarks.scorers                     the scorers of both backbones: benchmarks/results/scorers_<K>.json
python -m benchmarks.scorers --variants all      the variants too: benchmarks/results/scorers_<K>_variants.json
python -m benchmarks.scorers --report            prints the tables of the files there

Tables: image AUROC, PRO and pixel AUROC by category; the difference to BASE; how many categories would have made the
choice without themselves (`held out`); and, with the variants, what is reached on each category by the variant of
`combined` that is best on all others.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.reference import DATA, TRUNK
from benchmarks.scoring import RESULTS, command_line
from datasets.mvtec import LabelledDataset, category_folder, list_test_items
from datasets.support import find_support_rounds
from evaluation.scoring import compute_test_features, score_rounds
from evaluation.statistics import summary
from models.networks import resolve_img_size, scoring_network
from models.stn import fuse_conv_bn
from scorers.base import Scorer
from scorers.combined import Combined
from scorers.gaussian import Gaussian
from scorers.neighbours import Neighbours, NeighboursConfig
from scorers.positions import Positions
from scorers.views import VIEWS_PER_IMAGE
from utils.choices import LITE_BACKBONE, NORMALISED, RELEASE_BACKBONE, SEVERAL
from utils.config import script_parser
from utils.devices import command_device
from utils.errors import UserError, run_command
from utils.files import require_writable, write_json
from utils.records import provenance
from utils.stages import StageClock

METRICS = {"image_auroc": "image AUROC", "pro": "PRO", "pixel_auroc": "pixel AUROC"}
BASE = f"{RELEASE_BACKBONE} neighbours"
AT_ONCE = 3  # methods that share a pass of the images through the network; limited by memory


def _neighbours(views: Sequence[int] = Neighbours.views, **options: object) -> Scorer:
    scorer = Neighbours(NeighboursConfig(**options))
    scorer.views = tuple(views)
    return scorer


NORMALISED_BACKBONE = RELEASE_BACKBONE + NORMALISED
SCORERS: dict[str, tuple[type[Scorer], ...]] = {
    LITE_BACKBONE: (Neighbours, Positions, Combined),
    RELEASE_BACKBONE: (Gaussian, Neighbours),
}
MORE_BACKBONES: dict[str, tuple[type[Scorer], ...]] = {  # with --variants all
    NORMALISED_BACKBONE: (Neighbours, Combined),
    SEVERAL.join([NORMALISED_BACKBONE, LITE_BACKBONE]): (Neighbours, Combined),
}
VARIANTS: dict[str, dict[str, Callable[[], Scorer]]] = {
    RELEASE_BACKBONE: {
        "neighbours, all views": partial(_neighbours, range(VIEWS_PER_IMAGE)),
        "neighbours, the image alone": partial(_neighbours, (0,)),
        "neighbours, grid twice as fine": partial(_neighbours, finer=2),
        "neighbours, layer 1 too": partial(_neighbours, layers=3),
        "neighbours, no local average": partial(_neighbours, window=1),
        "neighbours, no whitening": partial(_neighbours, whitening=0),
        "neighbours, no damping": partial(_neighbours, damped=False),
        "neighbours, 2,000 embeddings": partial(_neighbours, bank_size=2000),
    },
    LITE_BACKBONE: {
        **{
            f"combined, weights {of_map} {of_score}": partial(Combined, of_map, of_score)
            for of_map, of_score in ((0.35, 0.35), (0.5, 0.5), (0.65, 0.65), (0.2, 0.65), (0.35, 0.8))
        },
        **{f"combined, border {weight}": partial(Combined, border_weight=weight) for weight in (0.8, 1.0)},
        **{
            f"combined, level {of_map} {of_score}": partial(Combined, level_powers=(of_map, of_score))
            for of_map, of_score in ((0.0, 0.0), (0.15, 0.15), (0.3, 0.0), (0.3, 0.3), (0.6, 0.3))
        },
        **{f"combined, window {side}": partial(Combined, window=side) for side in (1, 5)},
    },
}


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = script_parser(__doc__)
    parser.add_argument("--obj", nargs="+", help="default: every category with a test set")
    parser.add_argument("--shot", type=int, default=2, help="support images")
    parser.add_argument("--rounds", type=int, default=10, help="support sets")
    parser.add_argument(
        "--variants", choices=("few", "all"), default="few", help="few: the scorers of the project only"
    )
    parser.add_argument("--data_path", type=Path, default=DATA, help="folder of the categories")
    parser.add_argument("--weights", default=str(TRUNK), help=f"of {RELEASE_BACKBONE}")
    parser.add_argument("--num_workers", type=int, default=2, help="threads that decode images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--report", action="store_true", help="print the tables of the JSON files without measuring")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all categories, prints the tables and writes one JSON file."""
    args = get_args_parser().parse_args(argv)
    if args.report:
        files = sorted(args.output.glob("scorers_[0-9]*.json"), key=lambda path: int(path.stem.split("_")[1]))
        print("\n\n".join(report(json.loads(file.read_text())) for file in files))
        return
    require_writable(args.output, "--output", folder=True)
    device, begin = command_device(args.device), time.perf_counter()
    names = args.obj or sorted(path.parent.name for path in args.data_path.glob("*/test"))
    if not names:
        raise UserError(f"no category with a folder test in {args.data_path}")
    content = {"command": command_line("benchmarks.scorers", args), **provenance(device)}
    content["rounds"] = {name: {} for name in names}
    everything = args.variants == "all"
    for backbone, scorers in (SCORERS | MORE_BACKBONES if everything else SCORERS).items():
        methods = {scorer.name: scorer for scorer in scorers} | (VARIANTS.get(backbone, {}) if everything else {})
        for name in names:
            content["rounds"][name] |= _measure(name, backbone, methods, device, args)
    content["total_seconds"] = time.perf_counter() - begin
    target = args.output / f"scorers_{args.shot}{'_variants' if args.variants == 'all' else ''}.json"
    write_json(target, content)
    print(report(content))
    print(f"\n{content['total_seconds']:.0f} s; written: {target}")


def _measure(
    category: str,
    backbone: str,
    methods: dict[str, Callable[[], Scorer]],
    device: torch.device,
    args: argparse.Namespace,
) -> dict[str, dict[str, list]]:
    """The metrics by method: per metric a list with one value per round, rounded to 1e-6."""
    size = resolve_img_size(backbone, None)
    weights = "imagenet" if backbone == LITE_BACKBONE else args.weights
    network = fuse_conv_bn(scoring_network(backbone, "rotation_scale", size, None, weights).to(device))
    folder = category_folder(args.data_path, "folder", category)
    items = list_test_items(folder)
    dataset, labels = LabelledDataset(items, size), [item.label for item in items]
    rounds = find_support_rounds(None, folder, args.shot, args.rounds, size).images
    found: dict[str, dict[str, list]] = {f"{backbone} {name}": {metric: [] for metric in METRICS} for name in methods}
    for start in range(0, len(methods), AT_ONCE):
        scorers, clock = [], StageClock(device)
        for name in list(methods)[start : start + AT_ONCE]:
            scorers.append(methods[name]())
            scorers[-1].name = name
        test = compute_test_features(network, scorers, dataset, labels, clock, None, args.num_workers)
        for results in score_rounds(network, test, rounds, clock, all_metrics=True):
            for name, result in results.items():
                for metric, values in found[f"{backbone} {name}"].items():
                    number = result.numbers[metric]
                    values.append(None if number is None else round(number, 6))
    means = [f"{name} {100 * np.mean(values['image_auroc']):.1f}" for name, values in found.items()]
    print(f"{category}: {', '.join(means)}", flush=True)
    return found


def report(content: dict) -> str:
    """Markdown tables in percent, one per metric."""
    rounds = content["rounds"]
    count = len(next(iter(rounds.values()))[BASE]["image_auroc"])
    lines = [f"{content['command']} (commit {content['commit']}, {content['device']}, {count} rounds, percent)"]
    for metric in METRICS:
        lines += ["", *_table(rounds, metric)]
    return "\n".join([*lines, "", *_chosen_without(rounds)])


def _table(rounds: dict, metric: str) -> Iterator[str]:
    categories = _with_metric(rounds, metric)
    yield f"| {METRICS[metric]} | {' | '.join(categories)} | mean | minus {BASE} (95 %) | held out |"
    yield "|---" + "|---:" * (len(categories) + 3) + "|"
    for name in next(iter(rounds.values())):
        values = [100 * np.mean(rounds[category][name][metric]) for category in categories]
        cells = [f"{value:.1f}" for value in values] + [f"{np.mean(values):.2f}"]
        yield f"| {' | '.join([name, *cells, *_paired(rounds, categories, name, metric)])} |"


def _with_metric(rounds: dict, metric: str) -> list[str]:
    """The categories for which the metric is defined."""
    return [name for name, methods in rounds.items() if None not in methods[BASE][metric]]


def _paired(rounds: dict, categories: Sequence[str], name: str, metric: str) -> tuple[str, str]:
    """Two cells: the mean difference to BASE with Student's 95 % interval over rounds, and the `held out` count.

    The count is the number of categories whose difference has the sign of the mean difference of the others.
    """
    if name == BASE:
        return "", ""
    gains = np.array([100 * np.subtract(*(rounds[c][one][metric] for one in (name, BASE))) for c in categories])
    numbers = summary(gains.mean(axis=0).tolist())  # gains: (categories, rounds)
    interval = numbers["interval95"]
    text = f"{numbers['mean']:+.2f}" + (f" ({interval[0]:+.2f} to {interval[1]:+.2f})" if interval else "")
    own = gains.mean(axis=1)
    others = (own.sum() - own) / max(1, len(own) - 1)
    return text, f"{int((np.sign(others) == np.sign(own)).sum())} of {len(own)}"


def _chosen_without(rounds: dict) -> Iterator[str]:
    """For each category the variant of `combined` with the best image AUROC plus PRO on the others, judged on it."""
    variants = [name for name in next(iter(rounds.values())) if name.startswith(f"{LITE_BACKBONE} combined")]
    if len(variants) < 2:
        return
    means = {c: {v: {m: _mean(rounds[c][v][m]) for m in METRICS} for v in variants} for c in rounds}
    yield f"| category | chosen without it | {' | '.join(METRICS.values())} |"
    yield "|---|---" + "|---:" * len(METRICS) + "|"
    for category in rounds:

        def merit(variant: str, left_out: str = category) -> float:
            others = [means[name][variant] for name in rounds if name != left_out]
            return sum(np.nanmean([numbers[metric] for numbers in others]) for metric in ("image_auroc", "pro"))

        best = max(variants, key=merit)
        yield f"| {category} | {best} | {' | '.join(f'{value:.1f}' for value in means[category][best].values())} |"


def _mean(values: Sequence[float | None]) -> float:
    return 100 * float(np.mean(values)) if None not in values else float("nan")


if __name__ == "__main__":
    run_command(main)
