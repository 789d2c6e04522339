"""Support views: the 22 augmented copies of each support image (RegAD section 3.3)."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from models.warp import sample

ROTATION_ANGLES = tuple(step * math.pi / 16 for step in (-4, -3, -2, -1, 1, 2, 3, 4))  # radians, release's table
TRANSLATIONS = tuple(
    (size * a, size * b) for size in (0.2, 0.1) for a, b in ((1, 1), (-1, 1), (-1, -1), (1, -1))
)  # (x, y) in normalised units, release's table
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as kornia's rgb_to_grayscale in the release
VIEWS_PER_IMAGE = 1 + len(ROTATION_ANGLES) + len(TRANSLATIONS) + 1 + 3 + 1  # 22
TRANSLATED_VIEWS = range(1 + len(ROTATION_ANGLES), 1 + len(ROTATION_ANGLES) + len(TRANSLATIONS))
GREY_VIEW = VIEWS_PER_IMAGE - 1


def support_views(images: torch.Tensor) -> torch.Tensor:
    """The 22 views of each support image: (K, 3, S, S) in [0, 1] -> (22 K, 3, S, S).

    RegAD section 3.3. Order: for each kind of view all K images: as it is; 8 rotations; 8 translations; mirrored left
    to right; turned by 90, 180 and 270 degrees; grey. The release shuffles them, which changes no statistic.

    Convention:
        - rotations by `ROTATION_ANGLES`: matrix [cos -sin 0; sin cos 0], output -> input, reflection outside
        - translations by `TRANSLATIONS`: matrix [1 0 x; 0 1 y], so (.2, .2) moves the image S/10 to the left and up
        - turns are counter-clockwise as displayed
    """
    grids = _view_grids(images.shape[-1], images.device)
    copies = images.repeat(len(grids), 1, 1, 1)
    moved = sample(copies, grids.repeat_interleave(len(images), dim=0))
    luma = sum(weight * images[:, channel] for channel, weight in enumerate(GREY_WEIGHTS))
    grey = luma[:, None].expand_as(images)
    turned = [images.rot90(turns, (-2, -1)) for turns in (1, 2, 3)]
    return torch.cat([images, moved, images.flip(-1), *turned, grey])


@functools.cache
def _view_grids(size: int, device: torch.device) -> torch.Tensor:
    """Where the rotated and translated views read the image, (16, S, S, 2); float32 sines, as the release's."""
    angles = torch.tensor(ROTATION_ANGLES)
    zero = torch.zeros_like(angles)
    rotations = torch.stack([angles.cos(), -angles.sin(), zero, angles.sin(), angles.cos(), zero], dim=1)
    translations = torch.tensor([(1.0, 0.0, x, 0.0, 1.0, y) for x, y in TRANSLATIONS])
    matrices = torch.cat([rotations, translations]).view(-1, 2, 3).to(device)
    return F.affine_grid(matrices, [len(matrices), 1, size, size], align_corners=False)
