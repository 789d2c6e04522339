"""Statistics over rounds (mean, standard deviation, 95 % interval) and their text format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

SHARE = (0.0, 1.0)  # the range of every metric


def summary(values: Sequence[float | None], limits: tuple[float, float] | None = None) -> dict | None:
    """Mean, sample standard deviation and 95 % interval over rounds; None if a value is None.

    The interval [low, high] is Student's t confidence interval of the mean, clipped to `limits`, the range that the
    values can have. With a single round, standard deviation and interval are None.
    """
    if any(value is None for value in values):
        return None
    mean, rounds = float(np.mean(values)), len(values)
    if rounds == 1:
        return {"mean": mean, "sd": None, "interval95": None}
    spread = float(np.std(values, ddof=1))
    reach = float(stdtrit(rounds - 1, 0.975)) * spread / rounds**0.5
    interval = [mean - reach, mean + reach]
    if limits:
        interval = [min(max(end, limits[0]), limits[1]) for end in interval]
    return {"mean": mean, "sd": spread, "interval95": interval}


def summaries(rounds: Sequence[dict[str, float | None]]) -> dict[str, dict | None]:
    """The `summary` of every metric, a share; rounds: one dict per round, metric -> value."""
    return {name: summary([numbers[name] for numbers in rounds], SHARE) for name in rounds[0]}


def format_summary(numbers: dict | None) -> str:
    """Mean and standard deviation as text: `0.6596 +- 0.0123`, or `n/a` without values."""
    if numbers is None:
        return "n/a"
    return f"{numbers['mean']:.4f}" + ("" if numbers["sd"] is None else f" +- {numbers['sd']:.4f}")


def format_interval(numbers: dict | None) -> str:
    """The 95 % interval as text: `0.6508 to 0.6684`; empty without an interval."""
    interval = numbers and numbers["interval95"]
    return f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
