"""Exports a fitted detector to an ONNX or torch.export file, for use without this project.

python export.py --detector part.regad --output part.onnx --check photos/
python export.py --set_threshold 30 part.onnx
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from datasets.images import read_image
from inspection.detector import FewShotDetector
from inspection.export import WRITERS
from inspection.export_check import CHECK_IMAGES, compare, refuse_differences
from inspection.exported import require_packages, set_threshold
from inspection.flags import add_detector_flags, check_detector_flags, make_detector
from inspection.inputs import list_inputs
from utils.errors import UserError, run_command
from utils.files import require_writable


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of export.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_detector_flags(parser)
    export = parser.add_argument_group("export")
    export.add_argument("--output", type=Path, default=Path("part.onnx"), help="the suffix is set by --format")
    export.add_argument("--format", nargs="+", choices=list(WRITERS), default=["onnx"], help="one or both formats")
    export.add_argument(
        "--check",
        nargs="*",
        type=Path,
        metavar="PATH",
        help=f"compare with PyTorch on at most {CHECK_IMAGES} of these images; without PATH, on the --support images",
    )
    export.add_argument(
        "--set_threshold", nargs=2, metavar=("VALUE", "FILE"), help="change the threshold in an exported file, no more"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Fits or loads the detector, writes the files, and compares them with PyTorch; or changes a file's threshold."""
    args = get_args_parser().parse_args(argv)
    if args.set_threshold:
        _change_threshold(args)
        return
    stem = args.output.with_suffix("") if args.output.suffix[1:] in WRITERS else args.output
    files = {kind: stem.with_name(f"{stem.name}.{kind}") for kind in args.format}
    _check(args, files)
    images = None if args.check is None else list_inputs(args.check or args.support)
    detector = make_detector(args, "cpu")
    for kind, path in files.items():
        WRITERS[kind](detector, path)
        print(f"{kind}: {path} ({path.stat().st_size / 2**20:.0f} MB)")
    if images:
        _compare(detector, files, images, shifted=not args.check)


def _change_threshold(args: argparse.Namespace) -> None:
    """Changes the threshold in the metadata of an exported file.

    Raises:
        UserError: the threshold is no number, the file is unsuitable or cannot be written, or a detector is given, too.
    """
    if args.support or args.detector:
        raise UserError("--set_threshold changes a file that exists: leave out --support and --detector")
    text, file = args.set_threshold
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"--set_threshold needs a number and a file, got {text!r}")
    path = Path(file)
    require_writable(path, "--set_threshold")
    before = set_threshold(path, value)
    print(f"threshold of {path}: {value:g}, before: {before or 'none'}")


def _check(args: argparse.Namespace, files: dict[str, Path]) -> None:
    """Checks arguments and optional packages.

    Raises:
        UserError: arguments contradict each other, a file cannot be written, or a package is missing.
    """
    for file in files.values():
        require_writable(file, "--output")
    check_detector_flags(args)
    if args.check == [] and not args.support:
        raise UserError("--check needs images, and a saved detector contains none; give files or folders after --check")
    if "onnx" in args.format:
        require_packages("onnx", "onnxscript", *([] if args.check is None else ["onnxruntime"]))


def _compare(detector: FewShotDetector, files: dict[str, Path], paths: Sequence[Path], shifted: bool) -> None:
    """Prints differences and times.

    Raises:
        UserError: the maps or scores of a file differ from those in PyTorch.
    """
    chosen = np.unique(np.linspace(0, len(paths) - 1, CHECK_IMAGES).round().astype(int))
    how = (detector.size, detector.keep_aspect, detector.bits)
    images = np.stack([read_image(paths[index], *how) for index in chosen])
    if shifted:  # a support image as it is may have no distance anywhere, and would compare zeros
        images = np.roll(images, detector.size // 10, axis=2)
    print(f"{len(images)} images, {torch.get_num_threads()} thread(s), without decoding")
    print("runtime   batch   ms per image   largest relative difference")
    rows = []
    for row in compare(detector, files, images):
        print(f"{row.runtime:9} {row.batch:5} {row.milliseconds:16.1f}   {row.difference:.1e}")
        rows.append(row)
    refuse_differences(rows)


if __name__ == "__main__":
    run_command(main)
