"""One image at a time through a saved detector: what the service and the camera share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets.images import CLIPPED_FROM
from inspection.detector import FewShotDetector
from inspection.predictions import HEAT_PANEL, draw_panels
from inspection.results import Box, as_far_as_read, decide, find_boxes, relative_score
from inspection.tiles import shrink_warning
from utils.config import Config, flag


class Judgement(NamedTuple):
    """The result of one image; the fields are those of `inspection.results.Prediction`, but for one.

    map: (H, W), the score map in the image's own size.
    """

    score: float
    relative: float | None
    decision: str | None
    reason: str | None
    threshold: float | None
    detector: str
    warning: str | None
    boxes: Sequence[Box]
    map: np.ndarray

    def plain(self) -> dict:
        """Plain values for JSON, without the map."""
        kept = {name: value for name, value in self._asdict().items() if name != "map"}
        return kept | {"boxes": [box._asdict() for box in self.boxes]}


class Judge:
    """A fitted detector for single images. One call at a time."""

    def __init__(self, detector: FewShotDetector) -> None:
        self.detector, self.name = detector, detector.identity()

    def judge(self, image: Image.Image) -> Judgement:
        """Scores an image in mode L or RGB, as `datasets.images.decode_image` returns them."""
        warning = self._warning(image)
        image.info.pop(CLIPPED_FROM, None)  # else each call would warn once more
        (score,), maps, (stopped,), _ = self.detector.inspect([image])
        threshold, scores = self.detector.threshold, self.detector.restore(maps[0], *image.size)
        decided = decide(float(score), threshold, stopped, scores, self.detector.min_area)
        return Judgement(
            float(score),
            relative_score(float(score), threshold),
            *as_far_as_read(image, decided),
            None if threshold is None else threshold.value,
            self.name,
            warning,
            [] if threshold is None else find_boxes(scores, threshold.value),
            scores,
        )

    def _warning(self, image: Image.Image) -> str | None:
        """Why the score may mislead: what the detector doubts, or an image that shrinks much."""
        shrinks = None if self.detector.layout_of(*image.size) else shrink_warning(*image.size, self.detector.size)
        notes = [self.detector.doubts(image, None, "the image"), shrinks and shrinks.removeprefix("warning: ")]
        return "; ".join(filter(None, notes)) or None

    def heat_map(self, image: Image.Image, judgement: Judgement) -> Image.Image:
        """The heat map over the image, in the colours of predict.py."""
        return draw_panels(image, judgement.map, self.detector.threshold)[HEAT_PANEL]


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(Config):
    """How a saved detector is loaded."""

    scorer: str | None = flag(
        "the class of a custom scorer, as FILE.py:CLASS (default: the file names the scorer)",
        default=None,
        group="detector",
        metavar="CLASS",
    )
    device: str = flag("auto, cpu, cuda, cuda:1, ...", default="auto")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(DeviceConfig):
    """Which detector judges, and where."""

    detector: Path = flag("from predict.py --save", group="detector", metavar="FILE")


def load_judge(file: Path, config: DeviceConfig) -> Judge:
    """The saved detector in a file.

    Raises:
        UserError: the file is missing or unsuitable.
    """
    return Judge(FewShotDetector.load(file, config.device, config.scorer))
