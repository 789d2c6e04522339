"""The cache of decoded images: one memory-mapped uint8 array per folder, shared by epochs, runs and processes.

File: <cache_dir>/<category>_<size>_<where>_<what>.npy, (N, S, S, 3) uint8. `where` is a digest of the folder's path.
`what` is a digest of the images' names, sizes and modification times, of S, of the bit depth and of the resizing rule.
A changed image therefore leads to a new file; the file of the old state is removed.

A process that fills a file holds a lock (flock) on .<file>.lock beside it, so processes that start together decode each
image once. Where there are no locks (Windows, some network file systems) each of them decodes, with the same result.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from datasets.episodes import Episode
from datasets.images import FULL_BITS, ImageError, check_headers, read_batches, read_image
from utils.devices import upload
from utils.errors import UserError
from utils.files import digest, whole_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RESIZE_RULE = "Pillow LANCZOS to the square, RGB, 1"  # change it whenever `read_image` gives other values
DIGEST_LETTERS = 16
RESIDENT_BYTES = 4 * 2**30  # source images up to this total are kept on the CUDA device


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/regad, by default ~/.cache/regad; without a home folder, a folder for temporary files."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regad"
    except RuntimeError:  # no HOME and an unknown user id, as in containers
        return Path(tempfile.gettempdir()) / "regad"


def decoded_images(
    paths: Sequence[Path],
    size: int,
    cache_dir: Path | None,
    num_workers: int,
    keep_aspect: bool = False,
    bits: int = FULL_BITS,
) -> np.ndarray:
    """The images `paths` of one folder as (N, size, size, 3) uint8 RGB, each decoded at most once per machine.

    The array is a read-only memory map of a file in `cache_dir`. With None the images are decoded into memory.

    Raises:
        UserError: an image cannot be read, or the cache folder cannot be written.
    """
    if cache_dir is None:
        images = np.empty((len(paths), size, size, 3), np.uint8)
        _decode(paths, images, num_workers, keep_aspect, bits)
        return images
    file = _cache_file(paths, size, cache_dir, keep_aspect, bits)
    while True:
        if file.is_file():
            with suppress(FileNotFoundError):  # a run with other settings may remove the file as outdated at any time
                return np.load(file, mmap_mode="r")
        try:
            with _lock(file, f"waiting for another process, which decodes {paths[0].parent}"):
                if not file.is_file():
                    with whole_file(file) as aside:
                        images = np.lib.format.open_memmap(aside, "w+", np.uint8, (len(paths), size, size, 3))
                        _reserve(aside)
                        _decode(paths, images, num_workers, keep_aspect, bits)
        except OSError as error:
            raise UserError(
                f"cannot write the cache of decoded images {file}: {error.strerror}; "
                "give another folder with --cache_dir, or no cache with --cache_dir none"
            ) from error
        _remove_outdated(file)


def _reserve(file: Path) -> None:
    """Makes sure that the disk has room for a file. Else the system would kill the process that writes into its map."""
    if hasattr(os, "posix_fallocate"):
        with open(file, "rb+") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)


@contextmanager
def _lock(file: Path, waiting: str) -> Iterator[None]:
    """Holds the lock of a cache file, or nothing where there are no locks. Prints `waiting` if another has it.

    The system releases the lock of a process that ends in any way, so a crashed holder blocks nobody. The lock file
    stays: if it were removed, a new process would lock another file than those that wait for the removed one.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = None
    with suppress(OSError):  # a lock file of another user; if the folder cannot be written, writing the file says so
        lock = os.open(_lock_file(file), os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        if lock is not None and fcntl is not None:
            _wait(lock, waiting)
        yield
    finally:
        if lock is not None:
            _unlock(lock)


def _lock_file(file: Path) -> Path:
    return file.with_name(f".{file.name}.lock")


def _wait(lock: int, waiting: str) -> None:
    """Locks an open file as soon as no other process has it locked."""
    with suppress(OSError):  # the file system has no locks
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)


def _unlock(lock: int) -> None:
    with suppress(OSError):
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_UN)  # forked readers have the descriptor too: closing it is not enough
    os.close(lock)


