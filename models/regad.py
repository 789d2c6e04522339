"""RegAD's three networks as one module, checkpoints in the release's format, and initial weights of the backbone."""

from __future__ import annotations

import functools
import re
import textwrap
from pathlib import Path

import torch
from torch import nn
from torch.hub import load_state_dict_from_url
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from losses.norm_loss import registration_loss
from models.siamese import Encoder, Predictor
from models.stn import BACKBONES, STN_MODES, STNResNet
from utils.choices import RELEASE_BACKBONE, SAFETENSORS
from utils.config import recorded
from utils.errors import UserError, require_packages
from utils.files import METADATA, is_state_dict, load_state_dict, load_tensors, save_safetensors

CHECKPOINT_PARTS = {"STN": "stn", "ENC": "encoder", "PRED": "predictor"}  # key in the file -> attribute of RegAD
RECIPE = METADATA  # a further key in the checkpoints of train.py; the release's loader ignores it
HUB_ADDRESS = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")  # repository, and branch, tag or commit
HUB_FILE = "model.safetensors"  # in each repository
WEIGHTS_URL = "https://download.pytorch.org/models/"  # of torchvision
REASON_LETTERS = 200  # largest length of torch's reason why a checkpoint does not fit
TRUNK_LAYERS = ("conv1", "bn1", "layer1", "layer2", "layer3")  # the layers of a ResNet in the backbone


class RegAD(nn.Module):
    """Backbone with spatial transformers (`stn`), encoder and predictor. Scoring uses the backbone only."""

    def __init__(self, stn_mode: str = "rotation_scale", img_size: int = 224, backbone: str = RELEASE_BACKBONE) -> None:
        super().__init__()
        self.stn_mode, self.img_size, self.backbone = stn_mode, img_size, backbone
        self.stn = STNResNet(stn_mode, img_size, backbone)
        channels = BACKBONES[backbone].channels[-1]
        self.encoder = Encoder(channels)
        self.predictor = Predictor(channels)

    def forward(self, query: torch.Tensor, support: torch.Tensor, each: bool = False) -> torch.Tensor:
        """The registration loss, a scalar in [-1, 1] (RegAD section 3.2).

        `query` (B, 3, S, S) and `support` (B, K, 3, S, S) are images with values in [0, 1]. Queries and support images
        pass through the backbone separately, with separate batch-norm statistics. The query is compared with the mean
        of the registered maps of its K support images (release behaviour), or with `each` with every one of them.
        """
        query_map = self.stn(query).maps[-1]
        support_map = self.stn(support.flatten(0, 1)).maps[-1]  # (B K, C, H, W)
        if not each:
            support_map = support_map.unflatten(0, support.shape[:2]).mean(dim=1)
        z_query, z_support = self.encoder(query_map), self.encoder(support_map)
        p_query, p_support = self.predictor(z_query), self.predictor(z_support)
        if each:
            p_query, z_query = (maps.repeat_interleave(support.shape[1], dim=0) for maps in (p_query, z_query))
        return registration_loss(p_query, z_query, p_support, z_support)


def checkpoint(model: RegAD, recipe: dict) -> dict:
    """A checkpoint in the release's format, with the further entry `recipe`: plain values that describe the training.

    The weights are copies on the CPU: further training does not change them.
    """
    parts = {}
    for part, attribute in CHECKPOINT_PARTS.items():
        state = getattr(model, attribute).state_dict()
        parts[part] = {name: value.detach().to("cpu", copy=True) for name, value in state.items()}
    return {**parts, RECIPE: recipe}


def save_portable(path: Path, content: dict) -> None:
    """Writes the result of `checkpoint` as a safetensors file, with tensors named STN.conv1.weight and so on."""
    tensors = {f"{part}.{name}": value for part in CHECKPOINT_PARTS for name, value in content[part].items()}
    save_safetensors(path, tensors, content[RECIPE])


