"""Detector files: the state of a detector, tensors and plain values, as one file."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from models.networks import scoring_network
from models.stn import STNResNet, drop_heads
from scorers.base import Scorer
from scorers.registry import SCORERS, make_scorer
from utils.choices import RELEASE_BACKBONE
from utils.errors import UserError
from utils.files import load_tensors

HEADER = {"format": "RegAD detector", "version": 5}
READABLE = (3, 4, 5)  # versions; 3: one threshold
FIRST_READABLE = {"positions": 5, "combined": 5}  # by scorer, where fits have changed since
TYPES = {"origin": dict, "document": dict, "learned": dict, "support_digests": list, "min_area": int | float}
ID_LENGTH = 12  # hexadecimal digits of a detector's identity


def read_state(path: Path) -> dict:
    """The state in a detector file. Verifies the checksums of the archive, which torch does not do.

    Raises:
        UserError: the file is missing, damaged, not a detector, or of another version.
    """
    if not path.is_file():
        raise UserError(f"no detector file {path}; predict.py saves one")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile:
        damaged = path.name
    if damaged:
        raise UserError(f"detector {path} is damaged or not a detector (checksum of {damaged})")
    state = load_tensors(path, "detector")
    if not isinstance(state, dict) or state.get("format") != HEADER["format"]:
        raise UserError(f"{path} is not a detector (a checkpoint or support set?)")
    if str(state.get("version")) not in map(str, READABLE):
        raise UserError(f"detector {path} has version {state.get('version')}, this program supports {READABLE}")
    if int(state["version"]) < FIRST_READABLE.get(str(state.get("scorer")), min(READABLE)):
        raise UserError(f"detector {path} has an earlier scorer {state['scorer']}: fit a new one")
    if wrong := [name for name, kind in TYPES.items() if name in state and not isinstance(state[name], kind)]:
        raise UserError(f"detector {path} is incomplete or inconsistent (the type of {', '.join(wrong)})")
    return state


def identity(scoring_state: dict) -> str:
    """A short hash of the tensors and plain values that scores depend on.

    Result files name detectors by it, so it must not change from version to version.
    """
    plain, tensors = {}, {}
    for name, value in scoring_state.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            tensors |= {f"{name} {key}": tensor for key, tensor in value.items()}
        elif name != "region":
            plain[name] = value
    hashed = hash_tensors(tensors)
    hashed.update(json.dumps(plain | ({} if "region" in tensors else {"region": None}), sort_keys=True).encode())
    return hashed.hexdigest()[:ID_LENGTH]


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> hashlib._Hash:
    """SHA-256 of the names, types, shapes and values of tensors."""
    hashed = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        hashed.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        hashed.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hashed


def stored_network(state: dict) -> nn.Module:
    """The network of a state, with its weights, in eval mode."""
    backbone, size = state.get("backbone", RELEASE_BACKBONE), state["img_size"]
    network = scoring_network(backbone, state["stn_mode"], size, None, "none")
    if isinstance(network, STNResNet):
        drop_heads(network, state["network"])
    network.load_state_dict(state["network"])
    return network.eval()


def stored_scorer(state: dict, given: str | Scorer | None) -> Scorer:
    """The scorer of a state: the registered one, or the given one, whose name must match."""
    name = state["scorer"]
    if given is None:
        if name not in SCORERS:
            raise UserError(f"the detector needs its scorer {name} as FILE.py:CLASS", options=("scorer",))
        return make_scorer(name)
    scorer = make_scorer(given) if isinstance(given, str) else given
    if scorer.name != name:
        raise UserError(f"the detector was made with the scorer {name}, not {scorer.name}; fit a new detector")
    return scorer
