"""Times all metrics of one category against scikit-learn and a loop over regions, on one core.

python -m benchmarks.metrics    160 synthetic score maps of 224 x 224; writes benchmarks/results/metrics_<device>.json
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score

from benchmarks import plain
from evaluation.metrics import Ranking, auroc, average_precision, f1_max, pro, rank, region_weights
from utils.config import script_parser
from utils.devices import command_device
from utils.errors import UserError, run_command
from utils.files import require_writable, write_json
from utils.records import provenance
from utils.stages import StageClock

RESULTS = Path(__file__).parent / "results"
PRO_THRESHOLDS = 2000  # of the plain loop: quantiles of the normal scores; all scores would take hours
METRICS: dict[str, Callable[[Ranking], float]] = {"auroc": auroc, "ap": average_precision, "f1_max": f1_max}


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = script_parser(__doc__)
    parser.add_argument("--images", type=int, default=160, help="number of score maps")
    parser.add_argument("--size", type=int, default=224, help="side of the score maps in pixels")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timings of the project's metrics; the median is reported"
    )
    parser.add_argument("--device", default="cpu", help="device of the score maps; they are sorted there")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Times both on one core, prints times and differences, and writes a JSON file."""
    args = get_args_parser().parse_args(argv)
    require_writable(args.output, "--output", folder=True)
    if min(args.images, args.size, args.repeats) < 1:
        raise UserError("--images, --size and --repeats must be at least 1")
    device = command_device(args.device)
    one_core()
    maps, masks = draw_maps(args.images, args.size)
    ours = [_time_ours(maps, masks, device) for _ in range(args.repeats)]
    seconds = {name: float(np.median([run[0][name] for run in ours])) for name in ours[0][0]}
    values = ours[0][1]
    plain_seconds, plain_values = _time_plain(maps, masks)
    print(f"{'':22}{'seconds':>9}{'plain':>9}{'difference':>12}")
    for name in ("auroc", "ap", "f1_max", "pro"):
        print(f"{name:22}{seconds[name]:9.3f}{plain_seconds[name]:9.2f}{abs(values[name] - plain_values[name]):12.1e}")
    for name in ("sort and count", "regions"):
        print(f"{name:22}{seconds[name]:9.3f}")
    print(f"{'all':22}{sum(seconds.values()):9.3f}{sum(plain_seconds.values()):9.2f}")
    print(f"plain: scikit-learn; PRO: a loop over regions with {PRO_THRESHOLDS} thresholds, so an approximation")
    content = {**provenance(device), "images": args.images, "size": args.size, "seconds": seconds}
    content |= {"plain_seconds": plain_seconds, "values": values, "plain_values": plain_values}
    target = args.output / f"metrics_{device.type}.json"
    write_json(target, content)
    print(f"written: {target}")


def one_core() -> None:
    """Restricts this process to one core, where the system supports it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def draw_maps(images: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth score maps (B, S, S) float32 and masks (B, S, S) bool; three of four have a disc that scores higher."""
    rng = np.random.default_rng(0)
    maps = gaussian_filter(rng.gamma(3, size=(images, size, size)).astype(np.float32), (0, 4, 4))
    y, x = np.mgrid[:size, :size]
    centres = rng.uniform(0, size, (images, 2, 1, 1))
    discs = np.hypot(y - centres[:, 0], x - centres[:, 1]) < size / 14
    discs[::4] = False
    return maps + rng.uniform(0, 0.6, (images, 1, 1)).astype(np.float32) * discs, discs


def _time_ours(maps: np.ndarray, masks: np.ndarray, device: torch.device) -> tuple[dict, dict]:
    """Seconds and values of every metric of the project. In scoring, `regions` is computed once for all rounds."""
    clock, values = StageClock(), {}
    placed = maps if device.type == "cpu" else torch.from_numpy(maps).to(device)
    with clock("sort and count"):
        ranking = rank(placed, masks)
    with clock("regions"):
        weights = region_weights(masks)
    for name, metric in METRICS.items():
        with clock(name):
            values[name] = metric(ranking)
    with clock("pro"):
        values["pro"] = pro(ranking, weights)
    return clock.seconds, values


def _time_plain(maps: np.ndarray, masks: np.ndarray) -> tuple[dict, dict]:
    """Seconds and values of every metric by scikit-learn and the loop over regions."""
    clock, values = StageClock(), {}
    with clock("auroc"):
        values["auroc"] = float(roc_auc_score(masks.ravel(), maps.ravel()))
    with clock("ap"):
        values["ap"] = plain.average_precision(maps, masks)
    with clock("f1_max"):
        values["f1_max"] = plain.f1_max(maps, masks)
    with clock("pro"):
        thresholds = np.quantile(maps[~masks], np.linspace(0, 1, PRO_THRESHOLDS))
        values["pro"] = plain.pro(maps, masks, thresholds)
    return clock.seconds, values


if __name__ == "__main__":
    run_command(main)
