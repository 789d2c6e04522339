"""Saves plots for the screen and for print."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from utils.files import whole_file

# No date and no random identifiers: the same figure gives the same file.
METADATA = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


def save_figure(path: Path, figure: Figure) -> None:
    """Writes `path`, a PNG, and the same plot as PDF and SVG."""
    for suffix, metadata in METADATA.items():
        with whole_file(path.with_suffix(f".{suffix}")) as aside, matplotlib.rc_context({"svg.hashsalt": "RegAD"}):
            figure.savefig(aside, format=suffix, dpi=100, metadata=metadata)
