"""The trainable layers, the training step and epoch, and saving and restoring the state of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from datasets.cache import SourceImages
from datasets.episodes import Episode
from models.regad import TRUNK_LAYERS, RegAD, checkpoint
from models.stn import layout
from utils.devices import run_batch
from utils.errors import UserError
from utils.files import save_tensors
from utils.progress import ProgressBar
from utils.stages import StageClock

REPORT_SECONDS = 1.0  # least time between two downloads of losses, which make the host wait for the device


def learning_rate(base: float, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch, counted from 1: half a cosine that ends at 0 (release behaviour)."""
    return base * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def count_images(episode: Episode) -> int:
    """The number of images that pass through the network in a step: queries and support images."""
    return len(episode.query) + sum(map(len, episode.support))


@contextmanager
def _tf32(enabled: bool) -> Iterator[None]:
    """Computes convolutions on CUDA in TF32. Only for training steps: scoring is that of test.py.

    Matrix products stay in float32: in TF32, the warps of the heads would lose 13 bits of their coordinates.
    """
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = enabled
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def frozen_layers(model: RegAD, train: str, batch_norm: str) -> list[nn.Module]:
    """The layers whose weights and batch-norm statistics stay fixed.

    train: `all` fixes none; `heads` the trunk, which is the layers of the ResNet; `stn` also encoder and predictor.
    batch_norm: `frozen` fixes the batch norm of the trunk.
    """
    trunk = [getattr(model.stn, name) for name in TRUNK_LAYERS]
    if train != "all":
        return trunk if train == "heads" else [*trunk, model.encoder, model.predictor]
    if batch_norm == "train":
        return []
    return [layer for part in trunk for layer in part.modules() if isinstance(layer, nn.BatchNorm2d)]


def freeze(layers: Sequence[nn.Module]) -> None:
    """Fixes weights and batch-norm statistics of `layers`. Each `train()` of their model undoes that of statistics."""
    for layer in layers:
        layer.eval().requires_grad_(False)


@dataclass
class Progress:
    """The progress of a run. `step` of `epoch` is next; epoch 0 is the scoring of the untrained network."""

    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)  # of the finished steps of the current epoch
    history: list[dict] = field(default_factory=list)  # one entry per finished epoch, see training/run.py
    selected: int = 0  # the epoch of the selected weights
    source: int = 0  # the epoch of the further weights, selected by held-out categories


