"""Evaluation of a category: network + support sets + test images -> score maps and metrics of every round.

The test features depend neither on the round nor on the support set. They are computed once and used in all rounds.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.images import read_batches, unit_range
from evaluation.metrics import METRIC_NAMES
from evaluation.round_metrics import AUROCS, IMAGES_AT_ONCE, GroundTruth, Numbers, RoundMetrics
from models.stn import STNResNet, fuse_conv_bn
from scorers.base import Prepared, Scorer
from scorers.combined import over_backbones
from scorers.features import FeatureNetwork, FeatureStore, images_per_pass, write_support_images
from scorers.maps import score_maps_at
from utils.choices import default_cache_dir
from utils.devices import release_freed_memory, run_batch, upload
from utils.errors import UserError
from utils.progress import ProgressBar
from utils.stages import StageClock

# Images per network pass on the CPU. Affects time, memory and the last digits only. The best value depends on the
# caches; benchmarks/scoring.py --batch_size N prints the milliseconds per image.
SCORING_BATCH = 12
KEPT_FEATURES_BYTES = 512 * 2**20  # limit for cached features of support images that occur again in later rounds


class NotFinite(UserError):
    """Scores are NaN or infinite."""


class TestFeatures(NamedTuple):
    """Features and ground truth of the test images of a category, used in all rounds."""

    features: FeatureStore
    truth: GroundTruth


class ScoreMaps:
    """Score maps (B, S, S) that are computed from distance maps (`Scorer.distance_maps`) on access.

    All maps of a large test set may not fit into memory: 10,000 images of 224 pixels need 2 GB.
    """

    def __init__(self, distances: torch.Tensor, size: int) -> None:
        self.distances, self.size = distances if distances.dim() == 3 else distances[:, 0], size

    def __getitem__(self, images: slice) -> torch.Tensor:
        release_freed_memory()  # of the maps of other images
        return score_maps_at(self.distances[images], self.size)[1]

    def cpu(self) -> torch.Tensor:
        """All maps, as a tensor in host memory that is backed by a temporary file."""
        shape = (len(self.distances), self.size, self.size)
        default_cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=default_cache_dir()) as file:
            array = np.memmap(file, np.float32, "w+", shape=shape)
        for at in range(0, len(array), IMAGES_AT_ONCE):
            array[at : at + IMAGES_AT_ONCE] = self[at : at + IMAGES_AT_ONCE].cpu().numpy()
        return torch.from_numpy(array)


class RoundResult(NamedTuple):
    """The result of one support set and one scorer.

    image_scores: (B,). distances: from `Scorer.distance_maps`. maps: (B, S, S), enlarged and smoothed. numbers: the
    metrics by their key in the records, None where evaluation.round_metrics has a reason. by_defect_type: the same for
    each defect type.
    """

    image_scores: np.ndarray
    distances: torch.Tensor
    maps: torch.Tensor | ScoreMaps
    numbers: Numbers
    by_defect_type: dict[str, Numbers]


class Shared:
    """What rounds share, also those of several K: metrics, and features of support images that occur again.

    rounds: the support images (K, 3, S, S) of all rounds to come. all_metrics: as `score_rounds`.
    """

    def __init__(
        self, test: TestFeatures, rounds: Iterable[torch.Tensor], device: torch.device, all_metrics: bool
    ) -> None:
        self.metrics = RoundMetrics(test.truth, device, tuple(METRIC_NAMES) if all_metrics else AUROCS)
        self.to_come = Counter(_digest(image) for images in rounds for image in images)
        self.features: dict[bytes, dict[str, Prepared]] = {}  # by _digest, up to KEPT_FEATURES_BYTES

    def used(self, key: bytes, number: int, store: FeatureStore) -> None:
        """Counts a use of an image, whose features are those of index `number` in `store`."""
        self.to_come[key] -= 1
        if self.to_come[key] <= 0:
            self.features.pop(key, None)
        elif key not in self.features and (len(self.features) + 1) * store.nbytes <= KEPT_FEATURES_BYTES * store.images:
            part = store.part(number, number + 1)
            self.features[key] = {name: [layer.clone() for layer in layers] for name, layers in part.items()}


def _digest(image: torch.Tensor) -> bytes:
    return hashlib.sha256(image.cpu().contiguous().numpy()).digest()


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
    network = fuse_conv_bn(network.to(clock.device))
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
    defect_types: Sequence[str] | None = None,
) -> TestFeatures:
    """Features and ground truth of the test images in `dataset`.

    network: from `models.stn.fuse_conv_bn`, on the clock's device. dataset: its items are those of
    datasets.mvtec.LabelledDataset. labels: 1 for defective images. batch_size: None for `images_per_pass`.
    defect_types: of each image, for metrics by defect type.
    """
    batch_size = batch_size or images_per_pass(network, clock.device, SCORING_BATCH)
    scorers = [over_backbones(scorer, getattr(network, "backbone_layers", ())) for scorer in scorers]
    store = FeatureStore(scorers, len(labels), folder=default_cache_dir())
    masks: np.ndarray | None = None
    valid_mask: np.ndarray | None = None
    batches = read_batches(dataset, batch_size, num_workers)
    for start in ProgressBar("features of test images", range(0, len(labels), batch_size), unit="batches"):
        with clock("decode"):
            batch = next(batches)
            mask, valid = batch["mask"].numpy(), batch["valid_mask"].numpy()
            rows = slice(start, start + len(mask))
            if masks is None:
                masks = np.zeros((len(labels), *mask.shape[1:]), bool)
            masks[rows] = mask
            if valid_mask is None and not valid.all():
                valid_mask = np.ones_like(masks)
            if valid_mask is not None:
                valid_mask[rows] = valid
        with clock("network"):
            images = unit_range(upload(batch["image"], clock.device))
            write = partial(_write_features, store, start, network, images)
            run_batch(write, len(images), "images per network pass")
    truth = GroundTruth(np.array(labels, dtype=bool), masks if masks.any() else None, valid_mask, defect_types)
    return TestFeatures(store, truth)


def _write_features(store: FeatureStore, start: int, network: FeatureNetwork, images: torch.Tensor, count: int) -> None:
    store.write(start, network.features(images[:count]))


def score_rounds(
    network: FeatureNetwork,
    test: TestFeatures,
    rounds: Sequence[torch.Tensor],
    clock: StageClock,
    batch_size: int | None = None,
    all_metrics: bool = False,
    shared: Shared | None = None,
) -> Iterator[dict[str, RoundResult]]:
    """Scores the test features against the support images of each round, one round at a time.

    Yields the result of every scorer of `test.features` by name.

    rounds: support images (K, 3, S, S) in [0, 1], per round. all_metrics: also computes average precision, F1-max and
    PRO. shared: of several K that are scored in turns; it has its own all_metrics.

    Raises:
        NotFinite: a score is not finite.
    """
    shared = shared or Shared(test, rounds, clock.device, all_metrics)
    supports = _support_features(network, test.features.scorers, rounds, clock, batch_size, shared)
    for support in supports:
        yield {
            scorer.name: _score_round(scorer, support, test, rounds[0].shape[-1], shared.metrics, clock)
            for scorer in test.features.scorers
        }


def _score_round(
    scorer: Scorer,
    support: dict[str, Prepared],
    test: TestFeatures,
    size: int,
    metrics: RoundMetrics,
    clock: StageClock,
) -> RoundResult:
    distances = _distances(scorer, support[scorer.name], test.features, clock)
    with clock("smoothing"):
        scores = []
        for part in distances.split(IMAGES_AT_ONCE):
            part_scores, maps = score_maps_at(part, size, border_weight=scorer.border_weight)
            scores.append(part_scores)
        maps = maps if len(scores) == 1 else ScoreMaps(distances, size)
        image_scores = torch.cat(scores).cpu().numpy()
    if not np.isfinite(image_scores).all():
        raise NotFinite("scores are not finite: the checkpoint or the support set contains NaN or infinite values")
    with clock("metrics"):
        return RoundResult(image_scores, distances, maps, *metrics.of_round(image_scores, maps))


def _distances(scorer: Scorer, support: Prepared, features: FeatureStore, clock: StageClock) -> torch.Tensor:
    """Distance maps (B, H, H). If the test features are in parts, the scorer is fitted once for all of them."""
    if not features.is_in_parts:
        (prepared,) = features.parts(scorer.name)
        return scorer.measure(support, prepared, clock)
    with clock(scorer.name):
        fitted = scorer.fit(support)
    with clock("distance"):
        return torch.cat([scorer.distance_maps(fitted, prepared) for prepared in features.parts(scorer.name)])


def _support_features(
    network: FeatureNetwork,
    scorers: Sequence[Scorer],
    rounds: Sequence[torch.Tensor],
    clock: StageClock,
    batch_size: int | None,
    shared: Shared,
) -> Iterator[dict[str, Prepared]]:
    """Yields the prepared features of all views of each round, by scorer. All rounds share the same memory."""
    batch_size = batch_size or images_per_pass(network, clock.device, SCORING_BATCH)
    store = FeatureStore(scorers, len(rounds[0]), with_views=True)
    for images in rounds:
        with clock("network"):
            keys = [_digest(image) for image in images]
            missing = [number for number, key in enumerate(keys) if key not in shared.features]
            for number in set(range(len(images))) - set(missing):
                store.copy_image(number, shared.features[keys[number]])
            if missing:
                write_support_images(store, missing, network, upload(images[missing], clock.device), batch_size)
            for number, key in enumerate(keys):
                shared.used(key, number, store)
        yield store.prepared
