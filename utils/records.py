"""The description of a run in its record: versions, commit, machine, memory."""

from __future__ import annotations

import functools
import getpass
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from utils.files import PROJECT_ROOT

VERSION = "0.1.0"  # as in pyproject.toml
RECORDED_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow")


def peak_memory_mb() -> float | None:
    """The highest resident memory of this process so far, in MB (2**20 bytes); None where it is not reported."""
    if resource is None:
        return None
    scale = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20


def provenance(device: torch.device) -> dict:
    """Commit, package versions, device, number of threads and date, as entries of a record."""
    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": _package_versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def who_and_when() -> dict:
    """Date, user, host, version and commit, as entries of a document."""
    try:
        user = getpass.getuser()
    except (ImportError, KeyError, OSError):  # an unknown user id, as in containers, or Windows
        user = None
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "user": user,
        "host": platform.node(),
        "version": VERSION,
        "commit": git_commit(),
        "versions": {"python": platform.python_version(), **_package_versions()},
    }


@functools.cache
def git_commit() -> str | None:
    """The commit of the project, with "+changes" if tracked files differ from it; None outside a git checkout.

    Cached, because later changes of the files do not affect the running code.
    """
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None else commit + ("+changes" if changes else "")


def _git(*arguments: str) -> str | None:
    if not (PROJECT_ROOT / ".git").exists():  # otherwise git could find another repository around the project
        return None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        command = ["git", "-C", str(PROJECT_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@functools.cache
def _package_versions() -> dict[str, str | None]:
    versions = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions
