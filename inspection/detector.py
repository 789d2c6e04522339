"""The few-shot detector: fitted once on support pictures, then asked for scores and maps of any pictures.

The steps that the evaluation of data sets shares with it come first: support views -> features -> Gaussians ->
distance maps -> score maps. A layer is (P_l, N, C_l), positions in nested order, see scorers/gaussian.py.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from datasets.images import eight_bit, read_picture, to_square
from inspection.threshold import Threshold, check_calibration, is_order_statistic, normal_threshold
from models.stn import FEATURE_STRIDES, STNResNet18, folded
from scorers.gaussian import CHUNK_BYTES, SupportStatistics, chunks, fit, from_nested, nested_layers, squared_distance
from scorers.views import VIEWS_PER_IMAGE, score_map_matrix, support_views
from utils.utils import StageClock, UserError, load_tensors, resolve_device, whole_file

# Pictures per network pass and per distance product. Both are always filled up to this number, so a picture goes
# through the same arithmetic alone as among others. More are quicker each, but then one alone waits longer.
NETWORK_GROUP = {"cpu": 4, "cuda": 16}
DISTANCE_GROUP = 32
FILE_FORMAT, FILE_VERSION = "RegAD detector", 2

Layers = list[torch.Tensor]
Picture = Path | str | Image.Image | np.ndarray | torch.Tensor


class FittedRows(NamedTuple):
    """The Gaussians of some positions: the rows of each layer that they belong to, and their statistics."""

    rows: list[slice]
    statistics: SupportStatistics


def write_views(
    layers: Layers, start: int, count: int, network: STNResNet18, picture: torch.Tensor, batch_size: int
) -> None:
    """Puts the features of a picture's views at columns start..; the grey view of a grey picture is the picture."""
    views = support_views(picture[None])
    is_grey = bool((picture == picture[:1]).all())
    different = views[: len(views) - is_grey]
    for number, batch in enumerate(different.split(batch_size)):
        write_features(layers, start + number * batch_size, count, nested_layers(network.features(batch)))
    if is_grey:
        for layer in layers:
            layer[:, start + len(different)] = layer[:, start]


def write_features(layers: Layers, start: int, count: int, features: Layers) -> None:
    """Puts features (P_l, N, C_l) at columns start.. of `layers`, which are made for `count` pictures on first use."""
    if not layers:
        layers.extend(layer.new_empty(layer.shape[0], count, layer.shape[2]) for layer in features)
    for layer, new in zip(layers, features, strict=True):
        layer[:, start : start + new.shape[1]] = new


def fit_rows(support: Layers, images: int, clock: StageClock) -> Iterator[FittedRows]:
    """The Gaussians of all positions, a chunk of positions at a time, for distances of `images` pictures at once."""
    for rows in chunks(support, images, CHUNK_BYTES[support[0].device.type]):
        with clock("gaussian"):
            statistics = fit([layer[r] for layer, r in zip(support, rows, strict=True)])
        yield FittedRows(rows, statistics)


def distance_maps(fitted: Iterable[FittedRows], test: Layers, clock: StageClock) -> torch.Tensor:
    """Mahalanobis distances (B, H, W) of `test` to the Gaussians, a chunk of positions at a time."""
    squared = test[0].new_empty(test[0].shape[:2])
    for rows, statistics in fitted:
        with clock("distance"):
            squared[rows[0]] = squared_distance(statistics, [layer[r] for layer, r in zip(test, rows, strict=True)])
    return from_nested(squared.sqrt_(), depth=len(test) - 1)


