"""Skips the tests that need the release's outputs where they are missing."""

from __future__ import annotations

import pytest

from benchmarks.reference import GOLDEN, REFERENCE

needs_reference = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the release's outputs are not at {REFERENCE}")
