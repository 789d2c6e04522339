"""The backbone: ResNet-18 up to layer3 with a spatial transformer (STN) after each of layer1, layer2 and layer3.

RegAD section 3.2 (feature registration). Layer names are torchvision's and the release's, because they are the
checkpoint format; they may not change.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import resnet18

from models.warp import full_precision, inverse_affine, warp
from utils.errors import UserError

FEATURE_CHANNELS = (64, 128, 256)  # of layer1, layer2, layer3
FEATURE_STRIDES = (4, 8, 16)  # input pixels per feature position
SIZE_DIVISOR = FEATURE_STRIDES[-1]  # the three grids must nest, see scorers/gaussian.py


def check_img_size(size: int, smallest: int = SIZE_DIVISOR) -> None:
    """UserError where --img_size is no multiple of SIZE_DIVISOR, or below `smallest`."""
    if size % SIZE_DIVISOR or size < smallest:
        least = "" if smallest == SIZE_DIVISOR else f" from {smallest} on"
        raise UserError(f"--img_size must be a multiple of {SIZE_DIVISOR}{least}, got {size}")


class WarpMode(NamedTuple):
    """One way to constrain the affine warp: its free parameters and the matrix they make."""

    identity: tuple[float, ...]  # parameters of the warp that moves nothing
    matrix: Callable[[tuple[torch.Tensor, ...]], tuple]  # parameters p -> the six entries of the 2x3 matrix, row by row


# The release's nine modes. The matrix of `rotation_scale` is NOT a rotation times a scaling (p1 and p2 stand beside the
# cosines only); released checkpoints fit it as it is.
STN_MODES: dict[str, WarpMode] = {
    "affine": WarpMode((1, 0, 0, 0, 1, 0), lambda p: p),
    "translation": WarpMode((0, 0), lambda p: (1, 0, p[0], 0, 1, p[1])),
    "rotation": WarpMode((0,), lambda p: (p[0].cos(), -p[0].sin(), 0, p[0].sin(), p[0].cos(), 0)),
    "scale": WarpMode((1, 1), lambda p: (p[0], 0, 0, 0, p[1], 0)),
    "shear": WarpMode((0, 0), lambda p: (1, p[0], 0, p[1], 1, 0)),
    "rotation_scale": WarpMode(
        (0, 1, 1), lambda p: (p[1] * p[0].cos(), -p[0].sin(), 0, p[0].sin(), p[2] * p[0].cos(), 0)
    ),
    "translation_scale": WarpMode((0, 0, 1, 1), lambda p: (p[2], 0, p[0], 0, p[3], p[1])),
    "rotation_translation": WarpMode(
        (0, 0, 0), lambda p: (p[0].cos(), -p[0].sin(), p[1], p[0].sin(), p[0].cos(), p[2])
    ),
    "rotation_translation_scale": WarpMode(
        (0, 0, 0, 1, 1), lambda p: (p[3] * p[0].cos(), -p[0].sin(), p[1], p[0].sin(), p[4] * p[0].cos(), p[2])
    ),
}


class SpatialTransformer(nn.Module):
    """Predicts one 2x3 warp matrix per feature map; starts as the identity.

    Convention:
        - the matrix maps OUTPUT positions to INPUT positions, normalised to [-1, 1], align_corners False
        - angles are radians; a positive angle turns the sampling grid clockwise as displayed (y points down)
    """

    def __init__(self, in_channels: int, grid: int, stn_mode: str) -> None:
        super().__init__()
        self.mode = STN_MODES[stn_mode]
        side = _pooled(_pooled(grid))
        # The indices in these Sequentials are the checkpoint's names: conv.0, conv.1, conv.4, conv.5, fc.0, fc.2.
        # The release has ReLU before pooling; the two commute, in the gradient too, and after it there is less to do.
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.ReLU(inplace=True),
        )
        self.fc = nn.Sequential(
            nn.Linear(16 * side * side, 1024), nn.ReLU(inplace=True), nn.Linear(1024, len(self.mode.identity))
        )
        nn.init.zeros_(self.fc[2].weight)
        with torch.no_grad():
            self.fc[2].bias.copy_(torch.tensor(self.mode.identity, dtype=self.fc[2].bias.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Warp matrices (B, 2, 3) of feature maps `x` (B, C, H, W)."""
        hidden = self.conv(x).flatten(1)
        with full_precision(x.device):
            parameters = self.fc(hidden.to(self.fc[0].weight.dtype)).unbind(1)  # n tensors of (B,)
            entries = self.mode.matrix(parameters)
        columns = [e if isinstance(e, torch.Tensor) else torch.full_like(parameters[0], e) for e in entries]
        return torch.stack(columns, dim=1).view(-1, 2, 3)


