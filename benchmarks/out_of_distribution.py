"""Measures which images are flagged as unusual: frames without a part, other parts, turned parts, own images.

python -m benchmarks.out_of_distribution             measure, print the tables and write them to
                                                     benchmarks/results/out_of_distribution_<device>.json
python -m benchmarks.out_of_distribution --report    print the tables of that file
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from benchmarks.measuring import measuring_parser, report_or_measure
from benchmarks.reference import TRUNK, draw_support_images
from datasets.mvtec import category_folder, list_test_items
from datasets.support import read_support_images
from inspection.out_of_distribution import OutOfDistributionCheck, contrast
from models.networks import resolve_img_size, scoring_network
from models.stn import STNResNet, fuse_conv_bn
from scorers.base import Fitted, Prepared
from scorers.features import FeatureStore, write_support_images
from scorers.views import VIEWS_PER_IMAGE
from utils.choices import LITE_BACKBONE, RELEASE_BACKBONE
from utils.devices import command_device
from utils.errors import run_command

FRAMES = 10  # normal test images of a category from which frames are made
BATCH = 8  # images per network pass
OWN = ("normal", "defective")
UPSIDE_DOWN, DARK = "upside down", "15 % of the light"
CHECK = OutOfDistributionCheck()


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = measuring_parser(__doc__)
    parser.add_argument("--shots", nargs="+", type=int, default=[2, 4, 8], help="numbers of support images")
    parser.add_argument("--draws", type=int, default=6, help="draws of support images, seed 0")
    parser.add_argument("--weights", default=str(TRUNK), help="ImageNet weights of ResNet-18")
    parser.add_argument("--backbone", default=LITE_BACKBONE, help="of the detectors")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all categories, prints the tables and writes one JSON file."""
    args = get_args_parser().parse_args(argv)
    device = command_device(args.device)
    target = args.output / f"out_of_distribution_{device.type}.json"

    def measure() -> dict:
        args.img_size = resolve_img_size(args.backbone, None)
        weights = args.weights if args.backbone == RELEASE_BACKBONE else "imagenet"
        network = scoring_network(args.backbone, "rotation_scale", args.img_size, None, weights)
        network = fuse_conv_bn(network.to(device))
        images = {name: _test_images(name, network, device, args) for name in args.obj}
        rounds = [row for name in args.obj for row in _measure(name, images, network, device, args)]
        return {"categories": summarise(rounds)}

    report_or_measure("benchmarks.out_of_distribution", args, target, device, measure, report)


def summarise(rounds: Sequence[dict]) -> list[dict]:
    """One entry per category: the means over draws and K, rounded to 1e-6."""
    entries = []
    for name in dict.fromkeys(row["category"] for row in rounds):
        rows = [row for row in rounds if row["category"] == name]
        shares = {key: round(_mean([row[key] for row in rows]), 6) for key in OWN}
        groups = {
            group: {key: round(_mean([row[group][key] for row in rows]), 6) for key in rows[0][group]}
            for group in ("frames", "others")
        }
        entries.append({"category": name, "runs": len(rows), **shares, **groups})
    return entries


