"""Signals become KeyboardInterrupt, but not while files are written."""

from __future__ import annotations

import os
import signal

import pytest

from utils.interrupts import Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_held_back(number):
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    done = []
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Interrupts() as interrupts:
            with pytest.raises(KeyboardInterrupt), interrupts.held():
                os.kill(os.getpid(), number)
                done.append("written")
            with interrupts.held():
                done.append("not interrupted twice")
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
            with pytest.raises(ValueError, match="own error"), interrupts.held():
                os.kill(os.getpid(), number)
                raise ValueError("own error")
    finally:
        signal.signal(signal.SIGINT, before[0])
    assert done == ["written", "not interrupted twice"]
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
