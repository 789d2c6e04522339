"""Measures decisions on images that were taken otherwise: light, blur, noise, JPEG compression, shift, zoom.

python -m benchmarks.changes             measure, print the tables, write benchmarks/results/changes_<device>.json
python -m benchmarks.changes --report    print the tables of that file

A detector is fitted to K normal images of a category, with the default thresholds. Its decisions on the same good and
defective test images, unchanged and changed, are counted.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.measuring import evenly, measuring_parser, report_or_measure
from benchmarks.reference import draw_support_images
from datasets.images import decode_image
from datasets.mvtec import category_folder, list_test_items
from inspection.detector import FewShotDetector, Inspection
from inspection.fitting import DEFAULT_RATE
from inspection.results import DEFECTIVE, NORMAL, REVIEW, decide
from models.efficientnet_lite import EfficientNetLite
from utils.devices import command_device
from utils.errors import run_command


def with_light(share: float) -> Callable[[Image.Image], Image.Image]:
    """Grey values times `share`, at most white."""
    return lambda image: image.point(lambda value: min(255, round(value * share)))


def blurred(image: Image.Image) -> Image.Image:
    """Gaussian blur with a standard deviation of 2 pixels of the image."""
    return image.filter(ImageFilter.GaussianBlur(2))


def noisy(image: Image.Image) -> Image.Image:
    """Normally distributed noise with a standard deviation of 12 grey values."""
    values = np.asarray(image, np.float32)
    values = values + np.random.default_rng(0).normal(0, 12, values.shape)
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def compressed(image: Image.Image) -> Image.Image:
    """JPEG with quality 20."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=20)
    return Image.open(stream).convert(image.mode)


def framed(zoom: float = 1.0, shift: float = 0.0) -> Callable[[Image.Image], Image.Image]:
    """The image enlarged by `zoom` around its centre, and moved to the right by `shift` of its width.

    What comes into view is a reflection.
    """

    def change(image: Image.Image) -> Image.Image:
        width, height = image.size
        pad = max(width, height) // 3
        values = np.asarray(image)
        values = np.pad(values, ((pad, pad), (pad, pad), *[(0, 0)] * (values.ndim - 2)), "reflect")
        left = pad + width / 2 - width / zoom / 2 - shift * width
        top = pad + height / 2 - height / zoom / 2
        box = (left, top, left + width / zoom, top + height / zoom)
        return Image.fromarray(values).resize(image.size, Image.Resampling.BICUBIC, box=box)

    return change


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "unchanged": lambda image: image,
    "25 % of the light": with_light(0.25),
    "40 %": with_light(0.4),
    "60 %": with_light(0.6),
    "130 %": with_light(1.3),
    "blur, sigma 2": blurred,
    "noise": noisy,
    "JPEG 20": compressed,
    "5 % shift": framed(shift=0.05),
    "20 % smaller": framed(zoom=0.8),
    "20 % larger": framed(zoom=1.2),
}


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = measuring_parser(__doc__)
    parser.add_argument("--shots", nargs="+", type=int, default=[4], help="numbers of support images")
    parser.add_argument("--draws", type=int, default=1, help="draws of the support images, seed 0")
    parser.add_argument("--images", type=int, default=12, help="good and defective test images each")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all categories, prints the tables and writes one JSON file."""
    args = get_args_parser().parse_args(argv)
    device = command_device(args.device)
    target = args.output / f"changes_{device.type}.json"

    def measure() -> dict:
        return {"rows": [row for category in args.obj for row in _measure(category, args)]}

    report_or_measure("benchmarks.changes", args, target, device, measure, lambda content: report(content["rows"]))


def _measure(category: str, args: argparse.Namespace) -> Iterator[dict]:
    """Yields one row per draw, K, kind of image and change: the shares of the decisions."""
    folder = category_folder(args.data_path, "folder", category)
    images: dict[str, list[Path]] = {"good": [], "defective": []}
    for item in list_test_items(folder):
        images["defective" if item.label else "good"].append(item.image)
    for number, paths in enumerate(draw_support_images(folder, max(args.shots), args.draws, seed=0)):
        for shot in args.shots:
            detector = FewShotDetector(EfficientNetLite(), args.device).fit(paths[:shot])
            detector.calibrate(DEFAULT_RATE)
            for kind, paths_of_kind in images.items():
                decoded = [decode_image(path) for path in evenly(paths_of_kind, args.images)]
                for change, apply in CHANGES.items():
                    found = detector.inspect([apply(image) for image in decoded])
                    of_images = decisions(detector, found)
                    shares = {name: of_images.count(name) / len(of_images) for name in (NORMAL, REVIEW, DEFECTIVE)}
                    row = {"category": category, "shot": shot, "draw": number, "kind": kind, "change": change}
                    yield row | shares | {"stopped": sum(map(bool, found.reasons)) / len(of_images)}
    print(f"{category} measured", flush=True)


def decisions(detector: FewShotDetector, found: Inspection) -> list[str]:
    """The decision of a detector with a threshold on each inspected image."""
    pairs = zip(found.scores.tolist(), found.reasons, strict=True)
    return [decide(score, detector.threshold, reason)[0] for score, reason in pairs]


def report(rows: Sequence[dict]) -> str:
    """Markdown tables: of the defective images those called normal, of the good ones each decision."""
    categories = list(dict.fromkeys(row["category"] for row in rows))
    parts = []
    for kind, decision in (("defective", NORMAL), ("good", REVIEW), ("good", DEFECTIVE)):
        lines = [f"| {kind} images called {decision} | {' | '.join(categories)} | mean |"]
        lines.append("|---" + "|---:" * (len(categories) + 1) + "|")
        for change in CHANGES:
            shares = [_mean(rows, decision, kind=kind, change=change, category=name) for name in categories]
            lines.append(f"| {' | '.join([change, *(f'{share:.0%}' for share in [*shares, np.mean(shares)])])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _mean(rows: Sequence[dict], column: str, **chosen: str) -> float:
    return float(np.mean([row[column] for row in rows if all(row[name] == value for name, value in chosen.items())]))


if __name__ == "__main__":
    run_command(main)
