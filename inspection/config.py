"""The configurations of predict.py and export.py."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from evaluation.config import CHECKPOINT_HELP, SCORER_HELP, ImageConfig, NetworkConfig
from utils.choices import (
    BACKBONE_HELP,
    DEFAULT_SCORER,
    DEFAULT_SEED,
    LARGEST_SEED,
    LITE_BACKBONE,
    OFF,
    RELEASE_BACKBONE,
    RELEASE_SCORER,
    SEVERAL,
    tile_side,
)
from utils.config import flag, flags_of
from utils.errors import UserError

PANELS = ("joined", "separate")  # in one file, side by side, or a file for each
CSV_KINDS = ("plain", "excel", "excel_comma")
MAPS = ("none", "png", "npy")
FORMATS = ("onnx", "pt2")
FITTING_GROUPS = ("detector", "network", "images")  # a saved detector keeps all settings of these groups
OF_SAVED = {"support", "detector", "scorer", "bits", "max_pixels"}  # except these
_decision_flag = functools.partial(flag, group="decision")


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(NetworkConfig, ImageConfig):
    """How a detector is loaded or fitted, and how its threshold is set."""

    support: tuple[Path, ...] = flag(
        "normal images: files or folders; this or --detector is needed", default=(), metavar="PATH", group="detector"
    )
    detector: Path | None = flag(
        "from predict.py --save; replaces --support and all settings of fitting",
        default=None,
        metavar="FILE",
        group="detector",
    )
    scorer: str | None = flag(
        f"{SCORER_HELP} (default: {DEFAULT_SCORER}; of test.py and train.py: {RELEASE_SCORER}, as released)",
        default=None,
        metavar="NAME",
        affects_results=True,
        group="detector",
    )
    tile: int | str = flag(
        "off: score whole images; auto: cut those that would shrink more than 4 times; or the side of a tile in pixels",
        default=OFF,
        convert=tile_side,
        affects_results=True,
        group="detector",
    )
    region: str | None = flag(
        "score only here: x,y,width,height, or a mask file (default: the whole image)",
        default=None,
        metavar="RECT|MASK",
        group="detector",
    )
    ignore: Path | None = flag(
        "mask file: do not score here (default: nothing is left out)", default=None, metavar="MASK", group="detector"
    )
    checkpoint: Path | None = flag(
        f"{CHECKPOINT_HELP} (default: weights without registration training)", default=None, group="network"
    )
    backbone: str | None = flag(
        f"{BACKBONE_HELP} (default: {LITE_BACKBONE}, with --checkpoint {RELEASE_BACKBONE}; of test.py and train.py: "
        f"{RELEASE_BACKBONE}, as released)",
        default=None,
        joined_by=SEVERAL,
        affects_results=True,
        group="network",
    )
    seed: int = flag(
        "for --weights none; everything else is deterministic",
        default=DEFAULT_SEED,
        least=0,
        most=LARGEST_SEED,
        group="network",
    )
    false_positive_rate: float | None = _decision_flag(
        "accepted share of normal images above the threshold (default: 0.01)",
        default=None,
        aliases=("--false_alarm",),
        metavar="RATE",
    )
    review_rate: float | None = _decision_flag(
        "accepted share of normal images above the lower threshold; between both a person should look (default: 0.05)",
        default=None,
        metavar="RATE",
    )
    calibrate: tuple[Path, ...] = _decision_flag(
        "further normal images to set the threshold (default: the support images alone)", default=(), metavar="PATH"
    )
    defects: tuple[Path, ...] = _decision_flag(
        "known defective images to compare with the threshold (default: none)", default=(), metavar="PATH"
    )
    threshold: float | None = _decision_flag("a fixed threshold (default: set from normal images)", default=None)
    adopt: bool = _decision_flag("adopt the threshold that separates --defects best", default=False)
    force: bool = _decision_flag(
        "calibrate although images are not like the support; save although known defects are missed, or more than by "
        "the detector that is replaced",
        default=False,
    )
    accept: tuple[Path, ...] = _decision_flag(
        "good images that the --detector rejected: it learns from them (default: none)", default=(), metavar="PATH"
    )
    min_area: float | None = _decision_flag(
        "area of the smallest defect in pixels of the image, with --mm_per_pixel in square millimetres; smaller "
        "regions do not decide (default: all do)",
        default=None,
        least=0,
    )
    mm_per_pixel: float | None = _decision_flag(
        "side of a pixel of the image, for --min_area in square millimetres (default: --min_area is in pixels)",
        default=None,
        metavar="MM",
    )
    part: str | None = flag("name of the part, kept in the detector file (default: none)", default=None)

    def check(self) -> None:
        """Raises UserError where flags exclude each other."""
        if bool(self.support) == bool(self.detector):
            raise UserError("give either normal images with --support, or a saved detector with --detector")
        if self.adopt and not self.defects:
            raise UserError("--adopt takes the threshold that separates known defects best: give them with --defects")
        if self.mm_per_pixel is not None and (self.min_area is None or self.mm_per_pixel <= 0):
            raise UserError("--mm_per_pixel must be above 0, and needs --min_area")
        if self.accept and not self.detector:
            raise UserError("--accept makes a saved detector learn: give --detector, or these images with --support")
        if self.adopt and self.threshold is not None:
            raise UserError("--adopt and --threshold exclude each other")
        for name in ("false_positive_rate", "review_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < 1:
                raise UserError(f"--{name} must be between 0 and 1, got {rate:g}")
        if self.detector and (given := [f"--{name}" for name in self.given & fitting_flags()]):
            raise UserError(
                f"{', '.join(sorted(given))}: a saved detector keeps what it was fitted with; fit one with --support"
            )

    def plain(self) -> dict[str, object]:
        """All values that are in use, for JSON: without those of fitting if the detector is a saved one."""
        unused = fitting_flags() if self.detector else ()
        return {name: value for name, value in super().plain().items() if name not in unused}


@functools.cache
def fitting_flags() -> frozenset[str]:
    """The settings that a saved detector keeps."""
    fields = flags_of(DetectorConfig)
    return frozenset(field.name for field in fields if field.metadata["group"] in FITTING_GROUPS) - OF_SAVED


@dataclass(frozen=True, kw_only=True)
class PredictConfig(DetectorConfig):
    """The flags of predict.py."""

    input: tuple[Path, ...] = flag(
        "images to score: files or folders; this, --watch or --save is needed", default=(), metavar="PATH"
    )
    watch: Path | None = flag("score images as they arrive here, until Ctrl-C", default=None, metavar="DIR")
    output: Path = flag("folder of all output files", default=Path("./predictions"))
    append: bool = flag("keep the results in --output, score only new images", default=False)
    overwrite: bool = flag("remove the results in --output", default=False)
    save: Path | None = flag(
        "save the detector to a file, e.g. part.regad (default: not saved)", default=None, metavar="FILE"
    )
    describe: str | None = flag(
        "print the origin, images, limits and history in the --detector file, and end",
        default=None,
        choices=("text", "json"),
        nargs="?",
        const="text",
    )
    maps: str = flag(
        "files of the score maps. png: 16 bits, scaled by map_scale in scores.json; npy: float32",
        default="none",
        choices=MAPS,
    )
    csv: str = flag(
        "form of the tables. excel: with the part, file names and times as Excel reads them, in UTF-8 with byte-order "
        "mark; excel_comma: also decimal commas, between semicolons",
        default=CSV_KINDS[0],
        choices=CSV_KINDS,
    )
    jsonl: bool = flag("each result as a line of JSON on stdout, the rest on stderr", default=False)
    fail_on_defect: bool = flag("exit code 3 if an image is defective or for review", default=False)
    min_images: int = flag("exit code 5 if fewer images are scored, with --watch on any whole day", default=0, least=0)
    panels: str = flag(
        "image, heat map and outlines. joined: side by side in one file; separate: in a file each, without titles",
        default=PANELS[0],
        choices=PANELS,
    )
    no_images: bool = flag(
        "draw nothing: scores, maps and a report without images", default=False, aliases=("--no_pictures",)
    )
    device: str = flag("auto, cpu, cuda, cuda:1, ...", default="auto")
    num_workers: int | None = flag(
        "threads that decode and draw (default: 2, on CUDA one per core, at most 16)", default=None, least=0
    )

    def check(self) -> None:
        """Raises UserError where flags exclude each other."""
        super().check()
        if self.input and self.watch:
            raise UserError("--input and --watch exclude each other; images already in the watched folder come first")
        if self.append and self.overwrite:
            raise UserError("--append and --overwrite exclude each other")
        if self.describe and not self.detector:
            raise UserError("--describe needs a saved detector: give --detector FILE")
        if not (self.input or self.watch or self.save or self.describe):
            raise UserError("nothing to do: give images with --input or --watch, or a file to --save the detector in")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(DetectorConfig):
    """The flags of export.py."""

    output: Path = flag("the file to write; its suffix is set by --format", default=Path("part.onnx"))
    format: tuple[str, ...] = flag("onnx: ONNX; pt2: torch.export; or both", default=("onnx",), choices=FORMATS)
    compare: tuple[Path, ...] | None = flag(
        "compare with PyTorch on at most 20 of these images; without PATH, on the --support images",
        default=None,
        nargs="*",
        metavar="PATH",
        spelling="--check",
    )

    def check(self) -> None:
        """Raises UserError where flags exclude each other."""
        super().check()
        if self.compare == () and not self.support:
            raise UserError("--check needs images, and a saved detector contains none; give files or folders after it")
