"""Files that are whole or absent, tensors without code, digests. Knows where the project lies."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from utils.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a name beside `path` to write to; the file takes its final name only when it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """`content` as indented JSON; NaN and infinity are refused, they are not JSON."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def load_tensors(path: Path, what: str) -> object:
    """A torch file's tensors and plain values, on the CPU. Nothing in the file is executed.

    Raises:
        UserError: not a torch file, damaged, or holding anything but tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damage leads to: pickle, zip, EOF, key and runtime errors
        raise UserError(
            f"{what} {path} cannot be read as a torch file of tensors: it is damaged, not a torch file (a saved web "
            f"page?), or holds objects that could run code ({type(error).__name__})"
        ) from error


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def digest(content: object) -> str:
    """SHA-256 of plain values, in hexadecimal."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
