"""The few-shot detector: fitted once on support images, then computes scores and score maps of any images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from datasets.images import FULL_BITS, TRANSPARENT, reading_note, smallest_depth
from inspection.detector_file import HEADER, ID_LENGTH, identity, read_state, stored_network, stored_scorer
from inspection.images import Decoded, ImageFile, ImageInput, as_pixels, image_list, image_names, largest_grey_values
from inspection.out_of_distribution import contrast
from inspection.quality import QualityGate, measure, readable
from inspection.scoring import CHECK, ImageResult, ImageScoring
from inspection.support import (
    MOST_FITTED,
    Support,
    digest,
    duplicate_notes,
    equal_images,
    read_support,
    representatives,
)
from inspection.threshold import (
    NormalScores,
    Threshold,
    check_calibration,
    given_threshold,
    is_order_statistic,
    left_out_scores,
    normal_threshold,
    scored_views,
)
from inspection.tiles import Layout, Tiling, fitting_corners, resolve_tiling
from models.stn import STNResNet, without_identity_heads
from scorers.base import Fitted, Prepared, Scorer
from scorers.features import FeatureStore, write_support_images
from scorers.gaussian import Gaussian, convert_fitted_369ac53
from scorers.left_out import without_images
from scorers.registry import make_scorer
from scorers.views import VIEWS_PER_IMAGE, support_views
from utils.choices import AUTO, AUTO_BITS, BIT_DEPTHS, DEFAULT_SCORER, MIN_TILE, OFF, Tile
from utils.devices import resolve_device
from utils.errors import UserError, lack_of_memory
from utils.files import save_tensors
from utils.progress import ProgressBar
from utils.stages import StageClock

# Attributes that a file holds as they are; those of earlier versions lack some
STORED = ("origin", "support_digests", "min_area", "document", "learned", "support_alpha")
MOST_OTHERS = 3  # images of other parts that an error names


class OtherPartError(UserError):
    """Images that are given as normal differ from the support as a whole."""


def require_this_part(what: str, names: Sequence[str], results: Iterable[ImageResult | None], option: str) -> None:
    """Raises OtherPartError if some of the images differ from the support as a whole.

    what, option: what the images are, and the flag that gives them. results: None for an image that does not count.
    """
    others = [
        f"{name} ({result.reason})" for name, result in zip(names, results, strict=True) if result and result.reason
    ]
    if others:
        more = f" and {len(others) - MOST_OTHERS} more" if len(others) > MOST_OTHERS else ""
        raise OtherPartError(
            f"{len(others)} of {len(names)} {what} are not like the support images: "
            f"{', '.join(others[:MOST_OTHERS])}{more}; give images of this part alone",
            options=(option, "force"),
        )


class Inspection(NamedTuple):
    """Results of B images: scores (B,) and maps as `FewShotDetector.score` returns them.

    reasons: why a person should look at an image whatever its score, see inspection/out_of_distribution.py and
    inspection/quality.py; "" for an image whose score decides. quality: the measures of each image by name.
    """

    scores: np.ndarray
    maps: np.ndarray | list[np.ndarray]
    reasons: list[str]
    quality: list[dict[str, float]]


class FewShotDetector(ImageScoring):
    """Scores images of a part by their distance to a few normal images of the same part.

    detector = FewShotDetector(untrained("imagenet").stn)  # or load_checkpoint(file, stn_mode, img_size).stn
    detector.fit(["normal_1.png", "normal_2.png"])
    scores, maps = detector.score(["new.png"])

    Images of any size are paths, PIL images, or arrays and tensors, see `inspection.images.array_image`. Scores are
    distances: at least 0, without a unit. The score of an image does not depend on the other images of the call.

    scorer: a name in `scorers.registry`, or a Scorer. keep_aspect: pad images by reflection instead of stretching them
    to a square. bits: the bit depth of 16-bit grey files and PIL images, 8 to 16; "auto": `fit` sets it to the smallest
    that holds the values of the support images. A later image that exceeds it is clipped, with a ClippedWarning.
    tile: how large images are cut: "auto", "off", or the side of a tile in pixels; see inspection/tiles.py. region:
    (H, W) bool, stretched to each image, whose score map is 0 where it is False; None: everywhere is scored.
    origin: plain values that describe the support images and the weights, kept in the file.

    tiling: what `fit` made of `tile`; None if no image is cut. threshold: None until `calibrate` or `set_threshold`.
    loo_scores: the leave-one-out scores of the support images, None if K is 1 or if `fit` was called with
    `for_threshold=False`. calibration: the scores of further normal images, if `calibrate` was given any.
    min_area: of the smallest defect, in pixels of the image. document: what the file says of itself, see
    inspection/document.py. learned: see inspection/learning.py.
    clock: seconds per stage.
    """

    def __init__(
        self,
        network: STNResNet,
        device: str = "auto",
        keep_aspect: bool = False,
        scorer: str | Scorer = DEFAULT_SCORER,
        bits: int | str = AUTO_BITS,
        tile: Tile = OFF,
        region: np.ndarray | None = None,
        origin: Mapping | None = None,
    ) -> None:
        if bits not in (AUTO_BITS, *BIT_DEPTHS):
            raise ValueError(f"bits must be {AUTO_BITS} or one of {BIT_DEPTHS}, got {bits!r}")
        if tile not in (AUTO, OFF) and not (isinstance(tile, int) and tile >= MIN_TILE):
            raise ValueError(f"tile must be {AUTO}, {OFF} or a number of pixels from {MIN_TILE}, got {tile!r}")
        scorer = make_scorer(scorer) if isinstance(scorer, str) else scorer
        depth = FULL_BITS if bits == AUTO_BITS else bits
        super().__init__(network, scorer, StageClock(resolve_device(device)), keep_aspect, depth, region)
        self.measures_bits, self.tile, self.origin = bits == AUTO_BITS, tile, dict(origin or {})
        self.threshold: Threshold | None = None
        self.loo_scores: NormalScores | None = None
        self.calibration: NormalScores | None = None
        self.fitted: Fitted = {}
        self.gate: QualityGate | None = None
        self.min_area = 0.0
        self.document: dict = {}
        self.learned: dict = {}
        self.support_digests: list[str] = []
        self.support_alpha: bool | None = None  # whether some have transparent parts; None: not known
        self._support_notes: list[str] = []
        self._calibration_notes: list[str] = []

    def fit(self, images: Sequence[ImageInput], for_threshold: bool = True) -> FewShotDetector:
        """Fits the detector to K >= 1 normal images; an earlier fit with its thresholds and its document is gone.

        Each file is opened once. for_threshold: also compute the leave-one-out scores that `calibrate` needs. After an
        error, the detector is as it was.

        Raises:
            UserError: no images are given, or some of them look like label files.
            ImageError: a file cannot be read.
            TypeError: a single image instead of a list, or an array of another type or shape.
        """
        images = [ImageFile(image) if isinstance(image, str | Path) else image for image in image_list(images)]
        if not images:
            raise UserError("no support images: at least one normal image is needed")
        fresh = copy(self)
        fresh._fit(images, for_threshold)
        vars(self).update(vars(fresh))
        return self

    def _fit(self, images: list[ImageInput], for_threshold: bool) -> None:
        self.network = without_identity_heads(self.network)  # here and not before: loaded files keep their identity
        self.threshold = self.loo_scores = self.calibration = None
        self.learned, self.document, self._calibration_notes = {}, {}, []
        with self.clock("decode"):
            if self.measures_bits:
                self.bits = smallest_depth(largest_grey_values(images))
            support = read_support(images, self.decode)
        self.support_digests, self.support_alpha = list(map(digest, support.squares)), support.has_alpha
        self._support_notes = support.notes
        self.gate = QualityGate.of(support.squares)
        self.tiling = resolve_tiling(self.tile, support.sizes, self.size, self.keep_aspect)
        layouts = [self.layout_of(*size) for size in support.sizes]
        are_cut, with_scores = any(layouts), for_threshold and len(support.names) > 1
        if are_cut:
            prepared, contrasts, ends = self._tile_features(support, layouts)
        else:
            chosen = self._representatives(support.squares)
            prepared, contrasts = self._view_features([support.squares[number] for number in chosen])
        features = prepared[self.scorer.name]
        with self.clock(self.scorer.name):
            self.check = CHECK.fit(prepared[CHECK.name], contrasts)
            if are_cut or not with_scores:
                self.fitted = self.scorer.fit(features)
        if with_scores:
            get_scores = partial(self._tile_scores, ends=ends) if are_cut else partial(self._cross_fit, chosen=chosen)
            self.loo_scores = get_scores(support, features)._replace(names=tuple(support.names))

    def _cross_fit(self, support: Support, features: Prepared, chosen: list[int]) -> NormalScores:
        """Fits to the features of the images `chosen`, which are not cut; returns the scores of all images.

        Each image is scored by a fit without it; those that are not among the fitted ones are further normal images.
        """
        self.fitted, distances = self.scorer.cross_fit(features, self.clock, scored_views(self.scorer))
        scores = left_out_scores(self.scorer, distances, self.size, self.inside_views)
        others = [number for number in range(len(support.squares)) if number not in set(chosen)]
        if not others:
            return scores
        progress = ProgressBar("further support images", [support.squares[number] for number in others])
        further = self._as_normal(self.reduced_results(progress, self.fitted), scored_views(self.scorer) > 1)
        order = np.argsort([*chosen, *others])
        return scores._replace(
            scores=np.concatenate([scores.scores, further.scores])[order],
            maps=np.concatenate([scores.maps, further.maps])[order],
        )

    def _tile_scores(self, support: Support, features: Prepared, ends: np.ndarray) -> NormalScores:
        """The leave-one-out scores of images that are cut, whose tiles end at `ends`.

        Each image is left out with all its tiles. There are no scores of views: the score of an image is the maximum
        over all its tiles, and the views of all tiles would take 22 times as long.
        """
        results = []
        for image, start, end in zip(support.images, [0, *ends], ends, strict=False):
            with self.clock(self.scorer.name):
                fitted = self.scorer.refit(self.fitted, without_images(features, int(start), int(end)))
            results += self.reduced_results([image], fitted)
        return self._as_normal(results, with_views=False)._replace(is_loo=True)

    def _representatives(self, squares: list[torch.Tensor]) -> list[int]:
        """The support images to which the detector is fitted, by number."""
        if len(squares) <= MOST_FITTED:
            return list(range(len(squares)))
        store, size = FeatureStore([CHECK], len(squares)), self.pass_images
        for start in ProgressBar("choosing support images", range(0, len(squares), size), unit="batches"):
            with self.clock("network"):
                store.write(start, self.fast_network.features(self.on_device(squares[start : start + size])))
        return representatives(CHECK.statistics(store.prepared[CHECK.name]), MOST_FITTED)

    def _tile_features(
        self, support: Support, layouts: list[Layout | None]
    ) -> tuple[dict[str, Prepared], torch.Tensor, np.ndarray]:
        """Features and contrasts of the tiles of the support images, and where the tiles of each image end.

        Tiles have no views: many tiles as they are show more than the views of a few.
        """
        chosen = fitting_corners(layouts)
        ends = np.cumsum([max(1, len(corners)) for corners in chosen])
        store, contrasts, number = FeatureStore([self.scorer, CHECK], int(ends[-1])), [], 0
        for image, square, layout, corners in zip(support.images, support.squares, layouts, chosen, strict=True):
            if layout:
                groups = layout.cut_groups(as_pixels(image, self.size, self.bits), corners, self.pass_images)
            for _, tiles in groups if layout else [(None, square[None])]:
                inputs = self.on_device(tiles)
                with self.clock("network"):
                    store.write(number, self.fast_network.features(inputs))
                contrasts.append(contrast(inputs))
                number += len(inputs)
        return store.prepared, torch.cat(contrasts), ends

    def _view_features(self, squares: list[torch.Tensor]) -> tuple[dict[str, Prepared], torch.Tensor]:
        """The features of all views of support images, and the contrasts of the images."""
        store = FeatureStore([self.scorer, CHECK], len(squares), with_views=True)
        views = VIEWS_PER_IMAGE if self.clock.device.type == "cpu" else self.pass_images  # per network pass
        group = max(1, views // VIEWS_PER_IMAGE)
        for start in ProgressBar("support views", range(0, len(squares), group), unit="batches"):
            batch = squares[start : start + group]
            with self.clock("network"):
                numbers = range(start, start + len(batch))
                write_support_images(store, numbers, self.fast_network, self.on_device(batch), views)
        return store.prepared, contrast(self.on_device(squares))

    @property
    def normal_scores(self) -> NormalScores | None:
        """The scores that `calibrate` used: of further normal images if it was given any, else leave-one-out."""
        return self.calibration or self.loo_scores

    @property
    def duplicates(self) -> list[str]:
        """Sentences on the images that `fit` and `calibrate` ignored, because they are duplicates of others."""
        return [*self._support_notes, *self._calibration_notes]

    @property
    def warnings(self) -> list[str]:
        """Warnings about the normal images and the threshold, as sentences."""
        return [*self.duplicates, *(self.threshold.warnings if self.threshold else ())]

    def calibrate(
        self,
        false_positive_rate: float,
        normal: Sequence[ImageInput] | None = None,
        review_rate: float | None = None,
        force: bool = False,
    ) -> Threshold:
        """Sets the two thresholds, see inspection/threshold.py.

        The rates are the shares of normal images that should score above the threshold, and above the lower threshold
        of those that a person should look at (None: `inspection.threshold.REVIEW_RATE`). The thresholds are computed
        from the scores of the images `normal`, or from `loo_scores` if none are given. Images `normal` also widen the
        limits of quality. force: accept images that differ from the support as a whole.

        Raises:
            UserError: the detector is not fitted, fewer than two normal scores, without duplicates, or rates that are
                impossible.
            OtherPartError: images `normal` differ from the support as a whole.
        """
        self._require_fitted()
        normal = None if normal is None else image_list(normal)
        check_calibration(2 if normal is None else len(normal), false_positive_rate, review_rate)
        squares, notes = [], []
        if normal is not None:
            seen, squares, notes = self._normal_scores(normal, false_positive_rate, force)
            source = f"{len(seen.scores)} further normal images"
        elif self.loo_scores is not None:
            seen, source = self.loo_scores, f"leave-one-out over {len(self.loo_scores.scores)} support images"
        else:
            raise UserError(
                "a threshold needs the scores of two normal images that differ: give two support images or more, "
                "further normal images, or set the threshold",
                options=("calibrate", "threshold"),
            )
        threshold = normal_threshold(seen, false_positive_rate, self.scorer.prior, source, review_rate)
        if self.threshold is not None and not seen.maps.size:  # of a file, without the maps that `region` comes from
            threshold = threshold._replace(region=self.threshold.region)
        # all at once: an error before leaves the detector as it was
        self.threshold, self.calibration, self._calibration_notes = threshold, seen if squares else None, notes
        self.gate = self.gate and self.gate.with_further(squares)
        return threshold

    def set_threshold(self, value: float, how: str = "given") -> Threshold:
        """Sets the threshold to a value. What is known of normal scores stays, with the lower threshold from them."""
        self.threshold = given_threshold(value, self.threshold, how)
        return self.threshold

    def _normal_scores(
        self, images: Sequence[ImageInput], rate: float, force: bool
    ) -> tuple[NormalScores, list[torch.Tensor], list[str]]:
        """Scores and score maps of normal images, their network inputs, and sentences on those that are ignored.

        The scores include the views if the threshold rule needs them. Duplicates of each other and of support images
        are ignored.
        """
        results, names = self.reduced_results(images, self.fitted), image_names(images)
        _check_finite([result.score for result in results])
        duplicates = equal_images([result.square for result in results], self.support_digests)
        kept = [number for number in range(len(results)) if number not in duplicates]
        if not force:
            counted = (None if number in duplicates else result for number, result in enumerate(results))
            require_this_part("normal images", names, counted, "calibrate")
        if len(kept) < 2:
            raise UserError(
                f"of {len(images)} normal images, {len(duplicates)} are duplicates of each other or of support images; "
                "a threshold needs two others",
                options=("calibrate", "threshold"),
            )
        are_cut = any(result.is_cut for result in results)
        results = [results[number] for number in kept]
        with_views = self.scorer.prior is None and not are_cut and not is_order_statistic(len(kept), rate)
        scores = self._as_normal(results, with_views)._replace(names=tuple(names[number] for number in kept))
        return scores, [result.square for result in results], duplicate_notes(names, duplicates)

    def _as_normal(self, results: Sequence[ImageResult], with_views: bool) -> NormalScores:
        """The scores of results as those of normal images, in all views of the scorer if asked."""
        if with_views:
            views = (support_views(self.on_device([result.square]))[list(self.scorer.views)] for result in results)
            scores = [self.score_squares(of_image, self.fitted, self.inside_views)[0] for of_image in views]
        else:
            scores = [[result.score] for result in results]
        return NormalScores(np.array(scores), np.stack([result.map for result in results]), is_loo=False)

    def score(self, images: Sequence[ImageInput]) -> tuple[np.ndarray, np.ndarray | list[np.ndarray]]:
        """Image scores (B,) and score maps (B, S, S), float32, at least 0.

        S is the side of the network's input in pixels. If an image is cut into tiles, the maps are a list; the map of
        such an image is larger, S x S per tile. `restore` resizes a map to its image.

        Raises:
            UserError: the detector is not fitted, or a score is not finite.
            ImageError: a file cannot be read.
            TypeError: a single image instead of a list, or an array of another type or shape.
        """
        return self.inspect(images)[:2]

    def inspect(self, images: Sequence[ImageInput | Decoded]) -> Inspection:
        """Scores and maps as `score` returns them, and why a person should look at an image whatever its score.

        Raises:
            As `score`.
        """
        self._require_fitted()
        scores, maps, reasons, quality = [], [], [], []
        for result in self.results(image_list(images), self.fitted):
            measured = measure(result.square)
            scores.append(result.score)
            maps.append(result.map)
            reasons.append(result.reason or (self.gate.reason(measured) if self.gate else ""))
            quality.append(readable(measured))
        _check_finite(scores)
        if all(scored.shape == (self.size, self.size) for scored in maps):
            maps = np.stack(maps) if maps else np.empty((0, self.size, self.size), np.float32)
        return Inspection(np.array(scores, np.float32), maps, reasons, quality)

    def doubts(self, image: Image.Image, square: torch.Tensor | None, name: Path | str) -> str | None:
        """Why the score of a decoded image may mislead, as sentences; None if nothing is known.

        square: its network input (3, S, S), to find out whether it is a support image; None: that is not said.
        """
        notes, has_alpha = [reading_note(image, name, self.bits)], TRANSPARENT in image.info
        if self.support_alpha not in (None, has_alpha):
            lacks = f"{name} has no transparent parts, as support images have, and may not be comparable with them"
            notes.append("the support images have none" if has_alpha else lacks)
        if square is not None and digest(square) in self.support_digests:
            notes.append(f"{name} has the same pixels as a support image, against which it is scored")
        return "; ".join(filter(None, notes)) or None

    def _require_fitted(self) -> None:
        if not self.fitted:
            raise UserError("the detector must be fitted to support images, or loaded, before it can score images")

    def identity(self) -> str:
        """A short hash of all that scores and maps depend on; see `inspection.detector_file.identity`."""
        return identity(self._scoring_state())

    def decision_identity(self) -> str:
        """A short hash of all that decisions depend on: `identity`, thresholds, limits of quality, smallest defect."""
        threshold = self.threshold and [self.threshold.value, self.threshold.review_value]
        limits = self.gate and [self.gate.mean.tolist(), self.gate.margins.tolist()]
        content = json.dumps([self.identity(), threshold, limits, self.min_area])
        return hashlib.sha256(content.encode()).hexdigest()[:ID_LENGTH]

    def state(self) -> dict:
        """Tensors and plain values, from which `from_state` makes the same detector.

        Raises:
            UserError: the detector is not fitted, or no file could say how to build its network.
        """
        if not self.fitted:
            raise UserError("only a fitted detector can be saved")
        if not hasattr(self.network, "backbone"):
            raise UserError(
                "a detector with a custom network cannot be saved: its file does not contain the network's code"
            )
        loo, calibration = self.loo_scores, self.calibration
        if loo and len(loo.scores) > MOST_FITTED:
            loo = loo.without_maps()
        return self._scoring_state() | {
            **{name: getattr(self, name) for name in STORED},
            "threshold": self.threshold and self.threshold._asdict(),
            "quality": self.gate and self.gate.state(),
            "left_out": loo and loo.state(),
            "calibration": calibration and calibration.without_maps().state(),
        }

    def _scoring_state(self) -> dict:
        """The part of the state on which scores, score maps and reasons depend."""
        tensors = {"network": self.network.state_dict(), "fitted": self.fitted, "likeness": self.check}
        return {
            "backbone": getattr(self.network, "backbone", None),
            "stn_mode": getattr(self.network, "stn_mode", None),
            "img_size": self.size,
            "keep_aspect": self.keep_aspect,
            "bits": self.bits,
            "tile": self.tile,
            "tiling": None if self.tiling is None else tuple(self.tiling),
            "region": None if self.region is None else torch.from_numpy(self.region),
            "scorer": self.scorer.name,
        } | {name: {key: value.cpu() for key, value in part.items()} for name, part in tensors.items()}

    @classmethod
    def from_state(
        cls, state: Mapping, device: str = "auto", scorer: str | Scorer | None = None, bits: int | None = None
    ) -> FewShotDetector:
        """The detector of a state. scorer: required for a custom one. bits: another bit depth of later images."""
        region = state.get("region")  # of bits, tiles and region, older files do not store all
        detector = cls(
            stored_network(state),
            device,
            state["keep_aspect"],
            stored_scorer(state, scorer),
            bits or state.get("bits", FULL_BITS),
            state.get("tile", OFF),
            None if region is None else region.numpy(),
        )
        vars(detector).update({name: copy(state[name]) for name in STORED if name in state})
        tiling, threshold, quality = state.get("tiling"), state["threshold"], state.get("quality")
        detector.tiling = tiling and Tiling(*tiling)
        detector.threshold = threshold and Threshold.from_state(threshold)
        detector.gate = quality and QualityGate.from_state(quality)
        loo_scores, calibration = state.get("left_out"), state.get("calibration")
        detector.loo_scores = loo_scores and NormalScores.from_state(loo_scores)
        detector.calibration = calibration and NormalScores.from_state(calibration)
        on = detector.clock.device
        detector.fitted = {key: value.to(on) for key, value in state["fitted"].items()}
        if isinstance(detector.scorer, Gaussian):
            detector.fitted = convert_fitted_369ac53(detector.fitted)
        detector.check = {key: value.to(on) for key, value in state.get("likeness", {}).items()}
        return detector

    def save(self, path: Path | str) -> None:
        """Writes `state` to one file; UserError as `state`, WriteError if the file cannot be written."""
        save_tensors(Path(path), HEADER | self.state())

    @classmethod
    def load(
        cls, path: Path | str, device: str = "auto", scorer: str | Scorer | None = None, bits: int | None = None
    ) -> FewShotDetector:
        """Loads a detector that `save` wrote, without its support images; see `from_state`.

        scorer: required for a custom scorer, as the file contains no code.

        Raises:
            UserError: the file is missing, damaged or not a detector, or was made with another scorer.
        """
        state = read_state(Path(path))
        try:
            detector = cls.from_state(state, device, scorer, bits)
            detector.inspect([Image.new("L", (detector.size, detector.size))])  # do its tensors fit each other?
            return detector
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if lack_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"detector {path} is incomplete or inconsistent ({reason})") from error


def _check_finite(scores: Sequence[float]) -> None:
    if not np.isfinite(scores).all():
        raise UserError("scores are not finite: the checkpoint or a support image contains NaN or infinity")
