"""Compares exported detectors with the original in PyTorch: difference of the maps and time per image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.images import read_image
from inspection.detector import FewShotDetector
from inspection.images import as_tensor
from utils.errors import UserError

FLOOR = 1e-3  # times the largest value: lower bound of the divisor, as distances can be 0
TOLERANCE = 1e-3  # largest relative difference of a pixel or score; above it, a file is rejected
CHECK_BATCHES = (1, 4)  # images per call
CHECK_IMAGES = 20  # at most, evenly spread over the file names of a folder

REFERENCE = "PyTorch"

Runtime = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # images (B, S, S, 3) uint8 -> maps, scores


class Comparison(NamedTuple):
    """One runtime at one batch size. difference: largest relative difference of a pixel or score from PyTorch."""

    runtime: str
    batch: int
    difference: float
    milliseconds: float  # per image, median over the calls


def compare(detector: FewShotDetector, files: dict[str, Path], images: np.ndarray) -> Iterator[Comparison]:
    """Runs `images` (N, S, S, 3) uint8 through FewShotDetector.score and the exported `files` (format -> path).

    The runtimes alternate batch by batch, so that other load on the machine affects all of them. The last batch is
    padded with the first images.
    """
    runtimes = {REFERENCE: _pytorch(detector), **{kind: OPENERS[kind](path) for kind, path in files.items()}}
    for size in CHECK_BATCHES:
        filled = images[np.arange(-(-len(images) // size) * size) % len(images)]
        batches = np.split(filled, len(filled) // size)
        seconds, differences = {name: [] for name in runtimes}, dict.fromkeys(runtimes, 0.0)
        for batch in [batches[0], *batches]:  # the first call is a warm-up
            results = {}
            for name, run in runtimes.items():
                begin = time.perf_counter()
                results[name] = run(batch)
                seconds[name].append(time.perf_counter() - begin)
                differences[name] = max(differences[name], _difference(results[name], results[REFERENCE]))
        for name in runtimes:
            yield Comparison(name, size, differences[name], 1000 * float(np.median(seconds[name][1:])) / size)


def _difference(result: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """Largest relative difference of any pixel or score; NaN counts as infinite."""
    pairs = zip(result, reference, strict=True)
    relative = [(np.abs(one - other) / np.maximum(other, FLOOR * (other.max() or 1))).max() for one, other in pairs]
    return float(np.nan_to_num(np.max(relative), nan=np.inf))


def _pytorch(detector: FewShotDetector) -> Runtime:
    def run(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores, maps = detector.score([as_tensor(square) for square in batch])  # never cut
        return maps, scores

    return run


def open_onnx(path: Path) -> Runtime:
    """Opens an ONNX file in ONNX Runtime on the CPU, with the number of threads that PyTorch uses."""
    import onnxruntime  # optional: needed only to check ONNX files

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: tuple(session.run(["map", "score"], {"image": batch}))


def open_pt2(path: Path) -> Runtime:
    """Opens a torch.export file on the CPU."""
    module = torch.export.load(path).module()

    def run(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            maps, scores = module(torch.from_numpy(batch))
        return maps.numpy(), scores.numpy()

    return run


OPENERS = {"onnx": open_onnx, "pt2": open_pt2}


def compare_files(detector: FewShotDetector, files: dict[str, Path], paths: Sequence[Path], are_support: bool) -> None:
    """Compares exported files with the detector on at most CHECK_IMAGES of the images; prints differences and times.

    Raises:
        UserError: the maps or scores of a file differ from those in PyTorch.
    """
    chosen = np.unique(np.linspace(0, len(paths) - 1, CHECK_IMAGES).round().astype(int))
    how = (detector.size, detector.keep_aspect, detector.bits)
    images = np.stack([read_image(paths[index], *how) for index in chosen])
    if are_support:  # a support image as it is may have no distance anywhere, and would compare zeros
        images = np.roll(images, detector.size // 10, axis=2)
    print(f"{len(images)} images, {torch.get_num_threads()} thread(s), without decoding")
    print("runtime   batch   ms per image   largest relative difference")
    rows = []
    for row in compare(detector, files, images):
        print(f"{row.runtime:9} {row.batch:5} {row.milliseconds:16.1f}   {row.difference:.1e}")
        rows.append(row)
    refuse_differences(rows)


def refuse_differences(comparisons: list[Comparison]) -> None:
    """Checks that the maps and scores of every runtime agree with PyTorch up to TOLERANCE.

    Raises:
        UserError: a difference exceeds TOLERANCE.
    """
    for row in comparisons:
        if row.difference > TOLERANCE:
            raise UserError(
                f"the {row.runtime} file must not be used: at batch size {row.batch} its maps differ from PyTorch's "
                f"by {row.difference:.1e}; the limit is {TOLERANCE:g}"
            )
