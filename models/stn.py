"""The backbone: a ResNet up to layer3 with a spatial transformer (STN) after each of layer1, layer2 and layer3.

RegAD section 3.2 (feature registration). The names of the layers are those of torchvision and the release: they are
part of the checkpoint format and must not change.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.resnet import BasicBlock, Bottleneck, ResNet
from models.warp import full_precision, inverse_affine, warp
from utils.choices import RELEASE_BACKBONE
from utils.errors import UserError

FEATURE_STRIDES = (4, 8, 16)  # input pixels per feature position, of layer1, layer2, layer3
HEADS = ("stn1", "stn2", "stn3")  # the spatial transformers
SIZE_DIVISOR = FEATURE_STRIDES[-1]  # the three grids are joined, so each must divide the finer one


def check_img_size(size: int, smallest: int = SIZE_DIVISOR) -> None:
    """Raises UserError if an image size is not a multiple of SIZE_DIVISOR, or is below `smallest`."""
    if size % SIZE_DIVISOR or size < smallest:
        least = "" if smallest == SIZE_DIVISOR else f" from {smallest} on"
        raise UserError(f"the image size must be a multiple of {SIZE_DIVISOR}{least}, got {size}", ("img_size",))


# Memory formats that are not channels-last, for which the CPU's `warp` is faster, too. CUDA's grid_sample returns
# channels-first, and float32 convolutions should gain nothing from channels-last. benchmarks/cuda.sh measures both.
LAYOUTS = {("cuda", torch.float32): torch.contiguous_format}


class WarpMode(NamedTuple):
    """One of the affine warps: its free parameters and the matrix they define."""

    identity: tuple[float, ...]  # parameters of the identity warp
    matrix: Callable[[tuple[torch.Tensor, ...]], tuple]  # parameters p -> the 2x3 matrix, row by row


# The release's nine modes. The matrix of `rotation_scale` is NOT the product of a rotation and a scaling: p1 and p2
# scale the cosines only. Released checkpoints depend on it.
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
    """Predicts one 2x3 warp matrix per feature map. Before training it is the identity.

    Convention: the matrix maps OUTPUT positions (x, y) to INPUT positions, both normalised to [-1, 1], align_corners
    False. Angles are in radians; with y pointing down, a positive angle turns the sampling grid clockwise.
    """

    def __init__(self, in_channels: int, grid: int, stn_mode: str) -> None:
        super().__init__()
        self.mode = STN_MODES[stn_mode]
        side = _pooled(_pooled(grid))
        # The indices in these Sequentials are names in the checkpoint: conv.0, conv.1, conv.4, conv.5, fc.0, fc.2.
        # The release applies ReLU before pooling. The two commute, also in the gradient; ReLU costs less after it.
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

    def is_identity(self) -> bool:
        """Whether the warp is the identity for every input: that of an untrained network is."""
        last = self.fc[2]
        start = torch.tensor(self.mode.identity, dtype=last.bias.dtype)
        return not bool(last.weight.any()) and torch.equal(last.bias.cpu(), start)

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


class Backbone(NamedTuple):
    """A ResNet, torchvision's file of its ImageNet weights, and the channels of its layer1, layer2 and layer3."""

    build: Callable[[], ResNet]
    weights: str
    channels: tuple[int, int, int]


BACKBONES = {
    RELEASE_BACKBONE: Backbone(partial(ResNet, BasicBlock, (2, 2, 2, 2)), "resnet18-f37072fd.pth", (64, 128, 256)),
    "resnet34": Backbone(partial(ResNet, BasicBlock, (3, 4, 6, 3)), "resnet34-b627a593.pth", (64, 128, 256)),
    "resnet50": Backbone(partial(ResNet, Bottleneck, (3, 4, 6, 3)), "resnet50-0676ba61.pth", (256, 512, 1024)),
    "wide_resnet50_2": Backbone(
        partial(ResNet, Bottleneck, (3, 4, 6, 3), 2), "wide_resnet50_2-95faca4d.pth", (256, 512, 1024)
    ),
}


