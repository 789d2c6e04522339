"""Builds the wheel of `pip install .`: the same files as one package, `regad`, for use inside other programs.

The folders of this tree have names that other packages have too, such as Hugging Face's `datasets`. The wheel therefore
holds them below `regad`, with their imports rewritten. pip calls `build_wheel` (PEP 517); the files are made in a
temporary folder, so that the tree stays as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from setuptools import build_meta

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("train", "test", "predict", "export", "make_support", "check_data", "reproduce")
LEFT_OUT = {"tests", "benchmarks"}
PACKAGES = sorted({path.parent.name for path in ROOT.glob("*/__init__.py")} - LEFT_OUT)
NAMES = "|".join(PACKAGES)
REWRITTEN = (
    (rf"^(\s*)(from|import) ({NAMES})(?=[. ])", r"\1\2 regad.\3"),
    (rf"python -m ({NAMES})\.", r"python -m regad.\1."),
    (rf"python ({'|'.join(COMMANDS)})\.py", lambda match: f"regad-{match[1].replace('_', '-')}"),
)
INIT = '''"""RegAD: few-shot anomaly detection by registration."""

__version__ = "{version}"


def __getattr__(name):
    if name == "FewShotDetector":
        from regad.inspection.detector import FewShotDetector  # slow: imports torch

        return FewShotDetector
    raise AttributeError(f"module 'regad' has no attribute {{name!r}}")
'''
ENTRY = '''"""The commands regad-train, regad-test and so on."""

import importlib

from regad.utils.errors import run_command


def __getattr__(name):
    def command():
        module = importlib.import_module(f"regad.{name}")
        run_command(module.main, module.get_args_parser)

    return command
'''


def build_wheel(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    """Builds the wheel; returns its name."""
    target, before = Path(wheel_directory).resolve(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        write_package(Path(folder))
        os.chdir(folder)
        try:
            return build_meta.build_wheel(str(target), config_settings, metadata_directory)
        finally:
            os.chdir(before)


def build_sdist(sdist_directory: str, config_settings: dict | None = None) -> str:  # noqa: ARG001
    """There are wheels only."""
    raise RuntimeError("there are no source distributions: use pip install . or pip wheel .")


def write_package(folder: Path) -> None:
    """Writes what setuptools needs for the wheel: pyproject.toml and the package `regad`."""
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    package = folder / "regad"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in COMMANDS:
        shutil.copy(ROOT / f"{name}.py", package)
    for file in package.rglob("*.py"):
        file.write_text(rewritten(file.read_text(encoding="utf-8")), encoding="utf-8")
    (version,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    (package / "__init__.py").write_text(INIT.format(version=version), encoding="utf-8")
    (package / "_commands.py").write_text(ENTRY, encoding="utf-8")


def rewritten(text: str) -> str:
    """The text of a source file with the names that it has in the package."""
    for pattern, replacement in REWRITTEN:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text