def _cache_file(paths: Sequence[Path], size: int, cache_dir: Path, keep_aspect: bool, bits: int) -> Path:
    folder = paths[0].parent.resolve()
    states = [_state(path) for path in paths]
    where = hashlib.sha256(os.fsencode(folder)).hexdigest()[:DIGEST_LETTERS]
    what = hashlib.sha256(repr((size, keep_aspect, bits, RESIZE_RULE, states)).encode()).hexdigest()[:DIGEST_LETTERS]
    return cache_dir / f"{folder.parent.parent.name}_{size}_{where}_{what}.npy"


def _state(path: Path) -> tuple[str, int, int]:
    """Name, size in bytes and modification time: a changed image differs in one of them."""
    try:
        stat = path.stat()
    except OSError as error:  # a dangling link
        raise ImageError(f"cannot read the image {path}: {error.strerror}") from error
    return path.name, stat.st_size, stat.st_mtime_ns


def _remove_outdated(file: Path) -> None:
    """Removes the cache files of earlier states of the same folder. A process that has one mapped can still read it."""
    same_folder = file.name.rsplit("_", 1)[0] + "_"
    for other in file.parent.iterdir():
        if other.name.startswith(same_folder) and other.suffix == ".npy" and other != file:
            for outdated in (other, _lock_file(other)):
                with suppress(OSError):
                    outdated.unlink()


class _Images(Dataset):
    def __init__(self, paths: Sequence[Path], size: int, keep_aspect: bool, bits: int) -> None:
        self.paths, self.size, self.keep_aspect, self.bits = paths, size, keep_aspect, bits

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(read_image(self.paths[number], self.size, self.keep_aspect, self.bits).copy())


def _decode(paths: Sequence[Path], into: np.ndarray, num_workers: int, keep_aspect: bool, bits: int) -> None:
    """Decodes the images into the rows of `into` (N, S, S, 3) uint8."""
    images = read_batches(_Images(paths, into.shape[1], keep_aspect, bits), None, num_workers)
    progress = tqdm(images, f"decoding {paths[0].parent}", len(paths), unit=" images", leave=False, disable=None)
    for number, image in enumerate(progress):
        into[number] = image.numpy()


class SourceImages:
    """The decoded images of the source categories, gathered into training batches on `device`.

    Raises:
        UserError: as `decoded_images`.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Path]],
        size: int,
        cache_dir: Path | None,
        num_workers: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        keep_aspect: bool = False,
        bits: int = FULL_BITS,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.rows = {name: {p.name: row for row, p in enumerate(paths)} for name, paths in sources.items()}
        to_decode = [
            p
            for p in sources.values()
            if not cache_dir or not _cache_file(p, size, cache_dir, keep_aspect, bits).is_file()
        ]
        check_headers([path for paths in to_decode for path in paths])  # fails early: decoding takes minutes
        self.images = {
            name: decoded_images(paths, size, cache_dir, num_workers, keep_aspect, bits)
            for name, paths in sources.items()
        }
        fits = sum(array.nbytes for array in self.images.values()) <= RESIDENT_BYTES
        self.resident = {}
        if device.type == "cuda" and fits:
            self.resident = {name: torch.tensor(array, device=device) for name, array in self.images.items()}

    def episode(self, episode: Episode) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries (B, 3, S, S) and support images (B, K, 3, S, S) of an episode, in [0, 1], in channels-last memory."""
        query = self._gather(episode.category, episode.query)
        support = self._gather(episode.category, [name for of_query in episode.support for name in of_query])
        return query, support.unflatten(0, (len(episode.query), -1))

    def digest(self) -> str:
        """SHA-256 of the names and the decoded images, in hexadecimal."""
        images = {
            name: [list(self.rows[name]), hashlib.sha256(array).hexdigest()] for name, array in self.images.items()
        }
        return digest(images)

    def _gather(self, category: str, names: Sequence[str]) -> torch.Tensor:
        rows = [self.rows[category][name] for name in names]
        if self.resident:
            images = self.resident[category][upload(torch.tensor(rows), self.device)]
        else:
            images = upload(torch.from_numpy(self.images[category][rows]), self.device)
        return images.permute(0, 3, 1, 2).to(torch.float32).div_(255).to(self.dtype)
