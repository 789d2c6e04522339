"""ResNets with torchvision's layers, names and random initial weights.

torchvision itself takes longer to import than torch. The names are part of the checkpoint format.
tests/models/test_backbones.py compares with torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class BasicBlock(nn.Module):
    """Two convolutions of 3 x 3 with a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _convolution(width, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output (B, channels, H / stride, W / stride) for `x` (B, in_channels, H, W)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 with the stride, and 1 x 1, with a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _convolution(width, channels, 1)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output (B, channels, H / stride, W / stride) for `x` (B, in_channels, H, W)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """A whole ResNet. Only its layers are used, so it has no `forward`.

    layer4 and fc are created because they draw random numbers: with the same seed, torchvision gives the same weights.

    blocks: number of blocks of each layer. wide: factor of the channels of the 3 x 3 convolutions of bottlenecks.
    """

    def __init__(self, block: type[BasicBlock | Bottleneck], blocks: Sequence[int], wide: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        for number, (planes, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), start=1):
            layer = _layer(block, channels, planes, planes * wide, count, stride=1 if number == 1 else 2)
            setattr(self, f"layer{number}", layer)
            channels = planes * block.expansion
        self.fc = nn.Linear(channels, 1000)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _layer(
    block: type[BasicBlock | Bottleneck], in_channels: int, planes: int, width: int, count: int, stride: int
) -> nn.Sequential:
    channels, downsample = planes * block.expansion, None
    if stride != 1 or in_channels != channels:
        downsample = nn.Sequential(_convolution(in_channels, channels, 1, stride), nn.BatchNorm2d(channels))
    first = block(in_channels, width, channels, stride, downsample)
    return nn.Sequential(first, *(block(channels, width, channels, 1, None) for _ in range(count - 1)))


def _convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
