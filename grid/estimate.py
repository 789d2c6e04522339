"""An estimate of the duration of a grid, from a measurement of a few seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from models.networks import scoring_network
from models.regad import RegAD
from models.stn import BACKBONES, folded
from scorers.views import VIEWS_PER_IMAGE
from training.loop import Trainer
from utils.stages import StageClock

MEASURED_IMAGES = 8  # in the measured step, half of them queries
NETWORK_SHARE = 0.77  # of the time of scoring, on the CPU: benchmarks/results/scoring_screw_2_cpu.json


class Speed(NamedTuple):
    """Seconds per image, of queries and support images."""

    training: float
    network: float


def measure(device: torch.device, stn_mode: str, img_size: int, backbone: str) -> Speed:
    """Times one training step and one pass of the scoring network, after one of each to warm up."""
    clock = StageClock(device)
    images = torch.rand(MEASURED_IMAGES // 2, 3, img_size, img_size, device=device)
    network = folded(scoring_network(backbone, stn_mode, img_size, None, "none").to(device))
    trainer = Trainer(RegAD(stn_mode, img_size, backbone).to(device), 0.0, 0.9) if backbone in BACKBONES else None
    for _ in range(2):
        clock.seconds.clear()
        with clock("training"):
            if trainer:  # a model of timm is not trained
                trainer.model.train()
                trainer.step(images, images[:, None], StageClock(device))
        with clock("network"), torch.no_grad():
            network.features(torch.cat([images, images]))
    return Speed(*(clock.seconds[name] / MEASURED_IMAGES for name in ("training", "network")))


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
