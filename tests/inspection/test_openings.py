"""predict.py opens a support image once for the fit and once for the page, whatever the flags."""

from __future__ import annotations

import os
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import predict

SIZE = 64
_counts: Counter[str] | None = None


def _count(event: str, arguments: tuple) -> None:
    if event == "open" and _counts is not None and isinstance(arguments[0], str | bytes | os.PathLike):
        _counts[os.path.basename(os.fsdecode(arguments[0]))] += 1


sys.addaudithook(_count)  # it stays for the life of the process, and counts for the fixture only


@pytest.fixture
def openings():
    """How often each file is opened, by name."""
    global _counts
    _counts = Counter()
    yield _counts
    _counts = None


def images(folder, names, width, height):
    for name in names:
        values = np.random.default_rng(ord(name[0])).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / name)
    return [str(folder / name) for name in names]


@pytest.mark.parametrize("flags", [[], ["--calibrate"], ["--region", "0,0,0.5,1", "--tile", "48", "--calibrate"]])
def test_support_images_are_opened_at_most_twice(flags, openings, tmp_path):
    support = images(tmp_path, ["a.png", "b.png", "c.png"], 100, 70)
    others = images(tmp_path, ["d.png", "e.png", "f.png"], 100, 70)
    flags = [*flags, *others] if "--calibrate" in flags else flags
    run = ["--weights", "none", "--img_size", str(SIZE), "--device", "cpu", "--output", str(tmp_path / "out")]
    openings.clear()
    predict.main(["--support", *support, "--input", others[0], "--save", str(tmp_path / "part.regad"), *run, *flags])
    assert [openings[name] for name in ("a.png", "b.png", "c.png")] == [2, 2, 2]
    assert openings["e.png"] <= 3 and openings["d.png"] <= 4  # once for its SHA-256; d.png is an input as well
