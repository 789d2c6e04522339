"""Support views: the 22 augmented copies of each support image (RegAD section 3.3)."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from models.warp import sample

ROTATION_ANGLES = tuple(step * math.pi / 16 for step in (-4, -3, -2, -1, 1, 2, 3, 4))  # radians, as in the release
TRANSLATIONS = tuple(
    (size * a, size * b) for size in (0.2, 0.1) for a, b in ((1, 1), (-1, 1), (-1, -1), (1, -1))
)  # (x, y) in normalised units, as in the release
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma; the release uses kornia's rgb_to_grayscale
VIEWS_PER_IMAGE = 1 + len(ROTATION_ANGLES) + len(TRANSLATIONS) + 1 + 3 + 1  # 22
TRANSLATED_VIEWS = range(1 + len(ROTATION_ANGLES), 1 + len(ROTATION_ANGLES) + len(TRANSLATIONS))
GREY_VIEW = VIEWS_PER_IMAGE - 1
TURNED_VIEWS = range(GREY_VIEW - 3, GREY_VIEW)  # by 90, 180 and 270 degrees


def support_views(images: torch.Tensor) -> torch.Tensor:
    """The 22 views of each support image (RegAD section 3.3): (K, 3, S, S) in [0, 1] -> (22 K, 3, S, S).

    The views are grouped by kind, each group with all K images: the image itself; 8 rotations; 8 translations; flipped
    left to right; rotated by 90, 180 and 270 degrees; grey. The release shuffles the views, which does not change the
    statistics.

    Convention: matrices map output to input coordinates (normalised, align_corners=False), with reflection outside.
        - Rotations by `ROTATION_ANGLES` use [cos -sin 0; sin cos 0].
        - Translations by `TRANSLATIONS` use [1 0 x; 0 1 y]; (0.2, 0.2) moves the image by S/10 to the left and up.
        - Rotations by multiples of 90 degrees are counter-clockwise as displayed.
    """
    grids = _view_grids(images.shape[-1], images.dtype, images.device)
    copies = images.repeat(len(grids), 1, 1, 1)
    moved = sample(copies, grids.repeat_interleave(len(images), dim=0))
    luma = sum(weight * images[:, channel] for channel, weight in enumerate(GREY_WEIGHTS))
    grey = luma[:, None].expand_as(images)
    turned = [images.rot90(turns, (-2, -1)) for turns in (1, 2, 3)]
    return torch.cat([images, moved, images.flip(-1), *turned, grey])


@functools.cache
def _view_grids(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Sampling grids (16, S, S, 2) of the rotated and translated views. All steps are in `dtype`."""
    angles = torch.tensor(ROTATION_ANGLES, dtype=dtype)
    zero = torch.zeros_like(angles)
    rotations = torch.stack([angles.cos(), -angles.sin(), zero, angles.sin(), angles.cos(), zero], dim=1)
    translations = torch.tensor([(1.0, 0.0, x, 0.0, 1.0, y) for x, y in TRANSLATIONS], dtype=dtype)
    matrices = torch.cat([rotations, translations]).view(-1, 2, 3).to(device)
    return F.affine_grid(matrices, [len(matrices), 1, size, size], align_corners=False)
