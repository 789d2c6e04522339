"""Wrappers of networks that are not trained here: a normalised input, and several backbones side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from models.stn import without_identity_heads
from utils.choices import NORMALISED, SEVERAL

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of torchvision's weights


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
