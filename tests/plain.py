"""The plain definition of few-shot scoring, in the release's order of work: slow, obvious, the oracle of the fast path.

Also the baseline of benchmarks/scoring.py. Works in the dtype of its input.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score

COVARIANCE_EPS = 0.01
SIGMA = 4


def embedding(features: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Layers (N, C_l, H_l, W_l), finest first -> the joined embedding (N, C, P)."""
    size = features[0].shape[-2:]
    return torch.cat([F.interpolate(f, size=size, mode="nearest") for f in features], dim=1).flatten(2)


def distances(support: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """Mahalanobis distances (B, P) of test (B, C, P) to the Gaussians of support (V, C, P)."""
    channels, positions = support.shape[1:]
    mean = support.mean(dim=0)
    identity = torch.eye(channels, dtype=support.dtype)
    covariance = torch.zeros(channels, channels, positions, dtype=support.dtype)
    for i in range(positions):
        covariance[:, :, i] = torch.cov(support[:, :, i].T) + COVARIANCE_EPS * identity
    out = torch.empty(len(test), positions, dtype=support.dtype)
    for i in range(positions):
        inverse = torch.linalg.inv(covariance[:, :, i])
        for b, sample in enumerate(test):
            delta = sample[:, i] - mean[:, i]
            out[b, i] = torch.sqrt(torch.dot(delta @ inverse, delta))
    return out


def score_maps(distance: torch.Tensor, size: int) -> np.ndarray:
    """Distance maps (B, H, W) -> score maps (B, size, size)."""
    maps = F.interpolate(distance[:, None], size=size, mode="bilinear", align_corners=False)[:, 0].numpy()
    return np.stack([gaussian_filter(m, sigma=SIGMA) for m in maps])


def aurocs(maps: np.ndarray, labels: np.ndarray, masks: np.ndarray) -> tuple[float, float]:
    """Image AUROC (score: the map's maximum) and pixel AUROC."""
    image = roc_auc_score(labels, maps.reshape(len(maps), -1).max(axis=1))
    return float(image), float(roc_auc_score(masks.ravel(), maps.ravel()))
