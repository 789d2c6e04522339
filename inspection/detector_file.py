"""Detector files: writing a fitted detector to one file of tensors and plain values, and reading it back."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from datasets.images import FULL_BITS
from inspection.threshold import NormalScores, Threshold
from inspection.tiles import OFF, Tiling
from models.stn import RELEASE_BACKBONE, STNResNet
from models.timm_features import PREFIX, TimmFeatures
from scorers.base import Scorer
from scorers.registry import RELEASE_SCORER, SCORERS, make_scorer
from utils.errors import UserError
from utils.files import load_tensors, save_tensors

if TYPE_CHECKING:
    from inspection.detector import FewShotDetector

FILE_FORMAT, FILE_VERSION = "RegAD detector", 3
READABLE_VERSIONS = (2, FILE_VERSION)
ID_LENGTH = 12  # hexadecimal digits of a detector's hash
TENSORS = ("fitted", "likeness")  # attributes that are dictionaries of tensors
NORMAL = ("left_out", "calibration")  # attributes that are NormalScores or None


def write_detector(detector: FewShotDetector, path: Path) -> None:
    """Writes network, fitted tensors, preprocessing and threshold.

    Raises:
        UserError: the detector is not fitted, or the file cannot be written.
    """
    if not detector.fitted:
        raise UserError("only a fitted detector can be saved")
    if not hasattr(detector.network, "backbone"):
        raise UserError("a detector with a network of your own cannot be saved: no file could say how to build it")
    content = {
        "format": FILE_FORMAT,
        "version": FILE_VERSION,
        **_what_decides_scores(detector),
        "threshold": None if detector.threshold is None else tuple(detector.threshold),
        "origin": detector.origin,
    }
    calibration = detector.calibration  # its maps would be most of the file, and only `calibrate` needs them
    normal = {
        "left_out": detector.left_out,
        "calibration": calibration and calibration._replace(maps=calibration.maps[:, :0, :0]),
    }
    content |= {name: None if scores is None else scores.content() for name, scores in normal.items()}
    try:
        save_tensors(path, content)
    except OSError as error:
        raise UserError(f"cannot write the detector {path}: {error.strerror}") from error


def _what_decides_scores(detector: FewShotDetector) -> dict:
    """The entries of a saved detector on which scores, score maps and `unusual` depend: tensors and plain values."""
    content = {
        "network": {name: value.cpu() for name, value in detector.network.state_dict().items()},
        "backbone": getattr(detector.network, "backbone", None),
        "stn_mode": getattr(detector.network, "stn_mode", None),
        "img_size": detector.size,
        "keep_aspect": detector.keep_aspect,
        "bits": detector.bits,
        "tile": detector.tile,
        "tiling": None if detector.tiling is None else tuple(detector.tiling),
        "region": None if detector.region is None else torch.from_numpy(detector.region),
        "scorer": detector.scorer.name,
    }
    return content | {name: {key: v.cpu() for key, v in getattr(detector, name).items()} for name in TENSORS}


def identity(detector: FewShotDetector) -> str:
    """A short hash of all that scores depend on. It reads every tensor; a saved detector keeps it.

    The threshold, the scores of normal images and the origin do not count.
    """
    content, hashed = _what_decides_scores(detector), hashlib.sha256()
    tensors = {f"{part} {name}": v for part in ("network", *TENSORS) for name, v in content.pop(part).items()}
    tensors |= {"region": content.pop("region")} if detector.region is not None else {}
    for name, value in sorted(tensors.items()):
        hashed.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        hashed.update(value.contiguous().flatten().view(torch.uint8).numpy())
    hashed.update(json.dumps(content, sort_keys=True).encode())
    return hashed.hexdigest()[:ID_LENGTH]


def read_detector(path: Path, make: Callable[..., FewShotDetector], scorer: str | Scorer | None) -> FewShotDetector:
    """The detector that `write_detector` wrote.

    make: makes a detector from network, keep_aspect, scorer, bits, tile and region. scorer: required for a custom
    scorer, as the file contains no code.

    Raises:
        UserError: the file is missing, damaged or not a detector, or was made with another scorer.
    """
    content = _read_content(path)
    try:
        if content["version"] == 2:
            content = _from_version_2(content)
        network = _empty_network(content)
        network.load_state_dict(content["network"])
        region = content.get("region")  # of bits, tiles and region, older files do not store all
        detector = make(
            network.eval(),
            keep_aspect=content["keep_aspect"],
            scorer=_scorer_of(path, content["scorer"], scorer),
            bits=content.get("bits", FULL_BITS),
            tile=content.get("tile", OFF),
            region=None if region is None else region.numpy(),
        )
        tiling, threshold = content.get("tiling"), content["threshold"]
        detector.tiling = None if tiling is None else Tiling(*tiling)
        detector.threshold = None if threshold is None else Threshold(*threshold)
        detector.origin = dict(content["origin"])
        for name in TENSORS:
            tensors = content[name] if name == "fitted" else content.get(name, {})
            setattr(detector, name, {key: value.to(detector.clock.device) for key, value in tensors.items()})
        for name in NORMAL:
            scores = content.get(name)
            setattr(detector, name, None if scores is None else NormalScores.from_content(scores))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"detector {path} is incomplete or inconsistent ({type(error).__name__}: {reason})") from error
    return detector


def _read_content(path: Path) -> dict:
    """Reads the content of a detector file. Verifies the checksums of the archive, which torch does not do."""
    if not path.is_file():
        raise UserError(f"no detector file {path}; make one with: python predict.py --support ... --save {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile:
        damaged = path.name
    if damaged:
        raise UserError(f"detector {path} is damaged or not a detector (checksum of {damaged})")
    content = load_tensors(path, "detector")
    if not isinstance(content, dict) or content.get("format") != FILE_FORMAT:
        raise UserError(f"{path} is not a detector (a checkpoint or support set?); predict.py --save writes one")
    if content.get("version") not in READABLE_VERSIONS:
        raise UserError(f"detector {path} has version {content.get('version')}, this program supports {FILE_VERSION}")
    return content


def _empty_network(content: dict) -> nn.Module:
    """The network of a saved detector, without its weights."""
    backbone, size = content.get("backbone", RELEASE_BACKBONE), content["img_size"]  # older files do not store it
    if backbone.startswith(PREFIX):
        return TimmFeatures(backbone.removeprefix(PREFIX), "none", size)
    return STNResNet(content["stn_mode"], size, backbone)


def _scorer_of(path: Path, name: str, given: str | Scorer | None) -> Scorer:
    """The scorer of a saved detector: the registered one, or the given one, whose name must match."""
    if given is None:
        if name not in SCORERS:
            raise UserError(f"detector {path} was made with the scorer {name}; give --scorer FILE.py:CLASS")
        return make_scorer(name)
    scorer = make_scorer(given) if isinstance(given, str) else given
    if scorer.name != name:
        raise UserError(f"detector {path} was made with the scorer {name}, not {scorer.name}; fit a new detector")
    return scorer


def _from_version_2(content: dict) -> dict:
    """Converts the content of a version 2 file, which stored the Gaussian statistics in parts by position."""
    parts = content["statistics"]
    fitted = {}
    for name, value in parts[0].items():
        if isinstance(value, list):
            stem = name.rstrip("s")
            fitted |= {f"{stem}{n}": torch.cat([part[name][n] for part in parts]) for n in range(len(value))}
        elif value is not None:
            fitted[name] = torch.cat([part[name] for part in parts])
    return {**content, "scorer": RELEASE_SCORER, "fitted": fitted}
