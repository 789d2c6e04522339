"""Scores one category against few-shot support sets and reports image and pixel metrics.

python test.py --obj bottle --shot 2 --stn_mode rotation_scale
python test.py --obj bottle --shot 2 4 8 --untrained        several K; test features are computed once per checkpoint
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.images import limit_pixels, settle_bits, warn_beyond
from datasets.mvtec import CATEGORIES, LabelledDataset, category_folder, normal_images
from datasets.notes import checked_test_items
from datasets.support import SupportRounds, find_support_rounds
from evaluation.metrics import METRIC_NAMES
from evaluation.scoring import RoundResult, TestFeatures, compute_test_features, score_rounds
from evaluation.statistics import format_interval, format_summary, summaries
from models.networks import network_name, scoring_network, settle_img_size
from models.regad import checkpoint_file, last_file, selection
from models.stn import BACKBONES, STN_MODES, folded
from models.timm_features import PREFIX
from scorers.features import FeatureNetwork
from scorers.registry import RELEASE_SCORER, add_scorer_flag, make_scorers, record_ending
from utils import flags
from utils.devices import command_device, seed_everything
from utils.errors import UserError, require_positive, run_command
from utils.files import sha256, write_json
from utils.records import peak_memory_mb, plain_arguments, provenance
from utils.stages import StageClock


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of test.py: the flags of the release and those of this project."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_argument_group("data")
    what.add_argument(
        "--obj", type=flags.category_name, required=True, metavar="CATEGORY", help="the category to score"
    )
    flags.add_data_flags(what, CATEGORIES)
    what.add_argument("--shot", nargs="+", type=int, default=[2], metavar="K", help="support images per round")
    flags.add_support_flags(what)
    flags.add_image_flags(parser.add_argument_group("images"))
    network = parser.add_argument_group("network")
    flags.add_network_flags(network, STN_MODES, list(BACKBONES))
    network.add_argument("--save_dir", type=Path, default=flags.DEFAULT_SAVE_DIR, help="folder of the checkpoints")
    network.add_argument("--checkpoint", type=Path, help="default: the file of train.py or the release in --save_dir")
    network.add_argument("--last", action="store_true", help="score the weights of the last epoch instead")
    network.add_argument("--untrained", action="store_true", help="score without registration training")
    flags.add_weights_flag(network, "backbone weights for --untrained")
    run = parser.add_argument_group("run")
    flags.add_device_flag(run)
    run.add_argument("--batch_size", type=int, help="images per network pass; affects time, memory, last digits")
    flags.add_workers_flag(run)
    flags.add_seed_flag(run, "for --weights none; everything else is deterministic")
    add_scorer_flag(run, several=True)
    run.add_argument("--metrics", choices=("all", "auroc"), default="all", help="all: also AP, F1-max and PRO")
    run.add_argument("--output", type=Path, default=Path("./results"), help="folder of the JSON record and images")
    run.add_argument("--save_images", type=int, default=0, metavar="N", help="images of round 0 and a report; -1: all")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Checks all inputs, scores every round, prints the metrics and writes the records."""
    args = get_args_parser().parse_args(argv)
    _check_numbers(args)
    limit_pixels(args.max_pixels)
    device = command_device(args.device)
    seed_everything(args.seed)
    folder = category_folder(args.data_path, args.data_type, args.obj)
    items = checked_test_items(folder, args.strict)
    args.bits = settle_bits(args.bits, normal_images(folder), f"{args.obj}/train")
    warn_beyond([item.image for item in items], args.bits)
    supports = {
        shot: find_support_rounds(
            args.support_path, folder, shot, args.inferences, args.img_size, args.keep_aspect, args.bits
        )
        for shot in args.shot
    }
    dataset = LabelledDataset(items, args.img_size, args.keep_aspect, args.bits)
    scorers, labels = make_scorers(args.scorer), [item.label for item in items]
    for weights, shots in _find_weights(args).items():
        print(f"scoring {args.obj}: {len(items)} test images, {weights.file or f'untrained, weights {args.weights}'}")
        network, clock = folded(_load_network(args, weights).to(device)), StageClock(device)
        test = compute_test_features(network, scorers, dataset, labels, clock, args.batch_size, args.num_workers)
        shared_seconds = clock.seconds
        for shot in shots:
            clock.seconds = dict(shared_seconds)
            _score_shot(args, shot, supports[shot], weights, network, test, dataset, clock)


def _score_shot(
    args: argparse.Namespace,
    shot: int,
    support: SupportRounds,
    weights: Weights,
    network: FeatureNetwork,
    test: TestFeatures,
    dataset: LabelledDataset,
    clock: StageClock,
) -> None:
    """Scores all rounds of one K with every scorer; prints the metrics and writes one record per scorer."""
    print(f"support: {support.source}")
    scored = score_rounds(network, test, support.images, clock, args.batch_size, args.metrics == "all")
    names = [scorer.name for scorer in test.features.scorers]
    results, first_maps = _print_rounds(scored, names, keep_maps=args.save_images != 0)
    for scorer, rounds in results.items():
        kind = "" if weights.kind == "best" else f"_{weights.kind}"
        network_part = network_name(args.backbone, args.stn_mode)
        name = f"{args.obj}_{shot}_{network_part}{kind}{record_ending(scorer)}"
        content = {
            "arguments": plain_arguments(args) | {"shot": shot, "scorer": scorer},
            **provenance(clock.device),
            **{"weights": weights.kind, "epoch": weights.epoch, "checkpoint": _file_record(weights.file)},
            "scorer": scorer,
            "support_set": _support_record(support),
            "test_pictures": len(dataset),
            "rounds": rounds,
            **_print_summaries(scorer, rounds),
            "seconds": clock.seconds,
            "peak_memory_mb": peak_memory_mb(),
        }
        write_json(args.output / f"{name}.json", content)
        print(f"record: {args.output / name}.json")
        if scorer in first_maps:
            _save_images(args, name, dataset, first_maps[scorer])


