"""The regions of a score map above a threshold, as boxes in the image's own pixels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage

MOST_BOXES = 100  # of an image; those with the highest peaks
_EIGHT_NEIGHBOURS = np.ones((3, 3), bool)


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


def find_boxes(scores: np.ndarray, limit: float, most: int = MOST_BOXES) -> list[Box]:
    """The boxes of the regions of a score map (H, W) above `limit`, highest peak first, at most `most`.

    A region is a set of pixels with scores above `limit` that touch each other at a side or a corner.
    """
    above = scores > limit
    if not above.any():
        return []
    labels, count = ndimage.label(above, structure=_EIGHT_NEIGHBOURS)
    inside = labels[above]  # far fewer pixels than the image has
    areas = np.bincount(inside)
    peaks = ndimage.maximum(scores[above], inside, np.arange(1, count + 1))
    places = ndimage.find_objects(labels)
    first = np.argsort(-peaks, kind="stable")[:most]  # equal peaks: from top to bottom
    return [_box(places[number], int(areas[number + 1]), float(peaks[number])) for number in first]


def _box(place: tuple[slice, slice], area: int, peak: float) -> Box:
    rows, columns = place
    width, height = columns.stop - columns.start, rows.stop - rows.start
    return Box(columns.start, rows.start, width, height, area, peak)
