"""The device, the seed, and the settings that belong to a whole process."""

from __future__ import annotations

import ctypes
import random
from contextlib import suppress

import numpy as np
import torch

from utils.errors import UserError

DEFAULT_SEED = 668  # the release's
GLIBC_M_TRIM_THRESHOLD, GLIBC_M_MMAP_MAX = -1, -4  # malloc.h


def seed_everything(seed: int) -> None:
    """One seed for Python's, numpy's and torch's generators, on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def resolve_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA where there is one, else the CPU. Changes nothing in the process.

    Raises:
        UserError: no such device, or it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}); try --device cpu") from error
    return device


def command_device(name: str) -> torch.device:
    """`resolve_device` for a command, which owns its process: also makes the settings that hold for all of it.

    On CUDA, convolutions use full float32 and deterministic algorithms (cuDNN's default rounds to TF32's 10 bits). On
    the CPU, freed memory is kept, see `_keep_freed_memory`.
    """
    device = resolve_device(name)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
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
