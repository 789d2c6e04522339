"""What exported files say of themselves: the metadata, and another threshold without a new export."""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch

from inspection.detector import FewShotDetector
from inspection.tiles import OVERLAP
from utils.errors import UserError
from utils.files import whole_file
from utils.records import VERSION, git_commit

METADATA_FILE = "metadata.json"  # extra file inside a .pt2 file
GIVEN = "given"  # how a threshold was set


def export_metadata(detector: FewShotDetector) -> dict[str, str]:
    """Metadata stored in an exported file: how to prepare the input, how to decide, and where the file comes from.

    `tile`: "off", or "width,height,above": images with a longer side above the last are to be cut into tiles of this
    size, in pixels; `overlap`: the least overlap of the tiles. `region`: whether the maps are 0 outside a region.
    `threshold` and `threshold_rule` are empty if the detector has no threshold; `false_alarm`, the rate asked for, is
    empty if the threshold was given; `normal_images`: the number that it was computed from. `detector`: see
    `FewShotDetector.identity`. `support_sha256`: of the support images, joined by commas; empty if they were no files.
    """
    threshold, tiling = detector.threshold, detector.tiling
    rate = None if threshold is None else threshold.rate
    return {
        "input": "uint8 RGB (batch, size, size, 3)",
        "size": str(detector.size),
        "keep_aspect": str(detector.keep_aspect).lower(),
        "bits": str(detector.bits),
        "resize": "Pillow LANCZOS; keep_aspect: longer side to size, centred, the rest filled by symmetric reflection",
        "tile": "off" if tiling is None else f"{tiling.width},{tiling.height},{tiling.above}",
        "overlap": str(OVERLAP),
        "region": str(detector.region is not None).lower(),
        "scorer": detector.scorer.name,
        "backbone": getattr(detector.network, "backbone", "of your own"),
        "network": detector.origin.get("network", ""),
        "threshold": "" if threshold is None else repr(float(threshold.value)),
        "threshold_rule": "" if threshold is None else threshold.how,
        "false_alarm": "" if rate is None else repr(float(rate)),
        "normal_images": str(0 if threshold is None else threshold.count),
        "detector": detector.identity(),
        "support_sha256": ",".join(image["sha256"] for image in detector.origin.get("support", ())),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "regad": f"{VERSION} {git_commit() or ''}".strip(),
        "torch": torch.__version__,
    }


def set_threshold(path: Path, value: float) -> str:
    """Writes another threshold into an exported file; returns the one before. All other content stays as it is.

    Raises:
        UserError: there is no such file, it is not from export.py, or its format needs a package that is missing.
    """
    if not path.is_file():
        raise UserError(f"no exported file {path}; export.py writes one")
    writers = {".onnx": _set_in_onnx, ".pt2": _set_in_pt2}
    if path.suffix not in writers:
        raise UserError(f"{path} is not an .onnx or .pt2 file; predict.py changes the threshold of a .regad file")
    return writers[path.suffix](path, {"threshold": repr(value), "threshold_rule": GIVEN, "false_alarm": ""})


def _set_in_onnx(path: Path, changes: dict[str, str]) -> str:
    require_packages("onnx")
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # the decoder of protocol buffers has errors of its own
        raise _not_exported(path) from error
    about = {entry.key: entry.value for entry in model.metadata_props}
    before = _threshold_of(path, about)
    onnx.helper.set_model_props(model, about | changes)
    with whole_file(path) as aside:
        aside.write_bytes(model.SerializeToString())
    return before


def _set_in_pt2(path: Path, changes: dict[str, str]) -> str:
    """The file is an archive in which only METADATA_FILE is replaced: reading the program would take far longer."""
    try:
        with zipfile.ZipFile(path) as archive:
            (place,) = (entry for entry in archive.infolist() if Path(entry.filename).name == METADATA_FILE)
            about = json.loads(archive.read(place))
            before = _threshold_of(path, about)
            with whole_file(path) as aside, zipfile.ZipFile(aside, "w") as changed:
                for entry in archive.infolist():
                    if entry is place:
                        changed.writestr(entry.filename, json.dumps(about | changes))
                        continue
                    with archive.open(entry) as source, changed.open(entry.filename, "w", force_zip64=True) as target:
                        shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, ValueError) as error:
        raise _not_exported(path) from error
    return before


def _threshold_of(path: Path, about: dict[str, str]) -> str:
    if not {"threshold", "size", "scorer"} <= set(about):
        raise _not_exported(path)
    return about["threshold"]


def _not_exported(path: Path) -> UserError:
    return UserError(f"{path} is damaged or not from export.py: it has no metadata with a threshold")


def require_packages(*names: str, requirements: str = "requirements-export.txt") -> None:
    """Checks that the optional packages `names` are installed; `requirements`: the file that lists them.

    Raises:
        UserError: a package is missing.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UserError(f"no package {' and '.join(missing)}: run pip install -r {requirements}")
