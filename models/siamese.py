"""The two heads of the Siamese network, encoder and predictor (RegAD section 3.2, after SimSiam)."""

from __future__ import annotations

import torch
from torch import nn

CHANNELS = 256  # of layer3, the input of the heads


class Encoder(nn.Module):
    """Three 1x1 convolutions: registered maps (B, 256, H, W) -> z (B, 256, H, W), the last one without ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(CHANNELS)
        self.conv3 = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(CHANNELS)  # not used; the release's checkpoints hold it, and they load strictly

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """z (B, 256, H, W) of registered maps `x` (B, 256, H, W)."""
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
        """p (B, 256, H, W) of `z` (B, 256, H, W)."""
        return self.conv2(torch.relu(self.bn1(self.conv1(z))))
