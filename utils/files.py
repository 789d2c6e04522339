"""Atomic writes, locks, tensor files that are read without running code, digests, and the project's folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from utils.choices import SAFETENSORS
from utils.errors import UserError, WriteError
from utils.naming import lock_file

NAME_LETTERS = 40  # letters of a file's name in that of its temporary file; file systems limit the length
TEMPORARY = re.compile(r"\..*\.[0-9]+\.[0-9a-f]{8}\.tmp")  # the names that `temporary_name` gives
LEFTOVER_SECONDS = 24 * 3600  # temporary files of this age are leftovers: no file takes so long to write
_tidied: set[Path] = set()  # the folders in which this process has looked for leftovers
METADATA = "recipe"  # this project's entry in the metadata of a safetensors file
PROJECT_ROOT = Path(__file__).resolve().parent.parent


def require_writable(path: Path, flag: str, folder: bool = False) -> None:
    """Checks that the file `path`, or with `folder` a file in the folder `path`, can be written. Creates nothing.

    flag: the flag that sets the path, for the message. A command calls this before its work starts.

    Raises:
        UserError: permission is missing, the file system is read-only, or the path or its parent is of another type.
    """
    try:
        _try_to_write(path, folder)
    except OSError as error:
        what = "cannot write to the folder" if folder else "cannot write the file"
        raise UserError(f"{what} {path} ({flag}): {error.strerror or error}") from error


def _try_to_write(path: Path, folder: bool) -> None:
    if not folder and _is_there(path) and not path.is_file():
        raise OSError("it exists and is not a file")
    place = path if folder else path.parent
    while not _is_there(place):
        place = place.parent
    if not place.is_dir():
        raise OSError(f"{place} is not a folder")
    trial = place / temporary_name(path)  # os.access is not enough: root, /proc, read-only file systems
    os.close(os.open(trial, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    trial.unlink()


def _is_there(path: Path) -> bool:
    """Whether the path exists, also as a dangling link. Raises OSError if it cannot exist, as with too long names."""
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

    After an error, `path` is unchanged and the temporary file is removed. If the process is killed, the temporary file
    stays; the next process that writes into the folder at least a day later removes it. durable: wait until the content
    is on the disk; otherwise the file can be empty after a power failure.

    Raises:
        WriteError: the file cannot be written, for example because the disk is full.
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
        with suppress(OSError):  # it may not exist
            temporary.unlink()


def _remove_leftovers(written: Path) -> None:
    """Removes temporary files next to `written` that are older by LEFTOVER_SECONDS; once per folder and process.

    All times come from the clock of the file system, which other machines, with other process ids, may share.
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
    """The error of writing to one of `places` that caused `error`; None if it has another cause.

    If a stream fails, torch raises a RuntimeError whose context is the error of the stream.
    """
    while isinstance(error, RuntimeError):
        error = error.__context__
    is_fault = isinstance(error, OSError) and error.errno is not None
    return error if is_fault and {error.filename, error.filename2} <= places else None


def write_json(path: Path, content: dict) -> None:
    """Writes `content` as indented JSON. Raises ValueError for NaN and infinity, which are not valid JSON."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_line(stream: FileIO, line: str) -> None:
    """Writes a line to an unbuffered file, which processes may share, in one write. OSError if it is not complete."""
    content = line.encode() + b"\n"
    if stream.write(content) < len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(stream.name))


def save_tensors(path: Path, content: object) -> None:
    """Writes tensors and plain values as a torch file."""
    with whole_file(path) as temporary, open(temporary, "wb") as stream:  # with a path, torch hides the error
        torch.save(content, stream)


def save_safetensors(path: Path, tensors: dict[str, torch.Tensor], recipe: dict) -> None:
    """Writes tensors as a safetensors file, with the plain values `recipe` as JSON in its metadata."""
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        temporary.write_bytes(save(content, {"format": "pt", METADATA: json.dumps(recipe)}))


def load_tensors(path: Path, what: str) -> object:
    """The tensors and plain values of a torch file or a .safetensors file, on the CPU. No code in the file is run.

    Of a safetensors file: the tensors by name, and under METADATA the `recipe` of `save_safetensors`. what: the kind of
    file, for messages.

    Raises:
        UserError: the file cannot be read, is damaged, not a torch file, or has objects other than tensors and plain
            values.
    """
    if path.suffix == SAFETENSORS:
        try:
            with safe_open(path, "pt") as file:
                recipe = (file.metadata() or {}).get(METADATA)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
            return tensors | ({METADATA: json.loads(recipe)} if recipe else {})
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{what} {path} cannot be read as a safetensors file: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from error
    except Exception as error:  # damage leads to errors of many types: pickle, zip, EOF, key, runtime, OS
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        objects = f": {unsafe[1]}" if unsafe else ""
        raise UserError(
            f"{what} {path} cannot be read as a torch file of tensors: it is damaged, not a torch file (a saved web "
            f"page?), or holds objects that could run code{objects} ({type(error).__name__})"
        ) from error


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a weights file.

    Raises:
        UserError: the file is missing, damaged, or not a state dict.
    """
    if not path.is_file():
        raise UserError(
            f"no weights file {path}; weights are imagenet, none, or the path of a state dict", ("weights",)
        )
    state = load_tensors(path, "weights file")
    if not is_state_dict(state):
        raise UserError(f"weights file {path} is not a state dict: names with plain tensors, weights in floating point")
    return state


def is_state_dict(content: object) -> bool:
    """Whether the content of a file is plain tensors by name, the weights among them of floating point."""
    return isinstance(content, dict) and all(
        isinstance(name, str)
        and is_plain(value)
        and (value.is_floating_point() or not name.endswith(("weight", "bias", "mean", "var")))
        for name, value in content.items()
    )


def is_plain(value: object) -> bool:
    """Whether a value is a tensor that holds all its numbers: neither sparse nor nested nor on the meta device."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not (value.is_meta or value.is_nested)


def sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(files: Sequence[Path], waiting: str | None = None) -> Iterator[None]:
    """Holds the locks of `files`, acquired in the same order by all processes. The lock files remain.

    waiting: if another process holds a lock, print this and wait; None: raise an error.

    Raises:
        UserError: another process holds a lock, or the file system has no locks.
    """
    with ExitStack() as stack:
        for file in sorted(files):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(lock_file(file), mode=0o666)
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                if waiting is None:
                    raise UserError(f"another process writes {file}") from error
                print(waiting, flush=True)
                lock.acquire()
            except (OSError, NotImplementedError) as error:
                raise UserError(f"files in {file.parent} cannot be locked ({error}); give another folder") from error
            stack.callback(lock.release)
        yield
