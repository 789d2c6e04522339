"""The two heads of the Siamese network, encoder and predictor (RegAD section 3.2, after SimSiam).

C, the channels of layer3 of the backbone, is 256 in the release.
"""

from __future__ import annotations

import torch
from torch import nn


class Encoder(nn.Module):
    """Three 1x1 convolutions: registered maps (B, C, H, W) -> z (B, C, H, W), the last one without ReLU."""

    def __init__(self, channels: int = 256) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)  # not used; the release's checkpoints hold it, and they load strictly

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """z (B, C, H, W) of registered maps `x` (B, C, H, W)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.conv3(x)


class Predictor(nn.Module):
    """Two 1x1 convolutions: z (B, C, H, W) -> p (B, C, H, W)."""

    def __init__(self, channels: int = 256) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """p (B, C, H, W) of `z` (B, C, H, W)."""
        return self.conv2(torch.relu(self.bn1(self.conv1(z))))
