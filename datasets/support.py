"""Support sets: the K normal pictures of each round, in the release's format.

File: <support_path>/<category>/<shot>_<rounds>.pt, a list of `rounds` tensors (K, 3, S, S), float32 in [0, 1].
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.images import read_image
from datasets.mvtec import list_images
from utils.utils import UserError, load_tensors, whole_file

DEFAULT_PATH = Path("./support_set")
DRAW_SEED = 0  # of support sets, unless another one is asked for


def support_file(support_path: Path, category: str, shot: int, rounds: int) -> Path:
    """Where the release keeps a support set (its code, not its README)."""
    return support_path / category / f"{shot}_{rounds}.pt"


class SupportRounds(NamedTuple):
    """The support pictures of every round, and where they come from.

    pictures: per round (K, 3, S, S) in [0, 1]. names: per round the K file names, None where a .pt file does not say.
    source: a phrase for logs and records. file: what was read, if anything.
    """

    pictures: list[torch.Tensor]
    names: list[list[str]] | None
    source: str
    file: Path | None


def find_support_rounds(support_path: Path | None, folder: Path, shot: int, rounds: int, size: int) -> SupportRounds:
    """The support set of the category in `folder`.

    With a `support_path`, the file there. With None, the file under DEFAULT_PATH or, where there is none, pictures
    drawn from train/good with DRAW_SEED.

    Raises:
        UserError: as `load_support_rounds` and `draw_support_images`.
    """
    file = support_file(support_path or DEFAULT_PATH, folder.name, shot, rounds)
    if support_path or file.is_file():
        return SupportRounds(load_support_rounds(file, shot, rounds, size), None, str(file), file)
    draws = draw_support_images(folder, shot, rounds, DRAW_SEED)
    source = f"drawn from {folder / 'train' / 'good'} with seed {DRAW_SEED} (there is no {file})"
    names = [[path.name for path in paths] for paths in draws]
    return SupportRounds([read_support_images(paths, size) for paths in draws], names, source, None)


def load_support_rounds(path: Path, shot: int, rounds: int, size: int) -> list[torch.Tensor]:
    """The rounds of a support file, each (K, 3, S, S) in [0, 1]; every property is checked.

    Raises:
        UserError: missing or damaged file, or one of other shot, rounds, size or value range.
    """
    if not path.is_file():
        raise UserError(
            f"no support set {path}; make it with: python make_support.py --obj {path.parent.name} --shots {shot} "
            f"--rounds {rounds} --img_size {size} --support_path {path.parent.parent} --data_path <data folder>"
        )
    content = load_tensors(path, "support set")
    if not isinstance(content, list | tuple) or not all(isinstance(item, torch.Tensor) for item in content):
        raise UserError(f"support set {path} is not a list of tensors, one per round")
    if len(content) != rounds:
        raise UserError(f"support set {path} has {len(content)} rounds, not {rounds}; give --inferences {len(content)}")
    for number, pictures in enumerate(content):
        if pictures.shape != (shot, 3, size, size):
            raise UserError(
                f"support set {path} is for another shot or size: round {number} has shape {tuple(pictures.shape)}, "
                f"--shot {shot} --img_size {size} need {(shot, 3, size, size)}"
            )
        if not pictures.is_floating_point() or not (pictures.min() >= 0 and pictures.max() <= 1):
            raise UserError(f"support set {path}: round {number} is not made of floats between 0 and 1")
    return [pictures.float() for pictures in content]


def draw_support_names(names: list[str], shot: int, round_number: int, seed: int, category: str) -> list[str]:
    """K distinct names for one round. A round's 2 pictures are the first 2 of its 8.

    Names are ordered by the SHA-256 of "seed/category/round/name", so a draw is the same on every machine and version.
    """

    def key(name: str) -> bytes:
        return hashlib.sha256(f"{seed}/{category}/{round_number}/{name}".encode()).digest()

    return sorted(names, key=key)[:shot]


def draw_support_images(category: Path, shot: int, rounds: int, seed: int) -> list[list[Path]]:
    """The pictures of `category`/train/good for each round, see `draw_support_names`.

    Raises:
        UserError: fewer pictures than `shot`.
    """
    images = {path.name: path for path in list_images(category / "train" / "good")}
    if len(images) < shot:
        raise UserError(
            f"{category / 'train' / 'good'} has {len(images)} picture(s), {shot} are needed for --shots {shot}"
        )
    draws = (draw_support_names(list(images), shot, number, seed, category.name) for number in range(rounds))
    return [[images[name] for name in names] for names in draws]


def read_support_images(paths: list[Path], size: int) -> torch.Tensor:
    """Pictures as one round of a support set, (K, 3, S, S) in [0, 1]."""
    pictures = np.stack([read_image(path, size) for path in paths])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float() / 255


def save_support_rounds(path: Path, rounds: list[torch.Tensor]) -> None:
    """Writes a support set in the release's format."""
    with whole_file(path) as aside:
        torch.save(rounds, aside)