class Weights(NamedTuple):
    """The weights to score. kind: a key of grid.results.WEIGHTS. file, sha256: None for an untrained network."""

    file: Path | None
    sha256: str | None
    kind: str
    epoch: int | None


def _check_numbers(args: argparse.Namespace) -> None:
    require_positive(args, "shot", "inferences", "batch_size", "img_size", "max_pixels")
    args.img_size = settle_img_size(args.backbone, args.img_size)
    if args.backbone.startswith(PREFIX) and not args.untrained:
        raise UserError(f"{args.backbone} is not trained here: give --untrained")
    if args.untrained + args.last + bool(args.checkpoint) > 1:
        raise UserError("--untrained, --last and --checkpoint exclude each other")
    if args.num_workers < 0:
        raise UserError(f"--num_workers must not be negative, got {args.num_workers}")


def _find_weights(args: argparse.Namespace) -> dict[Weights, list[int]]:
    """The weights to score, each with its list of K. Equal files are scored once.

    Raises:
        UserError: a checkpoint is missing.
    """
    if args.untrained:
        return {Weights(None, None, "untrained", 0): args.shot}
    found: dict[str, tuple[Weights, list[int]]] = {}
    default = last_file if args.last else checkpoint_file
    for shot in args.shot:
        file = args.checkpoint or default(args.save_dir, args.stn_mode, shot, args.obj, args.backbone)
        if not file.is_file():
            raise UserError(
                f"no checkpoint {file}; make it with: python train.py --obj {args.obj} --shot {shot} "
                f"--stn_mode {args.stn_mode} --data_path <data folder>. Or put the release's file there, give another "
                "with --checkpoint FILE, or score the network before training with --untrained"
            )
        digest = sha256(file)
        if digest not in found:
            found[digest] = Weights(file, digest, *selection(file)), []
        found[digest][1].append(shot)
    return dict(found.values())


def _load_network(args: argparse.Namespace, weights: Weights) -> torch.nn.Module:
    return scoring_network(args.backbone, args.stn_mode, args.img_size, weights.file, args.weights)


def _print_rounds(
    scored: Iterable[dict[str, RoundResult]], names: Sequence[str], keep_maps: bool
) -> tuple[dict[str, list[dict]], dict[str, np.ndarray]]:
    """Prints the metrics of every round. Returns them by scorer, with `keep_maps` also the maps of round 0."""
    results: dict[str, list[dict]] = {name: [] for name in names}
    first_maps: dict[str, np.ndarray] = {}
    for number, by_scorer in enumerate(scored):
        for name, result in by_scorer.items():
            pixel = "n/a" if result.pixel_auroc is None else f"{result.pixel_auroc:.4f}"
            label = f"round {number}" + (f", {name}" if len(names) > 1 else "")
            print(f"{label}: image AUROC {result.image_auroc:.4f}, pixel AUROC {pixel}", flush=True)
            if keep_maps and number == 0:
                first_maps[name] = result.maps.cpu().numpy()
            results[name].append(result.numbers)
    return results, first_maps


def _print_summaries(scorer: str, rounds: list[dict]) -> dict[str, dict | None]:
    numbers_by_metric = summaries(rounds)
    label = "" if scorer == RELEASE_SCORER else f"{scorer}: "
    print(f"{label}mean +- SD of {len(rounds)} rounds, and Student's 95 % interval of the mean:")
    for name, numbers in numbers_by_metric.items():
        print(f"  {METRIC_NAMES[name]:14}{format_summary(numbers):20}{format_interval(numbers)}".rstrip())
    return numbers_by_metric


def _support_record(support: SupportRounds) -> dict:
    return {"source": support.source, "names": support.names} | (_file_record(support.file) or {})


def _save_images(args: argparse.Namespace, name: str, dataset: LabelledDataset, maps: np.ndarray) -> None:
    from reports.gallery import save_gallery, with_own_threshold  # slow: imports scikit-learn and matplotlib

    folder = args.output / name
    try:
        save_gallery(folder, f"{name}, round 0", with_own_threshold(dataset, maps), args.save_images, args.num_workers)
    except OSError as error:
        raise UserError(f"the record is written, but the images in {folder} cannot be: {error}") from error
    print(f"images: {folder}, with contact_sheet.jpg, curves.png and report.html")


def _file_record(path: Path | None) -> dict | None:
    return None if path is None else {"path": str(path), "sha256": sha256(path)}


if __name__ == "__main__":
    run_command(main)
