"""What a run leaves behind: the machine-readable record and the heat-map pictures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.special import stdtrit

from datasets.images import read_image, read_mask
from datasets.mvtec import LabelledImage
from evaluation.pictures import COLOUR_MAP
from utils.utils import whole_file


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
    """`0.6508 to 0.6684`, the 95 % interval; empty where there is none."""
    interval = numbers and numbers["interval95"]
    return f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""


def choose_examples(items: Sequence[LabelledImage], count: int) -> list[int]:
    """Indices of `count` test pictures, taken in turn from each defect and the normal ones; -1: all."""
    if count < 0:
        return list(range(len(items)))
    folders: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        folders.setdefault(item.defect, []).append(index)
    in_turn = [index for turn in zip_longest(*folders.values()) for index in turn if index is not None]
    return sorted(in_turn[:count])


def save_heat_maps(folder: Path, items: Sequence[LabelledImage], maps: np.ndarray, chosen: Sequence[int]) -> None:
    """One picture per chosen test image: input, ground truth outline, heat-map over the input.

    maps: score maps (B, S, S) of all test pictures; they set one colour scale for all, so pictures can be compared.
    """
    low, high = float(maps.min()), float(maps.max())
    for index in chosen:
        item, size = items[index], maps.shape[-1]
        image = read_image(item.image, size)
        mask = np.zeros((size, size), bool) if item.mask is None else read_mask(item.mask, size)
        target = folder / item.defect / f"{item.image.stem}.png"
        _save_panels(target, image, mask, maps[index], (low, high), f"{item.defect}/{item.image.name}")


def _save_panels(
    target: Path, image: np.ndarray, mask: np.ndarray, scores: np.ndarray, limits: tuple[float, float], name: str
) -> None:
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis in axes:
        axis.imshow(image)
        axis.set_axis_off()
    axes[0].set_title(name, fontsize=10)
    if mask.any():
        axes[1].contour(mask, levels=[0.5], colors="#00c8ff", linewidths=1.5)
    axes[1].set_title("ground truth" if mask.any() else "no marked defect", fontsize=10)
    heat = axes[2].imshow(scores, cmap=COLOUR_MAP, alpha=0.6, vmin=limits[0], vmax=limits[1])
    axes[2].set_title(f"image score {scores.max():.2f}", fontsize=10)
    figure.colorbar(heat, ax=axes[2], label="anomaly score (distance)")
    with whole_file(target) as aside:
        figure.savefig(aside, format="png", dpi=100)
