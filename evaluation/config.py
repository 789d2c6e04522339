"""The configuration of test.py and make_support.py, and groups of settings that commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils.choices import (
    AUTO_BITS,
    BACKBONE_HELP,
    BACKBONE_NAMES,
    BIT_DEPTHS,
    CATEGORIES,
    DEFAULT_SCORER,
    DEFAULT_SEED,
    DEFAULT_SUPPORT_PATH,
    DRAW_SEED,
    LARGEST_SEED,
    LITE_BACKBONE,
    MASK_ORIENTATIONS,
    MAX_PIXELS,
    RELEASE_BACKBONE,
    RELEASE_SCORER,
    ROUND_RANKS,
    SCORER_NAMES,
    SEVERAL,
    STN_MODE_NAMES,
    category_name,
    is_trainable,
    round_choice,
)
from utils.config import UNLESS_DEFAULT, Config, flag
from utils.errors import UserError
from utils.naming import DEFAULT_SAVE_DIR

TASK = "task: draw, or one of --from_pt and --verify"
SCORER_HELP = f"{', '.join(SCORER_NAMES)}, or a custom class as FILE.py:CLASS"
CHECKPOINT_HELP = "a .pt or .safetensors file, or hf:OWNER/NAME[@REVISION], downloaded from the Hugging Face hub"
OTHER_SCORER = f"predict.py and export.py take {DEFAULT_SCORER} if none is given"


def bit_depth(text: str) -> int | str:
    """A value of --bits: a number, or AUTO_BITS."""
    return text if text == AUTO_BITS else int(text)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """The data set."""

    data_type: str = flag(
        "the data set; folder: categories of any name, in any layout that docs/reproduce.md lists",
        default="mvtec",
        group="data",
        choices=tuple(CATEGORIES),
    )
    data_path: Path = flag("folder that holds the categories", default=Path("./MVTec/"), group="data")


@dataclass(frozen=True, kw_only=True)
class SupportConfig(Config):
    """The support sets."""

    inferences: int = flag(
        "number of rounds, each with another support set",
        default=10,
        group="data",
        least=1,
        metavar="ROUNDS",
        affects_results=True,
    )
    support_path: Path | None = flag(
        "folder of the support sets (default: ./support_set, or drawn with seed 0)", default=None, group="data"
    )


@dataclass(frozen=True, kw_only=True)
class MaxPixelsConfig(Config):
    """The limit of image sizes."""

    max_pixels: int = flag("images with more pixels are rejected", default=MAX_PIXELS, group="images", least=1)


@dataclass(frozen=True, kw_only=True)
class MaskConfig(Config):
    """The decoding of masks."""

    mask_orientation: str = flag(
        "for masks without an EXIF orientation whose image has one. upright: they were drawn on the upright image; "
        "stored: on the stored pixels",
        default=MASK_ORIENTATIONS[0],
        group="images",
        choices=MASK_ORIENTATIONS,
        affects_results=UNLESS_DEFAULT,
    )


@dataclass(frozen=True, kw_only=True)
class ImageConfig(MaxPixelsConfig):
    """The decoding of images."""

    keep_aspect: bool = flag(
        "pad images by reflection instead of stretching them to a square",
        default=False,
        group="images",
        affects_results=True,
    )
    bits: int | str = flag(
        "bit depth of 16-bit grey files; auto: the smallest that holds the values of the training images",
        default=AUTO_BITS,
        group="images",
        choices=(AUTO_BITS, *BIT_DEPTHS),
        convert=bit_depth,
        affects_results=True,
    )


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(Config):
    """The network and its initial weights."""

    stn_mode: str = flag(
        f"transformations that the spatial transformers may use: {', '.join(STN_MODE_NAMES)}",
        default="rotation_scale",
        group="network",
        choices=STN_MODE_NAMES,
        metavar="MODE",
        affects_results=True,
    )
    backbone: str = flag(
        f"{BACKBONE_HELP}; predict.py and export.py take {LITE_BACKBONE} if none is given",
        default=RELEASE_BACKBONE,
        group="network",
        joined_by=SEVERAL,
        affects_results=True,
    )
    img_size: int | None = flag(
        "side of the network's input in pixels, a multiple of 16 (default: that of the backbone, 224 for a ResNet)",
        default=None,
        group="network",
        least=1,
        affects_results=True,
    )
    weights: str = flag(
        "backbone weights without a checkpoint: imagenet, none, or a file", default="imagenet", group="network"
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """The device, the threads and the seed of a command."""

    device: str = flag("auto, cpu, cuda, cuda:1, ...", default="auto")
    num_workers: int | None = flag(
        "threads that decode images (default: 2, on CUDA one per core, at most 16)", default=None, least=0
    )
    seed: int = flag(
        "seed of all random numbers; determines the results", default=DEFAULT_SEED, least=0, most=LARGEST_SEED
    )


@dataclass(frozen=True, kw_only=True)
class ScoringConfig(RunConfig, NetworkConfig, MaskConfig, ImageConfig, SupportConfig, DataConfig):
    """The flags of test.py: those of the release and those of this project."""

    obj: str = flag("the category to score", group="data", convert=category_name, metavar="CATEGORY")
    shot: tuple[int, ...] = flag("support images per round", default=(2,), group="data", least=1, metavar="K")
    strict: bool = flag(
        "reject a test set with missing masks or other findings of check_data.py", default=False, group="images"
    )
    frame: str = flag(
        "frame in which features are compared. image: at their position in the image, as released; registered: at the "
        "position after the spatial transformers, which displaces score maps and pixel metrics",
        default="image",
        group="network",
        choices=("image", "registered"),
        affects_results=UNLESS_DEFAULT,
    )
    save_dir: Path = flag("folder of the checkpoints", default=DEFAULT_SAVE_DIR, group="network")
    checkpoint: Path | None = flag(
        f"the weights to score: {CHECKPOINT_HELP} (default: the file of train.py or the release in --save_dir)",
        default=None,
        group="network",
    )
    last: bool = flag("score the weights of the last epoch, not the selected ones", default=False, group="network")
    untrained: bool = flag("score without registration training", default=False, group="network")
    batch_size: int | None = flag(
        "images per network pass; affects time, memory, the last digits (default: 12, on CUDA what fits, at most 64)",
        default=None,
        least=1,
    )
    scorer: tuple[str, ...] = flag(f"{SCORER_HELP}; {OTHER_SCORER}", default=(RELEASE_SCORER,), metavar="NAME")
    metrics: str = flag(
        "auroc: image and pixel AUROC; all: also AP, F1-max and PRO",
        default="all",
        choices=("all", "auroc"),
        affects_results=True,
    )
    output: Path = flag("output folder", default=Path("./results"))
    overwrite: bool = flag("replace a record that was made with other settings", default=False)
    save_images: int = flag(
        "draw this many images of a round, and write a report; -1: all", default=0, metavar="N", least=-1
    )
    images_round: int | str = flag(
        f"the round of --save_images, and of --examples of reproduce.py: its number, or {', '.join(ROUND_RANKS)} by "
        "image AUROC",
        default=0,
        convert=round_choice,
        metavar="ROUND",
    )
    save_maps: bool = flag("write the score maps of every round as .npz, float32", default=False)
    save_tiff: bool = flag("write the score maps as 32-bit float TIFF, each at the size of its image", default=False)

    def check(self) -> None:
        """Raises UserError if flags exclude each other."""
        if not is_trainable(self.backbone) and not self.untrained:
            raise UserError(f"{self.backbone} is not trained here: give --untrained")
        if not is_trainable(self.backbone) and self.frame != "image":
            raise UserError(f"{self.backbone} has no warps: --frame {self.frame} is for {', '.join(BACKBONE_NAMES)}")
        if self.untrained + self.last + bool(self.checkpoint) > 1:
            raise UserError("--untrained, --last and --checkpoint exclude each other")
        if isinstance(self.images_round, int) and self.images_round >= self.inferences:
            raise UserError(f"--images_round {self.images_round}: there are {self.inferences} rounds, counted from 0")
        if len(set(self.shot)) < len(self.shot):
            raise UserError(f"--shot contains a number twice: {' '.join(map(str, self.shot))}")


@dataclass(frozen=True, kw_only=True)
class SupportSetConfig(ImageConfig, DataConfig):
    """The flags of make_support.py."""

    obj: tuple[str, ...] = flag(
        "categories to draw from; with --from_pt: the category of the file",
        default=(),
        group=TASK,
        convert=category_name,
        metavar="CATEGORY",
    )
    shots: tuple[int, ...] = flag(
        "images per round; without it, reproduce.py uses 2 4 8", default=(2,), group=TASK, least=1, metavar="K"
    )
    rounds: int = flag("rounds per support set (--inferences of test.py)", default=10, group=TASK, least=1)
    seed: int = flag("seed of the draw, unlike --seed of test.py and train.py", default=DRAW_SEED, least=0, group=TASK)
    names_only: bool = flag("write manifests only, without tensors; test.py reads both", default=False, group=TASK)
    from_pt: Path | None = flag("identify the training images in a .pt file", default=None, group=TASK, metavar="FILE")
    verify: tuple[Path, ...] = flag("check manifests against the data", default=(), group=TASK, metavar="MANIFEST")
    write_hashes: bool = flag("with --verify: add the SHA-256 to valid manifests", default=False, group=TASK)
    support_path: Path = flag("folder to write to", default=DEFAULT_SUPPORT_PATH, group="data")
    img_size: int = flag("side of the stored images in pixels", default=224, group="data", least=1)

    def check(self) -> None:
        """Raises UserError unless the flags select one task."""
        if sum(map(bool, (self.obj and not self.from_pt, self.from_pt, self.verify))) != 1:
            raise UserError("give one task: --obj CATEGORY ..., --from_pt FILE or --verify MANIFEST ...")