def score_maps(distances: torch.Tensor, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Image scores (B,) and score maps (B, S, S) of distance maps (B, H, W); `matrix` from `score_map_matrix`."""
    maps = matrix @ distances @ matrix.T
    return maps.flatten(1).amax(dim=1), maps  # method: the image's score is the map's maximum


class NormalScores(NamedTuple):
    """What a threshold comes from: scores (n, views) of normal pictures, the first view being the picture itself, and
    score maps (n, S, S) of the pictures themselves.
    """

    scores: np.ndarray
    maps: np.ndarray


def leave_one_out(views: Layers, matrix: torch.Tensor, clock: StageClock) -> NormalScores:
    """Scores of all support `views`, see `write_views`; those of a picture by the Gaussians of the K - 1 others."""
    scores, maps = [], []
    for start in range(0, views[0].shape[1], VIEWS_PER_IMAGE):
        end = start + VIEWS_PER_IMAGE
        others = [torch.cat([layer[:, :start], layer[:, end:]], dim=1) for layer in views]
        distances = distance_maps(
            fit_rows(others, VIEWS_PER_IMAGE, clock), [layer[:, start:end] for layer in views], clock
        )
        of_views, maps_of_views = score_maps(distances, matrix)
        scores.append(of_views.cpu().numpy())
        maps.append(maps_of_views[0].cpu().numpy())
    return NormalScores(np.stack(scores), np.stack(maps))


class FewShotDetector:
    """Scores pictures of a part by their distance to a few normal pictures of it.

    detector = FewShotDetector(untrained("imagenet").stn)  # or load_checkpoint(file, stn_mode, img_size).stn
    detector.fit(["normal_1.png", "normal_2.png"])
    scores, maps = detector.score(["new.png"])

    Pictures are paths, PIL images, arrays (H, W) or (H, W, 3) uint8, or tensors (3, H, W) uint8 or float in [0, 1], of
    any size. Scores are distances without a unit: 0 at the mean of the normal pictures, without upper bound, and never
    set in relation to the other pictures of a call: on the CPU a picture gets the same bits alone as among others.

    threshold: set by `calibrate`, or by hand; None before. left_out: the support pictures against each other, None
    where K is 1 or where `fit` was told to do without. origin: plain values that say where the detector came from.
    clock: seconds by stage.
    """

    def __init__(self, network: STNResNet18, device: str = "auto", keep_aspect: bool = False) -> None:
        self.clock = StageClock(resolve_device(device))
        self.network, self.keep_aspect = network.to(self.clock.device), keep_aspect
        self.size = network.img_size
        self.threshold: Threshold | None = None
        self.left_out: NormalScores | None = None
        self.origin: dict = {}
        self.fitted: list[FittedRows] = []
        self.matrix = score_map_matrix(self.size // FEATURE_STRIDES[0], self.size, self.clock.device)
        self._folded = folded(self.network)

    def fit(self, pictures: Sequence[Picture], for_threshold: bool = True) -> FewShotDetector:
        """Learns what is normal from K >= 1 pictures; with `for_threshold` also scores each against the others.

        Raises:
            UserError: no pictures; ImageError: a file that cannot be read.
        """
        if isinstance(pictures, str | Path | Image.Image):
            raise TypeError("give a list of pictures, not a single one")
        with self.clock("decode"):
            inputs = self._inputs(pictures)
        if not len(inputs):
            raise UserError("no support pictures: at least one normal picture is needed")
        views: Layers = []
        with self.clock("network"):
            for number, picture in enumerate(inputs):
                start, count = number * VIEWS_PER_IMAGE, len(inputs) * VIEWS_PER_IMAGE
                write_views(views, start, count, self._folded, picture, VIEWS_PER_IMAGE)
        self.fitted = list(fit_rows(views, DISTANCE_GROUP, self.clock))
        self.threshold, self.left_out = None, None
        if for_threshold and len(inputs) > 1:
            self.left_out = leave_one_out(views, self.matrix, self.clock)
        return self

    def calibrate(self, false_alarm: float, normal: Sequence[Picture] | None = None) -> Threshold:
        """Sets the threshold at which a share of `false_alarm` normal pictures is expected, see inspection/threshold.py.

        From the scores of the pictures `normal`; without them, from `left_out`.

        Raises:
            UserError: fewer than two normal scores, or a share outside (0, 1).
        """
        if normal is not None:
            check_calibration(len(normal), false_alarm)
            seen, source = self._normal_scores(normal, false_alarm), f"{len(normal)} further normal pictures"
        elif self.left_out is not None:
            seen, source = self.left_out, f"leave-one-out over {len(self.left_out.scores)} support pictures"
        else:
            raise UserError(
                "a threshold needs the scores of two normal pictures: give two support pictures or more, "
                "further normal pictures (--calibrate DIR), or the threshold itself (--threshold)"
            )
        self.threshold = normal_threshold(seen.scores, seen.maps, false_alarm, source)
        return self.threshold

    def _normal_scores(self, pictures: Sequence[Picture], false_alarm: float) -> NormalScores:
        """Normal pictures as they are, or with their views where the threshold needs them."""
        scores, maps = self.score(pictures)
        if is_order_statistic(len(pictures), false_alarm):
            return NormalScores(scores[:, None], maps)
        views = (support_views(self._inputs([picture])) for picture in pictures)
        return NormalScores(np.array([self.score(of_picture)[0] for of_picture in views]), maps)

    def score(self, pictures: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
        """Image scores (B,) and score maps (B, S, S), float32, of pictures; `datasets.images.restore_map` brings a map
        to its picture's own size.

        Raises:
            UserError: not fitted, or scores that are not finite; ImageError: a file that cannot be read.
        """
        if isinstance(pictures, str | Path | Image.Image):
            raise TypeError("give a list of pictures, not a single one")
        if not self.fitted:
            raise UserError("the detector must be fitted on support pictures, or loaded, before it can score")
        if not len(pictures):
            return np.empty(0, np.float32), np.empty((0, self.size, self.size), np.float32)
        groups = (pictures[at : at + DISTANCE_GROUP] for at in range(0, len(pictures), DISTANCE_GROUP))
        scores, maps = zip(*map(self._score_group, groups), strict=True)
        if not all(np.isfinite(part).all() for part in scores):
            raise UserError("scores are not finite: the checkpoint or the support pictures hold NaN or infinite values")
        return np.concatenate(scores), np.concatenate(maps)

    def _score_group(self, pictures: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
        """Scores and maps of at most DISTANCE_GROUP pictures."""
        distances = distance_maps(self.fitted, self.features(pictures), self.clock)
        with self.clock("smoothing"):
            scores, maps = score_maps(distances, self.matrix)
            return scores[: len(pictures)].cpu().numpy(), maps[: len(pictures)].cpu().numpy()

    def features(self, pictures: Sequence[Picture]) -> Layers:
        """Features of at most DISTANCE_GROUP pictures, as so many columns; those beyond B repeat other pictures."""
        with self.clock("decode"):
            inputs = self._inputs(pictures)
        with self.clock("network"):
            return self._features(inputs)

    def _features(self, inputs: torch.Tensor) -> Layers:
        """`features` of inputs (B, 3, S, S).

        Grey and coloured pictures go apart, because the network takes a shorter way where all of a pass are grey.
        """
        layers, size = [], NETWORK_GROUP[inputs.device.type]
        is_grey = (inputs == inputs[:, :1]).flatten(1).all(dim=1)
        groups = [group for kind in (is_grey, ~is_grey) for group in kind.nonzero().flatten().split(size)]
        for group in filter(len, groups):
            features = nested_layers(self._folded.features(inputs[_fill_up(group, size)]))
            layers = layers or [f.new_empty(f.shape[0], len(inputs), f.shape[2]) for f in features]
            for layer, new in zip(layers, features, strict=True):
                layer[:, group] = new[:, : len(group)]
        columns = _fill_up(torch.arange(len(inputs), device=inputs.device), DISTANCE_GROUP)
        return [layer[:, columns] for layer in layers]

    def _inputs(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Pictures as the network takes them, (B, 3, S, S) float32 in [0, 1], on the device."""
        inputs = [as_input(picture, self.size, self.keep_aspect) for picture in pictures]
        return torch.stack(inputs).to(self.clock.device) if inputs else torch.empty(0)

    def save(self, path: Path | str) -> None:
        """Writes network, statistics, preprocessing and threshold into one file of tensors and plain values.

        Raises:
            UserError: not fitted, or the file cannot be written.
        """
        if not self.fitted:
            raise UserError("only a fitted detector can be saved")
        content = {
            "format": FILE_FORMAT,
            "version": FILE_VERSION,
            "network": {name: value.cpu() for name, value in self.network.state_dict().items()},
            "stn_mode": self.network.stn_mode,
            "img_size": self.size,
            "keep_aspect": self.keep_aspect,
            "statistics": [_to_plain(part.statistics, "cpu") for part in self.fitted],
            "left_out": None if self.left_out is None else [torch.from_numpy(part) for part in self.left_out],
            "threshold": None if self.threshold is None else tuple(self.threshold),
            "origin": self.origin,
        }
        try:
            with whole_file(Path(path)) as aside, open(aside, "wb") as stream:
                torch.save(content, stream)
        except OSError as error:
            raise UserError(f"cannot write the detector {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path | str, device: str = "auto") -> FewShotDetector:
        """The detector that `save` wrote; needs no support pictures.

        Raises:
            UserError: missing, damaged or foreign file.
        """
        content = _read_content(Path(path))
        try:
            network = STNResNet18(content["stn_mode"], content["img_size"])
            network.load_state_dict(content["network"])
            detector = cls(network.eval(), device, content["keep_aspect"])
            detector.fitted = _from_plain(content["statistics"], detector.clock.device)
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


def as_input(picture: Picture, size: int, keep_aspect: bool) -> torch.Tensor:
    """A picture of any of the kinds in FewShotDetector as the network's input, (3, size, size) float32 in [0, 1]."""
    if isinstance(picture, torch.Tensor):
        if picture.shape == (3, size, size) and picture.is_floating_point():
            return picture.float()
        values = picture if picture.dtype == torch.uint8 else (picture * 255).round().clamp(0, 255).to(torch.uint8)
        picture = values.permute(1, 2, 0).cpu().numpy()
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise TypeError(f"arrays must be (H, W) or (H, W, 3) uint8, got {picture.shape} {picture.dtype}")
        picture = Image.fromarray(picture)
    picture = eight_bit(picture) if isinstance(picture, Image.Image) else read_picture(Path(picture))
    square = np.ascontiguousarray(to_square(picture, size, keep_aspect).transpose(2, 0, 1))
    return torch.from_numpy(square).float() / 255


def _fill_up(indices: torch.Tensor, count: int) -> torch.Tensor:
    """`indices` made `count` long by repeating the last one."""
    return torch.cat([indices, indices[-1:].expand(max(0, count - len(indices)))])


def _to_plain(statistics: SupportStatistics, device: str) -> dict:
    """Statistics as a dict of tensors and lists of tensors."""
    plain = statistics._asdict()
    for name, value in plain.items():
        moved = [v.to(device) for v in value] if isinstance(value, list) else value
        plain[name] = moved.to(device) if isinstance(value, torch.Tensor) else moved
    return plain


def _from_plain(parts: list[dict], device: torch.device) -> list[FittedRows]:
    """The way back; consecutive parts hold consecutive positions."""
    fitted: list[FittedRows] = []
    for part in parts:
        statistics = SupportStatistics(**_to_plain(SupportStatistics(**part), device))
        starts = [rows.stop for rows in fitted[-1].rows] if fitted else [0] * len(statistics.means)
        lengths = [len(mean) for mean in statistics.means]
        rows = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        fitted.append(FittedRows(rows, statistics))
    return fitted


def _read_content(path: Path) -> dict:
    """The dict in a detector's file; its checksums are verified, which torch does not do."""
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
    if content.get("version") != FILE_VERSION:
        raise UserError(f"detector {path} has version {content.get('version')}, this program reads {FILE_VERSION}")
    return content
