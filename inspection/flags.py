"""Command-line flags of the detector: load or fit it, and set its threshold."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from pathlib import Path

from datasets.images import AUTO_BITS, ClippedWarning, largest_values, resolve_bits, warn_clipped
from inspection.detector import DEFAULT_SCORER, FewShotDetector, KnownDefect
from inspection.inputs import list_inputs
from inspection.region import read_region
from inspection.results import DEFECTIVE, UNUSUAL, decide
from inspection.threshold import Threshold
from inspection.tiles import AUTO, describe_tiling, tile_side
from models.networks import resolve_img_size, scoring_network
from models.stn import BACKBONES, STN_MODES
from scorers.registry import add_scorer_flag
from utils.devices import seed_everything
from utils.errors import UserError, require_positive
from utils.files import sha256
from utils.flags import add_bits_flag, add_keep_aspect_flag, add_network_flags, add_seed_flag, add_weights_flag

DEFAULT_FALSE_ALARM = 0.01
MOST_NORMAL = 5  # normal images and known defects that are printed


def add_detector_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of all commands that load or fit a detector."""
    detector = parser.add_argument_group("detector")
    detector.add_argument("--support", nargs="+", type=Path, metavar="PATH", help="normal images: files or folders")
    detector.add_argument("--detector", type=Path, metavar="FILE", help="from predict.py --save; replaces --support")
    detector.add_argument("--checkpoint", type=Path, help="from train.py or the release; default: not trained")
    add_weights_flag(detector, "without --checkpoint")
    add_network_flags(detector, STN_MODES, list(BACKBONES))
    add_keep_aspect_flag(detector)
    add_bits_flag(detector, "the support images")
    detector.add_argument(
        "--tile", type=tile_side, help="auto (default): cut images that would shrink more than 4 times; off; or pixels"
    )
    detector.add_argument("--region", metavar="RECT|MASK", help="score only here: x,y,width,height, or a mask file")
    detector.add_argument("--ignore", type=Path, metavar="MASK", help="mask file: do not score here")
    add_seed_flag(detector, "for --weights none; everything else is deterministic")
    add_scorer_flag(detector, default=None)
    decide = parser.add_argument_group("threshold")
    decide.add_argument("--false_alarm", type=float, help="accepted false-positive rate of normal images; default 0.01")
    decide.add_argument("--calibrate", nargs="+", type=Path, metavar="PATH", help="further normal images to set it")
    decide.add_argument(
        "--defects", nargs="+", type=Path, metavar="PATH", help="known defective images to compare with the threshold"
    )
    decide.add_argument("--threshold", type=float, help="fixed threshold; overrides calibration")


def check_detector_flags(args: argparse.Namespace) -> None:
    """Checks the flags of `add_detector_flags` and sets the default of --img_size.

    Raises:
        UserError: flags contradict each other, or a value is invalid.
    """
    require_positive(args, "img_size")
    if not args.detector:  # a saved one has its own
        args.img_size = resolve_img_size(args.backbone, args.img_size)
    if bool(args.support) == bool(args.detector):
        raise UserError("give either normal images with --support, or a saved detector with --detector")
    for name in ("tile", "region", "ignore"):
        if args.detector and getattr(args, name) is not None:
            raise UserError(f"--{name} belongs to fitting: a saved detector has its own; fit a new one with --support")
    if args.threshold is not None and not math.isfinite(args.threshold):
        raise UserError(f"--threshold must be a number, got {args.threshold}")


def make_detector(args: argparse.Namespace, device: str) -> FewShotDetector:
    """Loads or fits the detector given by the flags of `add_detector_flags`, on `device`, and sets its threshold.

    Prints the scorer, the tiles, the threshold and, where 16-bit images are among the support images, their bit depth.

    Raises:
        UserError: a file or folder is missing or unsuitable.
    """
    seed_everything(args.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ClippedWarning)  # printed by resolve_bits and warn_clipped
        detector = _load(args, device) if args.detector else _fit(args, device)
        print(f"scorer: {detector.scorer.name}")
        print(f"tiles: {describe_tiling(detector.tiling)}")
        _set_threshold(detector, args)
        _describe(detector)
        if args.defects:
            _compare_defects(detector, list_inputs(args.defects, args.output))
    return detector


