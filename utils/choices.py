"""Names and defaults of flags. This module does not import torch, so that `--help` is fast.

The modules that implement the choices import them from here, or tests/utils/test_choices.py compares both.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

MAX_PIXELS = 178_956_970  # Pillow's limit: files of a few KB can decode to more than the memory
BIT_DEPTHS = (8, 10, 12, 14, 16)  # of cameras whose images are stored in 16-bit grey files
MASK_ORIENTATIONS = ("upright", "stored")  # the image on which a mask without EXIF orientation was drawn
AUTO_BITS = "auto"  # the smallest of BIT_DEPTHS that holds the values of the images
CATEGORIES = {
    "mvtec": (
        *("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile"),
        *("toothbrush", "transistor", "wood", "zipper"),
    ),
    "mpdd": ("bracket_black", "bracket_brown", "bracket_white", "connector", "metal_plate", "tubes"),
    "visa": (
        *("candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2", "pcb1", "pcb2", "pcb3"),
        *("pcb4", "pipe_fryum"),
    ),
    "loco": ("breakfast_box", "juice_bottle", "pushpins", "screw_bag", "splicing_connectors"),
    "folder": None,  # any sub-folder of the data folder
}
DATA_LICENCES = {"mvtec": "CC BY-NC-SA 4.0", "mpdd": "CC BY-NC-SA 4.0", "visa": "CC BY 4.0", "loco": "CC BY-NC-SA 4.0"}
STN_MODE_NAMES = (
    *("affine", "translation", "rotation", "scale", "shear", "rotation_scale", "translation_scale"),
    *("rotation_translation", "rotation_translation_scale"),
)
RELEASE_BACKBONE = "resnet18"
BACKBONE_NAMES = (RELEASE_BACKBONE, "resnet34", "resnet50", "wide_resnet50_2")
LITE_BACKBONE = "efficientnet_lite2"  # the default of predict.py and export.py
PREFIX = "timm:"  # of the names of timm's backbones
NORMALISED = "_normalised"  # after the name of a ResNet: its input is normalised as for ImageNet
SEVERAL = "+"  # between the names of backbones that are used side by side
BACKBONE_HELP = (
    f"{', '.join(BACKBONE_NAMES)}; without registration training: {LITE_BACKBONE} (its ImageNet weights are installed "
    f"with this project), or {PREFIX}NAME for any model of the timm library; a ResNet with {NORMALISED} after its "
    f"name has a normalised input; several names, or names joined by {SEVERAL}, are used side by side"
)
RELEASE_SCORER = "gaussian"  # the scorer of the release; default of train.py and test.py
SCORER_NAMES = (RELEASE_SCORER, "neighbours", "positions", "combined")
DEFAULT_SCORER = "combined"  # of predict.py and export.py
TRAIN = ("all", "heads", "stn")  # recipes of training; the first of each choice is the release's
BATCH_NORM = ("train", "frozen")
SUPPORT_TARGET = ("mean", "each")
FIGURE_FORMATS = (".pdf", ".svg", ".png")  # of figures for a paper
ROUND_RANKS = ("best", "median", "worst")  # of the rounds by image AUROC
LARGEST_SEED = 2**32 - 1  # of NumPy
DEFAULT_SEED = 668  # as in the release
DRAW_SEED = 0  # of support sets that are not given
DEFAULT_SUPPORT_PATH = Path("./support_set")
MIN_TILE = 16  # pixels; smaller tiles would be enlarged too much
AUTO, OFF = "auto", "off"
Tile = int | str  # AUTO, OFF, or the side of a tile in pixels of the image
SAFETENSORS = ".safetensors"  # the suffix of such files
WEIGHTS = {  # kinds of weights of a record, in the order of the tables' columns, with their selection
    "untrained": "before registration training",
    "last": "the last epoch, without selection",
    "source": "selected on held-out source categories; no image of the target category is read",
    "best": "selected by image + pixel AUROC on the target's own test labels, as in the published protocol. Test "
    "labels are not available in use, so these numbers are optimistic; they are comparable with the published ones",
}


def is_trainable(backbone: str) -> bool:
    """Whether train.py can train the backbone: it has spatial transformers, and checkpoints."""
    return backbone in BACKBONE_NAMES


def category_name(text: str) -> str:
    """The category that the text of a flag names; `ring/` and `./ring`, as from tab completion, are `ring`.

    Raises:
        argparse.ArgumentTypeError: the text is not the name of a folder, or has several.
    """
    name = os.path.normpath(text) if text else ""
    if name in ("", ".", "..") or Path(name).name != name:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a category: give the folder's name alone")
    return name


def round_choice(text: str) -> int | str:
    """The number of a round, or one of ROUND_RANKS, from the text of a flag.

    Raises:
        argparse.ArgumentTypeError: neither.
    """
    if text in ROUND_RANKS:
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 0 nor one of {', '.join(ROUND_RANKS)}")
    return int(text)


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/regad, by default ~/.cache/regad; without a home folder, a folder for temporary files."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regad"
    except RuntimeError:  # no HOME and an unknown user id, as in containers
        return Path(tempfile.gettempdir()) / "regad"


def tile_side(text: str) -> Tile:
    """The size of a tile from text.

    Raises:
        argparse.ArgumentTypeError: neither AUTO, nor OFF, nor a number of pixels of at least MIN_TILE.
    """
    if text in (AUTO, OFF):
        return text
    if not text.isdecimal() or int(text) < MIN_TILE:
        raise argparse.ArgumentTypeError(f"{text!r} is neither {AUTO} nor {OFF} nor a number from {MIN_TILE}")
    return int(text)
