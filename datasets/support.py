"""Support sets: the K normal images of each round as tensors, from a file, a manifest's names or a draw.

File: <support_path>/<category>/<shot>_<rounds>.pt, a list of `rounds` tensors (K, 3, S, S), float32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.images import read_image
from datasets.manifest import (
    DRAW_SEED,
    Manifest,
    category_manifest,
    draw_from_folder,
    load_manifest,
    training_files,
    verify,
    with_hashes,
)
from datasets.mvtec import list_train_images
from utils.errors import UserError
from utils.files import load_tensors, sha256, whole_file
from utils.flags import DEFAULT_SUPPORT_PATH
from utils.records import VERSION

NEAREST_TOLERANCE = 4.0  # of 255, mean difference: allows another decoder or a JPEG copy, not another image


def support_file(support_path: Path, category: str, shot: int, rounds: int) -> Path:
    """Where the release keeps a support set (its code, not its README)."""
    return support_path / category / f"{shot}_{rounds}.pt"


class SupportRounds(NamedTuple):
    """The support images of every round, and where they come from.

    images: per round (K, 3, S, S) in [0, 1]. names: per round the K file names, None where a .pt file does not say.
    source: a phrase for logs and records. file: what was read, if anything.
    """

    images: list[torch.Tensor]
    names: list[list[str]] | None
    source: str
    file: Path | None


def find_support_rounds(
    support_path: Path | None, folder: Path, shot: int, rounds: int, size: int, keep_aspect: bool = False
) -> SupportRounds:
    """The support set of the category in `folder`: the tensors under `support_path`, else a manifest's images.

    With None, those under DEFAULT_SUPPORT_PATH or, where nothing there fits, images drawn with DRAW_SEED.

    Raises:
        UserError: no support set, or one that does not fit, images missing, changed or damaged, or too few of them.
    """
    tensors = support_file(support_path or DEFAULT_SUPPORT_PATH, folder.name, shot, rounds)
    if tensors.is_file():
        return _stored_rounds(tensors, shot, rounds, size, keep_aspect)
    file = _find_manifest(tensors, shot, rounds)
    if file is None and support_path:
        load_support_rounds(tensors, shot, rounds, size)  # says what is missing and how it is made
    reason = f"there is no {tensors}"
    if file:
        manifest = load_manifest(file).part(shot, rounds)
        problems = verify(manifest, folder)
        if not problems:
            images = read_rounds(folder, manifest, size, keep_aspect)
            return SupportRounds(images, manifest.rounds, f"images named in {file}", file)
        if support_path or manifest.sha256:
            raise UserError(f"{file} does not fit the data, {len(problems)} problem(s), the first: {problems[0]}")
        reason = f"{file} is of other data: {problems[0]}"
    drawn = draw_from_folder(folder, shot, rounds, DRAW_SEED)
    source = f"drawn from {folder} with seed {DRAW_SEED} ({reason})"
    return SupportRounds(read_rounds(folder, drawn, size, keep_aspect), drawn.rounds, source, None)


def _find_manifest(tensors: Path, shot: int, rounds: int) -> Path | None:
    """The manifest beside where the tensors would be, or the category's: the first one that is large enough."""
    for file in (tensors.with_suffix(".json"), category_manifest(tensors.parent.parent, tensors.parent.name)):
        if file.is_file():
            manifest = load_manifest(file)
            if manifest.shot >= shot and len(manifest.rounds) >= rounds:
                return file
    return None


def _stored_rounds(file: Path, shot: int, rounds: int, size: int, keep_aspect: bool) -> SupportRounds:
    """The tensors, and their names if the manifest beside them is about this very file."""
    images = load_support_rounds(file, shot, rounds, size)
    beside = file.with_suffix(".json")
    manifest = load_manifest(beside) if beside.is_file() else None
    if manifest is None or manifest.tensors != sha256(file):
        return SupportRounds(images, None, f"{file} (names not known; make_support.py --from_pt finds them)", file)
    if manifest.keep_aspect != keep_aspect:
        made = "with" if manifest.keep_aspect else "without"
        raise UserError(f"support set {file} was made {made} --keep_aspect; remove it or give another --support_path")
    return SupportRounds(images, manifest.rounds, f"{file}, names in {beside.name}", file)