def _describe(detector: FewShotDetector) -> None:
    """Prints the threshold, the normal images with the highest scores, and what is to be known of them."""
    normal, threshold = detector.calibration or detector.left_out, detector.threshold
    print(f"threshold: {describe_threshold(threshold)}")
    if normal is not None and threshold is not None:
        print(f"{len(normal.scores)} normal images, highest scores first:")
        for name, score in normal.by_score()[:MOST_NORMAL]:
            print(f"  {score:8.3f}  {'above the threshold  ' if score > threshold.value else ''}{name}")
    for sentence in detector.warnings:
        print(f"warning: {sentence}", file=sys.stderr)


def _compare_defects(detector: FewShotDetector, paths: list[Path]) -> None:
    """Scores images with known defects and prints which are found. They do not change the threshold."""
    scores, _, unusual = detector.inspect(paths)
    known = [KnownDefect(*row) for row in zip(map(str, paths), scores.tolist(), unusual, strict=True)]
    detector.defects = sorted(known, key=lambda defect: defect.score)
    found = {row.name for row in known if decide(row.score, detector.threshold, row.unusual) in (DEFECTIVE, UNUSUAL)}
    print(f"known defects: {len(found)} of {len(known)} found, lowest scores first:")
    for name, score, _ in detector.defects[:MOST_NORMAL]:
        print(f"  {score:8.3f}  {'' if name in found else 'missed  '}{name}")


def _load(args: argparse.Namespace, device: str) -> FewShotDetector:
    """Loads the saved detector. --bits overrides its bit depth."""
    detector = FewShotDetector.load(args.detector, device, args.scorer)
    if args.bits != AUTO_BITS:
        detector.bits = args.bits
    return detector


def _fit(args: argparse.Namespace, device: str) -> FewShotDetector:
    """Fits a detector to the support images."""
    support = list_inputs(args.support, args.output)
    network = scoring_network(args.backbone, args.stn_mode, args.img_size, args.checkpoint, args.weights)
    print(f"fitting on {len(support)} normal image(s)")
    bits = resolve_bits(args.bits, support, "the support")
    region = read_region(args.region, args.ignore, support)
    tile = args.tile or AUTO
    detector = FewShotDetector(network, device, args.keep_aspect, args.scorer or DEFAULT_SCORER, bits, tile, region)
    detector.fit(support)
    weights = f"not trained, weights {args.weights}"
    detector.origin = {
        "support": [{"path": str(path), "sha256": sha256(path)} for path in support],
        "network": f"{args.checkpoint} {sha256(args.checkpoint)}" if args.checkpoint else weights,
    }
    return detector


def _set_threshold(detector: FewShotDetector, args: argparse.Namespace) -> None:
    """Sets the threshold: --threshold, else --calibrate, else leave-one-out. Without flags, a saved one is kept."""
    false_alarm = DEFAULT_FALSE_ALARM if args.false_alarm is None else args.false_alarm
    normal = list_inputs(args.calibrate, args.output) if args.calibrate else None
    is_fresh = detector.threshold is None and detector.left_out is not None
    if detector.calibration is not None and args.false_alarm is not None and not normal:
        raise UserError(
            f"the threshold of {args.detector} comes from {len(detector.calibration.scores)} calibration images: "
            "give them again with --calibrate for another rate, or the threshold itself with --threshold"
        )
    warn_clipped(largest_values(normal or []), detector.bits)
    if normal or args.false_alarm is not None or is_fresh:
        try:
            detector.calibrate(false_alarm, normal)
        except UserError:
            if args.threshold is None:  # otherwise calibration only provides the colour scale
                raise
    if args.threshold is not None:
        known = detector.threshold or Threshold(0.0, "", args.threshold, args.threshold)
        detector.threshold = known._replace(
            value=args.threshold, how="given with --threshold", rate=None, decided_by=""
        )


def describe_threshold(threshold: Threshold | None) -> str:
    """Value and origin of a threshold as text."""
    if threshold is None:
        return "none, images are not classified; give two support images or more, --calibrate, or --threshold"
    return f"{threshold.value:.3f} ({threshold.how})"
