"""Manifests: JSON files with the names of a support set's images and the SHA-256 of the image files.

<support_path>/<category>/<shot>_<rounds>.json   one support set, next to its tensors
<support_path>/manifests/<category>.json         all support sets of a category: draws are nested, so the first K names
                                                 of the first R rounds are the K-shot set of R rounds
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from datasets.images import FULL_BITS
from datasets.layouts import short_name
from datasets.mvtec import list_train_images
from utils.choices import BIT_DEPTHS
from utils.errors import UserError
from utils.files import sha256, write_json
from utils.records import VERSION
from utils.text import read_text

TOOL = f"regad {VERSION}"


class Manifest(NamedTuple):
    """The images of a support set by name, with what is known of their files. Entries with defaults are optional."""

    category: str
    shot: int  # images per round
    rounds: list[list[str]]  # file names in the category's training folder
    seed: int | None = None  # of the draw; None where the images were chosen elsewhere
    origin: str = "not stated"  # a sentence that says how the images were chosen
    tool: str = "not stated"  # name and version of the program
    tensors: str | None = None  # SHA-256 of the .pt file with these images
    keep_aspect: bool | None = None  # whether the images in the .pt file are padded
    bits: int = FULL_BITS  # depth by which 16-bit images in the .pt file are scaled
    sha256: dict[str, str] = {}  # by file name; empty where the manifest was written without the data  # noqa: RUF012

    def names(self) -> list[str]:
        """The names in all rounds, without repetitions, sorted."""
        return sorted({name for of_round in self.rounds for name in of_round})

    def unverified(self) -> str:
        """A phrase on the images whose content cannot be verified, as they have no SHA-256; empty if all have one."""
        names = self.names()
        lacking = [name for name in names if name not in self.sha256]
        return f"{len(lacking)} of {len(names)} without a SHA-256: their content is not verified" if lacking else ""

    def part(self, shot: int, rounds: int) -> Manifest:
        """The support set of the first `shot` names of the first `rounds` rounds."""
        part = self._replace(shot=shot, rounds=[names[:shot] for names in self.rounds[:rounds]])
        hashes = {name: self.sha256[name] for name in part.names() if name in self.sha256}
        return part._replace(sha256=hashes, tensors=None)


def category_manifest(support_path: Path, category: str) -> Path:
    """The path of the manifest of all support sets of a category."""
    return support_path / "manifests" / f"{category}.json"


def draw_manifest(category: str, names: Sequence[str], shot: int, rounds: int, seed: int) -> Manifest:
    """A manifest of rounds drawn from `names`, without hashes.

    A round has the first `shot` names in the order of the SHA-256 of "seed/category/round/name". Draws are nested (the
    2-shot set of a round is the first 2 names of its 8-shot set) and the same on every machine.
    """

    def key(number: int, name: str) -> bytes:
        text = f"{seed}/{category}/{number}/{name}"
        return hashlib.sha256(text.encode(errors="surrogatepass")).digest()  # a file name may not be valid UTF-8

    drawn = [sorted(names, key=partial(key, number))[:shot] for number in range(rounds)]
    origin = f"drawn from {len(names)} images in the order of the SHA-256 of seed/category/round/name"
    return Manifest(category, shot, drawn, seed, origin, TOOL)


def draw_from_folder(category: Path, shot: int, rounds: int, seed: int) -> Manifest:
    """A manifest of rounds drawn from the training images in the category folder `category`, without hashes.

    Raises:
        UserError: the category has fewer training images than `shot`.
    """
    images = list_train_images(category)
    if len(images) < shot:
        raise UserError(f"{images[0].parent} has {len(images)} image(s), {shot} are needed", ("shots", "shot"))
    return draw_manifest(category.name, [short_name(path) for path in images], shot, rounds, seed)


def training_files(category: Path, manifest: Manifest) -> dict[str, Path]:
    """The training images in the category folder `category` that the manifest names, by name."""
    named = set(manifest.names())
    return {name: path for path in list_train_images(category) if (name := short_name(path)) in named}


def with_hashes(manifest: Manifest, category: Path) -> Manifest:
    """The manifest with the SHA-256 of the files in the category folder `category`."""
    return manifest._replace(sha256={name: sha256(path) for name, path in training_files(category, manifest).items()})


def verify(manifest: Manifest, category: Path) -> list[str]:
    """The differences between the manifest and the training images in the category folder `category`, a sentence each.

    Names that are missing in the folder, files whose SHA-256 differs from the manifest's, and another category where
    no SHA-256 shows that the images are the same.
    """
    files = training_files(category, manifest)
    is_other = manifest.category != category.name and manifest.unverified()
    other = [f"it is of the category {manifest.category}, not {category.name}"] if is_other else []
    missing = [
        f"{name} is not among the training images of {category}" for name in manifest.names() if name not in files
    ]
    changed = [
        f"{path} has changed: its SHA-256 is not the one in the manifest"
        for name, path in files.items()
        if name in manifest.sha256 and sha256(path) != manifest.sha256[name].lower()
    ]
    return other + missing + changed


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Writes the manifest as JSON."""
    write_json(path, manifest._asdict())


def load_manifest(path: Path) -> Manifest:
    """Reads a manifest that `save_manifest` wrote, or that was written by hand with the required entries.

    Raises:
        UserError: the file is missing or no manifest, a round has another number of names than `shot`, or a name is a
            path or occurs twice in a round.
    """
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the manifest {path}: {' '.join(str(error).split())}") from error
    try:
        manifest = Manifest(**content)
    except TypeError as error:
        needed = [name for name in Manifest._fields if name not in Manifest._field_defaults]
        raise UserError(
            f"cannot read the manifest {path}: it needs the entries {', '.join(needed)}, and may have "
            f"{', '.join(Manifest._field_defaults)}"
        ) from error
    if not _is_sound(manifest):
        raise UserError(
            f"manifest {path} needs a list of file names per round, the number `shot`, and where they are given "
            f"`sha256` of names to digests, `bits` ({', '.join(map(str, BIT_DEPTHS))}) and `keep_aspect` (true, false)"
        )
    for number, names in enumerate(manifest.rounds):
        if len(names) != manifest.shot:
            raise UserError(f"manifest {path} has {manifest.shot} shots, but its round {number} has {len(names)}")
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"manifest {path} has {twice} twice in round {number}")
    return manifest


def _is_sound(manifest: Manifest) -> bool:
    """Whether all entries have the right types and every name is a plain file name."""
    rounds, hashes = manifest.rounds, manifest.sha256
    if not (isinstance(rounds, list) and rounds and all(isinstance(names, list) for names in rounds)):
        return False
    if not (isinstance(hashes, dict) and type(manifest.shot) is int and manifest.shot > 0):  # not a bool
        return False
    if manifest.bits not in BIT_DEPTHS or manifest.keep_aspect not in (None, False, True):
        return False
    names = [name for of_round in rounds for name in of_round]
    return all(isinstance(text, str) for text in (*names, *hashes.values(), manifest.category)) and all(
        name and Path(name).name == name for name in names
    )
