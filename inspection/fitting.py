"""Makes the detector that a configuration describes: loads or fits it, sets its threshold, compares known defects."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from datasets.images import FULL_BITS, ClippedWarning, smallest_depth
from inspection.config import DetectorConfig
from inspection.detector import FewShotDetector
from inspection.images import ImageFile, largest_grey_values
from inspection.inputs import list_inputs
from inspection.region import RegionWarning, read_region
from inspection.results import NORMAL, decide
from inspection.threshold import Threshold
from inspection.tiles import describe_tiling
from models.networks import resolve_img_size, scoring_network
from utils.choices import AUTO_BITS, DEFAULT_SCORER, LITE_BACKBONE, RELEASE_BACKBONE
from utils.devices import seed_everything
from utils.errors import UserError
from utils.files import sha256
from utils.fingerprint import fingerprint
from utils.hub import local_file

DEFAULT_RATE = 0.01  # false-positive rate
MOST_NORMAL = 5  # normal images and known defects that are printed


class KnownDefect(NamedTuple):
    """A defective image that is known: its path, its score, and the decision on it with its reason."""

    name: str
    score: float
    decision: str | None
    reason: str | None


def make_detector(config: DetectorConfig, device: str, output: Path) -> FewShotDetector:
    """Loads or fits the detector of `config` on `device`, and sets its threshold.

    Prints the scorer, the tiles, the threshold and, where 16-bit images are among the support images, their bit depth.
    output: a folder in which no images are looked for.

    Raises:
        UserError: a file or folder is missing or unsuitable.
    """
    seed_everything(config.seed)
    with _printed_warnings():
        if config.detector:
            bits = None if config.bits == AUTO_BITS else config.bits
            detector = FewShotDetector.load(config.detector, device, config.scorer, bits)
        else:
            detector = _fit(config, device, output)
        print(f"scorer: {detector.scorer.name}")
        print(f"tiles: {describe_tiling(detector.tiling)}")
        _set_threshold(detector, config, output)
    normal, threshold = detector.calibration or detector.loo_scores, detector.threshold
    print(f"threshold: {describe_threshold(threshold)}")
    if normal is not None and threshold is not None:
        print(f"{len(normal.scores)} normal images, highest scores first:")
        for name, score in normal.by_score()[:MOST_NORMAL]:
            print(f"  {score:8.3f}  {'above the threshold  ' if score > threshold.value else ''}{name}")
    for sentence in detector.warnings:
        print(f"warning: {sentence}", file=sys.stderr)
    return detector


def known_defects(detector: FewShotDetector, config: DetectorConfig, output: Path) -> list[KnownDefect]:
    """The scores of the known defects of `config`, lowest first. Prints which are found; the threshold stays."""
    if not config.defects:
        return []
    paths = list_inputs(config.defects, output)
    with _printed_warnings():
        scores, _, reasons, _ = detector.inspect(paths)
    known = [
        KnownDefect(str(path), score, *decide(score, detector.threshold, reason))
        for path, score, reason in zip(paths, scores.tolist(), reasons, strict=True)
    ]
    known.sort(key=lambda defect: defect.score)
    found = [one.decision not in (NORMAL, None) for one in known]
    print(f"known defects: {sum(found)} of {len(known)} found, lowest scores first:")
    for one, is_found in list(zip(known, found, strict=True))[:MOST_NORMAL]:
        print(f"  {one.score:8.3f}  {'' if is_found else 'missed  '}{one.name}")
    return known


def describe_threshold(threshold: Threshold | None) -> str:
    """Value and origin of a threshold as text."""
    if threshold is None:
        return "none, images are not classified; give two support images or more, --calibrate, or --threshold"
    review = f", review from {threshold.review:.3f} on" if threshold.review_value < threshold.value else ""
    return f"{threshold.value:.3f} ({threshold.how}){review}"


@contextmanager
def _printed_warnings() -> Iterator[None]:
    """Prints the warnings about images, one line for each kind, instead of showing them as Python does."""
    kinds = (ClippedWarning, RegionWarning)
    with warnings.catch_warnings(record=True) as raised:
        for kind in kinds:
            warnings.simplefilter("always", kind)
        yield
    for other in (one for one in raised if one.category not in kinds):
        warnings.showwarning(other.message, other.category, other.filename, other.lineno)
    for kind in kinds:
        sentences = list(dict.fromkeys(str(one.message) for one in raised if one.category is kind))
        more = f" (and {len(sentences) - 1} more images)" if len(sentences) > 1 else ""
        if sentences:
            print(f"warning: {sentences[0]}{more}")


def _fit(config: DetectorConfig, device: str, output: Path) -> FewShotDetector:
    """Fits a detector to the support images, each of which is opened once."""
    support = [ImageFile(path) for path in list_inputs(config.support, output)]
    backbone = config.backbone or (RELEASE_BACKBONE if config.checkpoint else LITE_BACKBONE)
    size = resolve_img_size(backbone, config.img_size)
    network = scoring_network(backbone, config.stn_mode, size, config.checkpoint, config.weights)
    print(f"backbone: {backbone}, {_describe_weights(config)}, {size} x {size} pixels")
    print(f"fitting to {len(support)} normal image(s)")
    bits = _bit_depth(config, support)
    region = None
    if config.region is not None or config.ignore is not None:
        region = read_region(config.region, config.ignore, [image.size for image in support])
    origin = _describe_fit(config, support, {"bits": bits, "img_size": size, "backbone": backbone})
    scorer = config.scorer or DEFAULT_SCORER
    detector = FewShotDetector(network, device, config.keep_aspect, scorer, bits, config.tile, region, origin)
    return detector.fit(support)


def _bit_depth(config: DetectorConfig, support: Sequence[ImageFile]) -> int:
    """The bit depth asked for, or the smallest that holds the 16-bit support images; printed if there are any."""
    values = [] if config.bits == FULL_BITS else largest_grey_values(support)
    bits = smallest_depth(values) if config.bits == AUTO_BITS else config.bits
    if values:
        print(f"bits: {bits} ({len(values)} 16-bit image(s) of the support, largest value {max(values)})")
    return bits


def _describe_weights(config: DetectorConfig) -> str:
    return str(config.checkpoint) if config.checkpoint else f"not trained, weights {config.weights}"


def _describe_fit(config: DetectorConfig, support: Sequence[ImageFile], resolved: dict) -> dict:
    """What a detector file says of the fit: images, weights, configuration, resolved values and fingerprint."""
    plain, own = config.plain(), DetectorConfig.__dataclass_fields__
    if config.weights == "none" and not config.checkpoint:
        weights_from = f"seed {config.seed}"
    else:
        file = local_file(config.checkpoint or Path(config.weights))
        weights_from = sha256(file) if file.is_file() else config.weights
    masks = [path for path in (config.region, config.ignore) if path is not None]
    inputs = {
        "support": [image.sha256 for image in support],
        "network": weights_from,
        "region": [sha256(Path(path)) if Path(path).is_file() else str(path) for path in masks],
    }
    return {
        "support": [{"path": str(image.path), "sha256": image.sha256} for image in support],
        "network": f"{config.checkpoint} {weights_from}" if config.checkpoint else _describe_weights(config),
        "config": {name: value for name, value in plain.items() if name in own},
        "resolved": resolved,
        "fingerprint": fingerprint(config.results_part() | resolved, inputs),
    }


def _set_threshold(detector: FewShotDetector, config: DetectorConfig, output: Path) -> None:
    """Sets the threshold: --threshold, else --calibrate, else leave-one-out. Without flags, a saved one is kept."""
    rate, review_rate = config.false_positive_rate, config.review_rate
    normal = list_inputs(config.calibrate, output) if config.calibrate else None
    is_fresh = detector.threshold is None and detector.loo_scores is not None
    asks_rate = rate is not None or review_rate is not None
    if detector.calibration is not None and asks_rate and not normal:
        raise UserError(
            f"the threshold of {config.detector} comes from {len(detector.calibration.scores)} calibration images: "
            "give them again with --calibrate, or set --threshold"
        )
    if normal or asks_rate or is_fresh:
        kept = detector.threshold and detector.threshold.rate
        try:
            detector.calibrate(rate or kept or DEFAULT_RATE, normal, review_rate)
        except UserError:
            if config.threshold is None:  # otherwise calibration only provides the colour scale
                raise
    if config.threshold is not None:
        detector.set_threshold(config.threshold)
