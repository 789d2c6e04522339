"""Scores one category against few-shot support sets and reports image and pixel metrics.

python test.py --obj bottle --shot 2 --stn_mode rotation_scale
python test.py --obj bottle --shot 2 4 8 --untrained        several K; test features are computed once per checkpoint
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.check import list_test_items_with_notes, print_notes
from datasets.images import limit_pixels, resolve_bits
from datasets.mvtec import CATEGORIES, LabelledDataset, LabelledImage, category_folder, normal_images
from datasets.support import SupportRounds, find_support_rounds
from evaluation.metrics import METRIC_NAMES
from evaluation.per_image import write_scores
from evaluation.records import (
    RecordFiles,
    decisive,
    difference,
    file_record,
    save_maps,
    support_record,
    test_digest,
)
from evaluation.scoring import TestFeatures, compute_test_features, score_rounds
from evaluation.statistics import defect_type_summaries, format_aurocs, format_summaries, summaries
from models.networks import network_name, resolve_img_size, scoring_network
from models.regad import checkpoint_file, last_file, selection
from models.stn import BACKBONES, STN_MODES, fuse_conv_bn
from models.timm_features import PREFIX
from scorers.features import FeatureNetwork
from scorers.registry import RELEASE_SCORER, add_scorer_flag, make_scorers, record_ending
from utils import flags
from utils.devices import command_device, seed_everything
from utils.errors import UserError, require_positive, run_command
from utils.files import require_writable, sha256, write_json
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
    run.add_argument("--output", type=Path, default=Path("./results"), help="folder of all that is written")
    run.add_argument("--overwrite", action="store_true", help="replace a record that was made with other settings")
    run.add_argument("--save_images", type=int, default=0, metavar="N", help="images of round 0 and a report; -1: all")
    run.add_argument("--save_maps", action="store_true", help="the score maps of every round as .npz, float32")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Checks all inputs, scores every round, prints the metrics and writes the records."""
    args = get_args_parser().parse_args(argv)
    _check_numbers(args)
    limit_pixels(args.max_pixels)
    device = command_device(args.device)
    seed_everything(args.seed)
    folder = category_folder(args.data_path, args.data_type, args.obj)
    items = list_test_items_with_notes(folder, args.strict, need_both=False)
    args.bits = resolve_bits(args.bits, normal_images(folder), f"{args.obj}/train")
    supports = {
        shot: find_support_rounds(
            args.support_path, folder, shot, args.inferences, args.img_size, args.keep_aspect, args.bits
        )
        for shot in args.shot
    }
    dataset = LabelledDataset(items, args.img_size, args.keep_aspect, args.bits)
    scorers = make_scorers(args.scorer)
    jobs = _find_jobs(args, [scorer.name for scorer in scorers], items, supports)
    labels, kinds = [item.label for item in items], [item.defect for item in items]
    for weights in dict.fromkeys(job.weights for job in jobs):
        print(f"scoring {args.obj}: {len(items)} test images, {weights.file or f'untrained, weights {args.weights}'}")
        network, clock = fuse_conv_bn(_load_network(args, weights).to(device)), StageClock(device)
        test = compute_test_features(network, scorers, dataset, labels, clock, args.batch_size, args.num_workers, kinds)
        shared_seconds = dict(clock.seconds)
        for shot in dict.fromkeys(job.shot for job in jobs if job.weights == weights):
            clock.seconds.clear()
            clock.seconds.update(shared_seconds)
            _score_shot(args, [job for job in jobs if job.shot == shot], network, test, dataset, clock)
    print_notes(dataset.notes())


class Weights(NamedTuple):
    """The weights to score. kind: a key of experiments.results.WEIGHTS. file, sha256: None for an untrained network."""

    file: Path | None
    sha256: str | None
    kind: str
    epoch: int | None


class Job(NamedTuple):
    """One K and one scorer. decisive: what the numbers depend on. replaced: how an existing record differs, or None."""

    shot: int
    scorer: str
    weights: Weights
    support: SupportRounds
    files: RecordFiles
    decisive: dict
    replaced: str | None


class Scored(NamedTuple):
    """All rounds of a job: metrics, metrics of each kind of defect, image scores (B,), and the maps of round 0."""

    numbers: list[dict]
    by_defect_type: list[dict]
    image_scores: list[np.ndarray]
    first_maps: list[np.ndarray]


def _check_numbers(args: argparse.Namespace) -> None:
    require_writable(args.output, "--output", folder=True)
    require_positive(args, "shot", "inferences", "batch_size", "img_size", "max_pixels")
    args.img_size = resolve_img_size(args.backbone, args.img_size)
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


