"""Selects the network for scoring: of a checkpoint, untrained, or a backbone that is not trained in this project."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from models.efficientnet_lite import LITE_IMG_SIZE, EfficientNetLite
from models.regad import load_checkpoint, untrained
from models.stn import BACKBONES, SIZE_DIVISOR, check_img_size, without_identity_heads
from models.timm_features import TimmFeatures, own_img_size
from utils.choices import LITE_BACKBONE, NORMALISED, PREFIX, RELEASE_BACKBONE, SEVERAL, is_trainable
from utils.errors import UserError

RELEASE_IMG_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of torchvision's weights


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


class NormalisedInput(nn.Module):
    """The feature maps of a network with the input normalisation of its ImageNet training.

    The release does not normalise: the input of its networks is images in [0, 1].
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.img_size = without_identity_heads(network), network.img_size
        self.backbone, self.stn_mode = network.backbone + NORMALISED, network.stn_mode
        self.bn_follows_conv = getattr(network, "bn_follows_conv", False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Feature maps of images (B, 3, S, S) in [0, 1], finest first, without gradient."""
        return self.network.features((x - self.mean) / self.std)


class SeveralBackbones(nn.Module):
    """The feature maps of several networks for the same images, those of the first network first.

    backbone_layers: the number of maps of each network, for `scorers.combined.over_backbones`.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(without_identity_heads(network) for network in networks)
        self.img_size = networks[0].img_size
        self.backbone = SEVERAL.join(network.backbone for network in networks)
        self.stn_mode = next((network.stn_mode for network in networks if network.stn_mode), None)
        self.bn_follows_conv = all(getattr(network, "bn_follows_conv", False) for network in networks)
        self.eval().requires_grad_(False)
        image = torch.zeros(1, 3, self.img_size, self.img_size)
        self.backbone_layers = tuple(len(network.features(image)) for network in networks)

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Feature maps of images (B, 3, S, S) in [0, 1] by network, finest first, without gradient."""
        return tuple(layer for network in self.networks for layer in network.features(x))


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
