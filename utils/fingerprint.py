"""The fingerprint of a run, which identifies its results. Runs with equal fingerprints need not be repeated.

A fingerprint contains the settings that affect results, the SHA-256 of all inputs, and METHOD_VERSION. It does not
depend on the paths of files, nor on the text of the code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from utils.errors import UserError
from utils.files import sha256

# Raised by hand when a change of the code changes results; otherwise tests/test_fixture.py fails.
# 2: `combined` is a geometric mean; efficientnet_lite2 has 320 pixels; 16-bit colours are read with all bits;
# transparent parts are laid on black.
# 3: `positions` looks at windows, and `combined` divides by the level of an image; uncompressed TIFF turned by EXIF.
METHOD_VERSION = 3
DIGEST_LETTERS = 64  # length of a SHA-256 in hexadecimal


def fingerprint(settings: Mapping[str, object], inputs: Mapping[str, object]) -> dict:
    """The fingerprint of a run, for its record.

    settings: plain values, see `utils.config.Config.results_part`, with resolved values in place of `auto` or None.
    inputs: names of inputs (test images, weights, ...) and the digests of their content.
    """
    return {"method_version": METHOD_VERSION, "settings": dict(settings), "inputs": dict(inputs)}


def changes(stored: object, current: Mapping) -> list[str]:
    """Phrases on the entries in which the fingerprint `stored` in a record differs from the current one; [] if equal.

    A record without a fingerprint, as of version 0.1, differs.
    """
    if not isinstance(stored, Mapping) or not isinstance(stored.get("settings"), Mapping):
        return ["no fingerprint"]
    phrases = _changes({"method_version": stored.get("method_version")}, {"method_version": current["method_version"]})
    for entry in ("settings", "inputs"):
        phrases += _changes(stored.get(entry, {}), current[entry])
    return phrases


def _changes(before: Mapping, now: Mapping) -> list[str]:
    names = dict.fromkeys([*before, *now])
    return [_change(name, before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)]


def _change(name: str, before: object, now: object) -> str:
    are_short = all(not isinstance(value, dict) and len(str(value)) < DIGEST_LETTERS for value in (before, now))
    return f"{name} {before}, now {now}" if are_short else f"other {name.replace('_', ' ')}"


def digest(content: object) -> str:
    """SHA-256 of plain values, in hexadecimal."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class FileDigests:
    """SHA-256 of files. An object reads each file once, several at a time."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def of(self, files: Iterable[Path]) -> list[str]:
        """The SHA-256 of each file, in hexadecimal; UserError if one cannot be read."""
        files = list(files)
        unknown = sorted(set(files) - set(self._known))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter lock
            self._known.update(zip(unknown, pool.map(_sha256, unknown), strict=True))
        return [self._known[file] for file in files]

    def together(self, files: Sequence[Path]) -> str:
        """One digest of files with their names, independent of their folder and order."""
        return digest(sorted(zip((file.name for file in files), self.of(files), strict=True)))


def _sha256(file: Path) -> str:
    try:
        return sha256(file)
    except OSError as error:  # a folder, a dangling link, a missing permission
        raise UserError(f"cannot read the file {file}: {error.strerror}") from error
