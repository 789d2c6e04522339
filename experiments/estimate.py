"""An estimate of the duration of a table, from a measurement of a few seconds in a process of its own.

python -m experiments.estimate --device cuda --batch_size 32      prints the measured seconds per image as JSON

The process ends before the first run begins, so that the driver holds no CUDA context.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from evaluation.scoring import SCORING_BATCH
from experiments.config import ExperimentConfig
from models.networks import resolve_img_size, scoring_network
from models.regad import RegAD
from models.stn import BACKBONES, fuse_conv_bn
from scorers.views import VIEWS_PER_IMAGE
from training.loop import Trainer
from utils.config import Parser
from utils.devices import command_device
from utils.errors import UserError, run_command
from utils.files import PROJECT_ROOT
from utils.stages import StageClock

CPU_IMAGES = 8  # in a measured step or pass on the CPU, which takes about a second
CUDA_PASSES = 10  # where a pass takes milliseconds
NETWORK_SHARE = 0.77  # of the time of scoring, on the CPU: benchmarks/results/scoring_screw_2_cpu.json


class Speed(NamedTuple):
    """Seconds per image, of queries and support images."""

    training: float
    network: float


def measure(config: ExperimentConfig) -> Speed:
    """Times training steps and passes of the scoring network on the device, after one of each to warm up."""
    device = command_device(config.device)
    queries, scored, passes = _batches(device, config.batch_size)
    size = resolve_img_size(config.backbone, config.img_size)
    images = torch.rand(queries, 3, size, size, device=device)
    batch = images[:1].expand(scored, -1, -1, -1).contiguous()
    network = scoring_network(config.backbone, config.stn_mode, size, None, "none")
    network = fuse_conv_bn(network.to(device))
    step = _training_step(config, images) if config.backbone in BACKBONES else lambda: None
    clock = StageClock(device)
    for repeats in (1, passes):
        clock.seconds.clear()
        with clock("training"):
            for _ in range(repeats):
                step()
        with clock("network"), torch.no_grad():
            for _ in range(repeats):
                network.features(batch)
    return Speed(clock.seconds["training"] / (passes * 2 * queries), clock.seconds["network"] / (passes * scored))


def _batches(device: torch.device, batch_size: int) -> tuple[int, int, int]:
    """Queries of a training step, images of a scoring pass, and how often each is measured.

    On CUDA these are the batches of a run: a small batch would measure the launching of kernels. On the CPU the time of
    an image hardly depends on the batch.
    """
    if device.type == "cpu":
        return CPU_IMAGES // 2, CPU_IMAGES, 1
    return batch_size, SCORING_BATCH[device.type], CUDA_PASSES


def _training_step(config: ExperimentConfig, images: torch.Tensor) -> Callable[[], None]:
    """A training step with one support image per query: 2 B images pass through the network."""
    model = RegAD(config.stn_mode, images.shape[-1], config.backbone).to(images.device)
    trainer = Trainer(model, 0.0, 0.9, bf16=config.amp == "bf16")
    trainer.model.train()
    return lambda: trainer.step(images, images[:, None], StageClock(images.device))


def measure_in_process(config: ExperimentConfig, environment: Mapping[str, str]) -> Speed | None:
    """`measure` in a process of its own; None where it fails, with a printed line.

    Raises:
        UserError: the measurement cannot be made because of a setting, such as a device that does not exist.
    """
    command = [sys.executable, "-m", "experiments.estimate"]
    for name in ("device", "stn_mode", "img_size", "backbone", "batch_size", "amp"):
        if (value := getattr(config, name)) is not None:
            command += [f"--{name}", str(value)]
    environment = {**os.environ, **environment}
    done = subprocess.run(
        command,
        cwd=PROJECT_ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return Speed(**json.loads(done.stdout.splitlines()[-1]))
    reason = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]
    if done.returncode == 2:
        raise UserError(reason.removeprefix("error: "))
    print(f"no estimate, its measurement failed: {reason}")
    return None


def scoring_seconds(speed: Speed, test_images: int, shots: Sequence[int], rounds: int) -> float:
    """Seconds to score one set of weights with the support sets of all `shots`."""
    images = test_images + sum(rounds * shot * VIEWS_PER_IMAGE for shot in shots)
    return images * speed.network / NETWORK_SHARE


def training_seconds(speed: Speed, source_images: int, shot: int, epochs: int, scoring: float) -> float:
    """Seconds of one run of train.py. `scoring`: seconds of one scoring, before the first and after every epoch."""
    return epochs * source_images * (1 + shot) * speed.training + (epochs + 1) * scoring


def format_duration(seconds: float) -> str:
    """A duration as text, such as `45 s`, `12 min` or `3.4 h`."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the measured speed as one line of JSON."""
    config = Parser(ExperimentConfig, "Measures seconds per image.").parse_config(argv)
    print(json.dumps(measure(config)._asdict()))


if __name__ == "__main__":
    run_command(main)
