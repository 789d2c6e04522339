"""Recipes: which layers registration training changes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from models.regad import TRUNK_LAYERS, RegAD


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
    """Fixes weights and batch-norm statistics of `layers`. Each `train()` of their model undoes it."""
    for layer in layers:
        layer.eval().requires_grad_(False)
