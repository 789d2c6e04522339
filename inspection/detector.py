"""The few-shot detector: fitted once on support images, then computes scores and score maps of any images."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from datasets.images import (
    AUTO_BITS,
    BIT_DEPTHS,
    FULL_BITS,
    ClippedWarning,
    clipping_note,
    decode_image,
    eight_bit,
    largest_values,
    restore_map,
    smallest_depth,
    to_square,
)
from inspection.detector_file import identity, read_detector, write_detector
from inspection.region import inside_map, inside_square, inside_views, pixels
from inspection.threshold import (
    NormalScores,
    Threshold,
    check_calibration,
    check_rate,
    leave_one_out,
    needs_views,
    normal_threshold,
)
from inspection.tiles import AUTO, Layout, Tile, fitting_corners, joined_map, settle_tiling
from inspection.unusual import Likeness, contrast
from models.stn import STNResNet, fuse_conv_bn
from scorers.base import Fitted, Prepared, Scorer
from scorers.features import FeatureStore, take_images, without_images, write_support_images
from scorers.maps import score_maps_at
from scorers.neighbours import Neighbours
from scorers.registry import make_scorer
from scorers.views import VIEWS_PER_IMAGE, support_views
from utils.devices import resolve_device, upload
from utils.errors import UserError
from utils.stages import StageClock

NETWORK_GROUP = {"cpu": 4, "cuda": 16}  # images per network pass; fastest on two cores
SUPPORT_GROUP = {"cpu": 1, "cuda": 4}  # support images whose views go through the network together
SCORE_GROUP = 32  # images whose features are in memory at the same time
DEFAULT_SCORER = Neighbours.name  # benchmarks/scorers.py compares it with the Gaussian
THUMBNAIL = 96  # pixels, side of the small copies of normal images
LIKENESS = Likeness()

ImageInput = Path | str | Image.Image | np.ndarray | torch.Tensor


class Inspection(NamedTuple):
    """Results of B images: scores (B,) and maps as `FewShotDetector.score` returns them.

    unusual: why an image is unlike the support as a whole, see inspection/unusual.py; "" for an image that is not. Its
    score means nothing then.
    """

    scores: np.ndarray
    maps: np.ndarray | list[np.ndarray]
    unusual: list[str]


class KnownDefect(NamedTuple):
    """A defective image that is known: its name, its score, and why it is unusual or ""."""

    name: str
    score: float
    unusual: str


class _Scored(NamedTuple):
    """Results of a group of images. kept: features for the comparison with the support as a whole, of uncut images."""

    scores: np.ndarray
    maps: np.ndarray | list[np.ndarray]
    are_cut: list[bool]
    unusual: list[str]
    kept: Prepared


class FewShotDetector:
    """Scores images of a part by their distance to a few normal images of the same part.

    detector = FewShotDetector(untrained("imagenet").stn)  # or load_checkpoint(file, stn_mode, img_size).stn
    detector.fit(["normal_1.png", "normal_2.png"])
    scores, maps = detector.score(["new.png"])

    Images of any size are paths, PIL images, arrays (H, W) or (H, W, 3) uint8, or tensors (3, H, W) uint8 or float in
    [0, 1]. Scores are distances: at least 0, without a unit. The score of an image does not depend on the other images
    of the call.

    scorer: a name in `scorers.registry`, or a Scorer. keep_aspect: pad images by reflection instead of squeezing them
    to a square. bits: the bit depth of 16-bit grey files and PIL images, 8 to 16; "auto": `fit` sets it to the smallest
    that holds the values of the support images. A later image that exceeds it is clipped, with a ClippedWarning.
    tile: how large images are cut: "auto", "off", or the side of a tile in pixels; see inspection/tiles.py. region:
    (H, W) bool, stretched to each image, whose score map is 0 where it is False; None: everywhere is scored.
    tiling: what `fit` made of `tile`; None if no image is cut. threshold: set by `calibrate` or by the caller; None
    until then. left_out: the leave-one-out scores of the support images, None if K is 1 or if `fit` was called with
    `for_threshold=False`. calibration: the scores of further normal images, if `calibrate` was given any. copies:
    sentences on images that were left out of both because they are copies of others. likeness: what tells images
    that are unlike the support as a whole. defects: known defects that a command scored. origin:
    plain values that describe the support images and the weights. clock: seconds per stage.
    """

    def __init__(
        self,
        network: STNResNet,
        device: str = "auto",
        keep_aspect: bool = False,
        scorer: str | Scorer = DEFAULT_SCORER,
        bits: int | str = AUTO_BITS,
        tile: Tile = AUTO,
        region: np.ndarray | None = None,
    ) -> None:
        self.clock = StageClock(resolve_device(device))
        self.network, self.keep_aspect = network.to(self.clock.device), keep_aspect
        self.scorer = make_scorer(scorer) if isinstance(scorer, str) else scorer
        if bits not in (AUTO_BITS, *BIT_DEPTHS):
            raise ValueError(f"bits must be {AUTO_BITS} or one of {BIT_DEPTHS}, got {bits!r}")
        self.measures_bits, self.bits = bits == AUTO_BITS, FULL_BITS if bits == AUTO_BITS else bits
        self.size = network.img_size
        self.tile, self.tiling, self.region = tile, None, region
        self.threshold: Threshold | None = None
        self.left_out: NormalScores | None = None
        self.calibration: NormalScores | None = None
        self.copies: list[str] = []
        self._copies_in_support = 0  # so many of `copies`, which come first; the others are of `calibrate`
        self.defects: list[KnownDefect] = []
        self.origin: dict = {}
        self.fitted: Fitted = {}
        self.likeness: Fitted = {}
        self._fused = fuse_conv_bn(self.network)

    def fit(self, images: Sequence[ImageInput], for_threshold: bool = True) -> FewShotDetector:
        """Fits the detector to K >= 1 normal images.

        for_threshold: also compute the leave-one-out scores that `calibrate` needs.

        Raises:
            UserError: no images are given.
            ImageError: a file cannot be read.
            TypeError: a single image instead of a list, or an array of another type or shape.
        """
        if isinstance(images, str | Path | Image.Image):
            raise TypeError("give a list of images, not a single one")
        self.threshold, self.left_out, self.calibration, self.copies = None, None, None, []
        with self.clock("decode"):
            if self.measures_bits:
                self.bits = smallest_depth(largest_values(_files_and_pil(images)))
            support = self._support(images)
        if not support.names:
            raise UserError("no support images: at least one normal image is needed")
        self.tiling = settle_tiling(self.tile, support.sizes, self.size, self.keep_aspect)
        layouts = [self.layout_of(*size) for size in support.sizes]
        if any(layouts):
            prepared, contrasts, ends = self._tile_features(support, layouts)
        else:
            support, prepared = self._support_features(support)
            contrasts, ends = contrast(torch.stack(support.squares)), None
        self._copies_in_support = len(self.copies)
        features = prepared[self.scorer.name]
        with self.clock(self.scorer.name):
            self.fitted = self.scorer.fit(features)
            self.likeness = LIKENESS.fit(prepared[LIKENESS.name], contrasts.to(self.clock.device))
        if for_threshold and len(support.names) > 1:
            if ends is None:
                left_out = leave_one_out(self.scorer, features, self.size, self.clock, self._inside_views)
            else:
                left_out = self._leave_one_out(support.images, features, ends)
            self.left_out = left_out._replace(names=support.names, thumbnails=_thumbnails(support.squares))
        return self

    def _tile_features(
        self, support: _Support, layouts: list[Layout | None]
    ) -> tuple[dict[str, Prepared], torch.Tensor, np.ndarray]:
        """Features and contrasts of the tiles of the support images, and where the tiles of each image end.

        Tiles have no views: many tiles as they are show more than the views of a few.
        """
        chosen = fitting_corners(layouts)
        ends = np.cumsum([max(1, len(corners)) for corners in chosen])
        store, contrasts, number = FeatureStore([self.scorer, LIKENESS], int(ends[-1])), [], 0
        for image, square, layout, corners in zip(support.images, support.squares, layouts, chosen, strict=True):
            for tiles in self._cut(image, layout, corners) if layout else [square[None]]:
                inputs = upload(tiles, self.clock.device)
                with self.clock("network"):
                    store.write(number, self._fused.features(inputs))
                contrasts.append(contrast(inputs))
                number += len(inputs)
        return store.prepared, torch.cat(contrasts), ends

    def _support(self, images: Sequence[ImageInput]) -> _Support:
        """The decoded support images, without copies."""
        squares, sizes = [], []
        for image in map(self._decoded, images):
            squares.append(self._square(image))
            sizes.append(image.size if isinstance(image, Image.Image) else (self.size, self.size))
        support = _Support(list(images), _names(images), squares, sizes)
        twins = equal_images(squares)
        self._name_copies(support.names, twins, "a copy of")
        return support.keep([n for n in range(len(squares)) if n not in twins])

    def _support_features(self, support: _Support) -> tuple[_Support, dict[str, Prepared]]:
        """The support images without near copies, and the features of all their views."""
        store = FeatureStore([self.scorer, LIKENESS], len(support.names), with_views=True)
        group = SUPPORT_GROUP[self.clock.device.type]
        for start in range(0, len(support.names), group):
            some = support.squares[start : start + group]
            with self.clock("network"):
                inputs, numbers = upload(torch.stack(some), self.clock.device), range(start, start + len(some))
                write_support_images(store, numbers, self._fused, inputs, VIEWS_PER_IMAGE * group)
        return self._without_near_copies(support, dict(store.prepared))

    def _without_near_copies(
        self, support: _Support, prepared: dict[str, Prepared]
    ) -> tuple[_Support, dict[str, Prepared]]:
        """The support images and their features without images that are nearly equal to an earlier one."""
        twins = LIKENESS.twins(prepared[LIKENESS.name])
        if not twins:
            return support, prepared
        self._name_copies(support.names, twins, "nearly a copy of")
        kept = [number for number in range(len(support.names)) if number not in twins]
        for name, views in ((self.scorer.name, len(self.scorer.views)), (LIKENESS.name, len(LIKENESS.views))):
            rows = torch.tensor([number * views + view for number in kept for view in range(views)])
            prepared[name] = take_images(prepared[name], rows)
        return support.keep(kept), prepared

    @property
    def warnings(self) -> list[str]:
        """What is to be known of the normal images and the threshold, as sentences."""
        return [*self.copies, *(self.threshold.warnings if self.threshold else ())]

    def _name_copies(self, names: Sequence[str], twins: dict[int, int], what: str) -> None:
        self.copies += [f"{names[copy]} is {what} {names[of]} and does not count" for copy, of in twins.items()]

    def _cut(self, image: ImageInput, layout: Layout, corners: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """The tiles (n, 3, S, S) of an image at `corners`, a few at a time."""
        with self.clock("decode"):
            decoded = self._decoded(image)
        size = NETWORK_GROUP[self.clock.device.type]
        for start in range(0, len(corners), size):
            with self.clock("decode"):
                tiles = torch.stack([layout.cut(decoded, *corner) for corner in corners[start : start + size]])
            yield tiles

    def _leave_one_out(self, images: Sequence[ImageInput], support: Prepared, ends: np.ndarray) -> NormalScores:
        """Leave-one-out scores of support images that are cut: each is left out with all its tiles.

        There are no scores of views: the score of an image is the maximum over all its tiles, and the views of all
        tiles would take 22 times as long. ends: where the rows of each image end in `support`.
        """
        scores, kept = [], []
        for image, start, end in zip(images, [0, *ends], ends, strict=False):
            with self.clock(self.scorer.name):
                fitted = self.scorer.fit(without_images(support, int(start), int(end)))
            scored = self._score_group([image], fitted, only_pixels=True)
            scores.append(scored.scores)
            kept.append(scored.maps)
        return NormalScores(np.array(scores), np.concatenate(kept), left_out=True)

    def calibrate(self, false_alarm: float, normal: Sequence[ImageInput] | None = None) -> Threshold:
        """Sets the threshold for a false-positive rate of `false_alarm`, see inspection/threshold.py.

        The rate is the share of normal images that should score above the threshold. The threshold is computed from
        the scores of the images `normal`, or from `left_out` if none are given.

        Raises:
            UserError: fewer than two normal scores, copies left out, or a rate outside (0, 1).
        """
        check_rate(false_alarm)
        self.calibration = None
        del self.copies[self._copies_in_support :]
        if normal is not None:
            check_calibration(len(normal), false_alarm)
            seen = self._normal_scores(normal, false_alarm)
            if len(seen.scores) < 2:
                raise UserError(
                    f"of {len(normal)} normal images, {len(normal) - len(seen.scores)} are copies of each other or of "
                    "support images; a threshold needs two others (--calibrate), or give it with --threshold"
                )
            self.calibration = seen
            source = f"{len(seen.scores)} further normal images"
        elif self.left_out is not None:
            seen, source = self.left_out, f"leave-one-out over {len(self.left_out.scores)} support images"
        else:
            raise UserError(
                "a threshold needs the scores of two normal images that differ: give two support images or more, "
                "further normal images (--calibrate DIR), or the threshold itself (--threshold)"
            )
        self.threshold = normal_threshold(seen, false_alarm, self.scorer.typical_score, source)
        return self.threshold

    def _normal_scores(self, images: Sequence[ImageInput], false_alarm: float) -> NormalScores:
        """Scores and score maps of normal images; the scores include the views if the threshold rule needs them.

        Copies of each other and of support images are left out.
        """
        squares, to_score = [], []
        for image in images:
            with self.clock("decode"):
                decoded = self._decoded(image)
                squares.append(self._square(decoded))
            # an image that is cut is decoded again when it is scored: large images are not kept
            to_score.append(image if self._layout_of(decoded) else squares[-1])
        groups = (to_score[at : at + SCORE_GROUP] for at in range(0, len(to_score), SCORE_GROUP))
        parts = [self._score_group(group, self.fitted, only_pixels=True) for group in groups]
        scores, maps, are_cut = (np.concatenate([part[n] for part in parts]) for n in range(3))
        _check_finite(scores)
        seen = NormalScores(scores[:, None], maps, False, _names(images), _thumbnails(squares))
        kept = self._not_copies(seen.names, squares, [part.kept for part in parts], bool(are_cut.any()))
        seen, squares = seen.keep(kept), [square for square, is_kept in zip(squares, kept, strict=True) if is_kept]
        if are_cut.any() or not needs_views(len(seen.scores), false_alarm, self.scorer):
            return seen
        views = (support_views(self._on_device([square]))[list(self.scorer.views)] for square in squares)
        of_views = (self._score_squares(of_image, self.fitted, self._inside_views) for of_image in views)
        return seen._replace(scores=np.array([of_image.scores for of_image in of_views]))

    def _not_copies(
        self, names: Sequence[str], squares: list[torch.Tensor], kept: list[Prepared], are_cut: bool
    ) -> np.ndarray:
        """Which of the calibration images count, (n,) bool; the others are named in `copies`."""
        twins = equal_images(squares)
        self._name_copies(names, twins, "a copy of")
        counts = np.array([number not in twins for number in range(len(names))])
        if not are_cut and self.likeness:
            features = [torch.cat(part) for part in zip(*kept, strict=True)]
            for number, of in enumerate(LIKENESS.copies(self.likeness, features)):
                if of is not None and counts[number]:
                    counts[number] = False
                    self.copies.append(f"{names[number]} is a copy of a support image and does not count")
        return counts

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

    def inspect(self, images: Sequence[ImageInput]) -> Inspection:
        """Scores and maps as `score` returns them, and which images are unlike the support as a whole.

        Raises:
            As `score`.
        """
        if isinstance(images, str | Path | Image.Image):
            raise TypeError("give a list of images, not a single one")
        if not self.fitted:
            raise UserError("the detector must be fitted on support images, or loaded, before it can score images")
        if not len(images):
            return Inspection(np.empty(0, np.float32), np.empty((0, self.size, self.size), np.float32), [])
        groups = (images[at : at + SCORE_GROUP] for at in range(0, len(images), SCORE_GROUP))
        parts = [self._score_group(group, self.fitted) for group in groups]
        scores, maps = np.concatenate([part.scores for part in parts]), [part.maps for part in parts]
        _check_finite(scores)
        are_cut = any(cut for part in parts for cut in part.are_cut)
        joined = [one for part in maps for one in part] if are_cut else np.concatenate(maps)
        return Inspection(scores, joined, [reason for part in parts for reason in part.unusual])

    def layout_of(self, width: int, height: int) -> Layout | None:
        """The tiles into which an image of this size is cut; None if it is scored as a whole."""
        return self.tiling and self.tiling.layout(width, height, self.size)

    @property
    def cuts_support(self) -> bool:
        """Whether the support images were cut, so that the detector is fitted to tiles."""
        return self.tiling is not None and not self.tiling.of_support

    def restore(self, scores: np.ndarray, width: int, height: int) -> np.ndarray:
        """A score map at the size of its image, (height, width) float32; see `datasets.images.restore_map`."""
        return restore_map(scores, width, height, self.keep_aspect and self.layout_of(width, height) is None)

    def _score_group(self, images: Sequence[ImageInput], fitted: Fitted, only_pixels: bool = False) -> _Scored:
        """Results of at most SCORE_GROUP images. only_pixels: `inspection.region.pixels` of each map, (B, S, S)."""
        squares, cut = [], {}
        for number, image in enumerate(images):
            with self.clock("decode"):
                decoded = self._decoded(image)
                layout = self._layout_of(decoded)
                if layout is None:
                    squares.append(self._square(decoded))
            if layout is not None:
                scores, reason = self._score_tiles(decoded, layout, fitted)
                inside = inside_map(self.region, layout.across, layout.down)
                cut[number] = scores.max(), pixels(scores, inside, self.size) if only_pixels else scores, reason
        whole = _Scored(np.empty(0, np.float32), [], [], [], [])
        if squares:
            whole = self._score_squares(self._on_device(squares), fitted, self._inside)
            if only_pixels and self.region is not None:
                inside = inside_square(self.region, self.size, self.keep_aspect)
                whole = whole._replace(maps=np.stack([pixels(one, inside, self.size) for one in whole.maps]))
        if not cut:
            return whole
        rest = zip(whole.scores, whole.maps, whole.unusual, strict=True)
        rows = [cut[number] if number in cut else next(rest) for number in range(len(images))]
        scores, maps, unusual = (list(column) for column in zip(*rows, strict=True))
        return _Scored(np.array(scores), maps, [number in cut for number in range(len(images))], unusual, whole.kept)

    def _score_tiles(self, image: Image.Image, layout: Layout, fitted: Fitted) -> tuple[np.ndarray, str]:
        """The score map of an image that is cut, 0 outside the region, and why the image is unusual.

        It is unusual if most of its tiles are.
        """
        reasons: list[str] = []

        def maps_of(tiles: torch.Tensor) -> np.ndarray:
            scored = self._score_squares(upload(tiles, self.clock.device), fitted, None)
            reasons.extend(scored.unusual)
            return scored.maps

        scores = joined_map(image, layout, maps_of, SCORE_GROUP)
        inside = inside_map(self.region, layout.across, layout.down)
        unusual = [reason for reason in reasons if reason]
        reason = f"most tiles: {unusual[0]}" if 2 * len(unusual) > len(reasons) else ""
        return scores if inside is None else scores * inside, reason

    def _score_squares(self, inputs: torch.Tensor, fitted: Fitted, inside: torch.Tensor | None) -> _Scored:
        """Results of network inputs (B, 3, S, S); maps are 0 where `inside`, (S, S) or (B, S, S), is."""
        with self.clock("network"):
            prepared = self.features(inputs)
        kept = prepared[LIKENESS.name]
        with self.clock("distance"):
            distances = self.scorer.distance_maps(fitted, prepared[self.scorer.name])
            measured = LIKENESS.measure(self.likeness, kept, contrast(inputs)) if self.likeness else None
        with self.clock("smoothing"):
            scores, maps = score_maps_at(distances, self.size, inside)
            columns = [scores[:, None], maps.flatten(1)] + ([] if measured is None else [measured])
            values = torch.cat(columns, dim=1).cpu().numpy()  # one copy: each copy from a device waits for it
        scores, maps = values[:, 0], values[:, 1 : maps[0].numel() + 1].reshape(maps.shape)
        unusual = [""] * len(inputs)
        if measured is not None:
            unusual = LIKENESS.reasons(values[:, -measured.shape[1] :].tolist())
        return _Scored(scores, maps, [False] * len(inputs), unusual, kept)

    @property
    def _inside(self) -> torch.Tensor | None:
        """The region in the network's input, (S, S) bool."""
        if self.region is None:
            return None
        return upload(torch.from_numpy(inside_square(self.region, self.size, self.keep_aspect)), self.clock.device)

    @property
    def _inside_views(self) -> torch.Tensor | None:
        """The region in each support view that the scorer uses, (views, S, S) bool."""
        return None if self.region is None else inside_views(self._inside, self.scorer.views)

    def features(self, inputs: torch.Tensor) -> dict[str, Prepared]:
        """Prepared features of inputs (B, 3, S, S) in [0, 1], for the scorer and for `Likeness`, by name.

        On the CPU, grey and colour images are processed separately: a pass of grey images alone takes less time.
        """
        size = NETWORK_GROUP[inputs.device.type]
        store = FeatureStore([self.scorer, LIKENESS], len(inputs))
        kinds, done = _grey_and_coloured(inputs), 0
        groups = inputs.split(size) if len(kinds) == 1 else (inputs[g] for kind in kinds for g in kind.split(size))
        for group in groups:
            store.write(done, self._fused.features(group))
            done += len(group)
        if len(kinds) == 1:
            return store.prepared
        order = torch.cat(kinds).argsort()
        return {name: take_images(prepared, order) for name, prepared in store.prepared.items()}

    def inputs(self, images: Sequence[ImageInput]) -> torch.Tensor:
        """Converts images to network inputs (B, 3, S, S), float32 in [0, 1], on the device."""
        inputs = [self._square(self._decoded(image)) for image in images]
        return self._on_device(inputs) if inputs else torch.empty(0)

    def _on_device(self, squares: Sequence[torch.Tensor]) -> torch.Tensor:
        return upload(torch.stack(squares), self.clock.device)

    def _decoded(self, image: ImageInput) -> Image.Image | torch.Tensor:
        return decoded_input(image, self.size, self.bits)

    def _layout_of(self, image: Image.Image | torch.Tensor) -> Layout | None:
        """The tiles of a decoded image; a network input has none."""
        return None if isinstance(image, torch.Tensor) else self.layout_of(*image.size)

    def _square(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        return image if isinstance(image, torch.Tensor) else as_tensor(to_square(image, self.size, self.keep_aspect))

    def save(self, path: Path | str) -> None:
        """Writes network, fitted tensors, preprocessing and threshold to one file of tensors and plain values.

        Raises:
            UserError: the detector is not fitted, or the file cannot be written.
        """
        write_detector(self, Path(path))

    def identity(self) -> str:
        """A short hash of all that scores and maps depend on; see `inspection.detector_file.identity`."""
        return identity(self)

    @classmethod
    def load(cls, path: Path | str, device: str = "auto", scorer: str | Scorer | None = None) -> FewShotDetector:
        """Loads a detector that `save` wrote, without its support images.

        scorer: required for a custom scorer, as the file contains no code.

        Raises:
            UserError: the file is missing, damaged or not a detector, or was made with another scorer.
        """
        return read_detector(Path(path), partial(cls, device=device), scorer)


def decoded_input(image: ImageInput, size: int, bits: int = FULL_BITS) -> Image.Image | torch.Tensor:
    """An image of any type that FewShotDetector accepts, in mode L or RGB.

    Float tensors (3, size, size) are network inputs and remain as they are.

    bits: the bit depth of 16-bit grey images; a ClippedWarning names an image that exceeds it.

    Raises:
        ImageError: a file cannot be read.
        TypeError: an array of another type or shape.
    """
    if isinstance(image, torch.Tensor):
        if image.shape == (3, size, size) and image.is_floating_point():
            return image.float()
        values = image if image.dtype == torch.uint8 else (image * 255).round().clamp(0, 255).to(torch.uint8)
        image = values.permute(1, 2, 0).cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise TypeError(f"arrays must be (H, W) or (H, W, 3) uint8, got {image.shape} {image.dtype}")
        image = Image.fromarray(image)
    name = "an image" if isinstance(image, Image.Image) else Path(image)
    image = eight_bit(image, bits) if isinstance(image, Image.Image) else decode_image(name, bits)
    if warning := clipping_note(image, name, bits):
        warnings.warn(warning, ClippedWarning, stacklevel=2)
    return image


def as_tensor(square: np.ndarray) -> torch.Tensor:
    """A square image (S, S, 3) uint8 as network input (3, S, S), float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1))).float() / 255


class _Support(NamedTuple):
    """Support images of a fit: as given, by name, as network inputs, and their sizes (width, height)."""

    images: list[ImageInput]
    names: tuple[str, ...]
    squares: list[torch.Tensor]
    sizes: list[tuple[int, int]]

    def keep(self, numbers: Sequence[int]) -> _Support:
        """The images with these numbers."""
        images, squares, sizes = ([part[n] for n in numbers] for part in (self.images, self.squares, self.sizes))
        return _Support(images, tuple(self.names[n] for n in numbers), squares, sizes)


def equal_images(squares: Sequence[torch.Tensor]) -> dict[int, int]:
    """For each network input that equals an earlier one, the number of the first such."""
    first: dict[str, int] = {}
    found = {}
    for number, square in enumerate(squares):
        earlier = first.setdefault(hashlib.sha256(square.cpu().numpy().tobytes()).hexdigest(), number)
        if earlier != number:
            found[number] = earlier
    return found


def _names(images: Sequence[ImageInput]) -> tuple[str, ...]:
    """The paths of files; other images are numbered from 1."""
    return tuple(str(one) if isinstance(one, str | Path) else f"image {n}" for n, one in enumerate(images, start=1))


def _thumbnails(squares: Sequence[torch.Tensor]) -> np.ndarray:
    """Small copies of network inputs, (n, THUMBNAIL, THUMBNAIL, 3) uint8."""
    small = F.interpolate(torch.stack(list(squares)), size=THUMBNAIL, mode="area")
    return (small * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _check_finite(scores: np.ndarray) -> None:
    if not np.isfinite(scores).all():
        raise UserError("scores are not finite: the checkpoint or a support image contains NaN or infinity")


def _files_and_pil(images: Sequence[ImageInput]) -> list[Path | Image.Image]:
    """The images that may have 16 bits: files and PIL images."""
    kept = [image for image in images if isinstance(image, str | Path | Image.Image)]
    return [Path(image) if isinstance(image, str) else image for image in kept]


def _grey_and_coloured(inputs: torch.Tensor) -> list[torch.Tensor]:
    """Groups of image indices for the network: grey and colour images on the CPU, one group on other devices."""
    everything = torch.arange(len(inputs))
    if inputs.device.type != "cpu":
        return [everything]
    is_grey = (inputs == inputs[:, :1]).flatten(1).all(dim=1)
    return [kind for kind in (everything[is_grey], everything[~is_grey]) if len(kind)]
