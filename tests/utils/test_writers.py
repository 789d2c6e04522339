"""Faults while writing: the disk is full at any byte, the permission is lost, the process is killed.

The file keeps its old content, nothing else is left behind, and a command ends with one sentence and exit code 2. The
limit on the size of files (RLIMIT_FSIZE) makes the system itself refuse the next byte, also to code that is not Python.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.cache import decoded_images
from datasets.manifest import Manifest, save_manifest
from datasets.mvtec import LabelledDataset, LabelledImage, list_test_items
from evaluation.gallery import Scored, save_gallery
from evaluation.per_image import write_scores
from evaluation.run import save_maps, save_tiff
from examples.demo_data import write_dataset
from examples.demo_figure import Example, save_figure
from experiments.results import read_results
from experiments.run import write_tables
from inspection.detector import FewShotDetector
from inspection.export import save_program
from models.regad import RegAD, checkpoint
from reports.drawing import save_image
from reports.page import Page, PageRow, write_page
from training.curve import save_curve
from training.state import save_history
from utils.errors import run_command
from utils.files import PROJECT_ROOT, save_tensors, write_json
from utils.naming import CheckpointFiles

ITEMS = [LabelledImage(Path(f"test/{kind}/{number}.png"), (), kind) for kind in ("good", "cut") for number in range(40)]
HISTORY = [{"epoch": number, "loss": 0.5, "seconds": 1.0} for number in range(100)]
DATA: list[Path] = []  # the folder of the small data set


def noise() -> np.random.Generator:
    """The same numbers every time, so that a file has the same size every time."""
    return np.random.default_rng(0)


@cache
def small_detector() -> FewShotDetector:
    images = [Image.fromarray(noise().integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(2)]
    return FewShotDetector(RegAD("affine", 64).stn, "cpu", scorer="gaussian").fit(images, for_threshold=False)


def noise_image(*shape: int) -> Image.Image:
    return Image.fromarray(noise().integers(0, 255, shape, np.uint8))


def manifest(path: Path) -> None:
    names = [[f"{number:03}.png" for number in range(10)]] * 10
    save_manifest(path, Manifest("ring", 10, names, 0, "a draw", "a test", None, False))


def gallery(path: Path) -> None:
    """All files of a gallery, in the folder of `path`, which is its page."""
    items = list_test_items(DATA[0] / "ring")[:3]
    maps = noise().random((3, 64, 64)).astype(np.float32)
    scored = Scored(LabelledDataset(items, 64), maps, maps.max(axis=(1, 2)), np.array([True, True, False]), 0.5)
    save_gallery(path.parent, "ring", scored, 1, 1)


def cached_images(path: Path) -> None:
    decoded_images(sorted((DATA[0] / "ring/train/good").iterdir()), 64, path.parent, 0)


@cache
def small_program() -> torch.export.ExportedProgram:
    return torch.export.export(torch.nn.Linear(50, 50), (torch.zeros(1, 50),))


def tables(path: Path) -> None:
    """The tables of a committed results folder, whose records are copied to the folder of `path`."""
    for record in (PROJECT_ROOT / "results/published/registration").glob("*.json"):
        shutil.copy(record, path.parent)
    write_tables(read_results(path.parent))


def figure(path: Path) -> None:
    values = noise().random((64, 64)).astype(np.float32)
    shown = Example(np.asarray(noise_image(64, 64, 3)), values > 0.5, values, 1.0, "normal")
    save_figure(path, torch.ones(2, 3, 64, 64), [shown], (0.0, 1.0))


WRITERS = {  # name of a file -> what writes it
    "record.json": lambda path: write_json(path, {"rounds": list(range(500))}),
    "scores.csv": lambda path: write_scores(path, ITEMS, noise().random((3, len(ITEMS)))),
    "map.tiff": lambda path: save_tiff(path, noise().random((40, 40), np.float32)),
    "maps.npz": lambda path: save_maps(path, ITEMS, noise().random((len(ITEMS), 8, 8), np.float32)),
    "page.html": lambda path: write_page(path, Page("t", 0.5, [PageRow(str(n), n / 9, "good") for n in range(9)])),
    "image.jpg": lambda path: save_image(path, noise_image(90, 90, 3)),
    "image.png": lambda path: save_image(path, noise_image(90, 90)),
    "figure.jpg": figure,
    "curve.png": lambda path: save_curve(path, HISTORY, "ring"),
    "epochs.jsonl": lambda path: save_history(CheckpointFiles(*[path] * len(CheckpointFiles._fields)), HISTORY),
    "manifest.json": manifest,
    "support.pt": lambda path: save_tensors(path, [torch.ones(2, 3, 8, 8)] * 3),
    "state.pt": lambda path: save_tensors(path, {"weights": torch.rand(10_000), "epoch": 3}),
    "model.pt": lambda path: save_tensors(path, checkpoint(RegAD("affine", 64), {"epoch": 3})),
    "part.regad": lambda path: small_detector().save(path),
    "part.pt2": lambda path: save_program(path, small_program(), {}),
    "report.html": gallery,
    "tables.md": tables,
}


@pytest.fixture(autouse=True)
def data(demo_data):
    DATA[:] = [demo_data]


@contextmanager
def files_end_at(limit: int):
    """No file of this process can grow beyond `limit` bytes."""
    _, highest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, highest))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, highest))


def ends_with_one_sentence(write, path: Path, capsys) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_command(lambda argv: write(path))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ") and "write" in error and len(error.splitlines()) == 1, error


def limits(size: int, name: str) -> list[int]:
    """Bytes at which the disk is full: the first, the last, and one between."""
    return [0, size - 1, random.Random(name).randrange(size)]


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(name, tmp_path, capsys):
    write, path = WRITERS[name], tmp_path / name
    write(path)
    size = path.stat().st_size
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for limit in limits(size, name):
        path.write_bytes(b"old")
        with files_end_at(limit):
            ends_with_one_sentence(write, path, capsys)
        assert path.read_bytes() == b"old"
        left = [file for file in tmp_path.rglob("*") if file.is_file()]
        assert sorted(left) == sorted(before)  # no temporary file


@pytest.mark.parametrize(("name", "code"), [*((name, errno.EACCES) for name in WRITERS), ("record.json", errno.ENOSPC)])
def test_the_last_step_fails(name, code, tmp_path, capsys, monkeypatch):
    """Permission lost, or the disk full, when the finished file is to take its place."""
    path = tmp_path / name
    path.write_bytes(b"old")

    def refuse(source, target):
        raise OSError(code, os.strerror(code), str(source), None, str(target))

    monkeypatch.setattr(os, "replace", refuse)
    ends_with_one_sentence(WRITERS[name], path, capsys)
    assert path.read_bytes() == b"old" and not [file for file in tmp_path.rglob("*.tmp")]


def killed_at(limit: int, write, path: Path) -> bool:
    """Whether a copy of this process is killed by the system when it writes byte `limit`."""
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            write(path)
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGXFSZ


@pytest.mark.parametrize("name", sorted({*WRITERS} - {"model.pt", "part.regad", "report.html"}))  # these use threads
def test_a_kill(name, tmp_path):
    write, path = WRITERS[name], tmp_path / name
    write(path)
    size = path.stat().st_size
    path.write_bytes(b"old")
    for limit in limits(size, name):
        assert killed_at(limit, write, path)
        assert path.read_bytes() == b"old"


def test_the_cache(tmp_path, capsys, demo_data):
    cached_images(tmp_path / "x")
    (file,) = tmp_path.glob("*.npy")
    size = file.stat().st_size
    file.unlink()
    for limit in limits(size, "cache"):
        with files_end_at(limit):
            ends_with_one_sentence(cached_images, tmp_path / "x", capsys)
        assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob(".*.tmp"))


FULL_DISK = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from datasets.cache import decoded_images
from utils.errors import run_command
run_command(lambda argv: decoded_images(sorted(Path({images!r}).iterdir()), 64, Path({disk!r}), 0))
"""


def test_the_cache_on_a_disk_that_is_full(tmp_path, demo_data):
    """A memory map needs its space beforehand: else the system kills the process that writes into it."""
    mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=40k regad "$0" && exec "$@"', str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    code = FULL_DISK.format(root=str(PROJECT_ROOT), images=str(demo_data / "ring/train/good"), disk=str(tmp_path))
    done = subprocess.run([*mount, sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "No space left on device" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_data_set(tmp_path, capsys):
    """Many files: the first that does not fit ends the command, those before are whole."""
    with files_end_at(2000):
        ends_with_one_sentence(lambda path: write_dataset(path, ("ring",), 2, 1, 1, 64), tmp_path / "d", capsys)
    for file in tmp_path.rglob("*.*"):
        Image.open(file).load()
