"""Statistics over rounds (mean, standard deviation, 95 % interval, p-values) and their text format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtr, stdtrit

from evaluation.metrics import METRIC_NAMES
from evaluation.round_metrics import AUROCS, GroundTruth, Numbers

SHARE = (0.0, 1.0)  # the range of a metric


def summary(values: Sequence, limits: tuple[float, float] | None = None) -> dict | None:
    """Mean, sample standard deviation and 95 % interval; None if a value is None.

    values: of rounds; or of several trainings (rows) that were scored on the same support sets (columns), at least
    2 x 2. Then "sd" is that of the means of support sets, and "sd_trainings" that of the means of trainings.

    The interval [low, high] is Student's t confidence interval of the mean, clipped to `limits`, the range of the
    values; see `standard_error`. With a single round, standard deviation and interval are None.
    """
    if any(value is None for value in values):
        return None
    table = np.asarray(values, dtype=float)
    mean = float(table.mean())
    if table.size == 1:
        return {"mean": mean, "sd": None, "interval95": None}
    numbers = {"mean": mean, "sd": float(np.std(table if table.ndim == 1 else table.mean(axis=0), ddof=1))}
    if table.ndim == 2:
        numbers["sd_trainings"] = float(np.std(table.mean(axis=1), ddof=1))
    error, freedom = standard_error(table)
    reach = float(stdtrit(freedom, 0.975)) * error
    low, high = limits or (-np.inf, np.inf)
    return numbers | {"interval95": [min(max(end, low), high) for end in (mean - reach, mean + reach)]}


def standard_error(values: Sequence) -> tuple[float, float]:
    """The standard error of the mean, and its degrees of freedom.

    values: of rounds, at least 2; or of trainings (rows) by rounds (columns), at least 2 x 2. In the second case, the
    variance of the mean is that of a two-way layout with random effects, but at least that of either effect alone; the
    degrees of freedom are Satterthwaite's.
    """
    table = np.asarray(values, dtype=float)
    if table.ndim == 1:
        return float(np.std(table, ddof=1)) / len(table) ** 0.5, len(table) - 1
    trainings, supports = table.shape
    of_training, of_support = table.mean(axis=1), table.mean(axis=0)
    squares = [supports * of_training.var(ddof=1), trainings * of_support.var(ddof=1)]
    freedom = [trainings - 1, supports - 1, (trainings - 1) * (supports - 1)]
    rest = table - of_training[:, None] - of_support + table.mean()
    squares.append((rest**2).sum() / freedom[2])
    total = max(squares[0] + squares[1] - squares[2], squares[0], squares[1])
    of_squares = sum(square**2 / free for square, free in zip(squares, freedom, strict=True))
    return float(total / table.size) ** 0.5, total**2 / of_squares if total else 1.0


def p_value(differences: Sequence) -> float:
    """The two-sided p-value of the paired t-test: the probability of such a large mean if the true mean is 0.

    differences: as the values of `standard_error`. If all are equal, it is 0, or 1 if all are 0.
    """
    mean, (error, freedom) = float(np.mean(differences)), standard_error(differences)
    if error == 0:
        return float(mean == 0)
    return 2 * float(stdtr(freedom, -abs(mean) / error))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected by Holm's method (1979): the probability of any false finding among them is controlled."""
    count, corrected, largest = len(p_values), [0.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (count - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def summaries(rounds: Sequence[dict[str, float | None]]) -> dict[str, dict | None]:
    """The `summary` of every metric. rounds: one dict per round, metric -> value in [0, 1]."""
    return {name: summary([numbers[name] for numbers in rounds], SHARE) for name in rounds[0]}


def metric_entries(truth: GroundTruth, rounds: Sequence[tuple[Numbers, dict[str, Numbers]]]) -> dict:
    """The entries of a record with its metrics: of each round, their `summary`, and those of each defect type.

    A metric that cannot be computed is None, and `not_available` has the reason. rounds: from RoundMetrics.of_round.
    """
    overall, by_type = zip(*rounds, strict=True)
    reasons, type_reasons = truth.reasons()
    defects = {}
    for defect_type, images in truth.members().items():
        entry: dict[str, object] = {"images": int(images.sum())}
        metrics = by_type[0][defect_type]
        for name in metrics:
            values = [numbers[defect_type][name] for numbers in by_type]
            spread = summary(values, SHARE)
            entry[name] = spread and spread | {"rounds": values}
        missing = type_reasons[defect_type]
        entry["not_available"] = {name: reason for name, reason in missing.items() if name in metrics}
        defects[defect_type] = entry
    return {
        "rounds": list(overall),
        **summaries(overall),
        "not_available": {name: reason for name, reason in reasons.items() if name in overall[0]},
        "defects": defects,
    }


def format_summaries(entries: dict) -> list[str]:
    """The lines of all metrics with their intervals, then the table of the defect types, if there are any.

    entries: those of `metric_entries`, such as a record.
    """
    lines, defects = [], entries["defects"]
    for name in entries["rounds"][0]:
        second = entries["not_available"].get(name) or format_interval(entries[name])
        lines.append(f"  {METRIC_NAMES[name]:14}{format_summary(entries[name]):20}{second}".rstrip())
    if not defects:
        return lines
    metrics = [name for name in next(iter(defects.values())) if name in METRIC_NAMES]
    width = max(map(len, (*defects, "defect type")))
    heads = "".join(f"  {METRIC_NAMES[metric]:17}" for metric in metrics)
    lines += ["each defect type against all normal images:", f"  {'defect type':{width}}  images{heads}".rstrip()]
    for defect_type, numbers in defects.items():
        cells = "".join(f"  {format_summary(numbers[metric]):17}" for metric in metrics)
        lines.append(f"  {defect_type:{width}}  {numbers['images']:6}{cells}".rstrip())
    return lines


def format_summary(numbers: dict | None) -> str:
    """Mean and standard deviation as text: `0.6596 +- 0.0123`, or `n/a` without values."""
    if numbers is None:
        return "n/a"
    return f"{numbers['mean']:.4f}" + ("" if numbers["sd"] is None else f" +- {numbers['sd']:.4f}")


def format_aurocs(numbers: dict[str, float | None]) -> str:
    """The AUROCs of a round as text: `image AUROC 0.6596, pixel AUROC n/a`."""
    texts = {name: "n/a" if numbers[name] is None else f"{numbers[name]:.4f}" for name in AUROCS}
    return ", ".join(f"{METRIC_NAMES[name]} {text}" for name, text in texts.items())


def format_interval(numbers: dict | None) -> str:
    """The 95 % interval as text: `0.6508 to 0.6684`; empty without an interval."""
    interval = numbers and numbers["interval95"]
    return f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
