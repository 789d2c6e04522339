"""Real images, an ImageNet trunk and outputs of the release, kept outside the project; where absent, tests skip."""

from __future__ import annotations

import json

import pytest

from utils.files import PROJECT_ROOT

REFERENCE = PROJECT_ROOT.parent / "shared"
DATA = REFERENCE / "data"
TRUNK = REFERENCE / "weights" / "resnet18_imagenet_trunk.pth"
GOLDEN = REFERENCE / "golden"
GOLDEN_CHECKPOINT = GOLDEN / "save_checkpoints/rotation_scale/2/screw/screw_2_rotation_scale_model.pt"

needs_reference = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the release's outputs are not at {REFERENCE}")


def golden_rounds() -> dict[str, list[dict]]:
    """Per shot the release's rounds: support names, image and pixel AUROC."""
    content = json.loads((GOLDEN / "screw.json").read_text())
    return {shot: content[shot] for shot in ("2", "4", "8")}
