"""Makes the detector that a configuration describes: loads or fits it, sets its threshold, compares known defects."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from datasets.images import FULL_BITS, ClippedWarning
from inspection.config import DetectorConfig, ExportConfig, PredictConfig
from inspection.detector import FewShotDetector, OtherPartError
from inspection.detector_file import read_state
from inspection.document import KnownDefect, acceptance, propose, record_change, worse_than
from inspection.images import ImageFile, largest_grey_values
from inspection.inputs import list_inputs
from inspection.learning import accept
from inspection.region import RegionWarning, read_region
from inspection.results import decide
from inspection.threshold import Threshold, expectation
from inspection.tiles import describe_tiling
from models.networks import resolve_img_size, scoring_network
from models.regad import local_file
from utils.choices import AUTO_BITS, DEFAULT_SCORER, LITE_BACKBONE, RELEASE_BACKBONE
from utils.devices import seed_everything
from utils.errors import UserError
from utils.files import sha256, write_json
from utils.fingerprint import fingerprint

CommandConfig = PredictConfig | ExportConfig
DEFAULT_RATE = 0.01  # false-positive rate
MOST_NORMAL = 5  # normal images and known defects that are printed


def make_detector(config: CommandConfig, device: str) -> FewShotDetector:
    """Loads or fits the detector of `config` on `device`, and sets its threshold.

    Prints the scorer, the tiles, the threshold and, where 16-bit images are among the support images, their bit depth.
    No images are looked for in the output of the command.

    Raises:
        UserError: a file or folder is missing or unsuitable.
    """
    seed_everything(config.seed)
    with _printed_warnings():
        if config.detector:
            bits = None if config.bits == AUTO_BITS else config.bits
            detector = FewShotDetector.load(config.detector, device, config.scorer, bits)
        else:
            detector = _fit(config, device)
            record_change(detector, "fitted")
        print(f"scorer: {detector.scorer.name}")
        print(f"tiles: {describe_tiling(detector.tiling)}")
        if config.part:
            detector.document["part"] = config.part
        if config.min_area is not None:
            detector.min_area = config.min_area / (config.mm_per_pixel or 1.0) ** 2
            record_change(detector, f"smallest defect set to {detector.min_area:.1f} pixels")
        _set_threshold(detector, config)
        if config.accept:
            _accept(detector, config)
    normal, threshold = detector.normal_scores, detector.threshold
    print(f"threshold: {describe_threshold(threshold)}")
    if normal is not None and threshold is not None:
        print(f"{len(normal.scores)} normal images, highest scores first:")
        for name, score in normal.by_score()[:MOST_NORMAL]:
            print(f"  {score:8.3f}  {'above the threshold  ' if score > threshold.value else ''}{name}")
        if detector.scorer.name == DEFAULT_SCORER and threshold.rate is not None and not config.defects:
            print(f"{expectation(threshold.count, normal.is_loo)} (--defects)")
    for sentence in detector.warnings:
        print(f"warning: {sentence}", file=sys.stderr)
    return detector


def known_defects(detector: FewShotDetector, config: CommandConfig) -> list[KnownDefect]:
    """Compares the known defects of `config`, lowest score first, and keeps the acceptance in the detector.

    Prints which are found, and the threshold that separates them best from the normal images; --adopt takes it.
    """
    if not config.defects:
        return []
    paths = list_inputs(config.defects, config.output)
    with _printed_warnings():
        scores, maps, reasons, _ = detector.inspect(paths)
    if (normal := detector.normal_scores) is not None:
        proposal = propose(normal.scores[:, 0], scores)
        kind = "normal images" if detector.calibration else "support images (leave-one-out)"
        print(f"threshold that separates best from {len(normal.scores)} {kind}: {proposal}")
        if config.adopt:
            detector.set_threshold(proposal.threshold, "separates known defects best")
            print(f"threshold: {describe_threshold(detector.threshold)}")
            record_change(detector, "threshold adopted from known defects", paths)
        else:
            print("it is not in use; --adopt takes it")
    elif config.adopt:
        raise UserError("--adopt needs the scores of normal images: give two support images or more, or --calibrate")
    known = []
    for path, score, score_map, reason in zip(paths, scores.tolist(), maps, reasons, strict=True):
        restored = detector.restore(score_map, *ImageFile(path).size) if detector.min_area else None
        decided = decide(score, detector.threshold, reason, restored, detector.min_area)
        known.append(KnownDefect(str(path), score, *decided))
    known.sort(key=lambda defect: defect.score)
    print(f"known defects: {sum(not defect.is_missed for defect in known)} of {len(known)} found, lowest scores first:")
    for defect in known[:MOST_NORMAL]:
        decided = "missed" if defect.is_missed else ", ".join(filter(None, (defect.decision, defect.reason)))
        print(f"  {defect.score:8.3f}  {defect.name}: {decided}")
    detector.document["acceptance"] = acceptance(detector, known)
    return known


def save_detector(detector: FewShotDetector, file: Path, defects: Sequence[KnownDefect], force: bool) -> None:
    """Saves the detector, and its acceptance beside it if it was compared with known defects.

    Raises:
        UserError: known defects are missed, or the file holds a detector that was accepted and misses fewer; not with
            `force`.
    """
    missed = [defect.name for defect in defects if defect.is_missed]
    if missed and detector.threshold is not None and not force:
        raise UserError(
            f"not saved: {len(missed)} of {len(defects)} known defects are below the threshold and called normal, e.g. "
            f"{missed[0]}; set another threshold",
            options=("threshold", "adopt", "force"),
        )
    accepted = detector.document.get("acceptance")
    if accepted and accepted["decision_id"] != detector.decision_identity():  # of an earlier threshold
        accepted = None
    if file.is_file() and not force:
        try:
            before = read_state(file).get("document", {}).get("acceptance")
        except UserError:  # no detector
            before = None
        if reason := worse_than(accepted, before):
            raise UserError(f"{file} is not overwritten: {reason}", options=("defects", "save", "force"))
    detector.save(file)
    print(f"detector: {file}")
    if defects:
        beside = file.with_suffix(".acceptance.json")
        write_json(beside, accepted)
        print(f"acceptance: {beside}")


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
    for other in (warning for warning in raised if warning.category not in kinds):
        warnings.showwarning(other.message, other.category, other.filename, other.lineno)
    for kind in kinds:
        sentences = list(dict.fromkeys(str(warning.message) for warning in raised if warning.category is kind))
        more = f" (and {len(sentences) - 1} more images)" if len(sentences) > 1 else ""
        if sentences:
            print(f"warning: {sentences[0]}{more}")


def _fit(config: CommandConfig, device: str) -> FewShotDetector:
    """Fits a detector to the support images, each of which is opened once."""
    support = [ImageFile(path) for path in list_inputs(config.support, config.output)]
    backbone = config.backbone or (RELEASE_BACKBONE if config.checkpoint else LITE_BACKBONE)
    size = resolve_img_size(backbone, config.img_size)
    network = scoring_network(backbone, config.stn_mode, size, config.checkpoint, config.weights)
    print(f"backbone: {backbone}, {_describe_weights(config)}, {size} x {size} pixels")
    print(f"fitting to {len(support)} normal image(s)")
    region = None
    if config.region is not None or config.ignore is not None:
        region = read_region(config.region, config.ignore, [image.size for image in support])
    scorer = config.scorer or DEFAULT_SCORER
    detector = FewShotDetector(network, device, config.keep_aspect, scorer, config.bits, config.tile, region)
    detector.fit(support)
    if config.bits != FULL_BITS and (values := largest_grey_values(support)):
        print(f"bits: {detector.bits} ({len(values)} 16-bit image(s) of the support, largest value {max(values)})")
    detector.origin = _describe_fit(config, support, {"bits": detector.bits, "img_size": size, "backbone": backbone})
    return detector


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


def _accept(detector: FewShotDetector, config: CommandConfig) -> None:
    """Makes the detector learn from the good images of --accept, and prints what has changed."""
    paths = list_inputs(config.accept, config.output)
    before = len(detector.learned.get("names", ()))
    learned = accept(detector, paths, config.force)
    new = len(learned) - before
    if new < len(paths):
        print(f"left out: {len(paths) - new} of {len(paths)} images, whose pixels are known already")
    record_change(detector, f"{new} good images accepted", paths)
    print(f"learned from {len(learned)} accepted images; scores before, and after learning from the others alone:")
    for image in sorted(learned, key=lambda image: -image.after)[:MOST_NORMAL]:
        print(f"  {image.before:8.3f}  {image.after:8.3f}  {image.name}")


def _set_threshold(detector: FewShotDetector, config: CommandConfig) -> None:
    """Sets the threshold: --threshold, else --calibrate, else leave-one-out. Without flags, a saved one is kept."""
    rate, review_rate = config.false_positive_rate, config.review_rate
    normal = list_inputs(config.calibrate, config.output) if config.calibrate else None
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
            detector.calibrate(rate or kept or DEFAULT_RATE, normal, review_rate, config.force)
            record_change(detector, "thresholds computed", normal or ())
        except UserError as error:
            if config.threshold is None or isinstance(error, OtherPartError):
                raise  # otherwise calibration only provides the colour scale
    if config.threshold is not None:
        detector.set_threshold(config.threshold)
        record_change(detector, "threshold given")
