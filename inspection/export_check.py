"""Compares exported detectors with the original in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from datasets.images import read_image
from inspection.detector import FewShotDetector
from inspection.images import Decoded, as_tensor
from utils.errors import UserError

# Largest difference of a pixel or score, relative to itself or to the threshold, whichever is larger: what lies far
# below the threshold decides nothing. Measured with each scorer on bottles and transistors: ONNX Runtime, torch.export
# and OpenVINO in float32 at most 9e-6, OpenVINO in bfloat16 at least 3e-2.
TOLERANCE = 1e-3
CHECK_BATCHES = (1, 4)  # images per call
CHECK_IMAGES = 20  # at most, evenly spread over the file names of a folder

Runtime = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # images (B, S, S, 3) uint8 -> maps, scores


def compare_files(
    detector: FewShotDetector, files: Mapping[str, Path], paths: Sequence[Path], are_support: bool
) -> None:
    """Compares exported files (format -> path) with the detector on at most CHECK_IMAGES of the images `paths`.

    Prints the largest relative difference of each file.

    Raises:
        UserError: a difference exceeds TOLERANCE.
    """
    chosen = np.unique(np.linspace(0, len(paths) - 1, CHECK_IMAGES).round().astype(int))
    images = np.stack([read_image(paths[n], detector.size, detector.keep_aspect, detector.bits) for n in chosen])
    if are_support:  # a support image as it is may have no distance anywhere, and would compare zeros
        images = np.roll(images, detector.size // 10, axis=2)
    for kind, path in files.items():
        difference = largest_difference(detector, OPENERS[kind](path), images)
        print(f"{kind}: largest relative difference {difference:.1e} on {len(images)} images")
        if difference > TOLERANCE:
            raise UserError(
                f"the {kind} file must not be used: its scores differ from PyTorch's by {difference:.1e} of themselves "
                f"or of the threshold; the limit is {TOLERANCE:g}"
            )


def largest_difference(detector: FewShotDetector, runtime: Runtime, images: np.ndarray) -> float:
    """The largest difference of a pixel or score of images (N, S, S, 3) uint8; NaN counts as infinite.

    It is relative to the value or to the threshold, whichever is larger; without a threshold above 0, to the value or
    to the largest of all. The runtime gets the images in batches of each size in CHECK_BATCHES.
    """
    scores, maps = detector.score([Decoded(None, as_tensor(square)) for square in images])
    limit = detector.threshold.value if detector.threshold else 0.0
    least = limit if limit > 0 else float(scores.max()) or 1.0
    found = []
    for size in CHECK_BATCHES:
        batches = [runtime(images[start : start + size]) for start in range(0, len(images), size)]
        for parts, reference in zip(zip(*batches, strict=True), (maps, scores), strict=True):
            found.append((np.abs(np.concatenate(parts) - reference) / np.maximum(reference, least)).max())
    return float(np.nan_to_num(np.max(found), nan=np.inf))


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
