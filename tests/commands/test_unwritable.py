"""Outputs that cannot be written are found before the work starts, in every command, and cost one sentence.

Access rights do not bind root, so that the cases are places where nobody can write.
"""

from __future__ import annotations

import errno
import importlib
import os
from pathlib import Path

import pytest

from benchmarks import startup
from tests.commands.test_commands import test_command
from utils.errors import UserError
from utils.files import PROJECT_ROOT, require_writable

BENCHMARKS = {file.stem: file.read_text() for file in sorted((PROJECT_ROOT / "benchmarks").glob("*.py"))}
SHARED_FLAGS = "measuring_parser("  # has --data_path and --output
# Command, its arguments, and the flag to try, whose value is a folder or a file. The data are missing: a command that
# starts its work fails with another sentence.
NO_DATA, SUPPORT = ["--data_path", "/nowhere"], ["--support", "/nowhere"]
OBJ = ["--obj", "bottle", *NO_DATA]
FOLDERS = {
    "test": ("test", [*OBJ, "--untrained"], "--output"),
    "train": ("train", OBJ, "--save_dir"),
    "train, cache": ("train", OBJ, "--cache_dir"),
    "predict": ("predict", [*SUPPORT, "--input", "/nowhere"], "--output"),
    "make_support": ("make_support", OBJ, "--support_path"),
    "make_support of tensors": ("make_support", [*OBJ, "--from_pt", "/nowhere/2_10.pt"], "--support_path"),
    "reproduce": ("reproduce", ["--data_path", "/nowhere"], "--output"),
    "reproduce, cache": ("reproduce", ["--data_path", "/nowhere"], "--cache_dir"),
    "reproduce, tables": ("reproduce", [], "--report"),
    "reproduce, import": ("reproduce", ["--import", "/nowhere/scores.csv"], "--output"),
    "synthetic": ("examples.demo_data", [], "--output"),
    **{
        f"benchmarks.{name}": (
            f"benchmarks.{name}",
            NO_DATA if 'argument("--data_path"' in code or SHARED_FLAGS in code else [],
            "--output",
        )
        for name, code in BENCHMARKS.items()
        if "def main(" in code and ('"--output"' in code or SHARED_FLAGS in code) and name not in ("startup", "tiles")
    },
}
FILES = {
    "benchmarks.startup": ("benchmarks.startup", [], "--output"),
    "benchmarks.tiles": ("benchmarks.tiles", NO_DATA, "--output"),
    "predict, detector": ("predict", SUPPORT, "--save"),
    "export": ("export", [*SUPPORT, "--format", "pt2"], "--output"),
    "make_support, hashes": ("make_support", ["--write_hashes"], "--verify"),
    "reproduce, readme": ("reproduce", ["--report", "/nowhere"], "--readme"),
    "demo_figure": ("examples.demo_figure", OBJ, "--output"),
}


def taken_by_a_file(folder: Path) -> Path:
    (folder / "file").write_text("in the way")
    return folder / "file"


def below_a_file(folder: Path) -> Path:
    return taken_by_a_file(folder) / "deep" / "x.pt2"


def at_a_link_to_nothing(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "nothing" / "there")
    return folder / "link" / "x.pt2"


def below_proc(folder: Path) -> Path:
    return Path("/proc/regad/x.pt2")


def with_a_name_too_long(folder: Path) -> Path:
    return folder / ("x" * 300) / "x.pt2"


def taken_by_a_folder(folder: Path) -> Path:
    (folder / "x.pt2").mkdir()
    return folder / "x.pt2"


PLACES = (at_a_link_to_nothing, below_proc, with_a_name_too_long)
CASES = [  # each command, and each place with one of them: all ask `require_writable`
    *[(command, place) for command in FOLDERS for place in (below_a_file, taken_by_a_file)],
    *[(command, place) for command in FILES for place in (below_a_file, taken_by_a_folder)],
    *[(command, place) for command in ("train", "export") for place in PLACES],
]


@pytest.mark.parametrize(("command", "place"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_before_the_work_starts(command, place, tmp_path):
    name, arguments, flag = (FOLDERS | FILES)[command]
    path = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    main = test_command.main if name == "test" else importlib.import_module(name).main
    with pytest.raises(UserError) as caught:
        main([*arguments, flag, str(path)])
    sentence = str(caught.value)
    assert flag in sentence and "cannot write" in sentence
    assert ("/proc" if place is below_proc else str(tmp_path)) in sentence
    assert "\n" not in sentence and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("content", "sentence"), [("in the way", "cannot read"), ("[]", "is not a file of this")])
def test_another_file_in_place_of_the_start_times(content, sentence, tmp_path):
    (tmp_path / "times.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        startup.main(["--output", str(tmp_path / "times.json")])
    assert (tmp_path / "times.json").read_text() == content


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_no_permission(code, tmp_path, monkeypatch):
    """What the system answers where the user is not root."""

    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=rf"{tmp_path}/a/b \(--output\): {os.strerror(code)}"):
        require_writable(tmp_path / "a" / "b", "--output", folder=True)


def test_what_can_be_written_is_left_as_it_was(tmp_path):
    """Existing or not, with parents or without: no complaint, and nothing is created."""
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "to").symlink_to(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for file in ("old.json", "new.json", "a/b/c.json", "to/old.json", "x" * 250):
        require_writable(tmp_path / file, "--output")
    for folder in (".", "a", "a/b", "to", "to/a"):
        require_writable(tmp_path / folder, "--output", folder=True)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "old.json").read_text() == "old"
