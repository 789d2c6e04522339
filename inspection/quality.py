"""Compares light, sharpness, noise, colours and position of an image with those of the support images.

The score of an image that was taken otherwise than the support images means little: a dark or blurred image of a
defective part can have the score of a normal one, and a moved camera makes normal parts defective. Such an image is for
a person to judge.

Each measure is a number of the network's input, most of them logarithms, so that a factor of the light is a difference.
Its limits are mean +- q s sqrt(1 + 1/n) over n normal images. As few images say little about the standard deviation s,
it is combined with SPREAD, a typical one, which counts as PRIOR_IMAGES images; q is the quantile of Student's
distribution for RATE, or DARK_RATE below the mean light, as defects vanish in darker images. Where the normal images
differ more than typical, averaged over all measures, SPREAD is raised for all of them: two images of a varying part can
agree in one measure by chance.

The constants were chosen by the share of good images outside the limits (at most 5 % on average) and of dimmed and
blurred ones inside, on nine categories. `python -m benchmarks.changes` measures these shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit

from datasets.images import unit_range
from scorers.views import GREY_WEIGHTS

PRIOR_IMAGES = 4.0
RATE = 0.001  # of normal images beyond a limit of one measure
DARK_RATE = 0.005  # the same of darker images
POOLING = 0.75  # exponent of the factor by which images differ more than typical
MOST_UNTYPICAL = 3.0  # of that factor in one measure
NEWEST, LEAST_IMAGES, DRIFT = 50, 20, 0.5  # images that show a drift, and its size relative to a limit
EDGE = 1 / 255  # least light, contrast, difference: 8-bit images say nothing about less
NOISE_FLOOR = 0.001  # of grey values in [0, 1]; rounding to 8 bits leaves no less
STEP = 2.0**-16  # of grey values in [0, 1]; quantiles are counted in steps
NORMAL_MEDIAN = 0.6745  # of the absolute value of a standard normal variable
NOISE_GAIN = 6.0  # standard deviation of the mixed second difference of noise with standard deviation 1


class Measure(NamedTuple):
    """spread: the typical standard deviation over normal images. below, above: words for an image outside the limits.

    is_log: the measure is the logarithm of what `readable` shows. rate_below: of normal images beyond the lower limit.
    """

    spread: float
    below: str
    above: str
    is_log: bool = True
    rate_below: float = RATE


MEASURES = {
    # highlights, the 99th percentile: a defect hardly changes them
    "light": Measure(0.05, "darker", "brighter", rate_below=DARK_RATE),
    "contrast": Measure(0.15, "lower in contrast", "higher in contrast"),  # relative to the light
    "sharpness": Measure(0.01, "less sharp", "sharper"),  # differences of neighbours to those two pixels apart
    "noise": Measure(0.08, "smoother", "noisier"),  # median of second differences
    "grain": Measure(0.1, "smoother", "noisier"),  # lowest quarter: smooth areas show compression and weak blur
    "red": Measure(0.02, "less red", "redder"),
    "blue": Measure(0.02, "less blue", "bluer"),
    # centre and root mean square radius of what differs from the border
    "x": Measure(0.012, "further left", "further right", is_log=False),
    "y": Measure(0.012, "higher up", "lower down", is_log=False),
    "size": Measure(0.03, "smaller", "larger"),
}
SPREAD = np.array([kind.spread for kind in MEASURES.values()])
RATES = np.array([[kind.rate_below for kind in MEASURES.values()], [RATE] * len(MEASURES)])


def measure(square: torch.Tensor) -> np.ndarray:
    """The MEASURES (M,) of a network input (3, S, S); x and y are fractions of the side."""
    colours = unit_range(square).cpu().numpy()
    grey = np.tensordot(np.array(GREY_WEIGHTS, np.float32), colours, axes=1)
    light = _quantiles(grey, 0.99)[0] + EDGE
    near, far = (_square_difference(grey, pixels) + EDGE**2 / 16 for pixels in (1, 2))
    second = np.abs(np.diff(np.diff(grey, n=2, axis=0), n=2, axis=1))  # lines and steps along rows or columns vanish
    quarter, median = _quantiles(second, 0.25, 0.5) / NOISE_GAIN / NORMAL_MEDIAN + NOISE_FLOOR
    red, green, blue = colours.mean(axis=(1, 2)) + EDGE
    x, y, size = _extent(grey)
    ratios = light, (grey.std() + EDGE) / light, np.sqrt(near / far), median, quarter, red / green, blue / green, size
    light, contrast, sharpness, median, quarter, red, blue, size = np.log(ratios)
    return np.array([light, contrast, sharpness, median, quarter, red, blue, x, y, size])


def _quantiles(values: np.ndarray, *shares: float) -> np.ndarray:
    """The values below which these shares of `values` lie, within a STEP; negative values count as 0.

    Counting is faster than numpy's percentile, which slows the check of a single image.
    """
    counts = np.bincount((values.ravel().clip(min=0) / STEP + 0.5).astype(np.intp)).cumsum()
    return np.searchsorted(counts, np.array(shares) * values.size) * STEP


def _square_difference(grey: np.ndarray, pixels: int) -> float:
    """Mean squared difference of grey values some pixels apart, along rows and columns."""
    along, across = grey[pixels:] - grey[:-pixels], grey[:, pixels:] - grey[:, :-pixels]
    return float(np.square(along).mean() + np.square(across).mean())


def _extent(grey: np.ndarray) -> tuple[float, float, float]:
    """Centre (x, y) and root mean square radius, as fractions of the side, of what differs from the border's median."""
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    weights = np.square(grey - np.median(border)) + EDGE**2
    weights /= weights.sum()
    places = (np.arange(len(grey)) + 0.5) / len(grey)
    across, down = weights.sum(axis=0), weights.sum(axis=1)
    x, y = across @ places, down @ places
    return float(x), float(y), float(np.sqrt(across @ (places - x) ** 2 + down @ (places - y) ** 2))