def _find_jobs(
    args: argparse.Namespace,
    scorers: Sequence[str],
    items: Sequence[LabelledImage],
    supports: dict[int, SupportRounds],
) -> list[Job]:
    """The jobs, in the order of weights, K and scorers.

    Raises:
        UserError: a checkpoint is missing, or a record of other results would be replaced.
    """
    jobs, test = [], test_digest(items)
    for weights, shots in _find_weights(args).items():
        kind = "" if weights.kind == "best" else f"_{weights.kind}"
        for shot in shots:
            start = f"{args.obj}_{shot}_{network_name(args.backbone, args.stn_mode)}{kind}"
            for given, scorer in zip(args.scorer, scorers, strict=True):
                files = RecordFiles.of(args.output, f"{start}{record_ending(scorer)}")
                depends = decisive(args, weights.sha256, given, test, supports[shot].images)
                _check_files(args, files)
                replaced = difference(files.record, depends)
                if replaced and not args.overwrite:
                    raise UserError(f"{replaced}; give another --output to keep it, or --overwrite to replace it")
                jobs.append(Job(shot, scorer, weights, supports[shot], files, depends, replaced))
    return jobs


def _check_files(args: argparse.Namespace, files: RecordFiles) -> None:
    """Raises UserError where a file of a record could not be written."""
    for file in (files.record, files.scores):
        require_writable(file, "--output")
    for wanted, folder in ((args.save_maps, files.maps), (args.save_images, files.images)):
        if wanted:
            require_writable(folder, "--output", folder=True)


def _score_shot(
    args: argparse.Namespace,
    jobs: Sequence[Job],
    network: FeatureNetwork,
    test: TestFeatures,
    dataset: LabelledDataset,
    clock: StageClock,
) -> None:
    """Scores all rounds of one K with every scorer; prints the metrics and writes the files of each job."""
    support = jobs[0].support
    print(f"support: {support.source}")
    for job in jobs:
        if job.replaced:
            job.files.remove_extras()
    scored = [Scored([], [], [], []) for _ in jobs]
    rounds = score_rounds(network, test, support.images, clock, args.batch_size, args.metrics == "all")
    for number, by_scorer in enumerate(rounds):
        for job, of_job in zip(jobs, scored, strict=True):
            result = by_scorer[job.scorer]
            label = f"round {number}" + (f", {job.scorer}" if len(jobs) > 1 else "")
            print(f"{label}: {format_aurocs(result.numbers)}", flush=True)
            of_job.numbers.append(result.numbers)
            of_job.by_defect_type.append(result.by_defect_type)
            of_job.image_scores.append(result.image_scores)
            if args.save_maps:
                save_maps(job.files.round_maps(number), dataset.items, result.maps.cpu().numpy())
            if args.save_images and not number:
                of_job.first_maps.append(result.maps.cpu().numpy())
    for job, of_job in zip(jobs, scored, strict=True):
        _write(args, job, of_job, test, dataset, clock)


def _write(
    args: argparse.Namespace,
    job: Job,
    scored: Scored,
    test: TestFeatures,
    dataset: LabelledDataset,
    clock: StageClock,
) -> None:
    """Prints the summaries of a job; writes its scores, its record and its images."""
    reasons, type_reasons = test.truth.reasons()
    images = {name: int(members.sum()) for name, members in test.truth.members().items()}
    all_summaries, kinds = summaries(scored.numbers), defect_type_summaries(scored.by_defect_type, images, type_reasons)
    label = "" if job.scorer == RELEASE_SCORER else f"{job.scorer}: "
    print(f"{label}mean +- SD of {len(scored.numbers)} rounds, and Student's 95 % interval of the mean:")
    print(*format_summaries(all_summaries, reasons, kinds, METRIC_NAMES), sep="\n")
    content = {
        "arguments": plain_arguments(args) | {"shot": job.shot, "scorer": job.scorer},
        **provenance(clock.device),
        **{"weights": job.weights.kind, "epoch": job.weights.epoch, "checkpoint": file_record(job.weights.file)},
        "scorer": job.scorer,
        "decisive": job.decisive,
        "support_set": support_record(job.support),
        "test_pictures": len(dataset),
        "rounds": scored.numbers,
        **all_summaries,
        "not_available": {name: reason for name, reason in reasons.items() if name in all_summaries},
        "defects": kinds,
        "seconds": clock.seconds,
        "peak_memory_mb": peak_memory_mb(),
    }
    write_scores(job.files.scores, dataset.items, scored.image_scores)
    write_json(job.files.record, content)
    maps = f", maps: {job.files.maps}" if args.save_maps else ""
    print(f"record: {job.files.record}, scores: {job.files.scores}{maps}")
    if scored.first_maps:
        shown = (all_summaries, reasons, kinds, len(scored.numbers))
        _save_images(args, job.files.images, dataset, scored.first_maps[0], shown)


def _save_images(
    args: argparse.Namespace, folder: Path, dataset: LabelledDataset, maps: np.ndarray, metrics: tuple
) -> None:
    """Draws images and the report. metrics: the arguments of evaluation.gallery.metric_tables."""
    from evaluation import gallery  # slow: imports matplotlib

    title = f"{folder.name}, round 0"
    try:
        scored, tables = gallery.with_own_threshold(dataset, maps), gallery.metric_tables(*metrics)
        gallery.save_gallery(folder, title, scored, args.save_images, args.num_workers, tables)
    except OSError as error:
        raise UserError(f"the record is written, but the images in {folder} cannot be: {error}") from error
    print(f"images: {folder}, with contact_sheet.jpg, curves.png and report.html")


if __name__ == "__main__":
    run_command(main)
