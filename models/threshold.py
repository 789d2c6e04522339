"""From the scores of a few normal pictures to a threshold, with no defect seen.

The rule. Logarithms of normal scores are taken as normally distributed, mean and spread unknown. With n scores x_i,
m and SS the mean and the sum of squared deviations of log x_i, the next normal score stays below

    exp(m + t sqrt((1 + 1/n) (PRIOR_WEIGHT PRIOR_SPREAD^2 + SS) / (PRIOR_WEIGHT + n - 1)))

with probability 1 - false_alarm, t being that quantile of Student's distribution with PRIOR_WEIGHT + n - 1 degrees of
freedom: the predictive bound when the spread has a scaled inverse chi-square prior. Where n is so large that an order
statistic does (n + 1 >= 1 / false_alarm), the ceil((n + 1)(1 - false_alarm))-th smallest score is taken, which assumes
no distribution (split conformal prediction).

Its weakness: two to eight scores say next to nothing about the upper tail, so with few pictures the prior decides, and
the promise holds on average over support sets, not for one. Leave-one-out scores come from K - 1 pictures instead of K,
so they are too high; `as_of_all` takes that off by a rule of thumb that was measured on the very categories on which
the false alarms were measured. And they depend on each other.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from utils.utils import UserError

PRIOR_SPREAD = 0.25  # of log scores; on four real categories normal pictures have 0.10 to 0.40 (benchmarks.threshold)
PRIOR_WEIGHT = 4  # in pictures: as if the spread had been seen on so many before
LEFT_OUT_EXCESS = 0.4  # of log scores, times K; 0.36 to 0.51 on those categories, network not trained


class Threshold(NamedTuple):
    """A score above `value` (a distance) is called defective; `how` says where the value came from.

    typical: the median normal score, or `value` where no normal score is known; heat-maps are coloured by it.
    """

    value: float
    how: str
    typical: float


def normal_threshold(scores: np.ndarray, false_alarm: float, source: str) -> Threshold:
    """The threshold that about a share `false_alarm` of normal pictures exceeds, from normal `scores` (n,) above 0.

    Raises:
        UserError: fewer than two scores, or a share outside (0, 1).
    """
    if not 0 < false_alarm < 1:
        raise UserError(f"--false_alarm is a share between 0 and 1, got {false_alarm}")
    count = len(scores)
    if count < 2:
        raise UserError(f"a threshold needs at least 2 normal scores, got {count}")
    rank = math.ceil((count + 1) * (1 - false_alarm) - 1e-9)  # 20 * 0.95 must not become 19.000000000000004
    if rank <= count:
        value, rule = float(np.sort(scores)[rank - 1]), f"the {rank}-th smallest of {count} scores"
    else:
        value, rule = _predictive_bound(np.log(np.asarray(scores, np.float64)), false_alarm), "log-normal bound"
    how = f"{rule} for a false-alarm rate of {false_alarm:g}, {source}"
    return Threshold(value, how, float(np.median(scores)))


def as_of_all(left_out: np.ndarray) -> np.ndarray:
    """What scores (K,) from K - 1 support pictures each would be, on average, had there been K."""
    return left_out * np.exp(-LEFT_OUT_EXCESS / len(left_out))


def _predictive_bound(logs: np.ndarray, false_alarm: float) -> float:
    """The bound of the module's docstring."""
    freedom = PRIOR_WEIGHT + len(logs) - 1
    variance = (PRIOR_WEIGHT * PRIOR_SPREAD**2 + np.square(logs - logs.mean()).sum()) / freedom
    quantile = stdtrit(freedom, 1 - false_alarm)
    return float(np.exp(logs.mean() + quantile * np.sqrt((1 + 1 / len(logs)) * variance)))
