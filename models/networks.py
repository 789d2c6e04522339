"""Selects the network for scoring: of a checkpoint, untrained, or a backbone that is not trained in this project."""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from models.efficientnet_lite import LITE_IMG_SIZE, EfficientNetLite
from models.regad import load_checkpoint, untrained
from models.several import NormalisedInput, SeveralBackbones
from models.stn import BACKBONES, SIZE_DIVISOR, check_img_size
from models.timm_features import TimmFeatures, own_img_size
from utils.choices import LITE_BACKBONE, NORMALISED, PREFIX, RELEASE_BACKBONE, SEVERAL, is_trainable
from utils.errors import UserError

RELEASE_IMG_SIZE = 224


def resolve_img_size(backbone: str, img_size: int | None, smallest: int = SIZE_DIVISOR) -> int:
    """The side of the network's input in pixels: `img_size`, or the default of the backbone if it is None.

    smallest: least side for ResNet backbones.

    Raises:
        UserError: the backbone does not exist, or does not accept the size.
    """
    if SEVERAL in backbone:
        return max(resolve_img_size(name, img_size, smallest) for name in backbone.split(SEVERAL))
    if backbone.removesuffix(NORMALISED) in BACKBONES:
        backbone = backbone.removesuffix(NORMALISED)
    if backbone == LITE_BACKBONE:
        return img_size or LITE_IMG_SIZE
    if backbone.startswith(PREFIX):
        return img_size or own_img_size(backbone.removeprefix(PREFIX))
    if backbone not in BACKBONES:
        raise UserError(f"no backbone {backbone!r}; give {', '.join(BACKBONES)}, {LITE_BACKBONE} or timm:NAME")
    check_img_size(img_size or RELEASE_IMG_SIZE, smallest)
    return img_size or RELEASE_IMG_SIZE


def scoring_network(backbone: str, stn_mode: str, img_size: int, checkpoint: Path | None, weights: str) -> nn.Module:
    """The network of `checkpoint`, or without one the backbone with `weights` and no registration training.

    weights: imagenet, none, or a file. With several backbones, a file is for those other than LITE_BACKBONE.

    Raises:
        UserError: a file is missing or does not match the network, or a checkpoint is given for a backbone that is not
            trained here.
    """
    if checkpoint and not is_trainable(backbone):
        raise UserError(f"{backbone} is not trained here and has no checkpoint: leave out {checkpoint}")
    if SEVERAL in backbone:
        return SeveralBackbones(
            [
                scoring_network(
                    *(name, stn_mode, img_size, None),
                    "imagenet" if name == LITE_BACKBONE and weights != "none" else weights,
                )
                for name in backbone.split(SEVERAL)
            ]
        )
    if backbone.endswith(NORMALISED):
        return NormalisedInput(untrained(weights, stn_mode, img_size, backbone.removesuffix(NORMALISED)).stn)
    if backbone == LITE_BACKBONE:
        return EfficientNetLite(weights, img_size)
    if backbone.startswith(PREFIX):
        return TimmFeatures(backbone.removeprefix(PREFIX), weights, img_size)
    if checkpoint:
        return load_checkpoint(checkpoint, stn_mode, img_size, backbone).stn
    return untrained(weights, stn_mode, img_size, backbone).stn


def network_name(backbone: str, stn_mode: str) -> str:
    """The network in the file name of a record, without the backbone if it is the release's."""
    if backbone == RELEASE_BACKBONE:
        return stn_mode
    return f"{stn_mode}_{backbone}" if is_trainable(backbone) else re.sub(r"[^\w.-]", "-", backbone)
