"""The one evaluation: network + support rounds + test pictures -> score maps and AUROCs of every round.

Test features depend neither on the round nor on the support set: they are computed once and used by all rounds.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.images import read_batches
from evaluation.metrics import auroc
from models.detector import Layers, distance_maps, fit_rows, score_maps, write_features, write_views
from models.gaussian import nested_layers
from models.stn import STNResNet18, folded
from utils.funcs import VIEWS_PER_IMAGE, score_map_matrix
from utils.utils import StageClock, UserError

SCORING_BATCH = 32  # pictures per network pass; changes memory and the last digits, nothing else
KEPT_FEATURES_BYTES = 512 * 2**20  # at most, of support pictures that come again in a later round


class TestFeatures(NamedTuple):
    """A category's test side, ready for any number of rounds."""

    layers: Layers
    labels: np.ndarray  # (B,) bool, True for defective
    masks: np.ndarray | None  # (B, S, S) bool; None: no ground truth, so no pixel metric


class RoundResult(NamedTuple):
    """One support set's outcome. distances: (B, H, W) Mahalanobis. maps: (B, S, S), the same enlarged and smoothed."""

    image_auroc: float
    pixel_auroc: float | None
    distances: torch.Tensor
    maps: torch.Tensor


def score_category(
    network: STNResNet18,
    dataset: Dataset,
    labels: Sequence[int],
    has_masks: bool,
    rounds: Sequence[torch.Tensor],
    clock: StageClock,
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[RoundResult]:
    """Scores a category with `network` as it is (it is not changed): test features once, then round after round.

    The arguments are those of `compute_test_features` and `score_rounds`, which see.
    """
    network = folded(network.to(clock.device))
    test = compute_test_features(network, dataset, labels, has_masks, clock, batch_size, num_workers)
    yield from score_rounds(network, test, rounds, clock, batch_size)


def compute_test_features(
    network: STNResNet18,
    dataset: Dataset,
    labels: Sequence[int],
    has_masks: bool,
    clock: StageClock,
    batch_size: int,
    num_workers: int,
) -> TestFeatures:
    """Features and ground truth of the test pictures in `dataset` (items: image (3, S, S) uint8, mask (S, S) bool).

    `network` comes from `models.stn.folded`, on the clock's device.
    """
    layers: Layers = []
    masks = []
    batches = read_batches(dataset, batch_size, num_workers)
    for start in range(0, len(labels), batch_size):
        with clock("decode"):
            batch = next(batches)
            masks.append(batch["mask"].numpy())
        with clock("network"):
            images = batch["image"].to(clock.device).float() / 255
            write_features(layers, start, len(labels), nested_layers(network.features(images)))
    return TestFeatures(layers, np.array(labels, dtype=bool), np.concatenate(masks) if has_masks else None)


def score_rounds(
    network: STNResNet18, test: TestFeatures, rounds: Sequence[torch.Tensor], clock: StageClock, batch_size: int
) -> Iterator[RoundResult]:
    """Scores the test features against each round's support pictures (K, 3, S, S) in [0, 1], one round at a time.

    Raises:
        UserError: scores that are not finite.
    """
    grid, size = math.isqrt(test.layers[0].shape[0]), rounds[0].shape[-1]
    enlarge_and_smooth = score_map_matrix(grid, size).to(clock.device)  # (S, H)
    supports = _support_features(network, rounds, clock, batch_size)
    for support in supports:
        fitted = fit_rows(support, test.layers[0].shape[1], clock)
        distances = distance_maps(fitted, test.layers, clock)
        with clock("smoothing"):
            image_scores, maps = score_maps(distances, enlarge_and_smooth)
            image_scores = image_scores.cpu().numpy()
        if not np.isfinite(image_scores).all():
            raise UserError("scores are not finite: the checkpoint or the support set holds NaN or infinite values")
        with clock("metrics"):
            image_auroc = auroc(image_scores, test.labels)
            pixel_auroc = None if test.masks is None else auroc(maps.cpu().numpy(), test.masks)
        yield RoundResult(image_auroc, pixel_auroc, distances, maps)


def _support_features(
    network: STNResNet18, rounds: Sequence[torch.Tensor], clock: StageClock, batch_size: int
) -> Iterator[Layers]:
    """Features of all views of each round, in the same memory for every round.

    A picture of several rounds goes through the network once, as far as KEPT_FEATURES_BYTES allow.
    """
    keys = [[hashlib.sha256(picture.numpy()).digest() for picture in pictures] for pictures in rounds]
    to_come = Counter(key for of_round in keys for key in of_round)
    kept: dict[bytes, Layers] = {}
    layers: Layers = []
    for pictures, of_round in zip(rounds, keys, strict=True):
        with clock("network"):
            for number, (picture, key) in enumerate(zip(pictures, of_round, strict=True)):
                start, count = number * VIEWS_PER_IMAGE, len(pictures) * VIEWS_PER_IMAGE
                if key in kept:
                    write_features(layers, start, count, kept[key])
                else:
                    write_views(layers, start, count, network, picture.to(clock.device), batch_size)
                to_come[key] -= 1
                if not to_come[key]:
                    kept.pop(key, None)
                elif key not in kept and (len(kept) + 1) * _size(layers) <= KEPT_FEATURES_BYTES * len(pictures):
                    kept[key] = [layer[:, start : start + VIEWS_PER_IMAGE].clone() for layer in layers]
        yield layers


def _size(layers: Layers) -> int:
    """Bytes of one round's features."""
    return sum(layer.nbytes for layer in layers)
