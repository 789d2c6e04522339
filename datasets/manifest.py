"""Manifests: the names of a support set's images and the SHA-256 of their files, as a small JSON file.

<support_path>/<category>/<shot>_<rounds>.json   of one support set, beside its tensors
<support_path>/manifests/<category>.json         of many: draws are nested, so the first K names of the first R rounds
                                                 are the K-shot set of R rounds

python -m datasets.manifest      writes support_set/manifests/ for MVTec AD's names
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from datasets.mvtec import TRAINING_IMAGES, list_train_images
from utils.errors import UserError, run_command
from utils.files import sha256, whole_file
from utils.flags import DEFAULT_SUPPORT_PATH
from utils.records import VERSION

DRAW_SEED = 0  # of support sets, unless another one is asked for
PUBLISHED_SHOT, PUBLISHED_ROUNDS = 16, 10  # of the manifests in support_set/manifests/: they serve 1, 2, 4, 8, 16 shots


class Manifest(NamedTuple):
    """The images of a support set, by name, and what is known of their files."""

    category: str
    shot: int  # images per round
    seed: int | None  # of the draw; None: chosen elsewhere
    origin: str  # a sentence for people
    tool: str
    tensors: str | None  # SHA-256 of the .pt file with these images
    keep_aspect: bool | None  # how that file was made
    rounds: list[list[str]]  # file names in the category's training folder
    sha256: dict[str, str]  # of those files; {} where the data were not at hand

    def names(self) -> list[str]:
        """Every name once, sorted."""
        return sorted({name for of_round in self.rounds for name in of_round})

    def part(self, shot: int, rounds: int) -> Manifest:
        """The smaller set of fewer shots and rounds that this one holds."""
        part = self._replace(shot=shot, rounds=[names[:shot] for names in self.rounds[:rounds]])
        hashes = {name: self.sha256[name] for name in part.names() if name in self.sha256}
        return part._replace(sha256=hashes, tensors=None)


def category_manifest(support_path: Path, category: str) -> Path:
    """Where the manifest of all shots of a category lies."""
    return support_path / "manifests" / f"{category}.json"


def draw_support_names(names: Sequence[str], shot: int, round_number: int, seed: int, category: str) -> list[str]:
    """K distinct names for one round. A round's 2 images are the first 2 of its 8.

    Names are ordered by the SHA-256 of "seed/category/round/name", so a draw is the same on every machine and version.
    """

    def key(name: str) -> bytes:
        text = f"{seed}/{category}/{round_number}/{name}"
        return hashlib.sha256(text.encode(errors="surrogatepass")).digest()  # names need not be UTF-8

    return sorted(names, key=key)[:shot]


def draw_manifest(category: str, names: Sequence[str], shot: int, rounds: int, seed: int) -> Manifest:
    """A manifest of rounds drawn from `names`, without hashes."""
    drawn = [draw_support_names(names, shot, number, seed, category) for number in range(rounds)]
    origin = f"drawn from {len(names)} images in the order of the SHA-256 of seed/category/round/name"
    return Manifest(category, shot, seed, origin, f"regad {VERSION}", None, None, drawn, {})


def draw_from_folder(category: Path, shot: int, rounds: int, seed: int) -> Manifest:
    """A manifest of rounds drawn from the training images of the category in the folder `category`, without hashes.

    Raises:
        UserError: fewer images than `shot`.
    """
    images = list_train_images(category)
    if len(images) < shot:
        raise UserError(f"{images[0].parent} has {len(images)} image(s), {shot} are needed for --shots {shot}")
    return draw_manifest(category.name, [path.name for path in images], shot, rounds, seed)


def training_files(category: Path, manifest: Manifest) -> dict[str, Path]:
    """The training images of the category in the folder `category` that the manifest names, by name."""
    named = set(manifest.names())
    return {path.name: path for path in list_train_images(category) if path.name in named}


def with_hashes(manifest: Manifest, category: Path) -> Manifest:
    """The manifest with the SHA-256 of its files as they are now."""
    return manifest._replace(sha256={name: sha256(path) for name, path in training_files(category, manifest).items()})


def verify(manifest: Manifest, category: Path) -> list[str]:
    """What keeps the training images of the category from being the manifest's, a sentence each."""
    files = training_files(category, manifest)
    missing = [
        f"{name} is not among the training images of {category}" for name in manifest.names() if name not in files
    ]
    changed = [
        f"{path} is not the manifest's file of that name: its SHA-256 is another"
        for name, path in files.items()
        if name in manifest.sha256 and sha256(path) != manifest.sha256[name]
    ]
    return missing + changed


def save_manifest(path: Path, manifest: Manifest) -> None:
    """The manifest as JSON, a line for each round and each file."""
    content = {key: _json(value) for key, value in manifest._asdict().items()}
    content["rounds"] = _lines("[", [_json(names) for names in manifest.rounds], "]", indent=2)
    content["sha256"] = _lines("{", [f"{_json(k)}: {_json(v)}" for k, v in manifest.sha256.items()], "}", indent=2)
    with whole_file(path) as aside:
        entries = [f"{_json(key)}: {text}" for key, text in content.items()]
        aside.write_text(_lines("{", entries, "}", indent=1) + "\n", encoding="utf-8")


def _json(value: object) -> str:
    return json.dumps(value)


def _lines(start: str, entries: Sequence[str], end: str, indent: int) -> str:
    line = "\n" + " " * indent
    return start + ",".join(line + entry for entry in entries) + line[:-1] + end


def load_manifest(path: Path) -> Manifest:
    """A manifest as `save_manifest` writes it.

    Raises:
        UserError: missing, not a manifest, rounds of uneven length, a name that is a path or twice in a round.
    """
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"cannot read the manifest {path}: {' '.join(str(error).split())}") from error
    if not _is_sound(manifest):
        raise UserError(f"manifest {path} does not list plain file names per round, and SHA-256 of files by name")
    for number, names in enumerate(manifest.rounds):
        if len(names) != manifest.shot:
            raise UserError(f"manifest {path} is of {manifest.shot} shots, but its round {number} has {len(names)}")
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"manifest {path} has {twice} twice in round {number}")
    return manifest


def _is_sound(manifest: Manifest) -> bool:
    """Whether the entries have the right types; a name must not lead out of its folder."""
    rounds, hashes = manifest.rounds, manifest.sha256
    if not (isinstance(rounds, list) and rounds and all(isinstance(names, list) for names in rounds)):
        return False
    if not (isinstance(hashes, dict) and isinstance(manifest.shot, int) and manifest.shot > 0):
        return False
    names = [name for of_round in rounds for name in of_round]
    return all(isinstance(text, str) for text in (*names, *hashes.values(), manifest.category)) and all(
        name and Path(name).name == name for name in names
    )


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of datasets.manifest."""
    parser = argparse.ArgumentParser(prog="python -m datasets.manifest", description="Write MVTec AD's manifests.")
    parser.add_argument("--support_path", type=Path, default=DEFAULT_SUPPORT_PATH, help="its folder manifests")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Draws from the names that MVTec AD's training images have; `make_support.py --verify` adds the hashes."""
    args = get_args_parser().parse_args(argv)
    for category, count in TRAINING_IMAGES.items():
        names = [f"{number:03d}.png" for number in range(count)]
        file = category_manifest(args.support_path, category)
        save_manifest(file, draw_manifest(category, names, PUBLISHED_SHOT, PUBLISHED_ROUNDS, DRAW_SEED))
        print(f"wrote {file}")


if __name__ == "__main__":
    run_command(main)
