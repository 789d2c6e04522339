"""Support sets: the K normal images of each round as tensors, read from a tensor file or a manifest, or drawn.

File: <support_path>/<category>/<shot>_<rounds>.pt, a list of `rounds` tensors (K, 3, S, S), float32 in [0, 1].
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.images import FULL_BITS, read_image, unit_range
from datasets.layouts import short_name
from datasets.manifest import (
    TOOL,
    Manifest,
    category_manifest,
    draw_from_folder,
    load_manifest,
    training_files,
    verify,
    with_hashes,
)
from datasets.mvtec import list_train_images
from utils.choices import DEFAULT_SUPPORT_PATH, DRAW_SEED
from utils.errors import UserError
from utils.files import is_plain, load_tensors, sha256

NEAREST_TOLERANCE = 4.0  # mean difference, of 255: another decoder or a JPEG copy is below it, another image above


def support_file(support_path: Path, category: str, shot: int, rounds: int) -> Path:
    """The path of a support set, as in the release's code (its README differs)."""
    return support_path / category / f"{shot}_{rounds}.pt"


class SupportRounds(NamedTuple):
    """The support images of every round, and their origin."""

    images: list[torch.Tensor]  # per round (K, 3, S, S) in [0, 1]
    names: list[list[str]] | None  # per round the K file names; None where a .pt file holds none
    source: str  # a phrase for logs and records
    file: Path | None  # the tensor file or manifest that was read; None for a draw


def find_support_rounds(
    support_path: Path | None,
    folder: Path,
    shot: int,
    rounds: int,
    size: int,
    keep_aspect: bool = False,
    bits: int = FULL_BITS,
) -> SupportRounds:
    """The support set of the category in `folder`: the tensors under `support_path`, else the images of a manifest.

    With `support_path` None, DEFAULT_SUPPORT_PATH is searched. If nothing there fits, the images are drawn with
    DRAW_SEED.

    Raises:
        UserError: no support set, a support set of another shot, size, aspect or bit depth, or images that are missing,
            changed, damaged or too few.
    """
    tensors = support_file(support_path or DEFAULT_SUPPORT_PATH, folder.name, shot, rounds)
    if tensors.is_file():
        return _stored_rounds(tensors, shot, rounds, size, keep_aspect, bits)
    file = _find_manifest(tensors, shot, rounds)
    if file is None and support_path:
        raise _missing(tensors, shot, rounds, size)
    reason = f"there is no {tensors}"
    if file:
        manifest = load_manifest(file).part(shot, rounds)
        problems = verify(manifest, folder)
        if not problems:
            images = read_rounds(folder, manifest, size, keep_aspect, bits)
            unverified = f" ({phrase})" if (phrase := manifest.unverified()) else ""
            return SupportRounds(images, manifest.rounds, f"images named in {file}{unverified}", file)
        if support_path or manifest.sha256:
            raise UserError(
                f"{file} does not match the images in {folder}: {len(problems)} problem(s), first: {problems[0]}"
            )
        reason = f"{file} belongs to other data: {problems[0]}"
    drawn = draw_from_folder(folder, shot, rounds, DRAW_SEED)
    source = f"drawn from {folder} with seed {DRAW_SEED} ({reason})"
    return SupportRounds(read_rounds(folder, drawn, size, keep_aspect, bits), drawn.rounds, source, None)


def _find_manifest(tensors: Path, shot: int, rounds: int) -> Path | None:
    """The manifest next to the path of the tensors, or that of the category: the first one that is large enough."""
    for file in (tensors.with_suffix(".json"), category_manifest(tensors.parent.parent, tensors.parent.name)):
        if file.is_file():
            manifest = load_manifest(file)
            if manifest.shot >= shot and len(manifest.rounds) >= rounds:
                return file
    return None


def _stored_rounds(file: Path, shot: int, rounds: int, size: int, keep_aspect: bool, bits: int) -> SupportRounds:
    """The rounds of a tensor file, with names where the manifest next to it holds the SHA-256 of this file."""
    images = load_support_rounds(file, shot, rounds, size)
    named = file.with_suffix(".json")
    manifest = load_manifest(named) if named.is_file() else None
    if manifest is None or manifest.tensors != sha256(file):
        return SupportRounds(images, None, f"{file} (names unknown; make_support.py can find them)", file)
    if manifest.keep_aspect != keep_aspect:
        made, asked = ("padded" if padded else "stretched" for padded in (manifest.keep_aspect, keep_aspect))
        raise UserError(f"support set {file} holds {made} images, not {asked} ones; create it again", ("keep_aspect",))
    if manifest.bits != bits:
        raise UserError(f"support set {file} was made for {manifest.bits} bits, not {bits}; create it again", ("bits",))
    return SupportRounds(images, manifest.rounds, f"{file}, names in {named.name}", file)


def _missing(path: Path, shot: int, rounds: int, size: int) -> UserError:
    """The error for a tensor file that does not exist; it names the command that makes the file."""
    category, support_path = shlex.quote(path.parent.name), shlex.quote(str(path.parent.parent))
    return UserError(
        f"no support set {path}; create it with: python make_support.py --obj {category} --shots {shot} "
        f"--rounds {rounds} --img_size {size} --support_path {support_path} --data_path <data folder>"
    )


