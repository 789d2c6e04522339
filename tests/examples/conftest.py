"""The fitted detector that the tests of the examples share."""

from __future__ import annotations

from pathlib import Path

import pytest

from inspection.detector import FewShotDetector
from models.regad import untrained
from utils.devices import seed_everything


@pytest.fixture(scope="session")
def detector(demo_data) -> FewShotDetector:
    """Fitted to three rings at 64 pixels, with random weights and a threshold."""
    seed_everything(0)
    support = sorted((demo_data / "ring/train/good").iterdir())[:3]
    fitted = FewShotDetector(untrained("none", img_size=64).stn.eval(), "cpu").fit(support)
    fitted.calibrate(0.2)
    return fitted


@pytest.fixture(scope="session")
def part(detector, tmp_path_factory) -> Path:
    """The detector as a file."""
    path = tmp_path_factory.mktemp("detector") / "part.regad"
    detector.save(path)
    return path
