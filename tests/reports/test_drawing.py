"""Frames of boxes, titles of panels, and plots as files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from reports.drawing import (
    CAPTION_HEIGHT,
    FLAGGED,
    LEAST_SHEET,
    add_titles,
    boxed,
    captioned,
    colour_limits,
    heat_map,
    hstack,
    place,
    save_image,
    sheet,
    split_panels,
)
from training.curve import save_curve


def test_frames_lie_around_their_boxes():
    image = Image.new("RGB", (100, 80), "grey")
    drawn = np.asarray(boxed(image, [(40, 30, 20, 10, 150, 1.0)]))
    changed = (drawn != np.asarray(image)).any(axis=2)
    np.testing.assert_array_equal(drawn[28, 38:62], [FLAGGED] * 24)  # the upper line, two pixels outside
    np.testing.assert_array_equal(drawn[28:42, 61], [FLAGGED] * 14)
    assert not changed[30:40, 40:60].any() and not changed[43:].any()
    assert changed[:28].any()  # the number
    assert boxed(image, []) is image
    drawn = np.asarray(boxed(Image.new("RGB", (50, 50)), [(0, 0, 50, 50, 2500, 1.0)]))
    np.testing.assert_array_equal(drawn[-1], [FLAGGED] * 50)  # a box at the border is drawn


def test_titles_grow_with_the_image():
    for side, height in ((64, CAPTION_HEIGHT), (1500, 50)):
        panel = Image.new("RGB", (side, side), "white")
        (shown,) = add_titles({"input": panel})
        assert shown.size == (side, side + height)
        dark = np.argwhere(np.asarray(shown.convert("L")) < 128)
        assert len(dark) > 0 and dark[:, 0].max() < height and np.ptp(dark[:, 0]) > height / 3


def test_the_threshold_is_in_the_middle_of_the_colours():
    """A score twice the threshold is as far above it as half of it is below; one above that is seen to be higher."""
    limits = colour_limits(2.0)
    assert place(2.0, limits) == pytest.approx(0.5) and place(4.0, limits) + place(1.0, limits) == pytest.approx(1)
    assert colour_limits(2.0, 0.1) == (0.1 / 2.5, 5.0)
    level = [heat_map(np.full((1, 1), score), limits).getpixel((0, 0)) for score in (0.0, 1.0, 2.0, 4.0, 4.5, 90.0)]
    ramp = [heat_map(np.full((1, 1), score), (1.0, 16.0)).getpixel((0, 0)) for score in (1.0, 4.0, 16.0)]
    assert [level[0], level[2], level[5]] == ramp and len(set(level)) == 6
    for flat in (0.0, 3.0):  # without a threshold, each map has its own limits
        heat_map(np.full((2, 2), flat), (flat, flat))


def test_a_sheet_says_what_it_shows():
    row = hstack(add_titles({"input": Image.new("RGB", (64, 64)), "heat map": Image.new("RGB", (64, 64))}))
    plain = sheet(row, "a.png", "NORMAL", (0, 0, 0), (1.0, 4.0), 2.0)
    assert plain.width == LEAST_SHEET and np.array_equal(plain.crop(json.loads(plain.info["comment"])), row)
    for other in (("b.png", "NORMAL", (1.0, 4.0)), ("a.png", "REVIEW", (1.0, 4.0)), ("a.png", "NORMAL", (1.0, 9.0))):
        name, verdict, limits = other
        assert not np.array_equal(plain, sheet(row, name, verdict, (0, 0, 0), limits, 2.0))
    long = sheet(row, "x" * 300 + "/end.png", "NORMAL", (0, 0, 0), (1.0, 4.0), 2.0)
    assert long.size == plain.size
    long = sheet(row, "a.png", "REVIEW (darker, less sharp than the support images) score 1.47", (0, 0, 0), (1, 4), 2)
    assert (np.asarray(long)[:20, -4:] == 255).all()  # the verdict ends inside


ROW = Image.new("RGB", (64, 64))
SHEET_SIZE = sheet(ROW, "a", "NORMAL", (0, 0, 0), (1.0, 4.0), 2.0).size


@given(st.text(max_size=9))
def test_every_file_name_can_be_drawn(name):
    """Line feeds, control characters, bytes that are no text, right-to-left marks."""
    assert sheet(ROW, name, "NORMAL", (0, 0, 0), (1.0, 4.0), 2.0).size == SHEET_SIZE
    assert captioned(ROW, name, height=20).size == (64, 84)


def test_plots_are_the_same_files_again(tmp_path):
    history = [{"epoch": 0, "loss": None}, {"epoch": 1, "loss": -0.5}]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_curve(tmp_path / folder / "curve.png", history, "test images")
    for kind, begin in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        first, second = ((tmp_path / folder / f"curve.{kind}").read_bytes() for folder in ("a", "b"))
        assert first.startswith(begin) and first == second


@given(st.integers(8, 900), st.integers(8, 900), st.integers(1, 3), st.integers(20, 400), st.booleans())
@example(10, 138, 2, 20, False)  # decoded to three columns, of which one is half gap
def test_panels_are_taken_apart_as_they_were_joined(tmp_path_factory, width, height, count, side, on_sheet):
    colours = [(80 * n, 90, 200) for n in range(count)]
    panels = [Image.new("RGB", (width, height), colour) for colour in colours]
    path = tmp_path_factory.mktemp("panels") / "a.jpg"
    row = panels[0] if count == 1 else hstack(add_titles({str(n): one for n, one in enumerate(panels)}))
    save_image(path, sheet(row, "part/0.png", "NORMAL", (0, 0, 0), (1.0, 4.0), 2.0) if on_sheet else row)
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
