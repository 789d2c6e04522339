"""Command lines of small runs of train.py and test.py."""

from __future__ import annotations

from pathlib import Path

SMALL = {"data_type": "folder", "img_size": 64, "weights": "none", "device": "cpu", "num_workers": 0}


def words(**flags: object) -> list[str]:
    """The words of a command line. True is a flag without value, a tuple one of several values, None no flag."""
    line = []
    for name, value in flags.items():
        if value is not None:
            values = () if value is True else value if isinstance(value, tuple) else (value,)
            line += [f"--{name}", *map(str, values)]
    return line


def small_run(data: Path, **flags: object) -> list[str]:
    """The words of a run on the category `ring`, or another `obj`, in the folder `data`."""
    return words(**{"obj": "ring", "data_path": data} | SMALL | flags)
