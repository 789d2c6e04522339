"""The pipeline on a device: worker threads read a whole group ahead and do not wait for the device."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from inspection.detector import FewShotDetector
from inspection.predictions import Outputs, predict
from inspection.scoring import SCORE_GROUP
from inspection.threshold import Threshold
from models.regad import untrained
from utils.devices import seed_everything
from utils.stages import StageClock


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


def test_the_identity_of_a_detector(demo_data):
    """It depends on everything that scores depend on, and on nothing else; fitting again gives the same one."""
    support = sorted((demo_data / "ring/train/good").iterdir())[:3]

    def fitted(images, seed=0, **options) -> FewShotDetector:
        seed_everything(seed)
        return FewShotDetector(untrained("none", img_size=64).stn.eval(), "cpu", **options).fit(images, False)

    first = fitted(support)
    own = first.identity()
    first.set_threshold(1.0)
    assert first.identity() == own == fitted(support).identity()
    others = [fitted(support[:2]), fitted(support, seed=1), fitted(support, keep_aspect=True)]
    others += [fitted(support, scorer="gaussian"), fitted(support, bits=12), fitted(support, tile="auto")]
    others += [fitted(support, region=np.tri(64, dtype=bool))]
    assert len({own, *(other.identity() for other in others)}) == 8
