"""The device, the seed, and settings of the whole process."""

from __future__ import annotations

import ctypes
import functools
import glob
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from utils.errors import UserError, lack_of_memory

SUPPORTED_DEVICES = ("cpu", "cuda")  # others, such as mps and xpu, are untested
MEMORY_FILE = Path("/proc/meminfo")  # of Linux
GPU_FILES = ("/dev/nvidia[0-9]*", "/dev/dxg")  # of the NVIDIA driver; of Windows' GPUs in WSL
GLIBC_M_TRIM_THRESHOLD, GLIBC_M_MMAP_MAX = -1, -4  # malloc.h
CPU = torch.device("cpu")
CPU_READERS, MOST_READERS = 2, 16  # threads that decode images: if the network uses the CPU; the largest number

Result = TypeVar("Result")


def seed_everything(seed: int) -> None:
    """Seeds the generators of Python, NumPy and PyTorch, on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def resolve_device(name: str) -> torch.device:
    """The device `name`; `auto` is CUDA if available, else the CPU. Changes no setting of the process.

    Raises:
        UserError: the device does not exist, cannot be used or is not supported.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type in SUPPORTED_DEVICES:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}); try cpu", ("device",)) from error
    if device.type not in SUPPORTED_DEVICES:
        raise UserError(
            f"device {name!r} is not supported, only {' and '.join(SUPPORTED_DEVICES)}; try cpu", ("device",)
        )
    return device


def command_device(name: str) -> torch.device:
    """`resolve_device` for a command, with the settings of its process.

    On CUDA, convolutions and matrix products use full float32 and deterministic algorithms (cuDNN's default is TF32,
    with 10 bits of mantissa; common containers switch it on for matrix products). On the CPU, freed memory is kept; see
    `_keep_freed_memory`. Prints the device, and a warning if `auto` does not use an existing GPU.

    Raises:
        UserError: as `resolve_device`.
    """
    device = resolve_device(name)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    if device.type == "cpu":
        _keep_freed_memory()
    print(f"device: {describe_device(device)}")
    if name == "auto" and device.type == "cpu" and (reason := _why_no_cuda()):
        print(f"warning: there is an NVIDIA GPU, but PyTorch cannot use it: {reason}", file=sys.stderr)
    return device


def describe_device(device: torch.device) -> str:
    """The device as text, with its name or number of threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


@functools.cache
def _why_no_cuda() -> str:
    """Why an existing GPU is not used; empty if there is none, or if this PyTorch is not built for CUDA."""
    if torch.version.cuda is None or not any(map(glob.glob, GPU_FILES)) or torch.cuda.is_available():
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "it reports no device; CUDA_VISIBLE_DEVICES may hide it"


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`. Host memory is pinned before a copy to CUDA, so that the host does not wait."""
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def reader_threads(asked: int | None, device: torch.device) -> int:
    """The number of threads that decode images: `asked` if given; else CPU_READERS, on CUDA one per core.

    On CUDA, these are at most MOST_READERS. The number of cores is that of PyTorch's threads: reproduce.py divides the
    machine's cores among its jobs.
    """
    if asked is not None:
        return asked
    return CPU_READERS if device.type == "cpu" else min(torch.get_num_threads(), MOST_READERS)


def free_memory(device: torch.device = CPU) -> int | None:
    """Bytes that can be allocated on a device, on the CPU without swapping; None if the system does not report it."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch's allocator
        return torch.cuda.mem_get_info(device)[0] + cached
    with suppress(OSError, ValueError, IndexError):
        for line in MEMORY_FILE.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def run_batch(work: Callable[[int], Result], count: int, what: str) -> Result:
    """`work(count)` for a batch of `count` items.

    work: processes as many of the first items of the batch as its argument says; may be called again. what: the items,
    for messages.

    Raises:
        UserError: not enough memory; the message has the largest half, quarter and so on of `count` that fits.
    """
    fits, reason = count, ""
    while fits:
        try:
            result = work(fits)
            break
        except Exception as error:
            if not (lack := lack_of_memory(error)):
                raise
            traceback.clear_frames(error.__traceback__)  # which hold the tensors of the failed call
            fits, reason = fits // 2, reason or lack
    if fits == count:
        return result
    advice = f"{fits} would fit" if fits else "not even one fits: take smaller images"
    raise UserError(f"not enough memory for {count} {what} ({reason}); {advice}", ("batch_size", "img_size"))


def download(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Tensors of one device as arrays. The host waits once for all of them."""
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    if tensors[0].device.type == "cuda":
        torch.cuda.synchronize(tensors[0].device)
    return [copy.numpy() for copy in copies]


def _keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks for the next request; without glibc, does nothing.

    By default glibc returns them to the kernel at once, and each page of the next block causes a page fault. Network
    passes request the same blocks again, and would lose a tenth of their time.
    """
    with suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(GLIBC_M_MMAP_MAX, 0)
        libc.mallopt(GLIBC_M_TRIM_THRESHOLD, -1)


def release_freed_memory() -> None:
    """Returns to the kernel what `_keep_freed_memory` kept; without glibc, does nothing.

    For work on parts of large data: blocks of different sizes leave gaps, and the kept memory would grow to several
    times what is needed.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
