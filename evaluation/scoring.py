"""The one evaluation: network + support rounds + test pictures -> score maps and metrics of every round.

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
from evaluation.metrics import Ranking, auroc, average_precision, f1_max, pro, rank, region_weights
from inspection.detector import Layers, distance_maps, fit_rows, score_maps, write_features, write_views
from models.stn import STNResNet18, folded
from scorers.gaussian import nested_layers
from scorers.views import VIEWS_PER_IMAGE, score_map_matrix
from utils.utils import StageClock, UserError

# Pictures per network pass; changes time, memory and the last digits, nothing else. On the CPU the caches decide:
# benchmarks/scoring.py --batch_size N prints the milliseconds per picture.
SCORING_BATCH = {"cpu": 12, "cuda": 64}
KEPT_FEATURES_BYTES = 512 * 2**20  # at most, of support pictures that come again in a later round


class TestFeatures(NamedTuple):
    """A category's test side, ready for any number of rounds."""

    layers: Layers
    labels: np.ndarray  # (B,) bool, True for defective
    masks: np.ndarray | None  # (B, S, S) bool; None: no pixel is known to be defective, so there is no pixel metric
    counted: np.ndarray | None = None  # (B, S, S) bool, the pixels whose truth is known; None: all


class RoundResult(NamedTuple):
    """One support set's outcome. distances: (B, H, W) Mahalanobis. maps: (B, S, S), the same enlarged and smoothed."""

    image_auroc: float
    pixel_auroc: float | None
    distances: torch.Tensor
    maps: torch.Tensor
    more: dict[str, float | None]  # the other metrics, where asked for; None where there is no ground truth

    @property
    def numbers(self) -> dict[str, float | None]:
        """Every metric by its name in the records."""
        return {"image_auroc": self.image_auroc, "pixel_auroc": self.pixel_auroc, **self.more}


def score_category(
    network: STNResNet18,
    dataset: Dataset,
    labels: Sequence[int],
    rounds: Sequence[torch.Tensor],
    clock: StageClock,
    batch_size: int | None = None,
    num_workers: int = 0,
) -> Iterator[RoundResult]:
    """Scores a category with `network` as it is (it is not changed): test features once, then round after round.

    The arguments are those of `compute_test_features` and `score_rounds`, which see.
    """
    network = folded(network.to(clock.device))
    test = compute_test_features(network, dataset, labels, clock, batch_size, num_workers)
    yield from score_rounds(network, test, rounds, clock, batch_size)


def compute_test_features(
    network: STNResNet18,
    dataset: Dataset,
    labels: Sequence[int],
    clock: StageClock,
    batch_size: int | None,
    num_workers: int,
) -> TestFeatures:
    """Features and ground truth of the test pictures in `dataset`, whose items are datasets.mvtec.LabelledDataset's.

    `network` comes from `models.stn.folded`, on the clock's device. batch_size: None for SCORING_BATCH.
    """
    batch_size = batch_size or SCORING_BATCH[clock.device.type]
    layers: Layers = []
    truth: dict[str, list[np.ndarray]] = {"mask": [], "counted": []}
    batches = read_batches(dataset, batch_size, num_workers)
    for start in range(0, len(labels), batch_size):
        with clock("decode"):
            batch = next(batches)
            for name, batches_of_truth in truth.items():
                batches_of_truth.append(batch[name].numpy())
        with clock("network"):
            images = batch["image"].to(clock.device).float() / 255
            write_features(layers, start, len(labels), nested_layers(network.features(images)))
    masks, counted = map(np.concatenate, truth.values())
    return TestFeatures(
        layers, np.array(labels, dtype=bool), masks if masks.any() else None, None if counted.all() else counted
    )


def score_rounds(
    network: STNResNet18,
    test: TestFeatures,
    rounds: Sequence[torch.Tensor],
    clock: StageClock,
    batch_size: int | None = None,
    all_metrics: bool = False,
) -> Iterator[RoundResult]:
    """Scores the test features against each round's support pictures (K, 3, S, S) in [0, 1], one round at a time.

    all_metrics: average precision, F1-max and PRO too, not only the AUROCs.

    Raises:
        UserError: scores that are not finite.
    """
    grid, size = math.isqrt(test.layers[0].shape[0]), rounds[0].shape[-1]
    enlarge_and_smooth = score_map_matrix(grid, size).to(clock.device)  # (S, H)
    regions = region_weights(test.masks) if all_metrics and test.masks is not None else None
    truth, counted = _known_truth(test, clock.device)
    supports = _support_features(network, rounds, clock, batch_size or SCORING_BATCH[clock.device.type])
    for support in supports:
        fitted = fit_rows(support, test.layers[0].shape[1], clock)
        distances = distance_maps(fitted, test.layers, clock)
        with clock("smoothing"):
            image_scores, maps = score_maps(distances, enlarge_and_smooth)
            image_scores = image_scores.cpu().numpy()
        if not np.isfinite(image_scores).all():
            raise UserError("scores are not finite: the checkpoint or the support set holds NaN or infinite values")
        with clock("metrics"):
            image = rank(image_scores, test.labels)
            pixel = None if truth is None else _rank_pixels(maps if counted is None else maps[counted], truth)
            pixel_auroc = None if pixel is None else auroc(pixel)
            more = _more_metrics(image, pixel, regions) if all_metrics else {}
        yield RoundResult(auroc(image), pixel_auroc, distances, maps, more)


def _known_truth(test: TestFeatures, device: torch.device) -> tuple[np.ndarray | None, torch.Tensor | None]:
    """Which of the counted pixels are defective, and which pixels are counted, on `device`; None as in `test`."""
    if test.masks is None or test.counted is None:
        return test.masks, None
    return test.masks[test.counted], torch.from_numpy(test.counted).to(device)


def _rank_pixels(scores: torch.Tensor, truth: np.ndarray) -> Ranking:
    return rank(scores if scores.is_cuda else scores.numpy(), truth)


def _more_metrics(image: Ranking, pixel: Ranking | None, regions: np.ndarray | None) -> dict[str, float | None]:
    return {
        "image_ap": average_precision(image),
        "image_f1_max": f1_max(image),
        "pixel_ap": None if pixel is None else average_precision(pixel),
        "pixel_f1_max": None if pixel is None else f1_max(pixel),
        "pro": None if pixel is None else pro(pixel, regions),
    }


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
