"""Files that are complete or absent, tensor files read without running code, digests, and the project's folder."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from utils.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`. The file is renamed to `path` once it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")  # containers share process ids
    try:
        yield aside
        with open(aside, "rb+") as written:  # Windows flushes only files that are open for writing
            os.fsync(written.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Writes `content` as indented JSON. Raises ValueError for NaN and infinity, which JSON does not have."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def save_tensors(path: Path, content: object) -> None:
    """Writes tensors and plain values as a torch file, whole or not at all."""
    with whole_file(path) as aside:
        torch.save(content, aside)


def load_tensors(path: Path, what: str) -> object:
    """The tensors and plain values of a torch file, on the CPU. No code in the file is run.

    Raises:
        UserError: the file is damaged, no torch file, or holds anything else than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage leads to errors of many types: pickle, zip, EOF, key, runtime
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
