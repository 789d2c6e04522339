"""Compares scorers, and variants of the neighbours scorer, on real categories without training.

A variant differs from the scorer of the project in one choice; `prototype` differs in several. All variants are scored
on the same features and support sets, so the differences are paired over rounds. The column `held out` counts the
categories on which the mean difference of the other categories has the same sign: the choice would also have been made
without the category it is judged on.

python -m benchmarks.scorers                     gaussian, prototype, neighbours: benchmarks/results/scorers_<K>.json
python -m benchmarks.scorers --variants all      every variant too: benchmarks/results/scorers_<K>_variants.json
python -m benchmarks.scorers --report            prints the tables of the files there
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
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
from scorers.features import FeatureNetwork
from scorers.gaussian import Gaussian
from scorers.neighbours import Neighbours, NeighboursConfig
from scorers.views import TRANSLATED_VIEWS, VIEWS_PER_IMAGE
from utils.devices import command_device
from utils.errors import UserError, run_command
from utils.files import require_writable, write_json
from utils.records import provenance
from utils.stages import StageClock

ALL_VIEWS = tuple(range(VIEWS_PER_IMAGE))
METRICS = ("image_auroc", "pixel_auroc")
BASE = "neighbours"
PROTOTYPE = NeighboursConfig(finer=2, components=None, whitening=0, damped=False, bank_size=6000)
VARIANTS: dict[str, tuple[NeighboursConfig, tuple[int, ...]]] = {
    "prototype": (PROTOTYPE, ALL_VIEWS),
    BASE: (NeighboursConfig(), Neighbours.views),
    "with the translated and grey views": (NeighboursConfig(), ALL_VIEWS),
    "without rotated views": (
        NeighboursConfig(),
        tuple(v for v in Neighbours.views if v == 0 or v > TRANSLATED_VIEWS[-1]),
    ),
    "the image alone": (NeighboursConfig(), (0,)),
    "grid twice as fine": (NeighboursConfig(finer=2), Neighbours.views),
    "layer 3 alone": (NeighboursConfig(layers=1), Neighbours.views),
    "layer 1 too": (NeighboursConfig(layers=3), Neighbours.views),
    "no local average": (NeighboursConfig(window=1), Neighbours.views),
    "average over 5 x 5": (NeighboursConfig(window=5), Neighbours.views),
    "64 components": (NeighboursConfig(components=64), Neighbours.views),
    "no whitening": (NeighboursConfig(whitening=0), Neighbours.views),
    "full whitening": (NeighboursConfig(whitening=1), Neighbours.views),
    "no damping": (NeighboursConfig(damped=False), Neighbours.views),
    "2,000 rows": (NeighboursConfig(bank_size=2000), Neighbours.views),
}
CHOSEN_ON = 2  # rounds at K = 2 on which the choices were made
FEW = ("prototype", BASE)


def make_variant(name: str) -> Scorer:
    """The scorer of one row of the table."""
    if name == Gaussian.name:
        return Gaussian()
    config, views = VARIANTS[name]
    scorer = Neighbours(config)
    scorer.name, scorer.views = name, views
    return scorer


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--obj", nargs="+", help="default: every category with a test set")
    parser.add_argument("--shot", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--variants", choices=("few", "all"), default="few", help="few: prototype and neighbours only")
    parser.add_argument("--data_path", type=Path, default=DATA)
    parser.add_argument("--weights", default=str(TRUNK))
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--report", action="store_true", help="print the tables of the JSON files without measuring")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all categories, prints the table and writes one JSON file."""
    args = get_args_parser().parse_args(argv)
    if args.report:
        files = sorted(args.output.glob("scorers_[0-9]*.json"), key=lambda path: int(path.stem.split("_")[1]))
        print("\n\n".join(report(json.loads(file.read_text())) for file in files))
        return
    require_writable(args.output, "--output", folder=True)
    device, begin = command_device(args.device), time.perf_counter()
    size = resolve_img_size(args.backbone, None)
    network = fuse_conv_bn(scoring_network(args.backbone, "rotation_scale", size, None, args.weights).to(device))
    names = args.obj or sorted(path.parent.name for path in args.data_path.glob("*/test"))
    if not names:
        raise UserError(f"no category with a folder test in {args.data_path}")
    content = {"command": command_line("benchmarks.scorers", args), **provenance(device), "rounds": {}}
    for name in names:
        content["rounds"][name] = _measure(name, network, size, device, args)
    content["total_seconds"] = time.perf_counter() - begin
    ending = "_variants" if args.variants == "all" else ""
    target = args.output / f"scorers_{args.shot}{ending}.json"
    write_json(target, content)
    print(report(content))
    print(f"\n{content['total_seconds']:.0f} s; written: {target}")


