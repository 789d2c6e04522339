"""Real images, ImageNet weights and outputs of the release. Not part of the project; tests skip without them."""

from __future__ import annotations

import json
from pathlib import Path

from datasets.manifest import draw_from_folder, training_files
from utils.files import PROJECT_ROOT

REFERENCE = PROJECT_ROOT.parent / "shared"
DATA = REFERENCE / "data"
TRUNK = REFERENCE / "weights" / "resnet18_imagenet_trunk.pth"
GOLDEN = REFERENCE / "golden"
GOLDEN_CHECKPOINT = GOLDEN / "save_checkpoints/rotation_scale/2/screw/screw_2_rotation_scale_model.pt"


def golden_rounds() -> dict[str, list[dict]]:
    """The release's rounds by shot, each with its support names, image AUROC and pixel AUROC."""
    content = json.loads((GOLDEN / "screw.json").read_text())
    return {shot: content[shot] for shot in ("2", "4", "8")}


def draw_support_images(category: Path, shot: int, rounds: int, seed: int) -> list[list[Path]]:
    """The files of the support images of each round, drawn from the category folder as by `draw_from_folder`."""
    drawn = draw_from_folder(category, shot, rounds, seed)
    files = training_files(category, drawn)
    return [[files[name] for name in names] for names in drawn.rounds]
