"""The images that tests of detectors share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def rings(demo_data) -> dict[str, list[Path]]:
    """Images of rings: five for the support, three good ones, two with a defect."""
    kinds = {"support": "train/good", "good": "test/good", "defect": "test/chip"}
    return {kind: sorted((demo_data / "ring" / place).iterdir()) for kind, place in kinds.items()}
