"""Files and folders of another user, which cannot be read, at every depth of the inputs of every command."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import check_data
import make_support
import predict
import train
from tests.commands.test_commands import test_command
from utils.errors import UserError

if not sys.platform.startswith("linux"):
    pytest.skip("root gives its rights away as Linux knows them", allow_module_level=True)

SMALL = ["--img_size", 64, "--device", "cpu", "--weights", "none"]
REFUSED = (UserError, PermissionError)  # each is one sentence of `run_command`


@contextmanager
def as_plain_user() -> Iterator[None]:
    """Rights bind this thread, and those that it starts, also where it is root's."""
    if os.geteuid():
        yield
        return
    libc, version, known = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(version, known) == 0
    fewer = (ctypes.c_uint32 * 6)(known[0] & ~0b110, *known[1:])  # neither CAP_DAC_OVERRIDE nor CAP_DAC_READ_SEARCH
    libc.capset(version, fewer)
    try:
        yield
    finally:
        libc.capset(version, known)


@pytest.fixture
def data(demo_data, tmp_path) -> Path:
    return Path(shutil.copytree(demo_data, tmp_path / "data"))


@pytest.fixture
def shut() -> Iterator[Callable[[Path], None]]:
    """Takes the rights to a file or folder away, until the test ends."""
    places = []
    yield lambda place: place.chmod(0) or places.append(place)
    for place in places:
        place.chmod(0o700)


def run(main: Callable, *arguments: object) -> int:
    """The exit code of a command that a plain user starts."""
    try:
        with as_plain_user():
            main([*map(str, arguments)])
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.mark.parametrize(
    "place",
    ["", "train/good", "train/good/000.png", "test", "test/rust", "test/rust/000.png"]
    + ["ground_truth", "ground_truth/rust", "ground_truth/rust/000_mask.png"],
)
def test_what_a_data_set_holds(place, data, shut, capsys):
    closed = data / "ring" / place
    shut(closed)
    common = ["--data_type", "folder", "--data_path", data]
    assert run(check_data.main, *common) == check_data.PROBLEMS
    said = capsys.readouterr().out
    assert "Permission denied" in said and str(closed) in said and "\nweave     5 " in said
    with pytest.raises(REFUSED, match=rf"(?s)Permission denied.*{closed}|{closed}.*Permission denied"):
        scored = ["--obj", "ring", "--untrained", "--shot", 5, "--inferences", 1, "--output", data.parent / "out"]
        run(test_command.main, *common, *SMALL, *scored)
    if "train" in place or not place:
        with pytest.raises(REFUSED, match=f"{closed}"):
            folders = ["--save_dir", data.parent / "saved", "--cache_dir", data.parent / "cache"]
            run(train.main, "--obj", "weave", *common, *SMALL, *folders, "--epochs", 1)
        with pytest.raises(REFUSED, match=f"{closed}"):
            sets = ["--shots", 5, "--rounds", 1, "--support_path", data.parent / "sets"]
            run(make_support.main, "--obj", "ring", *common, *sets)


@pytest.mark.parametrize(
    ("place", "code"), [("test/rust", 1), ("test/rust/000.png", 1), ("train", 2), ("train/good/000.png", 2)]
)
@pytest.mark.parametrize("flags", [(), ("--fail_on_defect", "--threshold", 1000)])
def test_what_predict_reads(place, code, flags, data, shut, capsys):
    """A folder that was left out is an exit code, also where all other images are normal; support must be whole."""
    closed = data / "ring" / place
    shut(closed)
    support = data / "ring/train" / ("" if code == 2 else "good/001.png")
    command = ["--support", support, "--input", data / "ring/test", "--output", data.parent / "out"]
    command += [*SMALL, "--backbone", "resnet18", *flags, "--no_images"]
    if code == 2:
        with pytest.raises(REFUSED, match=rf"{closed}: Permission denied"):
            run(predict.main, *command)
        return
    assert run(predict.main, *command) == code
    said = capsys.readouterr()
    assert f"{closed}: Permission denied" in said.out + said.err
    assert "0 defective" in said.out or not flags