def read_checkpoint(path: Path) -> object:
    """The content of a .pt or .safetensors file; of a checkpoint, as `checkpoint` returns it.

    Raises:
        UserError: the file cannot be read.
    """
    content = load_tensors(path, "checkpoint")
    if path.suffix != SAFETENSORS:
        return content
    recipe, parts = content.pop(RECIPE, {}), {}
    for name, value in content.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    return parts | {RECIPE: recipe}


def selection(path: Path) -> tuple[str, int | None]:
    """The rule that selected the weights of a checkpoint (`--select` of train.py), and their epoch, None if unknown.

    The rule of the release's checkpoints is `best`, by the target's test labels.

    Raises:
        UserError: the file cannot be read.
    """
    content = read_checkpoint(path)
    recipe = content.get(RECIPE) if isinstance(content, dict) else None
    recipe = recipe if isinstance(recipe, dict) else {}
    ending = path.stem.rpartition("_")[2]
    rule = ending if ending in ("last", "source") else str(recorded(recipe).get("select", "best"))
    return rule, recipe.get("epoch")


def local_file(address: Path) -> Path:
    """The path itself, or the file of an address on the hub, which huggingface_hub downloads and caches.

    Raises:
        UserError: the address is malformed, huggingface_hub is not installed, or the file cannot be downloaded.
    """
    text = address.as_posix()
    if not text.startswith("hf:"):
        return address
    match = HUB_ADDRESS.fullmatch(text)
    if match is None:
        raise UserError(f"{text} is not an address on the hub: hf:OWNER/NAME[@REVISION]", ("checkpoint",))
    require_packages("huggingface_hub", requirements=None)
    from huggingface_hub import hf_hub_download  # slow to import
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(match[1], HUB_FILE, revision=match[2]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot get {HUB_FILE} of {text} from the hub: {reason}", ("checkpoint",)) from error


def load_checkpoint(path: Path, stn_mode: str, img_size: int, backbone: str = RELEASE_BACKBONE) -> RegAD:
    """The networks of a checkpoint in the release's format, {'STN', 'ENC', 'PRED'}. All names and shapes must match.

    path: a .pt or .safetensors file, or an address on the hub, see `local_file`.

    Raises:
        UserError: the file is missing, damaged or no checkpoint, or has another backbone, STN mode or image size.
    """
    path = local_file(path)
    content = read_checkpoint(path)
    if not isinstance(content, dict) or not all(is_state_dict(content.get(part)) for part in CHECKPOINT_PARTS):
        raise UserError(
            f"checkpoint {path} is not RegAD's: it lacks one of the entries {', '.join(CHECKPOINT_PARTS)}, each with "
            "plain tensors by name, weights in floating point"
        )
    recipe = content.get(RECIPE)
    resolved = recipe.get("resolved") if isinstance(recipe, dict) else None
    trained = recorded(content) | (resolved if isinstance(resolved, dict) else {})
    for name, requested in (("stn_mode", stn_mode), ("img_size", img_size)):
        if trained.get(name) not in (requested, None):
            raise UserError(f"checkpoint {path} was trained with {name} {trained[name]}, not {requested}", (name,))
    for part in CHECKPOINT_PARTS:
        consume_prefix_in_state_dict_if_present(content[part], "module.")  # of torch's DataParallel
    _reject_other_backbone(path, content["STN"], backbone)
    _reject_other_mode(path, content["STN"], stn_mode)
    model = RegAD(stn_mode, img_size, backbone)
    for part, attribute in CHECKPOINT_PARTS.items():
        try:
            getattr(model, attribute).load_state_dict(content[part], strict=True)
        except RuntimeError as error:
            reason = textwrap.shorten(str(error).splitlines()[1], REASON_LETTERS)
            raise UserError(
                f"checkpoint {path} does not fit the STN mode {stn_mode} at {img_size} pixels: {part}, {reason}",
                ("stn_mode", "img_size"),
            ) from error
    return model


def _reject_other_backbone(path: Path, stn: dict, backbone: str) -> None:
    """Raises UserError if the layers in a checkpoint are those of another backbone."""
    matching = [name for name in BACKBONES if _layer_shapes(name) == _trunk_shapes(stn)]
    if matching and backbone not in matching:
        raise UserError(f"checkpoint {path} has the backbone {matching[0]}, not {backbone}", ("backbone",))


@functools.cache
def _layer_shapes(backbone: str) -> dict[str, torch.Size]:
    """Names and shapes of the layers of a backbone, without the STNs. On the meta device nothing is allocated."""
    with torch.device("meta"):
        return _trunk_shapes(BACKBONES[backbone].build().state_dict())


def _trunk_shapes(state: dict) -> dict[str, torch.Size]:
    """Names and shapes of the ResNet's tensors in a state dict."""
    return {
        name: value.shape
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
        and name.split(".")[0] in TRUNK_LAYERS
        and not name.endswith("num_batches_tracked")
    }


def _reject_other_mode(path: Path, stn: dict, stn_mode: str) -> None:
    """Raises UserError if a checkpoint belongs to another STN mode, as far as this can be inferred.

    The release does not store the mode, and modes with equally many warp parameters load without an error. Three signs
    are checked: the mode in the file's name, the number of warp parameters, and the last bias of the first STN, which
    starts as the identity of its mode and stays near it. Translation and shear have the same identity and cannot be
    distinguished.
    """
    named = re.fullmatch(
        rf".+_\d+_({'|'.join(STN_MODES)})(?:_(?:{'|'.join(BACKBONES)}))?_(?:model|last)\.(?:pt|safetensors)", path.name
    )
    if named and named[1] != stn_mode:
        raise UserError(f"checkpoint {path} is named after the STN mode {named[1]}, not {stn_mode}", ("stn_mode",))
    bias = stn.get("stn1.fc.2.bias")
    if not isinstance(bias, torch.Tensor):
        return  # load_state_dict names the missing tensor
    offsets = {
        name: (bias - torch.tensor(mode.identity)).abs().max().item()
        for name, mode in STN_MODES.items()
        if len(mode.identity) == bias.numel()
    }
    if stn_mode not in offsets:
        likely = " or ".join(offsets) or "unknown"
        raise UserError(
            f"checkpoint {path} has {bias.numel()} warp parameters: its STN mode is {likely}, not {stn_mode}",
            ("stn_mode",),
        )
    nearest = min(offsets, key=offsets.get)
    if offsets[nearest] < offsets[stn_mode] and offsets[stn_mode] > 0.5:  # identities differ by 1 in some parameter
        raise UserError(
            f"the warp parameters of checkpoint {path} indicate STN mode {nearest}, not {stn_mode}", ("stn_mode",)
        )


def untrained(
    weights: str, stn_mode: str = "rotation_scale", img_size: int = 224, backbone: str = RELEASE_BACKBONE
) -> RegAD:
    """Networks before registration training: backbone from `weights`, identity warps, random encoder and predictor.

    `weights`: "imagenet" (torchvision's file, downloaded once), "none" (random), or the path of a state dict of that
    ResNet, complete or up to layer3.

    Raises:
        UserError: the weights cannot be downloaded or read, or are those of another backbone.
    """
    model = RegAD(stn_mode, img_size, backbone)
    if weights != "none":
        state = _imagenet_state(backbone) if weights == "imagenet" else load_state_dict(Path(weights))
        own, given = _layer_shapes(backbone), _trunk_shapes(state)
        other = [name for name in own | given if own.get(name) != given.get(name)]
        if other:
            raise UserError(f"weights {weights} are not those of a {backbone}: {len(other)} differ, e.g. {other[0]}")
        trunk = {name: value for name, value in state.items() if name.split(".")[0] in TRUNK_LAYERS}
        model.stn.load_state_dict(trunk, strict=False)
    return model


def _imagenet_state(backbone: str) -> dict[str, torch.Tensor]:
    url = WEIGHTS_URL + BACKBONES[backbone].weights
    try:
        return load_state_dict_from_url(url, progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network, no disk space, or another hash
        raise UserError(
            f"torchvision's ImageNet {backbone} cannot be downloaded ({error}); download {url} on another machine and "
            "give the file, or start from random weights (none)",
            ("weights",),
        ) from error
