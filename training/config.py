"""The configuration of train.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evaluation.config import (
    OTHER_SCORER,
    SCORER_HELP,
    DataConfig,
    ImageConfig,
    MaskConfig,
    NetworkConfig,
    RunConfig,
    SupportConfig,
)
from utils.choices import (
    BACKBONE_NAMES,
    BATCH_NORM,
    RELEASE_SCORER,
    SUPPORT_TARGET,
    TRAIN,
    category_name,
    default_cache_dir,
)
from utils.config import UNLESS_DEFAULT, flag
from utils.errors import UserError
from utils.naming import DEFAULT_SAVE_DIR

SELECTION = "scoring and selection of the epoch"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunConfig, SupportConfig, NetworkConfig, MaskConfig, ImageConfig, DataConfig):
    """The flags of train.py: those of the release and those of this project."""

    obj: str = flag(
        "target category: excluded from training, scored",
        group="data",
        convert=category_name,
        metavar="CATEGORY",
        affects_results=True,
    )
    sources: tuple[str, ...] | None = flag(
        "train on these categories (default: all but the target)",
        default=None,
        group="data",
        convert=category_name,
        metavar="CATEGORY",
    )
    source_path: Path | None = flag(
        "data set of the sources (default: that of the target)", default=None, group="data", metavar="DIR"
    )
    shot: int = flag("support images per query", default=2, group="data", least=1, metavar="K", affects_results=True)
    episodes: Path | None = flag(
        "use these episodes in every epoch, as python -m datasets.episodes prints them (default: drawn anew for each)",
        default=None,
        group="data",
        metavar="FILE",
    )
    strict: bool = flag(
        "reject a test set with missing masks or other findings of check_data.py", default=False, group="images"
    )
    epochs: int = flag("number of epochs", default=50, group="training", least=1, affects_results=True)
    batch_size: int = flag("queries per step", default=32, group="training", least=1, affects_results=True)
    steps: int | None = flag(
        "steps per epoch, at most (default: every source image is a query once)",
        default=None,
        group="training",
        least=1,
        affects_results=UNLESS_DEFAULT,
    )
    lr: float = flag(
        "learning rate, decays to 0 with a half cosine", default=0.0001, group="training", least=0, affects_results=True
    )
    momentum: float = flag("momentum of SGD", default=0.9, group="training", least=0, most=1, affects_results=True)
    train: str = flag(
        "the trainable layers. all: as released; heads: all but the ResNet; stn: the spatial transformers alone",
        default=TRAIN[0],
        group="training",
        choices=TRAIN,
        affects_results=UNLESS_DEFAULT,
    )
    batch_norm: str = flag(
        "batch norm of the ResNet. train: as released; frozen: keeps statistics, scales and offsets of --weights",
        default=BATCH_NORM[0],
        group="training",
        choices=BATCH_NORM,
        affects_results=UNLESS_DEFAULT,
    )
    support_target: str = flag(
        "the support map that a query is compared with. mean: over the support images, as released; each: all in turn",
        default=SUPPORT_TARGET[0],
        group="training",
        choices=SUPPORT_TARGET,
        affects_results=UNLESS_DEFAULT,
    )
    scorer: tuple[str, ...] = flag(
        f"{SCORER_HELP}; {OTHER_SCORER}", default=(RELEASE_SCORER,), group=SELECTION, metavar="NAME"
    )
    eval_every: int = flag(
        "epochs between scorings; 0: never (needs --select last)",
        default=1,
        group=SELECTION,
        least=0,
        metavar="EPOCHS",
        affects_results=True,
    )
    select: str = flag(
        "the epoch whose weights are kept. best: by the target's test labels; source: by held-out source categories, "
        "without the target; last: the last",
        default="best",
        group=SELECTION,
        choices=("best", "last", "source"),
        affects_results=True,
    )
    held_out: tuple[str, ...] | None = flag(
        "source categories that select an epoch instead of being trained on; with --select best, they select further "
        "weights (default: with --select source the next category after the target by name)",
        default=None,
        group=SELECTION,
        convert=category_name,
        metavar="CATEGORY",
    )
    cache_dir: str = flag("cache of decoded images; none: in memory", default=str(default_cache_dir()))
    save_dir: Path = flag("folder of the checkpoints", default=DEFAULT_SAVE_DIR)
    resume: bool = flag("resume an interrupted run, or start a new one", default=False)
    overwrite: bool = flag("start a new run in place of an earlier one", default=False)
    tensorboard: bool = flag(
        "write losses and scores as TensorBoard event files next to the weights (package tensorboard)", default=False
    )
    save_every: float = flag("interval for saving the state to resume from", default=300.0, least=0, metavar="SECONDS")
    amp: str = flag(
        "bf16: bfloat16 in training steps, 1.95 times as fast on a CPU with AMX, not measured on CUDA, changes results",
        default="off",
        choices=("off", "bf16"),
        affects_results=True,
    )
    tf32: bool = flag("TF32 convolutions in training (CUDA), changes results", default=False, affects_results=True)
    compile: bool = flag("compile the networks with torch.compile", default=False, affects_results=True)

    def check(self) -> None:
        """Raises UserError if flags contradict each other."""
        if self.backbone not in BACKBONE_NAMES:
            raise UserError(f"--backbone {self.backbone} cannot be trained; choose from {', '.join(BACKBONE_NAMES)}")
        if self.select != "last" and not self.eval_every:
            raise UserError(f"--select {self.select} needs scores; give --select last with --eval_every 0")
        if self.held_out and self.select == "last":
            raise UserError("--held_out is for --select source and --select best")
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other")
