"""Feature maps of any model of the timm library (an optional package), without registration or training.

A convolutional network has the maps of strides 4, 8 and 16. A vision transformer has one map, the patch tokens of its
last block, or the maps of several blocks, which are scored as separate backbones: NAME@upper, the upper half of the
blocks; NAME@spread, four blocks; or NAME@3,5,8,10, counted from 0. Class and register tokens are omitted. Normalisation
and default input size are those of the model. A vision transformer accepts any size that is a multiple of its patches;
the position embeddings of its weights are resampled.
"""

from __future__ import annotations

import itertools
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from utils.choices import PREFIX
from utils.errors import UserError
from utils.files import load_state_dict

STRIDES = (4, 8, 16)  # as layer1 to layer3 of a ResNet
BLOCKS, UPPER, SPREAD = "@", "upper", "spread"  # after the name of a vision transformer: the blocks
SPREAD_BLOCKS = {12: (3, 5, 8, 10), 24: (5, 11, 17, 23)}  # by depth, as in published few-shot methods


class TimmFeatures(nn.Module):
    """The feature maps of a timm model for images (B, 3, S, S) in [0, 1], S = `img_size` (None: the model's default).

    `name` is timm's, without PREFIX, with or without blocks. `weights`: "imagenet" (pretrained, downloaded by timm),
    "none" (random), or the path of a state dict.

    Raises:
        UserError: timm is not installed, the model does not exist, the weights do not fit, or the model does not accept
            the size.
    """

    stn_mode = None

    def __init__(self, name: str, weights: str = "imagenet", img_size: int | None = None) -> None:
        super().__init__()
        timm = timm_library()
        self.backbone = PREFIX + name
        name, _, blocks = name.partition(BLOCKS)
        config = _config(timm, name)
        self.img_size = img_size or config["input_size"][-1]
        self.net = self._create(timm, name, weights, blocks).eval().requires_grad_(False)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key]).view(3, 1, 1), persistent=False)
        self._check_grids(name)

    def _check_grids(self, name: str) -> None:
        """Raises UserError unless the maps cover the image, each half as wide as the one before."""
        try:
            sides = [tuple(layer.shape[2:]) for layer in self.features(torch.zeros(1, 3, self.img_size, self.img_size))]
        except Exception as error:  # models raise errors of any type at sizes that they do not accept
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the timm model {name} does not run at {self.img_size} pixels: {reason}") from error
        factor = 1 if hasattr(self, "backbone_layers") else 2
        nested = all(fine == (factor * side[0], factor * side[1]) for fine, side in itertools.pairwise(sides))
        if not nested or sides[-1][0] != sides[-1][1] or self.img_size % sides[-1][0]:
            grids = ", ".join(f"{height} x {width}" for height, width in sides)
            raise UserError(
                f"the timm model {name} gives grids of {grids} at {self.img_size} pixels, which do not tile the image; "
                "the image size must be a multiple of its coarsest stride (16 or 32 for most)",
                ("img_size",),
            )

    def _create(self, timm: object, name: str, weights: str, blocks: str) -> nn.Module:
        options = {"pretrained": weights == "imagenet", "features_only": True}
        try:
            probe = timm.create_model(name, features_only=True)
            reductions = probe.feature_info.reduction()
            if len(set(reductions)) == 1:  # a vision transformer
                chosen = _block_indices(blocks, len(probe.model.blocks))
                options |= {"out_indices": chosen, "img_size": self.img_size}
                self.backbone_layers = (1,) * len(chosen)
            elif blocks:
                raise UserError(f"{name} is not a vision transformer: leave out {BLOCKS}{blocks}")
            else:
                options["out_indices"] = tuple(i for i, stride in enumerate(reductions) if stride in STRIDES)
            net = timm.create_model(name, **options)
            if weights not in ("imagenet", "none"):
                _load(net, Path(weights))
        except UserError:
            raise
        except Exception as error:  # models and downloads raise errors of any type
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"the timm model {name} at {self.img_size} pixels cannot be made: {reason}") from error
        return net

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Feature maps (B, C_l, H_l, H_l) of images `x` (B, 3, S, S) in [0, 1], finest first, without gradient."""
        with torch.no_grad():
            return tuple(self.net((x - self.mean) / self.std))


def _load(net: nn.Module, path: Path) -> None:
    """Loads a state dict with timm's names. Further tensors, such as the classifier's, are ignored."""
    state = load_state_dict(path)
    if hasattr(net, "model") and hasattr(net.model, "patch_embed"):  # a vision transformer: resample its positions
        state = sys.modules[type(net.model).__module__].checkpoint_filter_fn(state, net.model)
    names = {name: _timm_name(name, state) for name in net.state_dict()}
    missing = sorted(name for name, timm_name in names.items() if timm_name not in state)
    if missing:
        raise UserError(f"weights {path} are those of another model: {len(missing)} are missing, e.g. {missing[0]}")
    net.load_state_dict({name: state[timm_name] for name, timm_name in names.items()})


def _block_indices(blocks: str, depth: int) -> tuple[int, ...]:
    """The indices of the blocks that the text after BLOCKS names, for a vision transformer of `depth` blocks.

    An empty text names the last block.

    Raises:
        UserError: the text is neither UPPER nor SPREAD nor numbers of blocks.
    """
    if not blocks:
        return (depth - 1,)
    if blocks == UPPER:
        return tuple(range(depth // 2, depth))
    if blocks == SPREAD:
        return SPREAD_BLOCKS.get(depth) or tuple(dict.fromkeys(depth * block // 12 for block in SPREAD_BLOCKS[12]))
    indices = tuple(int(number) if number.isdecimal() else depth for number in blocks.split(","))
    if max(indices) >= depth or list(indices) != sorted(set(indices)):
        raise UserError(
            f"no blocks {blocks!r}: give {UPPER}, {SPREAD}, or ascending numbers from 0 to {depth - 1}, as in 3,5,8"
        )
    return indices


def _timm_name(name: str, state: dict) -> str:
    """The name of a features-only model's tensor in a state dict of the whole model; `name` if it is not there."""
    plain = name.removeprefix("model.")
    first, dot, rest = plain.partition(".")
    split = re.sub(r"_(\d+)", r".\1", first) + dot + rest  # stages_0.blocks is stages.0.blocks there
    return next((candidate for candidate in (name, plain, split) if candidate in state), name)


def own_img_size(name: str) -> int:
    """The default input size of a model in pixels; UserError as TimmFeatures."""
    return _config(timm_library(), name.partition(BLOCKS)[0])["input_size"][-1]


def _config(timm: object, name: str) -> dict:
    """Input size and normalisation of a model; UserError if it does not exist."""
    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:5])
        raise UserError(f"timm has no model {name}" + (f"; similar: {similar}" if similar else ""))
    return timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())


def timm_library() -> object:
    """The package timm; UserError if it is not installed."""
    if find_spec("timm") is None:
        raise UserError("the models of timm need the package timm: pip install -r requirements.txt")
    import timm
    import timm.data

    return timm