def readable(values: np.ndarray) -> dict[str, float]:
    """The measures (M,) of an image by name, logarithms as ratios: light 0.5 is half of white."""
    kinds = MEASURES.values()
    plain = [float(np.exp(value)) if kind.is_log else float(value) for value, kind in zip(values, kinds, strict=True)]
    return dict(zip(MEASURES, plain, strict=True))


class QualityGate:
    """The measures (n, M) of n >= 1 support images, of further normal images, and the limits that follow."""

    def __init__(self, support: np.ndarray, further: np.ndarray | None = None) -> None:
        self.support, self.further = support, further
        normal = support if further is None else np.concatenate([support, further])
        count, self.mean = len(normal), normal.mean(axis=0)
        squares = np.square(normal - self.mean).sum(axis=0)
        untypical = 1.0
        if count > 1:
            ratios = np.sqrt(squares / (count - 1)) / SPREAD
            untypical = max(1.0, float(np.sqrt(np.square(ratios.clip(max=MOST_UNTYPICAL)).mean()))) ** POOLING
        freedom = PRIOR_IMAGES + count - 1
        variance = (PRIOR_IMAGES * np.square(untypical * SPREAD) + squares) / freedom * (1 + 1 / count)
        self.margins = stdtrit(freedom, 1 - RATES) * np.sqrt(variance)  # (2, M): below and above the mean

    @classmethod
    def of(cls, squares: Sequence[torch.Tensor]) -> QualityGate:
        """The gate of normal images, given as network inputs (3, S, S)."""
        return cls(np.stack([measure(square) for square in squares]))

    def with_further(self, squares: Sequence[torch.Tensor]) -> QualityGate:
        """The gate with these further normal images, given as network inputs, in place of earlier further ones."""
        return QualityGate(self.support, np.stack([measure(square) for square in squares]) if squares else None)

    def with_support(self, squares: Sequence[torch.Tensor]) -> QualityGate:
        """The gate with more support images, given as network inputs."""
        return QualityGate(np.concatenate([self.support, [measure(square) for square in squares]]), self.further)

    def drift(self, measured: Sequence[Mapping[str, float]]) -> list[str]:
        """Sentences on measures whose median over the newest images is more than DRIFT of the way to a limit.

        measured: as from `readable`, in the order of time; entries of other versions are left out. Nothing is said of
        fewer than LEAST_IMAGES.
        """
        newest = [measures for measures in measured if measures.keys() >= MEASURES.keys()][-NEWEST:]
        if len(newest) < LEAST_IMAGES:
            return []
        medians = {name: float(np.median([measures[name] for measures in newest])) for name in MEASURES}
        plain = [np.log(max(medians[name], 1e-9)) if kind.is_log else medians[name] for name, kind in MEASURES.items()]
        found = []
        for (name, kind), limits, share in zip(
            MEASURES.items(), self.limits().values(), self._shares(np.array(plain)), strict=True
        ):
            if abs(share) > DRIFT:
                words, limit = (kind.above, limits["high"]) if share > 0 else (kind.below, limits["low"])
                found.append(
                    f"the newest {len(newest)} images are {words} than the support images: {name} {medians[name]:.3g}, "
                    f"there {limits['typical']:.3g}, limit {limit:.3g}"
                )
        return found

    def _shares(self, values: np.ndarray) -> np.ndarray:
        """How far measures (M,) are from the mean, relative to the limit on their side; below -1 or above 1: beyond."""
        offsets = values - self.mean
        return offsets / np.where(offsets > 0, self.margins[1], self.margins[0])

    def state(self) -> dict:
        """Tensors for a file; `from_state` reads them."""
        further = {} if self.further is None else {"further": torch.from_numpy(self.further)}
        return {"support": torch.from_numpy(self.support)} | further

    @classmethod
    def from_state(cls, state: Mapping) -> QualityGate:
        """The inverse of `state`; ValueError if there are other measures."""
        measured = [state[name].numpy() for name in ("support", "further") if name in state]
        if any(values.shape[1:] != SPREAD.shape for values in measured):
            raise ValueError(f"{len(SPREAD)} measures of image quality are needed")
        return cls(*measured)

    def reason(self, values: np.ndarray) -> str:
        """In what an image with the measures `values` (M,) is outside the limits, as a phrase; "" if in nothing."""
        shares, kinds = self._shares(values), MEASURES.values()
        words = [kind.above if far > 0 else kind.below for far, kind in zip(shares, kinds, strict=True) if abs(far) > 1]
        return f"{', '.join(dict.fromkeys(words))} than the support images" if words else ""

    def limits(self) -> dict[str, dict[str, float]]:
        """For each measure `low`, `typical` and `high`, as `readable` shows them."""
        low, high = readable(self.mean - self.margins[0]), readable(self.mean + self.margins[1])
        return {
            name: {"low": low[name], "typical": typical, "high": high[name]}
            for name, typical in readable(self.mean).items()
        }
