"""Progress without a terminal: a line per minute with the time left."""

from __future__ import annotations

import pytest

from utils import progress
from utils.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, which only the test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_per_minute_with_the_time_left(clock, capsys):
    for _ in ProgressBar("decoding", range(10)):
        clock[0] += 30
    assert capsys.readouterr().err.splitlines() == [
        "decoding: 2 of 10 images, 20 %, about 4 min 0 s left",
        "decoding: 4 of 10 images, 40 %, about 3 min 0 s left",
        "decoding: 6 of 10 images, 60 %, about 2 min 0 s left",
        "decoding: 8 of 10 images, 80 %, about 1 min 0 s left",
    ]


def test_short_work_prints_nothing_and_notes_are_shown(clock, capsys):
    assert list(ProgressBar("decoding", "abc")) == list("abc") and not capsys.readouterr().err
    with ProgressBar("epoch 1/2", total=40, unit="steps") as bar:
        for note in ("loss 0.5", ""):
            clock[0] += 59
            bar.advance(10, note)
    assert capsys.readouterr().err == "epoch 1/2: 20 of 40 steps, 50 %, about 1 min 58 s left, loss 0.5\n"


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "BAR_SECONDS", 0)
    assert list(ProgressBar("decoding", range(3))) == [0, 1, 2]
    assert "decoding:   0%" in capsys.readouterr().err