class Registered(NamedTuple):
    """The outputs of the backbone for layer1, layer2, layer3: warped maps (B, C, H, W) and warps (B, 2, 3).

    A warp is None for a layer without a spatial transformer; see `without_identity_heads`.
    """

    maps: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    warps: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class STNResNet(nn.Module):
    """A ResNet up to layer3 that registers its own feature maps layer by layer.

    The input is images (B, 3, S, S) with values in [0, 1], S = `img_size`. There is no ImageNet normalisation (release
    behaviour). `backbone` is a key of BACKBONES.
    """

    registered_frame = False  # of `features`; True in the network of test.py --frame registered
    bn_follows_conv = True  # each batch norm is the child after its convolution, so that both can be fused

    def __init__(self, stn_mode: str = "rotation_scale", img_size: int = 224, backbone: str = RELEASE_BACKBONE) -> None:
        super().__init__()
        self.stn_mode, self.img_size, self.backbone = stn_mode, img_size, backbone
        trunk = BACKBONES[backbone].build()
        self.conv1, self.bn1, self.relu, self.maxpool = trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool
        self.layer1, self.layer2, self.layer3 = trunk.layer1, trunk.layer2, trunk.layer3
        heads = zip(BACKBONES[backbone].channels, FEATURE_STRIDES, strict=True)
        self.stn1, self.stn2, self.stn3 = (SpatialTransformer(c, img_size // s, stn_mode) for c, s in heads)

    def forward(self, x: torch.Tensor) -> Registered:
        """Registered maps and warps of images `x` (B, 3, S, S) in [0, 1].

        The maps are (B, C, S/4, S/4), (B, C, S/8, S/8) and (B, C, S/16, S/16) with the channels of BACKBONES.
        """
        x = self.maxpool(self.bn1(_first_convolution(self.conv1, x)))  # pooling first: see SpatialTransformer
        x = self.relu(x)
        maps, warps = [], []
        for layer, stn in ((self.layer1, self.stn1), (self.layer2, self.stn2), (self.layer3, self.stn3)):
            x = layer(x)
            warps.append(None if stn is None else stn(x))
            x = x if stn is None else warp(x, warps[-1])
            maps.append(x)
        return Registered(tuple(maps), tuple(warps))

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Registered maps of images `x` (B, 3, S, S) in [0, 1], warped back to the frame of the image; no gradient.

        Map i passed through the warps of layers 1..i. Their inverses are applied to it in reverse order, each with a
        separate resampling (release behaviour). Shapes are those of `forward`. With `registered_frame` the maps are not
        warped back.
        """
        with torch.no_grad():
            registered = self(x)
            if self.registered_frame:
                return registered.maps
            inverses = [None if theta is None else inverse_affine(theta) for theta in registered.warps]
            unwarped = []
            for depth, feature in enumerate(registered.maps):
                for theta in inverses[depth::-1]:
                    feature = feature if theta is None else warp(feature, theta)
                unwarped.append(feature)
        return tuple(unwarped)


def _first_convolution(convolution: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """`convolution` of images `x` (B, 3, S, S). If all are grey, one channel is convolved with the summed weights.

    On the CPU this halves the time, and the comparison takes a twentieth; values and gradients are the same up to
    rounding. On CUDA the host would wait for the comparison. Compiled and exported networks must not depend on values.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and (x[:, 1:] == x[:, :1]).all():
        weight = convolution.weight.sum(dim=1, keepdim=True)
        grey = x[:, :1].contiguous()
        # the strides of channels-last, which decide the layout of the output; of one channel, `contiguous` keeps others
        grey = grey.as_strided(grey.shape, (grey.shape[2] * grey.shape[3], 1, grey.shape[3], 1))
        return F.conv2d(grey, weight, convolution.bias, convolution.stride, convolution.padding)
    return convolution(x)


def fuse_conv_bn(network: nn.Module) -> nn.Module:
    """A copy of `network` for faster inference, with the same features up to rounding.

    See `without_batch_norm` and `layout`. A network that is not a STNResNet is only put into eval mode.
    """
    weight = next(network.parameters(), torch.empty(0))
    return without_batch_norm(network).to(memory_format=layout(weight.device, weight.dtype))


def layout(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """The fastest memory format of a network on `device` with convolutions in `dtype`."""
    return LAYOUTS.get((device.type, dtype), torch.channels_last)


def without_identity_heads(network: nn.Module) -> nn.Module:
    """`network` without the spatial transformers whose warp is the identity. The other modules are shared.

    Sampling at the identity gives the map itself up to rounding. Untrained networks thus skip 3 warps and 6 inverse
    warps, and their files lack the heads' weights. A network that is not a STNResNet, or is trained, is returned as it
    is.
    """
    heads = HEADS if isinstance(network, STNResNet) else ()
    identical = [name for name in heads if getattr(network, name) is not None and getattr(network, name).is_identity()]
    if not identical:
        return network
    shared = copy.copy(network)
    shared._modules = {name: None if name in identical else module for name, module in network._modules.items()}
    return shared


def drop_heads(network: STNResNet, state: Mapping[str, torch.Tensor]) -> None:
    """Removes the spatial transformers without weights in `state`, the state dict of a `without_identity_heads`."""
    for name in HEADS:
        if not any(key.startswith(f"{name}.") for key in state):
            setattr(network, name, None)


def without_batch_norm(network: nn.Module) -> nn.Module:
    """A copy of `network` in eval mode, `without_identity_heads`; batch norm is fused if it has `bn_follows_conv`."""
    network = copy.deepcopy(without_identity_heads(network)).eval().requires_grad_(False)
    if not getattr(network, "bn_follows_conv", False):
        return network
    for parent in list(network.modules()):
        children = list(parent.named_children())
        for (name, layer), (next_name, following) in itertools.pairwise(children):
            if isinstance(layer, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
                parent.register_module(name, fuse_conv_bn_eval(layer, following))
                parent.register_module(next_name, getattr(following, "act", nn.Identity()))  # timm's has one
    return network
