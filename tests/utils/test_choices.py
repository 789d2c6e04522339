"""The names that command lines offer are those that exist, and showing them does not import torch."""

from __future__ import annotations

import subprocess
import sys

from models.stn import BACKBONES, STN_MODES
from scorers.registry import SCORERS
from tests.test_imports import COMMANDS
from utils.choices import BACKBONE_NAMES, SCORER_NAMES, STN_MODE_NAMES
from utils.files import PROJECT_ROOT

HELP = """
import importlib, sys
for command in sys.argv[1:]:
    try:
        importlib.import_module(command).main(["--help"])
    except SystemExit as end:
        assert not end.code
    heavy = [name for name in ("torch", "numpy", "scipy", "PIL", "matplotlib") if name in sys.modules]
    assert not heavy, (command, heavy)
"""


def test_every_name_is_offered():
    """A new backbone, mode or scorer belongs into utils/choices.py too."""
    assert (*BACKBONES,) == BACKBONE_NAMES and (*STN_MODES,) == STN_MODE_NAMES and (*SCORERS,) == SCORER_NAMES


def test_help_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HELP, *COMMANDS], cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert done.stdout.count("usage: ") == len(COMMANDS)


WORK = """
import sys
import experiments.job
print(*(name for name in ("torch", "numpy") if name in sys.modules))
import evaluation.run
print(*(name for name in HEAVY + ("matplotlib",) if name in sys.modules))
import training.run, inspection.run, experiments.run
print(*(name for name in HEAVY if name in sys.modules))
"""
HEAVY = ("torch._dynamo", "sympy", "torchvision", "kornia", "sklearn", "scipy.stats", "pandas")


def test_the_work_imports_only_what_it_needs():
    """A process that waits for a run imports no PyTorch; none of the rest is needed to train, score and predict."""
    code = f"HEAVY = {HEAVY}\n{WORK}"
    found = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [""] * 3
