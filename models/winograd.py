"""3x3 convolution by Winograd's minimal filtering F(4x4, 3x3): a quarter of the multiplications, for inference on CPUs.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016. Each 4x4 tile of the output needs a 6x6
tile of the input; both are moved to a space of 36 points where convolving is multiplying. PyTorch's own CPU kernels
do not do this; cuDNN's do, so it is not used on CUDA.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

TILE = 4  # side of an output tile
PATCH = TILE + 2  # side of the input patch it needs
# Where the polynomials are evaluated, besides infinity. These keep the rounding error at twice that of a direct
# convolution (8e-7 against 5e-7 relative, 128 channels); the textbook's 0, 1, -1, 2, -2 make it four times as large.
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)


def transforms() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrices of one dimension: output (4, 6), kernel (6, 3) and input (6, 6), by Toom and Cook's construction.

    output @ ((kernel @ g) * (input @ d)) is the correlation of the six values d with the three values g.
    """
    others = [[q for q in POINTS if q != p] for p in POINTS]
    output = np.zeros((TILE, PATCH))
    output[:, :-1] = [[p**power for p in POINTS] for power in range(TILE)]
    output[-1, -1] = 1
    kernel = np.zeros((PATCH, 3))
    for row, (point, rest) in enumerate(zip(POINTS, others, strict=True)):
        kernel[row] = [point**power / np.prod(np.subtract(point, rest)) for power in range(3)]
    kernel[-1, -1] = 1
    inputs = np.zeros((PATCH, PATCH))
    inputs[:-1, :-1] = [np.poly(rest)[::-1] for rest in others]
    inputs[-1] = np.poly(POINTS)[::-1]
    return output, kernel, inputs


class WinogradConv2d(nn.Module):
    """Stands in for an nn.Conv2d with a 3x3 kernel, stride 1 and padding 1: (B, C, H, W) -> (B, C', H, W).

    Fast for channels-last input; the output is channels-last.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        output, kernel, inputs = (torch.from_numpy(matrix) for matrix in transforms())
        weight = torch.einsum("xi,ocij,yj->xyco", kernel, convolution.weight.detach().double(), kernel)
        dtype = convolution.weight.dtype
        self.register_buffer("weight", weight.flatten(0, 1).to(dtype))  # (36, C, C')
        self.register_buffer("to_points", torch.kron(inputs, inputs).to(dtype))  # (36, 36)
        self.register_buffer("from_points", torch.kron(output, output).to(dtype))  # (16, 36)
        self.register_buffer("bias", convolution.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution of `x` (B, C, H, W)."""
        batch, channels, height, width = x.shape
        down, across = -(-height // TILE), -(-width // TILE)  # tiles
        padding = (1, TILE * across + 1 - width, 1, TILE * down + 1 - height)
        rows = F.pad(x, padding).permute(0, 2, 3, 1).contiguous()  # (B, 4 down + 2, 4 across + 2, C)
        image, row, column, _ = rows.stride()
        patches = rows.as_strided(
            (PATCH, PATCH, batch, down, across, channels), (row, column, image, TILE * row, TILE * column, 1)
        )
        points = (self.to_points @ patches.reshape(PATCH**2, -1)).view(PATCH**2, -1, channels)  # (36, tiles, C)
        products = points @ self.weight  # (36, tiles, C')
        tiles = (self.from_points @ products.flatten(1)).view(TILE, TILE, batch, down, across, -1)
        picture = tiles.permute(2, 3, 0, 4, 1, 5).reshape(batch, TILE * down, TILE * across, -1)
        return (picture[:, :height, :width] + self.bias).permute(0, 3, 1, 2)
