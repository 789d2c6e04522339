"""`pip install .` in an environment whose `datasets` is another package: everything is below `regad`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.files import PROJECT_ROOT
from utils.records import VERSION

USE = """
import sys
import datasets, utils
from regad import FewShotDetector, __version__
import regad.datasets.layouts
assert datasets.load_dataset() == utils.helper() == "of the host"
assert regad.datasets.layouts.__file__.endswith("regad/datasets/layouts.py")
print(__version__, FewShotDetector.__module__, [name for name in ("inspection", "models") if name in sys.modules])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder of installed packages: the project as pip installs it, and a host's packages named like our folders."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("site")
    how = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *how, str(PROJECT_ROOT)], check=True, capture_output=True)
    for name, function in (("datasets", "load_dataset"), ("utils", "helper")):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"def {function}():\n    return 'of the host'\n")
    return folder


def run(installed: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=installed.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_program_uses_it_beside_packages_of_the_same_names(installed):
    assert run(installed, sys.executable, "-c", USE) == f"{VERSION} regad.inspection.detector []\n"
    assert sorted(path.name for path in installed.iterdir() if (path / "__init__.py").is_file()) == [
        *("datasets", "regad", "utils"),
    ]


def test_the_commands_are_installed(installed):
    assert run(installed, sys.executable, str(installed / "bin/regad-predict"), "--help").startswith(
        "usage: regad-predict [--FLAG VALUE ...]"
    )
    names = ("check-data", "export", "make-support", "predict", "reproduce", "test", "train")
    assert sorted(path.name for path in (installed / "bin").iterdir()) == [f"regad-{name}" for name in names]


def test_all_files_are_there_and_no_import_is_left_as_it_was(installed):
    data = {path.name for path in (installed / "regad").rglob("*") if path.suffix in (".css", ".html", ".json", ".csv")}
    assert {"page.css", "page.html", "tables.html", "record.schema.json", "published_mvtec.csv"} <= data
    folders = [path.name for path in (installed / "regad").iterdir() if path.is_dir()]
    for file in (installed / "regad").rglob("*.py"):
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
        imports = [words[1] for words in lines if len(words) > 1 and words[0] in ("from", "import")]
        assert not [name for name in imports if name.split(".")[0] in folders], file
