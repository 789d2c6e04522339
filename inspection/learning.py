"""A detector learns from good parts that it rejected: they join its memory and its limits of quality.

What the support images have shown stays as it is (`base`), and the features of all accepted images are kept beside it,
one view each, in half precision. The detector is then what the scorer makes of both, so that neither the order nor the
number of calls matters, up to rounding.

The thresholds stay. Accepted images were chosen because their scores are high; as normal scores like any others they
would raise the thresholds far too much. Images like them have low scores afterwards. `after` is the score of an
accepted image by a detector that has learned from the others alone. Where it stays high, the accepted images have
little in common, and unselected normal images are needed (--calibrate).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from inspection.detector import FewShotDetector, require_this_part
from inspection.images import ImageInput, image_list, image_names
from inspection.scoring import ImageResult
from inspection.support import MOST_FITTED, digest
from scorers.base import Fitted, Prepared
from scorers.left_out import left_out
from utils.errors import UserError

MOST_ACCEPTED = 64  # images; 1 MB of features each in the file


class Learned(NamedTuple):
    """An accepted image: its name, its score before, and by a detector that has learned from the others alone."""

    name: str
    before: float
    after: float


def accept(detector: FewShotDetector, images: Sequence[ImageInput], force: bool = False) -> list[Learned]:
    """Makes the detector learn from good images; returns all that were accepted so far.

    Images that are known already are left out. force: accept images that differ from the support as a whole.

    Raises:
        UserError: the detector is fitted to tiles, or learns from more than MOST_ACCEPTED images.
        OtherPartError: an image differs from the support as a whole.
    """
    if detector.cuts_support:
        raise UserError("a detector of tiles cannot learn; fit a new one with these images, too", ("accept", "support"))
    images = image_list(images)
    results, names = list(detector.results(images, detector.fitted)), image_names(images)
    if not force:
        require_this_part("images", names, results, "accept")
    nothing = {"base": detector.fitted, "digests": [], "names": [], "before": [], "after": [], "features": []}
    learned = detector.learned or nothing
    known, new = {*detector.support_digests, *learned["digests"]}, {}
    for name, result in zip(names, results, strict=True):
        if (key := digest(result.square)) not in known:
            new.setdefault(key, (name, result))
    if len(learned["names"]) + len(new) > MOST_ACCEPTED:
        raise UserError(
            f"a detector learns from at most {MOST_ACCEPTED} images; fit a new one with these among its support images",
            options=("accept", "support"),
        )
    if new:
        squares = [result.square for _, result in new.values()]
        detector.learned = learned = _extended(detector, learned, new, squares)
        if detector.gate:
            detector.gate = detector.gate.with_support(squares)
        _learn(detector)
    return [Learned(*row) for row in zip(learned["names"], learned["before"], learned["after"], strict=True)]


def _extended(
    detector: FewShotDetector, learned: dict, new: dict[str, tuple[str, ImageResult]], squares: list[torch.Tensor]
) -> dict:
    """The accepted images with new ones, by digest, in the order of all digests."""
    features = [tensor.half().cpu() for tensor in detector.features(detector.on_device(squares))[detector.scorer.name]]
    if learned["features"]:
        features = [torch.cat(pair) for pair in zip(learned["features"], features, strict=True)]
    lists = {
        "digests": [*learned["digests"], *new],
        "names": [*learned["names"], *(name for name, _ in new.values())],
        "before": [*learned["before"], *(float(result.score) for _, result in new.values())],
    }
    order = np.argsort(lists["digests"]).tolist()
    ordered = {name: [values[number] for number in order] for name, values in lists.items()}
    return {"base": learned["base"], **ordered, "features": [tensor[order] for tensor in features]}


def _learn(detector: FewShotDetector) -> None:
    """Makes the fit from the base and all accepted images, and scores each of these without itself."""
    learned, device = detector.learned, detector.clock.device
    base = {name: tensor.to(device) for name, tensor in learned["base"].items()}
    features = [tensor.float().to(device) for tensor in learned["features"]]
    known = max(1, min(MOST_FITTED, len(detector.support_digests))) * len(detector.scorer.views)

    def extended(accepted: Prepared) -> Fitted:
        return detector.scorer.extend(base, accepted, known) if len(accepted[0]) else base

    distances = left_out(features, 1, 1, lambda others, own: detector.scorer.distance_maps(extended(others), own))
    detector.fitted = extended(features)
    learned["after"] = detector.scores_of(distances).tolist()
