"""What others read of the project agrees with the code: version, citation, lock file, lint, continuous integration."""

from __future__ import annotations

import json
import os
import re

import pytest

from utils.files import PROJECT_ROOT
from utils.records import VERSION


def read(name: str) -> str:
    return (PROJECT_ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("pyproject.toml", r'^version = "(.+)"'),
        ("CITATION.cff", r"^version: (.+)"),
        ("CHANGELOG.md", r"^## (\d.+)"),
    ],
)
def test_one_version(file, pattern):
    assert re.findall(pattern, read(file), flags=re.MULTILINE)[0] == VERSION


def test_ruff_has_one_version():
    (pinned,) = re.findall(r"^ruff==(.+)", read("requirements-dev.txt"), flags=re.MULTILINE)
    assert f"rev: v{pinned}\n" in read(".pre-commit-config.yaml")


def test_continuous_integration_runs_what_the_project_runs():
    assert "run: .ci/run\n" in read(".github/workflows/ci.yml") and os.access(PROJECT_ROOT / ".ci/run", os.X_OK)


def pins() -> dict[str, str]:
    return dict(line.split("==") for line in read("requirements-lock.txt").splitlines() if not line.startswith("#"))


def test_the_lock_file_holds_every_requirement_and_the_versions_of_the_records():
    names = {name.lower() for name in pins()}
    needed = re.findall(r"^([\w-]+)[>=]", read("requirements.txt"), flags=re.MULTILINE)
    assert len(needed) > 10 and not [name for name in needed if name.lower() not in names]
    files = [*(PROJECT_ROOT / "results").rglob("*.json"), *(PROJECT_ROOT / "benchmarks/results").glob("*.json")]
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    recorded = [record["versions"] for record in records if isinstance(record, dict) and "versions" in record]
    locked = {name.lower(): pin for name, pin in pins().items()}
    assert recorded and all(locked[name] == pin for of_record in recorded for name, pin in of_record.items())
