"""How often a command opens the same image: once to identify it by its content, once to decode it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.flags import small_run
from utils.files import PROJECT_ROOT

COUNT = """
import json, runpy, sys
opened, (report, *sys.argv) = {}, sys.argv[1:]

def count(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].endswith(".png"):
        opened[arguments[0]] = opened.get(arguments[0], 0) + 1

sys.addaudithook(count)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    json.dump(opened, open(report, "w"))
"""


def openings(report: Path, *command: str) -> Counter[Path]:
    """How often a command opens each PNG file."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(report), *command], cwd=PROJECT_ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return Counter({Path(name): count for name, count in json.loads(report.read_text()).items()})


def test_scoring_opens_each_image_and_mask_twice(demo_data, tmp_path):
    """With panels and a report, which show images and masks again."""
    flags = {"shot": 2, "inferences": 2, "num_workers": 2, "untrained": True, "save_images": -1}
    found = openings(tmp_path / "report.json", "test.py", *small_run(demo_data, output=tmp_path / "out", **flags))
    labelled = [path for part in ("test", "ground_truth") for path in (demo_data / "ring" / part).rglob("*.png")]
    assert len(labelled) == 15 and {found[path] for path in labelled} <= {1, 2}
    train = list((demo_data / "ring/train").rglob("*.png"))
    assert max(found[path] for path in train) <= 2  # the header for the bit depth, and the pixels