def load_support_rounds(path: Path, shot: int, rounds: int, size: int | None) -> list[torch.Tensor]:
    """The rounds of a support file, each (K, 3, S, S) in [0, 1]; every property is checked. size: None for any.

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
    size = size or content[0].shape[-1]
    for number, images in enumerate(content):
        if images.shape != (shot, 3, size, size):
            raise UserError(
                f"support set {path} is for another shot or size: round {number} has shape {tuple(images.shape)}, "
                f"--shot {shot} --img_size {size} need {(shot, 3, size, size)}"
            )
        if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
            raise UserError(f"support set {path}: round {number} is not made of floats between 0 and 1")
    return [images.float() for images in content]


def draw_support_images(category: Path, shot: int, rounds: int, seed: int) -> list[list[Path]]:
    """The training images of the category in the folder `category` for each round, see `draw_from_folder`."""
    drawn = draw_from_folder(category, shot, rounds, seed)
    files = training_files(category, drawn)
    return [[files[name] for name in names] for names in drawn.rounds]


def read_rounds(category: Path, manifest: Manifest, size: int, keep_aspect: bool = False) -> list[torch.Tensor]:
    """The images that a manifest names, per round (K, 3, S, S) in [0, 1]."""
    files = training_files(category, manifest)
    return [read_support_images([files[name] for name in names], size, keep_aspect) for names in manifest.rounds]


def read_support_images(paths: Sequence[Path], size: int, keep_aspect: bool = False) -> torch.Tensor:
    """Images as one round of a support set, (K, 3, S, S) in [0, 1]."""
    images = torch.from_numpy(_read_all(paths, size, keep_aspect))
    return images.permute(0, 3, 1, 2).contiguous().float() / 255


def _read_all(paths: Sequence[Path], size: int, keep_aspect: bool) -> np.ndarray:
    """(N, S, S, 3) uint8; Pillow decodes and resizes without the interpreter lock."""
    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(lambda path: read_image(path, size, keep_aspect), paths)))


def save_support_rounds(path: Path, rounds: list[torch.Tensor]) -> None:
    """Writes a support set in the release's format."""
    with whole_file(path) as aside:
        torch.save(rounds, aside)


def find_names(file: Path, folder: Path, keep_aspect: bool = False) -> tuple[Manifest, dict[str, float]]:
    """The names behind a tensor file, and the mean difference (of 255) of those that were not found bit for bit.

    An exact match comes first, else the training image nearest in mean difference, within NEAREST_TOLERANCE.

    Raises:
        UserError: not a support set, or a image that is like none of the training images.
    """
    content = load_tensors(file, "support set")
    first = content[0] if isinstance(content, list | tuple) and content else None
    if not isinstance(first, torch.Tensor) or first.ndim != 4:
        raise UserError(f"support set {file} is not a list of tensors (K, 3, S, S), one per round")
    rounds = load_support_rounds(file, len(first), len(content), first.shape[-1])
    paths = list_train_images(folder)
    images = _read_all(paths, first.shape[-1], keep_aspect)
    by_content = {image.tobytes(): index for index, image in reversed(list(enumerate(images)))}
    names, differences = [], {}
    for number, of_round in enumerate(rounds):
        found = [_most_alike(stored, images, by_content) for stored in of_round.permute(0, 2, 3, 1).numpy()]
        worst = max(difference for _, difference in found)
        if worst > NEAREST_TOLERANCE:
            raise UserError(
                f"round {number} of {file} holds a image that is none of {paths[0].parent}: the nearest differs by "
                f"{worst:.1f} of 255 on average, more than {NEAREST_TOLERANCE:.0f} are not taken for the same"
            )
        names.append([paths[index].name for index, _ in found])
        differences |= {paths[index].name: difference for index, difference in found if difference}
    origin = f"found in {file.name}: {len(differences)} image(s) as the nearest, all others bit for bit"
    shot, tool = len(first), f"regad {VERSION}"
    manifest = Manifest(folder.name, shot, None, origin, tool, sha256(file), keep_aspect, names, {})
    return with_hashes(manifest, folder), differences


def _most_alike(stored: np.ndarray, images: np.ndarray, by_content: dict[bytes, int]) -> tuple[int, float]:
    """The index of the image nearest to `stored` (S, S, 3) in [0, 1] and its mean difference of 255, 0 if equal."""
    levels = np.rint(stored * np.float32(255)).astype(np.uint8)
    index = by_content.get(levels.tobytes())
    if index is not None and (levels / np.float32(255) == stored).all():
        return index, 0.0
    differences = [float(np.abs(image / np.float32(255) - stored).mean()) * 255 for image in images]
    nearest = int(np.argmin(differences))
    return nearest, differences[nearest]