def _measure(
    category: str, network: FeatureNetwork, size: int, device: torch.device, args: argparse.Namespace
) -> dict[str, dict[str, list]]:
    """The metrics by variant: per metric a list with one value per round."""
    folder = category_folder(args.data_path, "folder", category)
    items = list_test_items(folder)
    rounds = find_support_rounds(None, folder, args.shot, args.rounds, size).images
    variants = [Gaussian.name, *(FEW if args.variants == "few" else VARIANTS)]
    found: dict[str, dict[str, list]] = {name: {metric: [] for metric in METRICS} for name in variants}
    for group in _in_groups(variants):
        scorers, clock = [make_variant(name) for name in group], StageClock(device)
        dataset, labels = LabelledDataset(items, size), [item.label for item in items]
        test = compute_test_features(network, scorers, dataset, labels, clock, None, args.num_workers)
        for results in score_rounds(network, test, rounds, clock):
            for name, result in results.items():
                found[name]["image_auroc"].append(result.image_auroc)
                found[name]["pixel_auroc"].append(result.pixel_auroc)
    means = {name: 100 * float(np.mean(of["image_auroc"])) for name, of in found.items()}
    print(f"{category}: " + ", ".join(f"{name} {means[name]:.1f}" for name in (Gaussian.name, *FEW)), flush=True)
    return found


def _in_groups(names: Sequence[str], size: int = 8) -> Iterator[Sequence[str]]:
    """Groups of variants that share one pass of the images through the network; `size` is limited by memory."""
    for start in range(0, len(names), size):
        yield names[start : start + size]


def report(content: dict) -> str:
    """Markdown table in percent: image AUROC per category and mean, paired difference to BASE, mean pixel AUROC."""
    rounds = content["rounds"]
    categories, names = list(rounds), list(next(iter(rounds.values())))
    count = len(rounds[categories[0]][BASE]["image_auroc"])
    lines = [f"{content['command']} (commit {content['commit']}, {content['device']}, {count} rounds, percent)", ""]
    lines.append(f"| scorer | {' | '.join(categories)} | image mean | minus {BASE} (95 %) | held out | pixel mean |")
    lines.append("|---" + "|---:" * (len(categories) + 4) + "|")
    for name in names:
        image = [100 * np.mean(rounds[category][name]["image_auroc"]) for category in categories]
        cells = [f"{value:.1f}" for value in image] + [f"{np.mean(image):.2f}", *_paired(rounds, categories, name)]
        lines.append(f"| {' | '.join([name, *cells, _pixel_mean(rounds, categories, name)])} |")
    lines += ["", *_unseen_rounds(rounds, categories)] if count > CHOSEN_ON else []
    return "\n".join(lines)


def _unseen_rounds(rounds: dict, categories: Sequence[str]) -> Iterator[str]:
    """Differences of the means on the support sets that played no part in the choices."""
    for other in (Gaussian.name, "prototype"):
        gains = [
            100 * np.mean(np.subtract(*(rounds[name][one]["image_auroc"][CHOSEN_ON:] for one in (BASE, other))))
            for name in categories
        ]
        yield f"- without the first {CHOSEN_ON} rounds: {BASE} - {other} {np.mean(gains):+.2f}"


def _paired(rounds: dict, categories: Sequence[str], name: str) -> tuple[str, str]:
    """Two cells: the mean difference to BASE with Student's 95 % interval over rounds, and the `held out` count.

    The count is the number of categories whose difference has the sign of the mean difference of the others.
    """
    if name == BASE:
        return "", ""
    gains = np.array(
        [
            100 * np.subtract(rounds[category][name]["image_auroc"], rounds[category][BASE]["image_auroc"])
            for category in categories
        ]
    )  # (categories, rounds)
    numbers = summary(gains.mean(axis=0).tolist())
    interval = numbers["interval95"]
    text = f"{numbers['mean']:+.2f}" + (f" ({interval[0]:+.2f} to {interval[1]:+.2f})" if interval else "")
    own = gains.mean(axis=1)
    others = (own.sum() - own) / max(1, len(own) - 1)
    return text, f"{int((np.sign(others) == np.sign(own)).sum())} of {len(own)}"


def _pixel_mean(rounds: dict, categories: Sequence[str], name: str) -> str:
    values = [rounds[category][name]["pixel_auroc"] for category in categories]
    known = [100 * np.mean(of_category) for of_category in values if None not in of_category]
    return f"{np.mean(known):.2f} ({len(known)} of {len(values)})" if known else "n/a"


if __name__ == "__main__":
    run_command(main)
