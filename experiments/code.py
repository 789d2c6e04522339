"""The code that decides the numbers: a changed line in it makes every cell of a grid another one.

These are train.py, test.py and all files of the project that they import, also inside functions; not the folders that
only draw, report or export, nor data sets, commands and benchmarks that neither of the two reads.
"""

from __future__ import annotations

from modulefinder import ModuleFinder
from pathlib import Path

from utils.files import PROJECT_ROOT, digest, sha256

DECISIVE_COMMANDS = ("train.py", "test.py")
UNDECISIVE_FOLDERS = ("reports", "inspection", "experiments")


def decisive_files() -> list[Path]:
    """Files below PROJECT_ROOT, sorted. Found by reading the code; nothing is imported."""
    finder = ModuleFinder(path=[str(PROJECT_ROOT)], excludes=UNDECISIVE_FOLDERS)
    for command in DECISIVE_COMMANDS:
        finder.load_file(str(PROJECT_ROOT / command))
    return sorted(Path(module.__file__) for module in finder.modules.values() if module.__file__)


def code_version() -> str:
    """A digest of the decisive files and their names."""
    return digest([(file.relative_to(PROJECT_ROOT).as_posix(), sha256(file)) for file in decisive_files()])
