"""The few-shot detector: fitted once on support images, then computes scores and score maps of any images."""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from datasets.images import (
    ClippedWarning,
    clipping_note,
    decode_image,
    eight_bit,
    largest_values,
    restore_map,
    smallest_depth,
    to_square,
)
from inspection.region import inside_map, inside_square, inside_views, pixels
from inspection.threshold import (
    NormalScores,
    Threshold,
    check_calibration,
    is_order_statistic,
    leave_one_out,
    normal_threshold,
)
from inspection.tiles import AUTO, OFF, Layout, Tile, Tiling, fitting_corners, joined_map, settle_tiling
from models.stn import RELEASE_BACKBONE, STNResNet, folded
from models.timm_features import PREFIX, TimmFeatures
from scorers.base import Fitted, Prepared, Scorer
from scorers.features import FeatureStore, take_images, without_images, write_support_image
from scorers.maps import score_maps_at
from scorers.neighbours import Neighbours
from scorers.registry import RELEASE_SCORER, SCORERS, make_scorer
from scorers.views import VIEWS_PER_IMAGE, support_views
from utils.devices import resolve_device
from utils.errors import UserError
from utils.files import load_tensors, whole_file
from utils.flags import AUTO_BITS, BIT_DEPTHS, FULL_BITS
from utils.stages import StageClock

NETWORK_GROUP = {"cpu": 4, "cuda": 16}  # images per network pass; fastest on two cores
SCORE_GROUP = 32  # images whose features are in memory at the same time
DEFAULT_SCORER = Neighbours.name  # benchmarks/scorers.py compares it with the Gaussian
ID_LENGTH = 12  # hexadecimal digits of a detector's hash
FILE_FORMAT, FILE_VERSION = "RegAD detector", 3
READABLE_VERSIONS = (2, FILE_VERSION)