def report(content: dict) -> str:
    """Markdown tables: the share of images flagged as unusual, means over draws and K."""
    entries = content["categories"]
    names = [entry["category"] for entry in entries]
    frames = [key for key in entries[0]["frames"] if key not in (UPSIDE_DOWN, DARK)]
    first = ["caught", *frames, "other parts", DARK, UPSIDE_DOWN, *OWN]
    lines = [f"| detector of | {' | '.join(first)} |", "|---" * (len(first) + 1) + "|"]
    for name in [*names, "all"]:
        rows = [entry for entry in entries if name in (entry["category"], "all")]
        values = [_mean([_caught(row, frames) for row in rows])]
        values += [_mean([row["frames"][key] for row in rows]) for key in frames]
        values += [_mean([share for row in rows for share in row["others"].values()])]
        values += [_mean([row["frames"][key] for row in rows]) for key in (DARK, UPSIDE_DOWN)]
        values += [_mean([row[key] for row in rows]) for key in OWN]
        lines.append(f"| {name} | {' | '.join(f'{value:.1%}' for value in values)} |")
    lines += ["", f"| detector of | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for entry in entries:
        cells = ["" if name == entry["category"] else f"{entry['others'][name]:.0%}" for name in names]
        lines.append(f"| {entry['category']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _caught(row: dict, frames: Sequence[str]) -> float:
    """The share of caught kinds: each kind of frame and each other category counts once."""
    return _mean([*(row["frames"][key] for key in frames), *row["others"].values()])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


class _Images:
    """Kept features, contrasts and labels of the test images of a category, and of the frames made from them."""

    def __init__(self, images: torch.Tensor, labels: Sequence[int], network: STNResNet) -> None:
        self.labels = np.array(labels, bool)
        self.test = _keep(images, network)
        self.frames = {kind: _keep(made, network) for kind, made in make_frames(images[~self.labels][:FRAMES]).items()}


def make_frames(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Frames (N, 3, S, S) that show no usable part, from normal images (N, 3, S, S) in [0, 1]."""
    random = torch.Generator().manual_seed(0)

    def noise(level: float, spread: float) -> torch.Tensor:
        """Grey sensor noise around a level."""
        grey = level + spread * torch.randn(images[:, :1].shape, generator=random).to(images.device)
        return grey.clamp(0, 1).expand_as(images)

    flat = [noise(level, 0.0)[:1] for level in (0.0, 1.0, 0.5)]
    return {
        "black": flat[0],
        "white": flat[1],
        "grey": flat[2],
        "noise": torch.cat([torch.rand(images.shape, generator=random).to(images.device), noise(0.5, 0.15)]),
        "lens cap": noise(0.0, 0.02),
        "lamp off": (0.05 * images + noise(0.0, 0.005)).clamp(0, 1),
        DARK: 0.15 * images,
        UPSIDE_DOWN: images.flip(-2, -1),
    }


def _keep(images: torch.Tensor, network: STNResNet) -> tuple[Prepared, torch.Tensor]:
    """Kept features and contrasts of images."""
    store = FeatureStore([CHECK], len(images))
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            store.write(start, network.features(images[start : start + BATCH]))
    return store.prepared[CHECK.name], contrast(images)


def _test_images(category: str, network: STNResNet, device: torch.device, args: argparse.Namespace) -> _Images:
    items = list_test_items(category_folder(args.data_path, "folder", category))
    images = read_support_images([item.image for item in items], args.img_size).to(device)
    print(f"{category}: {len(items)} test images", flush=True)
    return _Images(images, [item.label for item in items], network)


def _measure(
    category: str, images: dict[str, _Images], network: STNResNet, device: torch.device, args: argparse.Namespace
) -> Iterator[dict]:
    """Yields one result row per draw and K."""
    folder, largest = category_folder(args.data_path, "folder", category), max(args.shots)
    for number, paths in enumerate(draw_support_images(folder, largest, args.draws, seed=0)):
        support = read_support_images(paths, args.img_size).to(device)
        store = FeatureStore([CHECK], largest, with_views=True)
        with torch.inference_mode():
            write_support_images(store, range(len(support)), network, support, VIEWS_PER_IMAGE)
        for shot in args.shots:
            fitted = CHECK.fit(store.part(0, shot)[CHECK.name], contrast(support[:shot]))
            row = _judge(category, images, fitted)
            print(f"{category}, K = {shot}, draw {number}: {_mean(list(row['others'].values())):.1%}", flush=True)
            yield {"category": category, "shot": shot, "limit": float(fitted["limit"]), **row}


def _judge(category: str, images: dict[str, _Images], fitted: Fitted) -> dict:
    """Shares of images flagged as unusual: own normal and defective ones, frames by kind, other categories by name."""

    def flagged(kept: tuple[Prepared, torch.Tensor]) -> np.ndarray:
        return np.array([bool(reason) for reason in CHECK.reasons(CHECK.measure(fitted, *kept).tolist())])

    own = images[category]
    of_test = flagged(own.test)
    return {
        "direction": bool(fitted["direction"]),
        "normal": float(of_test[~own.labels].mean()),
        "defective": float(of_test[own.labels].mean()),
        "frames": {kind: float(flagged(kept).mean()) for kind, kept in own.frames.items()},
        "others": {name: float(flagged(other.test).mean()) for name, other in images.items() if name != category},
    }


if __name__ == "__main__":
    run_command(main)
