"""Files that are complete or absent, tensor files read without running code, digests, and the project's folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from utils.choices import SAFETENSORS
from utils.errors import UserError, WriteError

NAME_LETTERS = 40  # of a file's name in that of its temporary file, which must not be longer than names may be
TEMPORARY = re.compile(r"\..*\.[0-9]+\.[0-9a-f]{8}\.tmp")  # the names that `temporary_name` gives
LEFTOVER_SECONDS = 24 * 3600  # no file is written for longer
_tidied: set[Path] = set()  # the folders in which this process has looked for leftovers
METADATA = "recipe"  # the entry of the metadata of a safetensors file that is ours
PROJECT_ROOT = Path(__file__).resolve().parent.parent


def require_writable(path: Path, flag: str, folder: bool = False) -> None:
    """Checks that the file `path`, or with `folder` a file in the folder `path`, can be written. Creates nothing.

    flag: the argument that gives the path, for the message. A command calls this before its work starts.

    Raises:
        UserError: permission is missing, the file system is read-only, or something else is in the place of the file
            or of a folder on the way to it.
    """
    try:
        _try_to_write(path, folder)
    except OSError as error:
        what = "cannot write to the folder" if folder else "cannot write the file"
        raise UserError(f"{what} {path} ({flag}): {error.strerror or error}") from error


def _try_to_write(path: Path, folder: bool) -> None:
    if not folder and _is_there(path) and not path.is_file():
        raise OSError("something else than a file is there")
    place = path if folder else path.parent
    while not _is_there(place):
        place = place.parent
    if not place.is_dir():
        raise OSError(f"{place} is not a folder")
    trial = place / temporary_name(path)  # as root, access rights say nothing: /proc, read-only file systems
    os.close(os.open(trial, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    trial.unlink()


def _is_there(path: Path) -> bool:
    """Whether there is anything, also a link to nothing. Raises OSError where nothing can be, as for too long names."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def temporary_name(path: Path) -> str:
    """A new name for a temporary file of `path`."""
    return f".{path.name[:NAME_LETTERS]}.{os.getpid()}.{secrets.token_hex(4)}.tmp"  # containers share process ids


@contextmanager
def whole_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path next to `path`. The file is renamed to `path` once it is complete and on the disk.

    After a fault, `path` is what it was before, and there is no temporary file. A killed process leaves one, which the
    next process removes that writes into the folder, a day later or more. durable: wait until the disk has the content;
    without it, a file that was just written can be empty after a power failure.

    Raises:
        WriteError: the disk is full, a permission is missing, or the like.
    """
    temporary = path.with_name(temporary_name(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as written:  # Windows flushes only files that are open for writing
            if durable:
                os.fsync(written.fileno())
        os.replace(temporary, path)
        _remove_leftovers(path)
    except (OSError, RuntimeError) as error:
        fault = _fault(error, {None, str(temporary), str(path), *map(str, path.parents)})
        if fault is None:
            raise
        raise WriteError(fault.errno, fault.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # it may never have been there
            temporary.unlink()


def _remove_leftovers(written: Path) -> None:
    """Removes the temporary files next to `written` that are LEFTOVER_SECONDS older; once per folder and process.

    All times are of the file system's clock, which other machines share. Process ids would say nothing there.
    """
    if written.parent in _tidied:
        return
    _tidied.add(written.parent)
    with suppress(OSError), os.scandir(written.parent) as entries:
        newest = written.stat().st_mtime - LEFTOVER_SECONDS
        for entry in entries:
            if TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(OSError):  # another process was faster
                    if entry.stat(follow_symlinks=False).st_mtime < newest:
                        os.unlink(entry.path)


def _fault(error: BaseException | None, places: set[str | None]) -> OSError | None:
    """The fault of writing to one of `places` that led to `error`; None if it has another cause.

    torch reports that its stream failed as a RuntimeError, whose context is what the stream raised.
    """
    while isinstance(error, RuntimeError):
        error = error.__context__
    is_fault = isinstance(error, OSError) and error.errno is not None
    return error if is_fault and {error.filename, error.filename2} <= places else None


def write_json(path: Path, content: dict) -> None:
    """Writes `content` as indented JSON. Raises ValueError for NaN and infinity, which JSON does not have."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file that several processes may share, in one write. OSError where it cannot be written."""
    with open(path, "ab", buffering=0) as stream:
        write_line(stream, line)


def write_line(stream: FileIO, line: str) -> None:
    """Writes a line to an unbuffered file in one write. OSError where it cannot be written, also where a part is."""
    content = line.encode() + b"\n"
    if stream.write(content) < len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(stream.name))


def save_tensors(path: Path, content: object) -> None:
    """Writes tensors and plain values as a torch file, whole or not at all."""
    with (
        whole_file(path) as temporary,
        open(temporary, "wb") as stream,
    ):  # torch hides why a path failed
        torch.save(content, stream)


def save_safetensors(path: Path, tensors: dict[str, torch.Tensor], recipe: dict) -> None:
    """Writes tensors as a safetensors file, with `recipe`, plain values, as JSON in its metadata."""
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        temporary.write_bytes(save(content, {"format": "pt", METADATA: json.dumps(recipe)}))


def load_tensors(path: Path, what: str) -> object:
    """The tensors and plain values of a torch file or a .safetensors file, on the CPU. No code in the file is run.

    Of a safetensors file: its tensors by name, and under METADATA what `save_safetensors` was given.

    Raises:
        UserError: the file is damaged, no torch file, or holds anything else than tensors and plain values.
    """
    if path.suffix == SAFETENSORS:
        try:
            with safe_open(path, "pt") as file:
                recipe = (file.metadata() or {}).get(METADATA)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            return tensors | ({METADATA: json.loads(recipe)} if recipe else {})
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{what} {path} cannot be read as a safetensors file: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage leads to errors of many types: pickle, zip, EOF, key, runtime
        named = re.search(r"GLOBAL (\S+)", str(error))
        objects = f": {named[1]}" if named else ""
        raise UserError(
            f"{what} {path} cannot be read as a torch file of tensors: it is damaged, not a torch file (a saved web "
            f"page?), or holds objects that could run code{objects} ({type(error).__name__})"
        ) from error


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a weights file.

    Raises:
        UserError: the file is missing, damaged, or something else.
    """
    if not path.is_file():
        raise UserError(
            f"no weights file {path}; weights are imagenet, none, or the path of a state dict", ("weights",)
        )
    state = load_tensors(path, "weights file")
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"weights file {path} is not a state dict (names -> tensors)")
    return state


def sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
