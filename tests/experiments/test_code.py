"""Which files make a cell another one: those that decide a number, and no others."""

from __future__ import annotations

import pytest

from experiments import code


@pytest.fixture
def tree(copied_tree, monkeypatch):
    monkeypatch.setattr(code, "PROJECT_ROOT", copied_tree)
    return copied_tree


def test_files(tree):
    names = {file.relative_to(tree).as_posix() for file in code.decisive_files()}
    assert {"train.py", "test.py", "models/warp.py", "training/loop.py", "utils/stages.py"} < names
    assert not {name.split("/")[0] for name in names} & {"reports", "inspection", "experiments", "benchmarks", "tests"}


@pytest.mark.parametrize(
    "place",
    ["evaluation/statistics.py", "scorers/gaussian.py", "losses/norm_loss.py", "test.py", "datasets/__init__.py"],
)
def test_code_that_decides(place, tree):
    before = code.code_version()
    with open(tree / place, "a") as stream:
        stream.write("\n# touched\n")
    assert code.code_version() != before


@pytest.mark.parametrize(
    "place",
    [
        *("datasets/check.py", "reports/templates/page.html", "evaluation/gallery.py"),
        *("inspection/detector.py", "inspection/new.py", "experiments/tables.py", "predict.py", "benchmarks/plain.py"),
    ],
)
def test_code_that_decides_nothing(place, tree):
    before = code.code_version()
    with open(tree / place, "a") as stream:
        stream.write("\n# touched\n")
    assert code.code_version() == before


def test_imports_inside_functions_count(tree):
    with open(tree / "losses/norm_loss.py", "a") as stream:
        stream.write("\ndef late():\n    from datasets import check\n    return check\n")
    assert tree / "datasets/check.py" in code.decisive_files()