def _pooled(side: int) -> int:
    """Side of a map after MaxPool2d(3, stride 2, padding 1)."""
    return (side + 1) // 2


class Registered(NamedTuple):
    """What one pass of the backbone gives: layer by layer the warped maps (B, C, H, W) and the warps (B, 2, 3)."""

    maps: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    warps: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class STNResNet18(nn.Module):
    """ResNet-18 to layer3, registering its own feature maps layer by layer.

    Takes images (B, 3, S, S) with values in [0, 1] (no ImageNet normalisation, as the release), S = `img_size`.
    """

    def __init__(self, stn_mode: str = "rotation_scale", img_size: int = 224) -> None:
        super().__init__()
        self.stn_mode, self.img_size = stn_mode, img_size
        trunk = resnet18(weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool
        self.layer1, self.layer2, self.layer3 = trunk.layer1, trunk.layer2, trunk.layer3
        heads = zip(FEATURE_CHANNELS, FEATURE_STRIDES, strict=True)
        self.stn1, self.stn2, self.stn3 = (SpatialTransformer(c, img_size // s, stn_mode) for c, s in heads)

    def forward(self, x: torch.Tensor) -> Registered:
        """Registered maps of images (B, 3, S, S), 64 x S/4 x S/4, 128 x S/8 x S/8 and 256 x S/16 x S/16, with warps."""
        x = self.relu(self.maxpool(self.bn1(_first_convolution(self.conv1, x))))  # order: see SpatialTransformer
        maps, warps = [], []
        for layer, stn in ((self.layer1, self.stn1), (self.layer2, self.stn2), (self.layer3, self.stn3)):
            x = layer(x)
            warps.append(stn(x))
            x = warp(x, warps[-1])
            maps.append(x)
        return Registered(tuple(maps), tuple(warps))

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Registered maps of images (B, 3, S, S), moved back to the frame of the image; shapes as in `forward`.

        Map i went through the warps of layers 1..i and goes back through their inverses in reverse order, one
        resampling each, without gradient (release behaviour).
        """
        with torch.no_grad():
            registered = self(x)
            inverses = [inverse_affine(theta) for theta in registered.warps]
            unwarped = []
            for depth, feature in enumerate(registered.maps):
                for theta in inverses[depth::-1]:
                    feature = warp(feature, theta)
                unwarped.append(feature)
        return tuple(unwarped)


def _first_convolution(convolution: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """`convolution` of images `x` (B, 3, S, S); where all are grey, of one channel with the summed weights.

    The same numbers, and gradients, for half the time on the CPU; the comparison costs a twentieth. (On CUDA it would
    make the host wait, and a compiled or exported network must not depend on values.)
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and (x[:, 1:] == x[:, :1]).all():
        weight = convolution.weight.sum(dim=1, keepdim=True)
        grey = x[:, :1].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # channels-last, and so is what comes out
        return F.conv2d(grey, weight, convolution.bias, convolution.stride, convolution.padding)
    return convolution(x)


def folded(network: STNResNet18) -> STNResNet18:
    """A copy of `network` for inference: same features, less work.

    Batch-norm is folded into the convolutions and memory is channels-last (on the CPU, `warp` is faster for it too).
    """
    return without_batch_norm(network).to(memory_format=torch.channels_last)


def without_batch_norm(network: STNResNet18) -> STNResNet18:
    """A copy of `network` in eval mode with batch-norm folded into the convolutions."""
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for parent in list(network.modules()):
        children = list(parent.named_children())
        for (name, layer), (next_name, following) in itertools.pairwise(children):
            if isinstance(layer, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
                parent.register_module(name, fuse_conv_bn_eval(layer, following))
                parent.register_module(next_name, nn.Identity())
    return network
