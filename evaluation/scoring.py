"""Evaluation of a category: network + support sets + test images -> score maps and metrics of every round.

The test features depend neither on the round nor on the support set. They are computed once and used in all rounds.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.images import read_batches
from evaluation.metrics import Ranking, auroc, average_precision, f1_max, pro, rank, region_weights
from models.stn import STNResNet, folded
from scorers.base import Prepared, Scorer
from scorers.features import FeatureNetwork, FeatureStore, write_support_image
from scorers.maps import score_maps_at
from utils.errors import UserError
from utils.stages import StageClock

# Images per network pass. Affects time, memory and the last digits only. On the CPU, the best value depends on the
# caches; benchmarks/scoring.py --batch_size N prints the milliseconds per image.
SCORING_BATCH = {"cpu": 12, "cuda": 64}
KEPT_FEATURES_BYTES = 512 * 2**20  # limit for cached features of support images that occur again in later rounds


class NotFinite(UserError):
    """Scores are NaN or infinite."""


class TestFeatures(NamedTuple):
    """Test features and ground truth of a category, used in all rounds."""

    features: FeatureStore
    labels: np.ndarray  # (B,) bool, True for defective
    masks: np.ndarray | None  # (B, S, S) bool; None if no pixel is known to be defective: no pixel metrics
    counted: np.ndarray | None = None  # (B, S, S) bool, the pixels with known ground truth; None: all


class RoundResult(NamedTuple):
    """The result of one support set and one scorer. distances: (B, H, H); maps: (B, S, S), enlarged and smoothed."""

    image_auroc: float
    pixel_auroc: float | None
    distances: torch.Tensor
    maps: torch.Tensor
    more: dict[str, float | None]  # the other metrics, if requested; None without ground truth

    @property
    def numbers(self) -> dict[str, float | None]:
        """All metrics by their key in the records."""
        return {"image_auroc": self.image_auroc, "pixel_auroc": self.pixel_auroc, **self.more}


def score_category(
    network: STNResNet,
    scorers: Sequence[Scorer],
    dataset: Dataset,
    labels: Sequence[int],
    rounds: Sequence[torch.Tensor],
    clock: StageClock,
    batch_size: int | None = None,
    num_workers: int = 0,
) -> Iterator[dict[str, RoundResult]]:
    """Scores a category with a copy of `network`: computes the test features once, then scores each round.

    The arguments are those of `compute_test_features` and `score_rounds`.
    """
    network = folded(network.to(clock.device))
    test = compute_test_features(network, scorers, dataset, labels, clock, batch_size, num_workers)
    yield from score_rounds(network, test, rounds, clock, batch_size)


def compute_test_features(
    network: FeatureNetwork,
    scorers: Sequence[Scorer],
    dataset: Dataset,
    labels: Sequence[int],
    clock: StageClock,
    batch_size: int | None,
    num_workers: int,
) -> TestFeatures:
    """Features and ground truth of the test images in `dataset`.

    network: from `models.stn.folded`, on the clock's device. dataset: its items are those of
    datasets.mvtec.LabelledDataset. labels: 1 for defective images. batch_size: None for SCORING_BATCH.
    """
    batch_size = batch_size or SCORING_BATCH[clock.device.type]
    store = FeatureStore(scorers, len(labels))
    truth: dict[str, list[np.ndarray]] = {"mask": [], "counted": []}
    batches = read_batches(dataset, batch_size, num_workers)
    for start in range(0, len(labels), batch_size):
        with clock("decode"):
            batch = next(batches)
            for name, batches_of_truth in truth.items():
                batches_of_truth.append(batch[name].numpy())
        with clock("network"):
            images = batch["image"].to(clock.device).float() / 255
            store.write(start, network.features(images))
    masks, counted = map(np.concatenate, truth.values())
    return TestFeatures(
        store, np.array(labels, dtype=bool), masks if masks.any() else None, None if counted.all() else counted
    )


def score_rounds(
    network: FeatureNetwork,
    test: TestFeatures,
    rounds: Sequence[torch.Tensor],
    clock: StageClock,
    batch_size: int | None = None,
    all_metrics: bool = False,
) -> Iterator[dict[str, RoundResult]]:
    """Scores the test features against the support images of each round, one round at a time.

    Yields the result of every scorer of `test.features` by name.

    rounds: support images (K, 3, S, S) in [0, 1], per round. all_metrics: also computes average precision, F1-max and
    PRO.

    Raises:
        NotFinite: a score is not finite.
    """
    metrics = _Metrics(test, clock.device, all_metrics)
    supports = _support_features(network, test.features.scorers, rounds, clock, batch_size)
    for support in supports:
        yield {
            scorer.name: _score_round(scorer, support, test, rounds[0].shape[-1], metrics, clock)
            for scorer in test.features.scorers
        }


def _score_round(
    scorer: Scorer, support: dict[str, Prepared], test: TestFeatures, size: int, metrics: _Metrics, clock: StageClock
) -> RoundResult:
    distances = scorer.measure(support[scorer.name], test.features.prepared[scorer.name], clock)
    with clock("smoothing"):
        image_scores, maps = score_maps_at(distances, size)
        image_scores = image_scores.cpu().numpy()
    if not np.isfinite(image_scores).all():
        raise NotFinite("scores are not finite: the checkpoint or the support set contains NaN or infinite values")
    with clock("metrics"):
        return RoundResult(distances=distances, maps=maps, **metrics.of_round(image_scores, maps))


class _Metrics:
    """Computes the metrics of each round; values that do not depend on the round are computed once."""

    def __init__(self, test: TestFeatures, device: torch.device, all_metrics: bool) -> None:
        self.labels, self.all_metrics = test.labels, all_metrics
        self.regions = region_weights(test.masks) if all_metrics and test.masks is not None else None
        self.truth, self.counted = _known_truth(test, device)

    def of_round(self, image_scores: np.ndarray, maps: torch.Tensor) -> dict:
        """`image_auroc`, `pixel_auroc` (None if no pixel is known to be defective), and in `more` what is requested."""
        image, pixel = rank(image_scores, self.labels), None
        if self.truth is not None:
            pixel = _rank_pixels(maps if self.counted is None else maps[self.counted], self.truth)
        return {
            "image_auroc": auroc(image),
            "pixel_auroc": None if pixel is None else auroc(pixel),
            "more": _more_metrics(image, pixel, self.regions) if self.all_metrics else {},
        }


def _known_truth(test: TestFeatures, device: torch.device) -> tuple[np.ndarray | None, torch.Tensor | None]:
    """The ground truth of the counted pixels, and the mask of counted pixels on `device`; None as in `TestFeatures`."""
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
    network: FeatureNetwork,
    scorers: Sequence[Scorer],
    rounds: Sequence[torch.Tensor],
    clock: StageClock,
    batch_size: int | None,
) -> Iterator[dict[str, Prepared]]:
    """Yields the prepared features of all views of each round, by scorer. All rounds share the same memory.

    The features of an image that occurs in several rounds are cached, up to KEPT_FEATURES_BYTES.
    """
    batch_size = batch_size or SCORING_BATCH[clock.device.type]
    keys = [[hashlib.sha256(image.cpu().contiguous().numpy()).digest() for image in images] for images in rounds]
    to_come = Counter(key for of_round in keys for key in of_round)
    kept: dict[bytes, dict[str, Prepared]] = {}
    store = FeatureStore(scorers, len(rounds[0]), with_views=True)
    for images, of_round in zip(rounds, keys, strict=True):
        with clock("network"):
            for number, (image, key) in enumerate(zip(images, of_round, strict=True)):
                if key in kept:
                    store.copy_image(number, kept[key])
                else:
                    write_support_image(store, number, network, image.to(clock.device), batch_size)
                to_come[key] -= 1
                if not to_come[key]:
                    kept.pop(key, None)
                elif key not in kept and (len(kept) + 1) * store.nbytes <= KEPT_FEATURES_BYTES * len(images):
                    part = store.part(number, number + 1)
                    kept[key] = {name: [layer.clone() for layer in layers] for name, layers in part.items()}
        yield store.prepared
