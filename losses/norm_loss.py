"""The registration loss: registered maps of the same category should agree (RegAD section 3.2, after SimSiam)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def negative_cosine(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """N(p, z) in [-1, 1]: the negative cosine over the channels of maps (B, C, H, W), averaged over B, H and W."""
    precise = torch.promote_types(p.dtype, torch.float32)  # float32 also for the outputs of bfloat16 heads
    return -F.cosine_similarity(p.to(precise), z.to(precise), dim=1).mean()


def registration_loss(
    p_query: torch.Tensor, z_query: torch.Tensor, p_support: torch.Tensor, z_support: torch.Tensor
) -> torch.Tensor:
    """1/2 N(p_query, stop(z_support)) + 1/2 N(p_support, stop(z_query)), a scalar in [-1, 1].

    All maps are (B, C, H, W), p = predictor(z). No gradient passes through stop().
    """
    return (negative_cosine(p_query, z_support.detach()) + negative_cosine(p_support, z_query.detach())) / 2
