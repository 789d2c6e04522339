"""Numbers over rounds: mean, spread, interval, and how they are printed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit


def summary(values: Sequence[float | None]) -> dict | None:
    """Mean, sample standard deviation and 95 % interval over rounds; None where the metric is absent.

    The interval [low, high] is Student's t for the mean of another set of as many rounds. A single round has no spread.
    """
    if any(value is None for value in values):
        return None
    mean, rounds = float(np.mean(values)), len(values)
    if rounds == 1:
        return {"mean": mean, "sd": None, "interval95": None}
    spread = float(np.std(values, ddof=1))
    reach = float(stdtrit(rounds - 1, 0.975)) * spread / rounds**0.5
    return {"mean": mean, "sd": spread, "interval95": [mean - reach, mean + reach]}


def format_summary(numbers: dict | None) -> str:
    """`0.6596 +- 0.0123`, or `n/a`."""
    if numbers is None:
        return "n/a"
    return f"{numbers['mean']:.4f}" + ("" if numbers["sd"] is None else f" +- {numbers['sd']:.4f}")


def format_interval(numbers: dict | None) -> str:
    """`0.6508 to 0.6684`, the 95 % interval as far as it lies in [0, 1]; empty where there is none."""
    interval = numbers and numbers["interval95"]
    return f"{max(interval[0], 0):.4f} to {min(interval[1], 1):.4f}" if interval else ""