class Trainer:
    """A model with its optimizer and progress. `bf16`: autocast to bfloat16; `compiled`: torch.compile.

    train, batch_norm, support_target: the recipe, see the flags of train.py.
    selected: the checkpoint of the selected epoch, see `models.regad.checkpoint`; None until an epoch is selected.
    source: the same for the further weights, selected by held-out categories.
    """

    def __init__(
        self,
        model: RegAD,
        lr: float,
        momentum: float,
        bf16: bool = False,
        tf32: bool = False,
        compiled: bool = False,
        train: str = "all",
        batch_norm: str = "train",
        support_target: str = "mean",
    ) -> None:
        weight = next(model.parameters())
        self.device = weight.device
        dtype = torch.bfloat16 if bf16 or tf32 else weight.dtype  # TF32 runs on the same units as bfloat16
        self.model = model.to(memory_format=layout(self.device, dtype))
        self.frozen = frozen_layers(model, train, batch_norm)
        self.each = support_target == "each"
        freeze(self.frozen)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trainable, lr=lr, momentum=momentum, fused=True)
        self.lr, self.bf16, self.tf32 = lr, bf16, tf32
        self.loss = torch.compile(model) if compiled else model
        self.progress = Progress()
        self.selected: dict | None = None
        self.source: dict | None = None

    def step(self, query: torch.Tensor, support: torch.Tensor, clock: StageClock) -> torch.Tensor:
        """One update from `query` (B, 3, S, S) and `support` (B, K, 3, S, S), values in [0, 1].

        Returns the loss before the update, a scalar on the device. On the CPU, the update is skipped if the loss is not
        finite, because torch's gradient of grid_sample then reads outside its memory.
        """
        with _tf32(self.tf32):
            with clock("forward"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.loss(query, support, self.each)
            if self.device.type == "cpu" and not loss.isfinite():
                return loss.detach()
            with clock("backward"):
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
        with clock("optimizer"):
            self.optimizer.step()
        return loss.detach()

    def _step_of(self, query: torch.Tensor, support: torch.Tensor, clock: StageClock, count: int) -> torch.Tensor:
        return self.step(query[:count], support[:count], clock)

    def train_epoch(
        self,
        episodes: Sequence[Episode],
        images: SourceImages,
        epochs: int,
        clock: StageClock,
        save: Callable[[], None],
        save_every: float,
    ) -> None:
        """Trains the current epoch from `progress.step` on, and calls `save` every `save_every` seconds.

        Raises:
            UserError: a loss, or afterwards a weight, is not finite (the message names loss, epoch and step), or there
                is not enough memory.
        """
        progress, pending = self.progress, []
        self.model.train()
        freeze(self.frozen)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.lr, progress.epoch, epochs)
        reported = saved = time.monotonic()
        remaining = episodes[progress.step :]
        title = f"epoch {progress.epoch}/{epochs}, lr {self.optimizer.param_groups[0]['lr']:.1e}"
        with ProgressBar(title, total=sum(map(count_images, remaining))) as bar:
            for episode in remaining:
                with clock("batch"):
                    query, support = images.episode(episode)
                step = partial(self._step_of, query, support, clock)
                pending.append(run_batch(step, len(query), "queries per step"))
                bar.advance(count_images(episode), f"loss {progress.losses[-1]:.4f}" if progress.losses else "")
                now = time.monotonic()
                if now - reported > REPORT_SECONDS:
                    reported = now
                    self._fetch(pending, episodes)
                if now - saved > save_every:
                    saved = now
                    self._fetch(pending, episodes)
                    with clock("save"):
                        save()
        self._fetch(pending, episodes)
        if not torch.stack([value.isfinite().all() for value in self.model.state_dict().values()]).all():
            raise self.diverged(f"weights or statistics of the network are not finite; {self.last_loss()}")

    def _fetch(self, pending: list[torch.Tensor], episodes: Sequence[Episode]) -> None:
        """Moves the losses of the steps since the last call from the device to `progress`; UserError if not finite."""
        progress = self.progress
        values = torch.stack(pending).tolist() if pending else []
        pending.clear()
        for loss in values:
            if not math.isfinite(loss):
                episode = episodes[progress.step]
                raise self.diverged(
                    f"the loss is {loss} in epoch {progress.epoch}, step {progress.step}: category {episode.category}, "
                    f"queries {', '.join(episode.query)}"
                )
            progress.losses.append(loss)
            progress.step += 1

    def last_loss(self) -> str:
        """The last loss of the current epoch, for messages."""
        progress = self.progress
        return f"the loss was {progress.losses[-1]:.4f} in epoch {progress.epoch}, step {progress.step - 1}"

    def diverged(self, what: str) -> UserError:
        """The error of a training with non-finite numbers; `what`: which numbers, a clause."""
        return UserError(
            f"{what}. The training diverged: start a new run in its place with a learning rate below {self.lr:g}",
            ("lr", "overwrite"),
        )

    def finish_epoch(self, entry: dict, is_selected: bool, is_source: bool, recipe: dict) -> None:
        """Appends the epoch's entry to the history and moves on to the next epoch. `recipe`: for the checkpoint."""
        progress = self.progress
        progress.history.append(entry)
        if is_selected:
            progress.selected, self.selected = progress.epoch, checkpoint(self.model, recipe)
        if is_source:
            progress.source, self.source = progress.epoch, checkpoint(self.model, recipe)
        progress.epoch, progress.step, progress.losses = progress.epoch + 1, 0, []

    def save(self, path: Path, fingerprint: dict) -> None:
        """Writes the state of the run, from which its other files can be written.

        On the CPU, a resumed run ends with the same bits as an uninterrupted one.
        """
        content = {
            "fingerprint": fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": vars(self.progress),
            "selected": self.selected,
            "source": self.source,
        }
        save_tensors(path, content)

    def restore(self, content: dict) -> None:
        """Continues from `content`, the state that `save` wrote."""
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.progress = Progress(**content["progress"])
        self.selected, self.source = content["selected"], content.get("source")