def load_support_rounds(
    path: Path, shot: int | None = None, rounds: int | None = None, size: int | None = None
) -> list[torch.Tensor]:
    """The rounds of a tensor file, each (K, 3, S, S) float32 in [0, 1]. None: any shot, number of rounds or size.

    Raises:
        UserError: the file is missing or damaged, or differs in shot, number of rounds, size or value range.
    """
    if not path.is_file():
        raise _missing(path, shot, rounds, size) if shot else UserError(f"no support set {path}", ("from_pt",))
    content = load_tensors(path, "support set")
    if not isinstance(content, list | tuple) or not all(map(is_plain, content)):
        raise UserError(f"support set {path} is not a list of tensors, one per round")
    rounds = rounds or max(1, len(content))
    if len(content) != rounds:
        raise UserError(f"support set {path} has {len(content)} rounds, not {rounds}", ("inferences",))
    first = content[0].shape if content[0].ndim == 4 else (0, 0, 0, 0)
    expected = (shot or first[0], 3, size or first[2], size or first[2])
    for number, images in enumerate(content):
        if images.shape != expected:
            raise UserError(
                f"support set {path} is for another shot or size: round {number} has shape {tuple(images.shape)} "
                f"instead of {expected}",
                ("shot", "img_size"),
            )
        if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
            raise UserError(f"support set {path}: round {number} does not consist of floats between 0 and 1")
    return [images.detach().float().contiguous() for images in content]


def read_rounds(
    category: Path, manifest: Manifest, size: int, keep_aspect: bool = False, bits: int = FULL_BITS
) -> list[torch.Tensor]:
    """The images that a manifest names, read from the category folder: per round (K, 3, S, S) float32 in [0, 1]."""
    files = training_files(category, manifest)
    images = dict(zip(files, read_support_images(list(files.values()), size, keep_aspect, bits), strict=True))
    return [torch.stack([images[name] for name in of_round]) for of_round in manifest.rounds]


def read_support_images(
    paths: Sequence[Path], size: int, keep_aspect: bool = False, bits: int = FULL_BITS
) -> torch.Tensor:
    """Images as one round of a support set, (K, 3, S, S) float32 in [0, 1]."""
    images = torch.from_numpy(_read_all(paths, size, keep_aspect, bits))
    return unit_range(images.permute(0, 3, 1, 2).contiguous())


def _read_all(paths: Sequence[Path], size: int, keep_aspect: bool, bits: int) -> np.ndarray:
    """The images as (N, S, S, 3) uint8."""
    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without the interpreter lock
        return np.stack(list(pool.map(lambda path: read_image(path, size, keep_aspect, bits), paths)))


def find_names(
    file: Path, folder: Path, keep_aspect: bool = False, bits: int = FULL_BITS
) -> tuple[Manifest, dict[str, float]]:
    """A manifest of the training images in `folder` that a tensor file was made of.

    An image with equal values is taken, else the one with the smallest mean difference up to NEAREST_TOLERANCE. The
    second return value holds these mean differences (of 255) by name, without the exact matches.

    Raises:
        UserError: the file is no support set, or one of its images is not among the training images.
    """
    rounds = load_support_rounds(file)
    shot, size = rounds[0].shape[0], rounds[0].shape[-1]
    paths = list_train_images(folder)
    images = _read_all(paths, size, keep_aspect, bits)
    by_content = {image.tobytes(): index for index, image in reversed(list(enumerate(images)))}
    names, differences = [], {}
    for number, of_round in enumerate(rounds):
        nearest = [_most_alike(stored, images, by_content) for stored in of_round.permute(0, 2, 3, 1).numpy()]
        worst = max(difference for _, difference in nearest)
        if worst > NEAREST_TOLERANCE:
            raise UserError(
                f"round {number} of {file} holds an image that is not in {paths[0].parent}: the mean difference from "
                f"the nearest one is {worst:.1f} of 255, above {NEAREST_TOLERANCE:.0f}"
            )
        names.append([short_name(paths[index]) for index, _ in nearest])
        differences |= {short_name(paths[index]): difference for index, difference in nearest if difference}
    origin = f"found in {file.name}: {len(differences)} image(s) as the nearest, all others bit for bit"
    manifest = Manifest(folder.name, shot, names, None, origin, TOOL, sha256(file), keep_aspect, bits)
    return with_hashes(manifest, folder), differences


def _most_alike(stored: np.ndarray, images: np.ndarray, by_content: dict[bytes, int]) -> tuple[int, float]:
    """The index of the image nearest to `stored` (S, S, 3) in [0, 1], and its mean difference, of 255."""
    levels = np.rint(stored * np.float32(255)).astype(np.uint8)
    index = by_content.get(levels.tobytes())
    if index is not None and (levels / np.float32(255) == stored).all():
        return index, 0.0
    differences = [float(np.abs(image / np.float32(255) - stored).mean()) * 255 for image in images]
    nearest = int(np.argmin(differences))
    return nearest, differences[nearest]
