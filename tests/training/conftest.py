"""Runs of train.py in tests draw no curves, which take most of their time; those of shared fixtures do."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Set up after the fixtures of a module, so that their runs have all files."""
    monkeypatch.setattr("training.curve.save_figure", lambda *_: None)
