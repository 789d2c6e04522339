"""Command line options, and the fixtures that tests share."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from examples.demo_data import write_dataset
from utils.files import PROJECT_ROOT

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("random", settings.get_profile("repeatable"), derandomize=False, max_examples=1000)
settings.load_profile("repeatable")  # `make test-random` has --hypothesis-profile random


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    skip_slow = pytest.mark.skip(reason="slow: give --runslow")
    skip_cuda = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--runslow"):
            item.add_marker(skip_slow)
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_cuda)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> Path:
    """Two synthetic categories, 64 px, in MVTec layout."""
    root = tmp_path_factory.mktemp("demo data")  # with a space, as real folders have
    write_dataset(root, categories=("ring", "weave"), train=5, good=3, defective=2, size=64)
    return root


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Runs of train.py draw no curves, which take a third of their time; those of a module's fixtures do."""
    monkeypatch.setattr("training.run.save_curve", lambda *_: None)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Background jobs ignore SIGINT, and their child processes inherit this. A handler is not inherited."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def copied_tree(tmp_path) -> Path:
    """The project's code and what stands beside it, to be changed at will."""
    tree = tmp_path / "tree"
    tree.mkdir()
    shutil.copy(PROJECT_ROOT / "pyproject.toml", tree)
    for file in PROJECT_ROOT.glob("*.py"):
        shutil.copy(file, tree)
    for file in PROJECT_ROOT.glob("[!.]*/__init__.py"):
        ignored = shutil.ignore_patterns("__pycache__", "results", "fixtures")
        shutil.copytree(file.parent, tree / file.parent.name, ignore=ignored)
    return tree
