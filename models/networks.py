"""The network that a command scores with: trained or not, with registration or any model of timm."""

from __future__ import annotations

import re
from pathlib import Path

from models.regad import load_checkpoint, untrained
from models.stn import BACKBONES, RELEASE_BACKBONE, STNResNet, check_img_size
from models.timm_features import PREFIX, TimmFeatures, own_img_size
from utils.errors import UserError

RELEASE_IMG_SIZE = 224


def settle_img_size(backbone: str, img_size: int | None, smallest: int | None = None) -> int:
    """The side that images are resized to: the one asked for, else the backbone's own.

    Raises:
        UserError: no such backbone, or a size that it cannot take.
    """
    if backbone.startswith(PREFIX):
        return img_size or own_img_size(backbone.removeprefix(PREFIX))
    if backbone not in BACKBONES:
        raise UserError(f"no backbone {backbone!r}; there are {', '.join(BACKBONES)}, and timm:NAME")
    check_img_size(img_size or RELEASE_IMG_SIZE, *([smallest] if smallest else []))
    return img_size or RELEASE_IMG_SIZE


def scoring_network(
    backbone: str, stn_mode: str, img_size: int, checkpoint: Path | None, weights: str
) -> STNResNet | TimmFeatures:
    """The network of a checkpoint; without one, the backbone with `weights` before any registration training.

    Raises:
        UserError: files that are missing or do not fit, or a checkpoint for a backbone of timm.
    """
    if backbone.startswith(PREFIX):
        if checkpoint:
            raise UserError(f"{backbone} is not trained here, so no checkpoint belongs to it: leave out {checkpoint}")
        return TimmFeatures(backbone.removeprefix(PREFIX), weights, img_size)
    if checkpoint:
        return load_checkpoint(checkpoint, stn_mode, img_size, backbone).stn
    return untrained(weights, stn_mode, img_size, backbone).stn


def network_name(backbone: str, stn_mode: str) -> str:
    """The part of a record's file name that stands for the network; the release's backbone is left out."""
    if backbone == RELEASE_BACKBONE:
        return stn_mode
    return re.sub(r"[^\w.-]", "-", backbone) if backbone.startswith(PREFIX) else f"{stn_mode}_{backbone}"
