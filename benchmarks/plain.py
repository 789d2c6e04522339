"""The plain definition of training and scoring: the release's order of work, slow and easy to check.

The tests compare the fast code with it, and the benchmarks use it as their baseline. All in the dtype and on the device
of the input; inverses of warps and the smoothing are computed on the host, as in the release.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from skimage.measure import label
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from models.regad import RegAD
from models.stn import STNResNet

COVARIANCE_EPS = 0.01
SIGMA = 4
FPR_LIMIT = 0.3


def warp(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """See models/warp.py, `warp`."""
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def forward(stn: STNResNet, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The last registered map and the un-warped features. The release computes both, in training and in scoring."""
    x = stn.maxpool(stn.relu(stn.bn1(stn.conv1(x))))
    inverses, features = [], []
    for layer, head in ((stn.layer1, stn.stn1), (stn.layer2, stn.stn2), (stn.layer3, stn.stn3)):
        x = layer(x)
        theta = head(x)
        x = warp(x, theta)
        last_row = np.tile(np.array([[[0, 0, 1]]]), (len(x), 1, 1))
        inverse = np.linalg.inv(np.concatenate([theta.detach().cpu().numpy(), last_row], axis=1))[:, :2]
        inverses.append(torch.from_numpy(inverse).to(x))
        feature = x.detach()
        for back in reversed(inverses):
            feature = warp(feature, back)
        features.append(feature)
    return x, features


def optimizers(model: RegAD, lr: float, momentum: float) -> list[torch.optim.Optimizer]:
    """One optimizer per network, as in the release."""
    networks = (model.stn, model.encoder, model.predictor)
    return [torch.optim.SGD(network.parameters(), lr=lr, momentum=momentum) for network in networks]


def training_step(
    model: RegAD, three_optimizers: list[torch.optim.Optimizer], query: torch.Tensor, support: torch.Tensor
) -> float:
    """One update from queries (B, 3, S, S) and support images (B, K, 3, S, S). Returns the loss before it."""
    for optimizer in three_optimizers:
        optimizer.zero_grad()
    batch, shot = support.shape[:2]
    x_q = forward(model.stn, query)[0]
    x_s = forward(model.stn, support.flatten(0, 1))[0].view(batch, shot, *x_q.shape[1:]).mean(dim=1)
    z_q, z_s = model.encoder(x_q), model.encoder(x_s)
    p_q, p_s = model.predictor(z_q), model.predictor(z_s)
    loss = sum(-F.cosine_similarity(p, z.detach(), dim=1).mean() / 2 for p, z in ((p_q, z_s), (p_s, z_q)))
    loss.backward()
    for optimizer in three_optimizers:
        optimizer.step()
    return loss.item()


def embedding(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """The joined embedding (N, C, P) of layers (N, C_l, H_l, W_l), finest first."""
    size = features[0].shape[-2:]
    return torch.cat([F.interpolate(f, size=size, mode="nearest") for f in features], dim=1).flatten(2)


def distances(support: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """Mahalanobis distances (B, P) of test (B, C, P) to the Gaussians of support (V, C, P)."""
    channels, positions = support.shape[1:]
    mean = support.mean(dim=0)
    identity = torch.eye(channels).to(support)
    covariance = support.new_zeros(channels, channels, positions)
    for i in range(positions):
        covariance[:, :, i] = torch.cov(support[:, :, i].T) + COVARIANCE_EPS * identity
    out = support.new_empty(len(test), positions)
    for i in range(positions):
        inverse = torch.linalg.inv(covariance[:, :, i])
        for b, sample in enumerate(test):
            delta = sample[:, i] - mean[:, i]
            out[b, i] = torch.sqrt(torch.dot(delta @ inverse, delta))
    return out


def score_maps(distance: torch.Tensor, size: int) -> np.ndarray:
    """Score maps (B, size, size) of distance maps (B, H, W)."""
    maps = F.interpolate(distance[:, None], size=size, mode="bilinear", align_corners=False)[:, 0].cpu().numpy()
    return np.stack([gaussian_filter(m, sigma=SIGMA) for m in maps])


def aurocs(maps: np.ndarray, labels: np.ndarray, masks: np.ndarray) -> tuple[float, float]:
    """Image AUROC and pixel AUROC. The score of an image is the maximum of its map."""
    image = roc_auc_score(labels, maps.reshape(len(maps), -1).max(axis=1))
    return float(image), float(roc_auc_score(masks.ravel(), maps.ravel()))


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Average precision by scikit-learn."""
    return float(average_precision_score(positive.ravel(), scores.ravel()))


def f1_max(scores: np.ndarray, positive: np.ndarray) -> float:
    """The largest F1 over all points of scikit-learn's precision-recall curve."""
    precision, recall, _ = precision_recall_curve(positive.ravel(), scores.ravel())
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)))


def pro(maps: np.ndarray, masks: np.ndarray, thresholds: np.ndarray | None = None) -> float:
    """PRO: the area under the per-region-overlap curve up to the false-positive rate FPR_LIMIT, divided by FPR_LIMIT.

    The curve has a point per threshold (None: per score), straight lines between points, and is cut at the limit.
    Regions are 8-connected.
    """
    thresholds = np.unique(maps) if thresholds is None else thresholds
    normal = np.sort(maps[~masks])
    regions = []
    for scores, mask in zip(maps, masks, strict=True):
        numbered = label(mask, connectivity=2)
        regions += [np.sort(scores[numbered == number]) for number in range(1, numbered.max() + 1)]

    def share_found(ordered: np.ndarray) -> np.ndarray:
        return np.append(1 - np.searchsorted(ordered, thresholds) / len(ordered), 0)[::-1]  # from (0, 0) up

    rates, overlaps = share_found(normal), np.mean([share_found(region) for region in regions], axis=0)
    inside = rates <= FPR_LIMIT
    x = np.append(rates[inside], FPR_LIMIT)
    y = np.append(overlaps[inside], overlap_at_limit(rates, overlaps, inside))
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / FPR_LIMIT)


def overlap_at_limit(rates: np.ndarray, overlaps: np.ndarray, inside: np.ndarray) -> float:
    """The overlap at FPR_LIMIT, interpolated between the two points around it."""
    last = np.flatnonzero(inside)[-1]
    (x0, x1), (y0, y1) = rates[last : last + 2], overlaps[last : last + 2]
    return y0 + (y1 - y0) * (FPR_LIMIT - x0) / (x1 - x0)