ImageInput = Path | str | Image.Image | np.ndarray | torch.Tensor


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
    `for_threshold=False`. origin: plain values that describe the support images and the weights. clock: seconds per
    stage.
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
        self.origin: dict = {}
        self.fitted: Fitted = {}
        self._folded = folded(self.network)

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
        with self.clock("decode"):
            if self.measures_bits:
                self.bits = smallest_depth(largest_values(_files_and_pil(images)))
            inputs, sizes = [], []
            for image in map(self._decoded, images):
                inputs.append(self._square(image))
                sizes.append(image.size if isinstance(image, Image.Image) else (self.size, self.size))
        if not inputs:
            raise UserError("no support images: at least one normal image is needed")
        self.tiling = settle_tiling(self.tile, sizes, self.size, self.keep_aspect)
        layouts = [self.tiling and self.tiling.layout(*size, self.size) for size in sizes]
        chosen = fitting_corners(layouts, len(self.scorer.views))
        ends = np.cumsum([max(1, len(corners)) for corners in chosen])
        store, number = FeatureStore([self.scorer], int(ends[-1]), with_views=True), 0
        for image, square, layout, corners in zip(images, inputs, layouts, chosen, strict=True):
            for part in self._cut(image, layout, corners) if layout else [square]:
                with self.clock("network"):
                    write_support_image(store, number, self._folded, part.to(self.clock.device), VIEWS_PER_IMAGE)
                number += 1
        support = store.prepared[self.scorer.name]
        with self.clock(self.scorer.name):
            self.fitted = self.scorer.fit(support)
        self.threshold, self.left_out = None, None
        if for_threshold and len(inputs) > 1:
            if any(layouts):
                self.left_out = self._leave_one_out(images, support, ends * len(self.scorer.views))
            else:
                self.left_out = leave_one_out(self.scorer, support, self.size, self.clock, self._inside_views)
        return self

    def _cut(self, image: ImageInput, layout: Layout, corners: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """The tiles (3, S, S) of an image at `corners`."""
        with self.clock("decode"):
            decoded = self._decoded(image)
        for corner in corners:
            with self.clock("decode"):
                tile = layout.cut(decoded, *corner)
            yield tile

    def _leave_one_out(self, images: Sequence[ImageInput], support: Prepared, ends: np.ndarray) -> NormalScores:
        """Leave-one-out scores of support images that are cut: each is left out with all its tiles.

        There are no scores of views: the score of an image is the maximum over all its tiles, and the views of all
        tiles would take 22 times as long. ends: where the rows of each image end in `support`.
        """
        scores, kept = [], []
        for image, start, end in zip(images, [0, *ends], ends, strict=False):
            with self.clock(self.scorer.name):
                fitted = self.scorer.fit(without_images(support, int(start), int(end)))
            score, maps, _ = self._score_group([image], fitted, only_pixels=True)
            scores.append(score)
            kept.append(maps)
        return NormalScores(np.array(scores), np.concatenate(kept))

    def calibrate(self, false_alarm: float, normal: Sequence[ImageInput] | None = None) -> Threshold:
        """Sets the threshold for a false-positive rate of `false_alarm`, see inspection/threshold.py.

        The rate is the share of normal images that should score above the threshold. The threshold is computed from
        the scores of the images `normal`, or from `left_out` if none are given.

        Raises:
            UserError: fewer than two normal scores, or a rate outside (0, 1).
        """
        if normal is not None:
            check_calibration(len(normal), false_alarm)
            seen, source = self._normal_scores(normal, false_alarm), f"{len(normal)} further normal images"
        elif self.left_out is not None:
            seen, source = self.left_out, f"leave-one-out over {len(self.left_out.scores)} support images"
        else:
            raise UserError(
                "a threshold needs the scores of two normal images: give two support images or more, "
                "further normal images (--calibrate DIR), or the threshold itself (--threshold)"
            )
        self.threshold = normal_threshold(seen.scores, seen.maps, false_alarm, source)
        self.calibration = None if normal is None else seen
        return self.threshold

    def _normal_scores(self, images: Sequence[ImageInput], false_alarm: float) -> NormalScores:
        """Scores and score maps of normal images; the scores include the views if the threshold rule needs them."""
        groups = (images[at : at + SCORE_GROUP] for at in range(0, len(images), SCORE_GROUP))
        parts = (self._score_group(group, self.fitted, only_pixels=True) for group in groups)
        scores, maps, are_cut = (np.concatenate(part) for part in zip(*parts, strict=True))
        _check_finite(scores)
        if is_order_statistic(len(images), false_alarm) or are_cut.any():
            return NormalScores(scores[:, None], maps)
        views = (support_views(self.inputs([image]))[list(self.scorer.views)] for image in images)
        of_views = (self._score_squares(of_image, self.fitted, self._inside_views) for of_image in views)
        return NormalScores(np.array([of_image for of_image, _ in of_views]), maps)

    def score(self, images: Sequence[ImageInput]) -> tuple[np.ndarray, np.ndarray | list[np.ndarray]]:
        """Image scores (B,) and score maps (B, S, S), float32, at least 0.

        S is the side of the network's input in pixels. If an image is cut into tiles, the maps are a list; the map of
        such an image is larger, S x S per tile. `restore` resizes a map to its image.

        Raises:
            UserError: the detector is not fitted, or a score is not finite.
            ImageError: a file cannot be read.
            TypeError: a single image instead of a list, or an array of another type or shape.
        """
        if isinstance(images, str | Path | Image.Image):
            raise TypeError("give a list of images, not a single one")
        if not self.fitted:
            raise UserError("the detector must be fitted on support images, or loaded, before it can score images")
        if not len(images):
            return np.empty(0, np.float32), np.empty((0, self.size, self.size), np.float32)
        groups = (images[at : at + SCORE_GROUP] for at in range(0, len(images), SCORE_GROUP))
        scores, maps, are_cut = zip(*(self._score_group(group, self.fitted) for group in groups), strict=True)
        _check_finite(np.concatenate(scores))
        joined = [one for part in maps for one in part] if np.concatenate(are_cut).any() else np.concatenate(maps)
        return np.concatenate(scores), joined

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

    def _score_group(
        self, images: Sequence[ImageInput], fitted: Fitted, only_pixels: bool = False
    ) -> tuple[np.ndarray, np.ndarray | list[np.ndarray], list[bool]]:
        """Scores, maps and whether they are cut, of at most SCORE_GROUP images.

        only_pixels: `inspection.region.pixels` of each map instead, (B, S, S).
        """
        squares, cut = [], {}
        for number, image in enumerate(images):
            with self.clock("decode"):
                decoded = self._decoded(image)
                layout = None if isinstance(decoded, torch.Tensor) else self.layout_of(*decoded.size)
                if layout is None:
                    squares.append(self._square(decoded))
            if layout is not None:
                scores = self._score_tiles(decoded, layout, fitted)
                inside = inside_map(self.region, layout.across, layout.down)
                cut[number] = scores.max(), pixels(scores, inside, self.size) if only_pixels else scores
        if squares:
            scores, maps = self._score_squares(torch.stack(squares).to(self.clock.device), fitted, self._inside)
            if only_pixels and self.region is not None:
                maps = np.stack([pixels(one, self._inside.cpu().numpy(), self.size) for one in maps])
        if not cut:
            return scores, maps, [False] * len(images)
        whole = zip(scores, maps, strict=True) if squares else iter(())
        rows = [cut[number] if number in cut else next(whole) for number in range(len(images))]
        return np.array([row[0] for row in rows]), [row[1] for row in rows], [n in cut for n in range(len(images))]

    def _score_tiles(self, image: Image.Image, layout: Layout, fitted: Fitted) -> np.ndarray:
        """The score map of an image that is cut; 0 outside the region."""

        def maps_of(tiles: torch.Tensor) -> np.ndarray:
            return self._score_squares(tiles.to(self.clock.device), fitted, None)[1]

        scores = joined_map(image, layout, maps_of, SCORE_GROUP)
        inside = inside_map(self.region, layout.across, layout.down)
        return scores if inside is None else scores * inside

    def _score_squares(
        self, inputs: torch.Tensor, fitted: Fitted, inside: torch.Tensor | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B,) and maps (B, S, S) of network inputs (B, 3, S, S); 0 where `inside`, (S, S) or (B, S, S), is."""
        with self.clock("network"):
            features = self.features(inputs)
        with self.clock("distance"):
            distances = self.scorer.distance_maps(fitted, features)
        with self.clock("smoothing"):
            scores, maps = score_maps_at(distances, self.size, inside)
            return scores.cpu().numpy(), maps.cpu().numpy()

    @property
    def _inside(self) -> torch.Tensor | None:
        """The region in the network's input, (S, S) bool."""
        if self.region is None:
            return None
        return torch.from_numpy(inside_square(self.region, self.size, self.keep_aspect)).to(self.clock.device)

    @property
    def _inside_views(self) -> torch.Tensor | None:
        """The region in each support view that the scorer uses, (views, S, S) bool."""
        return None if self.region is None else inside_views(self._inside, self.scorer.views)

    def features(self, inputs: torch.Tensor) -> Prepared:
        """The scorer's prepared features of inputs (B, 3, S, S) in [0, 1].

        On the CPU, grey and colour images are processed separately: a pass of grey images alone takes less time.
        """
        size, store = (
            NETWORK_GROUP.get(inputs.device.type, NETWORK_GROUP["cuda"]),
            FeatureStore([self.scorer], len(inputs)),
        )
        kinds, done = _grey_and_coloured(inputs), 0
        for group in (group for kind in kinds for group in kind.split(size)):
            store.write(done, self._folded.features(inputs[group]))
            done += len(group)
        prepared = store.prepared[self.scorer.name]
        return prepared if len(kinds) == 1 else take_images(prepared, torch.cat(kinds).argsort())

    def inputs(self, images: Sequence[ImageInput]) -> torch.Tensor:
        """Converts images to network inputs (B, 3, S, S), float32 in [0, 1], on the device."""
        inputs = [self._square(self._decoded(image)) for image in images]
        return torch.stack(inputs).to(self.clock.device) if inputs else torch.empty(0)

    def _decoded(self, image: ImageInput) -> Image.Image | torch.Tensor:
        return decoded_input(image, self.size, self.bits)

    def _square(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        return image if isinstance(image, torch.Tensor) else as_tensor(to_square(image, self.size, self.keep_aspect))

    def save(self, path: Path | str) -> None:
        """Writes network, fitted tensors, preprocessing and threshold to one file of tensors and plain values.

        Raises:
            UserError: the detector is not fitted, or the file cannot be written.
        """
        if not self.fitted:
            raise UserError("only a fitted detector can be saved")
        if not hasattr(self.network, "backbone"):
            raise UserError("a detector with a network of your own cannot be saved: no file could say how to build it")
        content = {
            "format": FILE_FORMAT,
            "version": FILE_VERSION,
            **self._what_decides_scores(),
            "left_out": None if self.left_out is None else [torch.from_numpy(part) for part in self.left_out],
            "threshold": None if self.threshold is None else tuple(self.threshold),
            "origin": self.origin,
        }
        try:
            with whole_file(Path(path)) as aside, open(aside, "wb") as stream:
                torch.save(content, stream)
        except OSError as error:
            raise UserError(f"cannot write the detector {path}: {error.strerror}") from error

    def _what_decides_scores(self) -> dict:
        """The entries of a saved detector on which scores and score maps depend: tensors and plain values."""
        return {
            "network": {name: value.cpu() for name, value in self.network.state_dict().items()},
            "backbone": getattr(self.network, "backbone", None),
            "stn_mode": getattr(self.network, "stn_mode", None),
            "img_size": self.size,
            "keep_aspect": self.keep_aspect,
            "bits": self.bits,
            "tile": self.tile,
            "tiling": None if self.tiling is None else tuple(self.tiling),
            "region": None if self.region is None else torch.from_numpy(self.region),
            "scorer": self.scorer.name,
            "fitted": {name: value.cpu() for name, value in self.fitted.items()},
        }

    def identity(self) -> str:
        """A short hash of all that scores depend on. It reads every tensor; a saved detector keeps it.

        The threshold, the leave-one-out scores and the origin do not count.
        """
        content, hashed = self._what_decides_scores(), hashlib.sha256()
        tensors = {
            f"{part} {name}": value for part in ("network", "fitted") for name, value in content.pop(part).items()
        }
        tensors |= {"region": content.pop("region")} if self.region is not None else {}
        for name, value in sorted(tensors.items()):
            hashed.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            hashed.update(value.contiguous().flatten().view(torch.uint8).numpy())
        hashed.update(json.dumps(content, sort_keys=True).encode())
        return hashed.hexdigest()[:ID_LENGTH]

    @classmethod
    def load(cls, path: Path | str, device: str = "auto", scorer: str | Scorer | None = None) -> FewShotDetector:
        """Loads a detector that `save` wrote, without its support images.

        scorer: required for a custom scorer, as the file contains no code.

        Raises:
            UserError: the file is missing, damaged or not a detector, or was made with another scorer.
        """
        content = _read_content(Path(path))
        try:
            if content["version"] == 2:
                content = _from_version_2(content)
            chosen = _scorer_of(Path(path), content["scorer"], scorer)
            network = _empty_network(content)
            network.load_state_dict(content["network"])
            bits = content.get("bits", FULL_BITS)  # older files do not store it
            tile, tiling, region = content.get("tile", OFF), content.get("tiling"), content.get("region")
            region = None if region is None else region.numpy()
            detector = cls(network.eval(), device, content["keep_aspect"], chosen, bits, tile, region)
            detector.tiling = None if tiling is None else Tiling(*tiling)
            detector.fitted = {name: value.to(detector.clock.device) for name, value in content["fitted"].items()}
            left_out, threshold = content["left_out"], content["threshold"]
            detector.left_out = None if left_out is None else NormalScores(*(part.numpy() for part in left_out))
            detector.threshold = None if threshold is None else Threshold(*threshold)
            detector.origin = dict(content["origin"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"detector {path} is incomplete or inconsistent ({type(error).__name__}: {reason})"
            ) from error
        return detector


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


def _check_finite(scores: np.ndarray) -> None:
    if not np.isfinite(scores).all():
        raise UserError("scores are not finite: the checkpoint or a support image contains NaN or infinity")


def _files_and_pil(images: Sequence[ImageInput]) -> list[Path | Image.Image]:
    """The images that may have 16 bits: files and PIL images."""
    kept = [image for image in images if isinstance(image, str | Path | Image.Image)]
    return [Path(image) if isinstance(image, str) else image for image in kept]


def _grey_and_coloured(inputs: torch.Tensor) -> list[torch.Tensor]:
    """Groups of image indices for the network: grey and colour images on the CPU, one group on other devices."""
    everything = torch.arange(len(inputs), device=inputs.device)
    if inputs.device.type != "cpu":
        return [everything]
    is_grey = (inputs == inputs[:, :1]).flatten(1).all(dim=1)
    return [kind for kind in (everything[is_grey], everything[~is_grey]) if len(kind)]


def _read_content(path: Path) -> dict:
    """Reads the content of a detector file. Verifies the checksums of the archive, which torch does not do."""
    if not path.is_file():
        raise UserError(f"no detector file {path}; make one with: python predict.py --support ... --save {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile:
        damaged = path.name
    if damaged:
        raise UserError(f"detector {path} is damaged or not a detector (checksum of {damaged})")
    content = load_tensors(path, "detector")
    if not isinstance(content, dict) or content.get("format") != FILE_FORMAT:
        raise UserError(f"{path} is not a detector (a checkpoint or support set?); predict.py --save writes one")
    if content.get("version") not in READABLE_VERSIONS:
        raise UserError(f"detector {path} has version {content.get('version')}, this program supports {FILE_VERSION}")
    return content


def _empty_network(content: dict) -> nn.Module:
    """The network of a saved detector, without its weights."""
    backbone, size = content.get("backbone", RELEASE_BACKBONE), content["img_size"]  # older files do not store it
    if backbone.startswith(PREFIX):
        return TimmFeatures(backbone.removeprefix(PREFIX), "none", size)
    return STNResNet(content["stn_mode"], size, backbone)


def _scorer_of(path: Path, name: str, given: str | Scorer | None) -> Scorer:
    """The scorer of a saved detector: the registered one, or the given one, whose name must match."""
    if given is None:
        if name not in SCORERS:
            raise UserError(f"detector {path} was made with the scorer {name}; give --scorer FILE.py:CLASS")
        return make_scorer(name)
    scorer = make_scorer(given) if isinstance(given, str) else given
    if scorer.name != name:
        raise UserError(f"detector {path} was made with the scorer {name}, not {scorer.name}; fit a new detector")
    return scorer


def _from_version_2(content: dict) -> dict:
    """Converts the content of a version 2 file, which stored the Gaussian statistics in parts by position."""
    parts = content["statistics"]
    fitted = {}
    for name, value in parts[0].items():
        if isinstance(value, list):
            stem = name.rstrip("s")
            fitted |= {f"{stem}{n}": torch.cat([part[name][n] for part in parts]) for n in range(len(value))}
        elif value is not None:
            fitted[name] = torch.cat([part[name] for part in parts])
    return {**content, "scorer": RELEASE_SCORER, "fitted": fitted}
