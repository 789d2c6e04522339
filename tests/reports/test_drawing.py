"""Frames of boxes, titles of panels, and plots as files."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from reports.drawing import CAPTION_HEIGHT, FLAGGED, add_titles, boxed, hstack, save_image, split_panels
from training.curve import save_curve


def test_frames_lie_around_their_boxes():
    image = Image.new("RGB", (100, 80), "grey")
    drawn = np.asarray(boxed(image, [(40, 30, 20, 10, 150, 1.0)], FLAGGED))
    changed = (drawn != np.asarray(image)).any(axis=2)
    np.testing.assert_array_equal(drawn[28, 38:62], [FLAGGED] * 24)  # the upper line, two pixels outside
    np.testing.assert_array_equal(drawn[28:42, 61], [FLAGGED] * 14)
    assert not changed[30:40, 40:60].any() and not changed[43:].any()
    assert changed[:28].any()  # the number
    assert boxed(image, [], FLAGGED) is image


def test_boxes_at_the_border_are_drawn():
    drawn = np.asarray(boxed(Image.new("RGB", (50, 50)), [(0, 0, 50, 50, 2500, 1.0)], FLAGGED))
    np.testing.assert_array_equal(drawn[-1], [FLAGGED] * 50)


def test_titles_grow_with_the_image():
    for side, height in ((64, CAPTION_HEIGHT), (1500, 50)):
        panel = Image.new("RGB", (side, side), "white")
        (shown,) = add_titles({"input": panel})
        assert shown.size == (side, side + height)
        dark = np.argwhere(np.asarray(shown.convert("L")) < 128)
        assert len(dark) > 0 and dark[:, 0].max() < height and np.ptp(dark[:, 0]) > height / 3


def test_plots_are_the_same_files_again(tmp_path):
    history = [{"epoch": 0, "loss": None}, {"epoch": 1, "loss": -0.5}]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_curve(tmp_path / folder / "curve.png", history, "test images")
    for kind, begin in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        first, second = ((tmp_path / folder / f"curve.{kind}").read_bytes() for folder in ("a", "b"))
        assert first.startswith(begin) and first == second


@given(st.integers(8, 900), st.integers(8, 900), st.integers(1, 3), st.integers(20, 400))
@example(10, 138, 2, 20)  # decoded to three columns, of which one is half gap
def test_panels_are_taken_apart_as_they_were_joined(tmp_path_factory, width, height, count, side):
    colours = [(80 * n, 90, 200) for n in range(count)]
    panels = [Image.new("RGB", (width, height), colour) for colour in colours]
    path = tmp_path_factory.mktemp("panels") / "a.jpg"
    save_image(path, panels[0] if count == 1 else hstack(add_titles({str(n): one for n, one in enumerate(panels)})))
    parts = split_panels(path, count, side)
    assert len(parts) == count
    for part, colour in zip(parts, colours, strict=True):
        size = np.array(part.size)
        is_small = max(width, height) <= 2 * side
        assert (size == (width, height)).all() if is_small else max(size) >= side
        np.testing.assert_allclose(size / max(size), np.array([width, height]) / max(width, height), atol=2 / max(size))
        if min(size) < 8:  # a border's colour reaches the middle
            continue
        middle = np.asarray(part)[size[1] // 4 : -(size[1] // 4) or None, size[0] // 4 : -(size[0] // 4) or None]
        np.testing.assert_allclose(middle.reshape(-1, 3).mean(axis=0), colour, atol=6)
