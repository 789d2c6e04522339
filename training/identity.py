"""What identifies a training run: its arguments and the content of its files, not how their paths are spelled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from datasets.images import FULL_BITS
from models.stn import RELEASE_BACKBONE
from scorers.registry import RELEASE_SCORER
from utils.errors import UserError
from utils.files import sha256

# Arguments that runs of earlier versions do not name, with the values that those had.
ADDED_LATER = {"scorer": [RELEASE_SCORER], "backbone": RELEASE_BACKBONE, "bits": FULL_BITS}
# What earlier versions did not store at all. A run of theirs takes the value of the first call that resumes it.
UNKNOWN_EARLIER = ("compile", "sources", "images", "scored")
FILE_ARGUMENTS = ("weights", "episodes", "scorer")  # their values may be paths; a scorer is FILE.py:CLASS
DIGESTS = {  # entries that are digests -> what they are of
    "pictures": "names of source images",
    "images": "source images (their content has changed)",
    "scored": "test images, masks or support images for the choice of the epoch",
}
SHOWN_LETTERS = 19  # of a file's digest in a message, with its prefix


def identified(arguments: Mapping) -> dict:
    """The arguments with the SHA-256 of files in place of their paths. Values that name no file stay as they are."""
    return {name: _content(value) if name in FILE_ARGUMENTS else value for name, value in arguments.items()}


def _content(value: object) -> object:
    if isinstance(value, list):
        return [_content(item) for item in value]
    if not isinstance(value, str):
        return value
    file, colon, name = value.rpartition(":")  # FILE.py:CLASS
    for path, ending in ((value, ""), (file, colon + name)):
        if path and Path(path).is_file():
            return f"sha256:{sha256(Path(path))}{ending}"
    return value


def require_same(file: Path, stored: Mapping, current: Mapping) -> None:
    """Compares what identifies the run of `file` with what identifies this call, entry by entry of `current`.

    Raises:
        UserError: they differ.
    """
    stored = identified({**ADDED_LATER, **stored})
    for name, value in current.items():
        if stored.get(name) == value or (name in UNKNOWN_EARLIER and name not in stored):
            continue
        if name in DIGESTS:
            difference = f"other {DIGESTS[name]}"
        else:
            difference = f"{name} {_shown(stored.get(name))}, not {_shown(value)}"
        raise UserError(
            f"the run of {file} has {difference}; give the same arguments and data, or start again with --overwrite"
        )


def _shown(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return value[:SHOWN_LETTERS] if isinstance(value, str) and value.startswith("sha256:") else str(value)
