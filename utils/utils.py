"""A run's book-keeping: errors for people, seed, device, clock, whole files, provenance. Imports nothing of ours."""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import io
import json
import os
import platform
import random
import resource
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

PROJECT_ROOT = Path(__file__).resolve().parent.parent
VERSION = "0.1.0"  # as in pyproject.toml
DEFAULT_SEED = 668  # the release's
RECORDED_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow")

In, Out = TypeVar("In"), TypeVar("Out")

GLIBC_M_TRIM_THRESHOLD, GLIBC_M_MMAP_MAX = -1, -4  # malloc.h


class UserError(Exception):
    """Something the user can mend. The message says what was looked for, where, and what to run."""


def run_command(main: Callable[[Sequence[str] | None], None]) -> None:
    """Runs a command's `main` on sys.argv; a UserError or Ctrl-C ends it in one line with exit code 2 or 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # the name of a file may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(None)
    except UserError as error:
        sys.exit(_complain(error, 2))
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted", 130))


def _complain(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def require_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Refuses counts and sizes below 1, single or in a list: UserError. None, for a default, passes."""
    for name in names:
        values = getattr(arguments, name)
        smallest = min(values) if isinstance(values, list) else values
        if smallest is not None and smallest < 1:
            raise UserError(f"--{name} must be at least 1, got {smallest}")


def plain_arguments(arguments: argparse.Namespace) -> dict:
    """A command's arguments for a record: paths as text, alone or in lists."""

    def plain(value: object) -> object:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in vars(arguments).items()}


def seed_everything(seed: int) -> None:
    """One seed for Python's, numpy's and torch's generators, on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def resolve_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA where there is one, else the CPU.

    On CUDA, convolutions are kept in full float32 and deterministic: by default cuDNN rounds to TF32's 10 bits. On the
    CPU, freed memory is kept, see `_keep_freed_memory`.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}); try --device cpu") from error
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def _keep_freed_memory() -> None:
    """Has glibc keep large freed blocks for the next request; elsewhere, nothing happens.

    By default they go back to the kernel at once, and every page of the next block is faulted in again: a tenth of the
    network's time, whose passes ask for the same blocks over and over.
    """
    with suppress(OSError, AttributeError):  # no glibc here
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(GLIBC_M_MMAP_MAX, 0)
        libc.mallopt(GLIBC_M_TRIM_THRESHOLD, -1)


class StageClock:
    """Seconds spent per stage: `with clock("network"): ...`. Waits for the device's queue, so that CUDA counts too.

    Threads may share one; their seconds add up.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self._lock = threading.Lock()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        with self._lock:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def in_threads(
    function: Callable[[In], Out], items: Iterable[In], workers: int, ahead: int | None = None
) -> Iterator[Out]:
    """`map(function, items)` in order, in `workers` threads; at most `ahead` items, or two per worker, wait or are done
    and not yet taken.
    """
    ahead = ahead or 2 * workers
    with ThreadPoolExecutor(workers) as pool:
        under_way: deque[Future[Out]] = deque()
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) == ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


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


def peak_memory_mb() -> float:
    """Highest resident memory of this process so far, in MB of 2**20 bytes."""
    scale = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20


def provenance(device: torch.device) -> dict:
    """What a reader of a record needs to repeat it: commit, versions, machine."""
    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": {name: _package_version(name) for name in RECORDED_PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def git_commit() -> str | None:
    """The project's commit, with "+changes" where files differ from it; None outside a git checkout."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None else commit + ("+changes" if changes else "")


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(PROJECT_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
