"""The two heads of the Siamese network: encoder and predictor (RegAD section 3.2, after SimSiam)."""

from __future__ import annotations

import torch
from torch import nn

CHANNELS = 256  # of layer3, which feeds the heads


class Encoder(nn.Module):
    """Three 1x1 convolutions: registered maps (B, 256, H, W) -> z (B, 256, H, W); nothing after the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(CHANNELS)
        self.conv3 = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(CHANNELS)  # never used, but in the release's checkpoints, which load strictly

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """z of registered maps."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.conv3(x)


class Predictor(nn.Module):
    """Two 1x1 convolutions: z (B, 256, H, W) -> p (B, 256, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """p of z."""
        return self.conv2(torch.relu(self.bn1(self.conv1(z))))
