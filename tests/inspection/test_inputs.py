"""Reading inputs: no half file is read as an image, and no worker thread waits for the device."""

from __future__ import annotations

import io
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from inspection.inputs import identify, read_inputs
from inspection.predictions import Outputs, predict
from inspection.scoring import SCORE_GROUP
from inspection.threshold import Threshold
from utils.stages import StageClock


@pytest.mark.parametrize("ending", ["png", "jpeg", "bmp", "tiff", "webp"])
def test_no_part_of_a_file_is_an_image(ending, tmp_path):
    """A file cut off anywhere cannot be read, or holds all pixels (only its end mark is missing)."""
    pixels = gaussian_filter(np.random.default_rng(0).random((60, 50, 3)), (2, 2, 0))
    stream = io.BytesIO()
    Image.fromarray((pixels * 255).astype(np.uint8)).save(stream, ending)
    content, file = stream.getvalue(), tmp_path / f"a.{ending}"
    lengths = [*range(0, len(content), max(1, len(content) // 60)), *range(len(content) - 16, len(content) + 1)]
    squares = []
    for length in lengths:
        file.write_bytes(content[:length])
        (item,) = read_inputs([file], 32, False, 1, StageClock())
        squares.append(item.square)
        assert item.error is not None or item.identity == identify(file)
    assert squares[-1] is not None and sum(square is None for square in squares) > 50
    assert all(np.array_equal(square, squares[-1]) for square in squares if square is not None)


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")

    def decode_and_touch(path, bits):
        os.utime(path, ns=(1, 1))
        return Image.new("L", (8, 8))

    monkeypatch.setattr("inspection.inputs.decode_image", decode_and_touch)
    (item,) = read_inputs([tmp_path / "a.png"], 16, False, 1, StageClock())
    assert "changed while it was read" in item.error and item.identity is None and item.square is None


def test_a_vanished_file_has_no_identity(tmp_path):
    (item,) = read_inputs([tmp_path / "a.png"], 16, False, 1, StageClock())
    assert item.identity is None and "cannot read the image" in item.error


def test_times_of_all_centuries(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"x")
    for nanoseconds in (0, 1_700_000_000_123_456_789, -(10**18)):
        os.utime(file, ns=(nanoseconds, nanoseconds))
        assert identify(file).modified
    os.utime(file, ns=(0, 1_700_000_000_123_456_789))
    assert identify(file).modified == "2023-11-14T22:13:20.123456789Z"


def test_no_worker_thread_waits_for_the_device(tmp_path, monkeypatch):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("a host stage waited for the device"))
    clock = StageClock(torch.device("cuda"))
    (item,) = read_inputs([tmp_path / "a.png"], 16, False, 1, clock)
    assert item.error is None and clock.seconds["decode"] > 0


def test_the_next_group_is_read_while_the_device_works(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("a host stage waited for the device"))
    decoded, when_scored = [], []

    def decode(path, bits):
        decoded.append(path)
        return Image.new("L", (16, 16))

    def inspect(images):
        end = time.monotonic() + 5
        while not when_scored and len(decoded) < 2 * SCORE_GROUP - 1 and time.monotonic() < end:
            time.sleep(0.01)  # the device works
        when_scored.append(len(decoded))
        shape = len(images), 16, 16
        return np.ones(len(images), np.float32), np.ones(shape, np.float32), [""] * len(images), [{}] * len(images)

    monkeypatch.setattr("inspection.inputs.decode_image", decode)
    detector = SimpleNamespace(
        clock=StageClock(torch.device("cuda")),
        threshold=Threshold(0.5, "", 0.25, 0.5),
        min_area=0,
        layout_of=lambda *_: None,
        restore=lambda scores, *_: scores,
        doubts=lambda *_: None,
        inspect=inspect,
        group_images=SCORE_GROUP,
        **{"size": 16, "keep_aspect": False, "bits": 16},
    )
    paths = [tmp_path / f"{number}.png" for number in range(3 * SCORE_GROUP)]
    outputs = Outputs(tmp_path / "out", tmp_path, None, "none", "id")
    rows = [row for row, _ in predict(detector, paths, outputs, 2, 0)]
    assert len(rows) == len(paths) and when_scored[0] == 2 * SCORE_GROUP - 1
    assert {(row.decision, row.relative, len(row.boxes)) for row in rows} == {("defective", 4.0, 1)}
    assert detector.clock.seconds.keys() == {"decode", "drawing"}
