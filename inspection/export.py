"""Exports a fitted detector as one module to ONNX and torch.export files, and compares these with PyTorch."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from datasets.images import read_image
from inspection.detector import FewShotDetector
from inspection.images import Decoded, as_tensor
from inspection.tiles import OVERLAP
from models.stn import without_batch_norm
from scorers.maps import border_weights, score_map_matrix, score_maps
from utils.errors import UserError
from utils.files import whole_file
from utils.records import VERSION, git_commit

ONNX_OPSET = 20
ONNX_LIMIT = 2**31 - 1  # bytes, size limit of an ONNX file (protocol buffer)
METADATA_FILE = "metadata.json"  # extra file inside a .pt2 file
DYNAMIC_SHAPES = ({0: torch.export.Dim("batch")},)
EXAMPLE_BATCH = 2  # with a batch of 1, the exporter would treat the batch size as constant
# Largest difference of a pixel or score, relative to itself or to the threshold, whichever is larger: what lies far
# below the threshold decides nothing. Measured with each scorer on bottles and transistors: ONNX Runtime, torch.export
# and OpenVINO in float32 at most 9e-6, OpenVINO in bfloat16 at least 3e-2.
TOLERANCE = 1e-3
CHECK_BATCHES = (1, 4)  # images per call
CHECK_IMAGES = 20  # at most, evenly spread over the file names of a folder

Runtime = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # images (B, S, S, 3) uint8 -> maps, scores


class ExportedDetector(nn.Module):
    """The computation of FewShotDetector.score on the CPU, for any batch size.

    Input: images (B, S, S, 3) uint8 RGB, resized as described by `export_metadata`. Output: maps (B, S, S) and scores
    (B,). Outside the region of the detector the maps are 0. The control flow does not depend on values. Tensors are
    contiguous, so that `models.warp.warp` uses grid_sample.
    """

    def __init__(self, detector: FewShotDetector) -> None:
        super().__init__()
        if not detector.fitted:
            raise UserError("only a fitted detector can be exported")
        self.network, self.scorer = without_batch_norm(detector.network).cpu(), detector.scorer
        self.names = list(detector.fitted)
        for number, tensor in enumerate(detector.fitted.values()):
            self.register_buffer(f"fitted_{number}", tensor.cpu().contiguous())
        with torch.no_grad():
            grid = self._distances(torch.zeros(1, 3, detector.size, detector.size)).shape[-1]
        self.register_buffer("matrix", score_map_matrix(grid, detector.size))
        if detector.region is not None and detector.cuts_support:
            raise UserError(
                "an exported file scores single tiles: fit the detector without a region", ("region", "ignore")
            )
        self.register_buffer("inside", None if detector.region is None else detector.inside.cpu())
        self.register_buffer("weights", border_weights(detector.size, self.scorer.border_weight))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Score maps (B, S, S) and image scores (B,), float32, of images (B, S, S, 3) uint8 RGB."""
        x = image.permute(0, 3, 1, 2).contiguous().float() / 255
        scores, maps = score_maps(self._distances(x), self.matrix, self.inside, self.weights)
        return maps, scores

    def _distances(self, x: torch.Tensor) -> torch.Tensor:
        fitted = {name: getattr(self, f"fitted_{number}") for number, name in enumerate(self.names)}
        return self.scorer.distance_maps(fitted, self.scorer.prepare(self.network.features(x)))


def export_metadata(detector: FewShotDetector) -> dict[str, str]:
    """Metadata stored in an exported file: how to prepare the input, how to decide, and where the file comes from.

    `tile`: "off", or "width,height,above": images with a longer side above the last are to be cut into tiles of this
    size, in pixels; `overlap`: the least overlap of the tiles. `region`: whether the maps are 0 outside a region.
    `review_threshold`: above it, a person should look. `quality_limits`: of the measures in inspection/quality.py, as
    JSON. `threshold`, `review_threshold` and `threshold_rule` are empty if the detector has no threshold;
    `false_alarm`, the rate asked for, is empty if the threshold was given; `normal_images`: the number that it was
    computed from. `detector`: see `FewShotDetector.identity`. `support_sha256`: of the support images, joined by
    commas; empty if they were no files.
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
        "review_threshold": "" if threshold is None else repr(float(threshold.review_value)),
        "quality_limits": json.dumps(detector.gate.limits() if detector.gate else {}),
        "threshold_rule": "" if threshold is None else threshold.how,
        "false_alarm": "" if rate is None else repr(float(rate)),
        "normal_images": str(0 if threshold is None else threshold.count),
        "detector": detector.identity(),
        "support_sha256": ",".join(image["sha256"] for image in detector.origin.get("support", ())),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "regad": f"{VERSION} {git_commit() or ''}".strip(),
        "torch": torch.__version__,
    }


def write_onnx(detector: FewShotDetector, path: Path) -> None:
    """Writes the detector to one ONNX file with input `image` and outputs `map` and `score` (see ExportedDetector).

    Raises:
        UserError: the detector is not fitted, or the file would exceed ONNX_LIMIT.
    """
    module, example = _module(detector)
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    if size > ONNX_LIMIT:
        raise UserError(
            f"the detector has {size / 2**30:.1f} GB, one ONNX file holds 2 GB: "
            "give fewer support images, a smaller image size, or the format pt2",
            options=("img_size", "format"),
        )
    program = torch.onnx.export(
        *(module, example),
        dynamo=True,
        opset_version=ONNX_OPSET,
        input_names=["image"],
        output_names=["map", "score"],
        dynamic_shapes=DYNAMIC_SHAPES,
        verbose=False,
    )
    program.model.metadata_props.update(export_metadata(detector))
    with whole_file(path) as aside:
        program.save(aside, external_data=False)


def write_pt2(detector: FewShotDetector, path: Path) -> None:
    """Writes the detector to a torch.export file, with the metadata as JSON in the extra file METADATA_FILE.

    Raises:
        UserError: the detector is not fitted.
    """
    module, example = _module(detector)
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=DYNAMIC_SHAPES)
    save_program(path, program, {METADATA_FILE: json.dumps(export_metadata(detector))})


def save_program(path: Path, program: torch.export.ExportedProgram, extra_files: dict[str, str]) -> None:
    """Writes a program of torch.export, by way of the memory: torch aborts where it cannot write into a file."""
    encoded = io.BytesIO()
    torch.export.save(program, encoded, extra_files=extra_files)
    with whole_file(path) as aside:
        aside.write_bytes(encoded.getbuffer())


WRITERS = {"onnx": write_onnx, "pt2": write_pt2}


def _module(detector: FewShotDetector) -> tuple[ExportedDetector, tuple[torch.Tensor]]:
    """The module of a detector, and arguments to trace it with."""
    example = torch.zeros(EXAMPLE_BATCH, detector.size, detector.size, 3, dtype=torch.uint8)
    return ExportedDetector(detector).eval(), (example,)


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
    differences = []
    for size in CHECK_BATCHES:
        batches = [runtime(images[start : start + size]) for start in range(0, len(images), size)]
        for parts, reference in zip(zip(*batches, strict=True), (maps, scores), strict=True):
            differences.append((np.abs(np.concatenate(parts) - reference) / np.maximum(reference, least)).max())
    return float(np.nan_to_num(np.max(differences), nan=np.inf))


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
