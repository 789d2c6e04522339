"""Boxes of regions above a threshold: a map drawn by hand, and the highest peaks."""

from __future__ import annotations

import numpy as np

from inspection.results import MOST_BOXES, Box, find_boxes


def test_a_map_drawn_by_hand():
    """Columns count from the left and rows from the top; pixels that touch at a corner are one region."""
    scores = np.zeros((5, 8), np.float32)
    scores[1, 2] = scores[2, 3] = 0.5
    scores[4, 5:8] = [0.25, 0.75, 0.5]
    assert find_boxes(scores, 0.2) == [Box(5, 4, 3, 1, 3, 0.75), Box(2, 1, 2, 2, 2, 0.5)]
    assert find_boxes(scores, 0.5) == [Box(6, 4, 1, 1, 1, 0.75)]
    assert find_boxes(scores, 0.75) == []


def test_the_highest_peaks_are_kept():
    scores = np.zeros((40, 40), np.float32)
    scores[::2, ::2] = 1 + np.arange(400).reshape(20, 20)
    boxes = find_boxes(scores, 0.5)
    assert [box.peak for box in boxes] == list(range(400, 400 - MOST_BOXES, -1))
    assert boxes[0] == Box(38, 38, 1, 1, 1, 400.0)
