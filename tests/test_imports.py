"""What commands import (`make lint` checks packages); the library leaves the settings of the process alone."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.files import PROJECT_ROOT

COMMANDS = ("train", "test", "predict", "reproduce", "export", "make_support", "check_data")


def imported(file: Path) -> set[str]:
    """The first part of every name that a file imports, inside functions, too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def test_every_package_and_every_command_is_known_to_the_contract():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    linter = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    packages = {file.parent.name for file in PROJECT_ROOT.glob("[!.]*/__init__.py")}
    layers, commands = linter["contracts"]
    assert packages == set(linter["root_packages"])
    assert packages == {package for layer in layers["layers"] for package in layer.split(" | ")}
    assert packages - {"tests", "benchmarks"} == set(commands["source_modules"])
    assert {file.stem for file in PROJECT_ROOT.glob("*.py")} == set(COMMANDS) == set(commands["forbidden_modules"])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_imports_no_command_no_test_and_no_benchmark(command):
    assert not imported(PROJECT_ROOT / f"{command}.py") & {*COMMANDS, "tests", "benchmarks"}


UNCHANGED = """
import ctypes, json, locale, logging, os, signal, sys, warnings
import numpy as np
import PIL.Image, scipy.ndimage, scipy.sparse, torch, torchvision, tqdm  # filters warnings when they are imported

def settings():
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    return {
        "warnings": [str(one) for one in warnings.filters],
        "cudnn": [cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, cuda.matmul.allow_tf32],
        "float32": [torch.get_float32_matmul_precision(), str(torch.get_default_dtype())],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "pixels": PIL.Image.MAX_IMAGE_PIXELS,
        "errors": np.geterr(),
        "locale": locale.setlocale(locale.LC_ALL, None),
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(one)) for one in (signal.SIGINT, signal.SIGTERM)],
        "logging": [logging.root.level, len(logging.root.handlers)],
        "folder": os.getcwd(),
    }

before = settings()
loaded, original = [], ctypes.CDLL
ctypes.CDLL = lambda name, *rest, **options: loaded.append(name) or original(name, *rest, **options)

import utils.devices
def command_device(name):
    raise AssertionError("the library made the settings of a command")
utils.devices.command_device = command_device

from inspection.detector import FewShotDetector
from models.stn import STNResNet
images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
detector = FewShotDetector(STNResNet(img_size=64).eval(), "cpu").fit(images[:2])
detector.calibrate(0.05)
scores, maps = detector.score(images[2:])
assert np.isfinite(scores).all() and maps.shape == (3, 64, 64)
assert not any("libc" in str(name) for name in loaded), loaded
after = settings()
print(json.dumps({name: [before[name], after[name]] for name in before if before[name] != after[name]}))
"""


def test_the_library_leaves_the_settings_of_the_process_alone():
    """They belong to commands (utils.devices.command_device). glibc's cannot be read back: it must not be loaded."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", UNCHANGED],
        cwd=PROJECT_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == {}
