"""Bounding boxes of the regions of a score map above a threshold, in pixels of the image after EXIF orientation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from skimage.measure import label, regionprops

MOST_BOXES = 100  # of an image; those with the highest peaks


class Box(NamedTuple):
    """The smallest upright rectangle around one region.

    area: pixels of the region itself, at most width * height. peak: its highest score.

    Convention: pixels of the image as it is displayed (after its EXIF orientation), origin at the top left, x to the
    right and y down. The box covers the columns x .. x + width - 1 and the rows y .. y + height - 1.
    """

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float


def largest_area(scores: np.ndarray, limit: float) -> int:
    """The pixels of the largest region of a score map (H, W) above `limit`; 0 if there is none."""
    return int(np.bincount(label(scores > limit, connectivity=2).ravel())[1:].max(initial=0))


def find_boxes(scores: np.ndarray, limit: float) -> list[Box]:
    """The boxes of the regions of a score map (H, W) above `limit`, highest peak first, at most MOST_BOXES.

    A region is a set of pixels with scores above `limit` that touch each other at a side or a corner.
    """
    boxes = []
    for region in regionprops(label(scores > limit, connectivity=2), intensity_image=scores):
        top, left, bottom, right = region.bbox
        boxes.append(Box(left, top, right - left, bottom - top, int(region.area), float(region.intensity_max)))
    return sorted(boxes, key=lambda box: -box.peak)[:MOST_BOXES]  # equal peaks: from top to bottom
