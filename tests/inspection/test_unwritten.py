"""Rows whose files could not be written, runs that ended meanwhile, and names that are not UTF-8."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from inspection.config import PredictConfig
from inspection.inputs import full_name
from inspection.results import Prediction, ResultFiles
from inspection.run import Run, check_paths
from utils.errors import UserError
from utils.files import PROJECT_ROOT


def row(path: str, score: float | None, error: str | None) -> Prediction:
    return Prediction("now", path, 1, "then", score, None, "normal", None, 1.0, "d", error)


def test_append_tries_again_what_could_not_be_written(tmp_path):
    results = ResultFiles(tmp_path)
    for name, score, error in (("a", 1.0, None), ("b", 1.0, "its files cannot be written"), ("c", None, "damaged")):
        results.add(row(name, score, error))
    assert len(results.done) == 3  # a watch does not try it again and again
    results.close()
    again = ResultFiles(tmp_path)
    assert {one.path for one in again.done} == {"a", "c"}
    again.close()


def test_results_of_a_run_that_ended_meanwhile_are_kept(tmp_path):
    config = PredictConfig(support=(tmp_path,), input=(tmp_path / "x.png",), output=tmp_path / "out")
    check_paths(config)
    results = ResultFiles(config.output)
    results.add(row("a", 1.0, None))
    results.close()
    with (
        closing(ResultFiles(config.output)) as results,
        pytest.raises(UserError, match="another run has written results"),
    ):
        Run(config, None, [], results, [tmp_path / "x.png"], None)


def test_nothing_to_write_needs_no_output_folder(tmp_path):
    (tmp_path / "file").touch()
    check_paths(PredictConfig(support=(tmp_path,), save=tmp_path / "x.regad", output=tmp_path / "file/out"))


@pytest.mark.parametrize("name", [b"\xff\xfe.png", "gr\u00fcn.png".encode(), b"gr\xfcn.png"])
def test_names_are_the_same_text_in_every_locale(name):
    path = Path(os.fsdecode(b"/x/" + name))
    assert full_name(path) == "/x/" + name.decode(errors="backslashreplace")


FOUND = """
import sys; from pathlib import Path; from inspection.results import ResultFiles
folder = Path(sys.argv[1])
for overwrite in (False, True):
    results = ResultFiles(folder, overwrite)
    print([(folder / name).is_file() for row in results.rows for name in row.files])
    results.close()
"""
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_files_of_rows_are_found_in_every_locale(tmp_path):
    results, names = ResultFiles(tmp_path), ["gr\u00fcn.png", os.fsdecode(b"gr\xfcn.png")]
    results.add(row("a", 1.0, None)._replace(files=names))
    results.close()
    for name in names:
        (tmp_path / name).touch()
    command = [sys.executable, "-c", FOUND, str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT_ROOT, env=os.environ | ASCII, capture_output=True, text=True)
    assert done.stdout == "[True, True]\n[]\n", done.stderr
    assert not any((tmp_path / name).exists() for name in names)
