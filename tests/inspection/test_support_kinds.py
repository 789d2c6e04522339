"""Support images that are none: label files and black images among photos, and transparent parts."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from inspection.detector import FewShotDetector
from models.regad import untrained
from utils.errors import UserError


@pytest.fixture(scope="module")
def detector() -> FewShotDetector:
    return FewShotDetector(untrained("none", img_size=32).stn.eval(), "cpu")


PHOTOS = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32), dtype=np.uint8)) for seed in range(2)]
LABELS = {
    "two values": Image.fromarray(np.eye(32, dtype=np.uint8) * 255),
    "classes": Image.fromarray(np.eye(32, dtype=np.uint8) * 2),
    "black": Image.new("RGB", (32, 32)),
}


@pytest.mark.parametrize("label", LABELS)
def test_label_files_and_black_images_are_no_support(label, detector):
    with pytest.raises(UserError, match="1 of 3 support images have at most 4 grey values"):
        detector.fit([*PHOTOS, LABELS[label]])


def test_support_images_with_and_without_transparent_parts_are_said(detector):
    clear = PHOTOS[0].convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((32, 32)))
    detector.fit([clear, PHOTOS[1]])
    (note,) = detector.warnings
    assert note.startswith("1 of 2 support images have transparent parts") and "not comparable" in note
