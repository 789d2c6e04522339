"""The cache of decoded images: one memory-mapped uint8 array per folder, shared by epochs, runs and processes.

File: <cache_dir>/<category>_<size>_<where>_<what>.npy, (N, S, S, 3) uint8. `where` is a digest of the folder's path.
`what` is a digest of the names and contents of the images, of S, of the bit depth and METHOD_VERSION. A changed image
therefore leads to a new file; the file of the old state is removed.

Processes that start together decode each image once: the one that fills a file locks .<file>.lock next to it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

from datasets.episodes import Episode
from datasets.images import FULL_BITS, read_image, unit_range
from datasets.layouts import short_name
from utils.devices import free_memory, upload
from utils.errors import UserError
from utils.files import locked, whole_file
from utils.fingerprint import METHOD_VERSION, FileDigests, digest
from utils.naming import lock_file
from utils.progress import ProgressBar
from utils.stages import in_threads

DIGEST_LETTERS = 16
RESIDENT_SHARE = 0.25  # of CUDA's free memory: source images up to this total stay there, training needs the rest


def decoded_images(
    paths: Sequence[Path],
    size: int,
    cache_dir: Path | None,
    num_workers: int,
    keep_aspect: bool = False,
    bits: int = FULL_BITS,
    digests: FileDigests | None = None,
) -> np.ndarray:
    """The images `paths` of one folder as (N, size, size, 3) uint8 RGB, each decoded at most once per machine.

    The array is a read-only memory map of a file in `cache_dir`. With None the images are decoded into memory.
    digests: those of files that are known already.

    Raises:
        UserError: an image cannot be read, or the cache folder cannot be written.
    """
    read = partial(read_image, size=size, keep_aspect=keep_aspect, bits=bits)
    shape = (len(paths), size, size, 3)

    def decode(into: np.ndarray) -> np.ndarray:
        images = in_threads(read, paths, max(1, num_workers))
        for number, image in enumerate(ProgressBar(f"decoding {paths[0].parent}", images, len(paths))):
            into[number] = image
        return into

    if cache_dir is None:
        return decode(np.empty(shape, np.uint8))
    file = _cache_file(paths, (size, keep_aspect, bits, METHOD_VERSION), cache_dir, digests or FileDigests())
    while True:
        try:
            array = np.load(file, mmap_mode="r")
            if array.shape == shape and array.dtype == np.uint8:
                return array
            raise ValueError("another content")
        except (FileNotFoundError, NotADirectoryError):  # other runs may remove it as outdated at any time
            pass
        except (ValueError, EOFError):
            print(f"warning: the cache file {file} is damaged; it is made again")
            file.unlink(missing_ok=True)
        try:
            with locked([file], f"waiting for another process, which decodes {paths[0].parent}"):
                if not file.is_file():
                    with whole_file(file) as temporary:
                        array = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
                        _reserve(temporary)
                        decode(array)
        except OSError as error:
            raise UserError(
                f"cannot write the cache of decoded images {file}: {error.strerror or error}; give another folder, or "
                "none to decode into memory",
                options=("cache_dir",),
            ) from error
        _remove_outdated(file)


def _reserve(file: Path) -> None:
    """Reserves the disk space of a file. Else a full disk would kill the process that writes into the file's map."""
    if hasattr(os, "posix_fallocate"):
        with open(file, "rb+") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)


def _cache_file(paths: Sequence[Path], settings: tuple, cache_dir: Path, digests: FileDigests) -> Path:
    folder = paths[0].parent.resolve()
    where = hashlib.sha256(os.fsencode(folder)).hexdigest()[:DIGEST_LETTERS]
    what = digest([*settings, [short_name(path) for path in paths], digests.together(paths)])[:DIGEST_LETTERS]
    return cache_dir / f"{folder.parent.parent.name}_{settings[0]}_{where}_{what}.npy"


def _remove_outdated(file: Path) -> None:
    """Removes the cache files of earlier states of the same folder. A process that has one mapped can still read it."""
    same_folder = file.name.rsplit("_", 1)[0] + "_"
    for other in file.parent.iterdir():
        if other.name.startswith(same_folder) and other.suffix == ".npy" and other != file:
            for outdated in (other, lock_file(other)):
                with suppress(OSError):
                    outdated.unlink()


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
        keep_aspect: bool = False,
        bits: int = FULL_BITS,
        digests: FileDigests | None = None,
    ) -> None:
        self.device = device
        self.index = {
            name: {short_name(path): number for number, path in enumerate(paths)} for name, paths in sources.items()
        }
        self.images = {
            name: decoded_images(paths, size, cache_dir, num_workers, keep_aspect, bits, digests)
            for name, paths in sources.items()
        }
        needed = sum(array.nbytes for array in self.images.values())
        self.resident = {}
        if device.type == "cuda" and needed <= RESIDENT_SHARE * free_memory(device):
            self.resident = {name: torch.tensor(array, device=device) for name, array in self.images.items()}

    def episode(self, episode: Episode) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries (B, 3, S, S) and support images (B, K, 3, S, S) of an episode, in [0, 1], in channels-last memory."""
        query = self._gather(episode.category, episode.query)
        support = self._gather(episode.category, [name for of_query in episode.support for name in of_query])
        return query, support.unflatten(0, (len(episode.query), -1))

    def _gather(self, category: str, names: Sequence[str]) -> torch.Tensor:
        numbers = [self.index[category][name] for name in names]
        if self.resident:
            images = self.resident[category][upload(torch.tensor(numbers), self.device)]
        else:
            images = upload(torch.from_numpy(self.images[category][numbers]), self.device)
        return unit_range(images.permute(0, 3, 1, 2))
