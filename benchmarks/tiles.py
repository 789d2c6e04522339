"""Measures whether small defects are found in large images: mosaics of magnetic tiles, 4000 x 3000 pixels.

A mosaic shows 10 x 8 windows of different normal parts, all at the same scale: SCALE times that of the photographs. In
defective mosaics one window shows a part with a blowhole, whose longer side is 20 to 30 pixels in the mosaic. A window
leaves out the outer MARGIN of the part, beyond which are chipped corners and background. Parts that are smaller than a
window are not used.

Support images, and the normal parts of the mosaics that are scored, come from different photographs. The choices of
inspection/tiles.py were made on mosaics of --seed 0.

python -m benchmarks.tiles             measure, write benchmarks/results/tiles.json
python -m benchmarks.tiles --report    print the table of that file
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image

from benchmarks.reference import DATA, TRUNK
from benchmarks.scoring import RESULTS, command_line
from datasets.images import decode_image
from datasets.masks import decode_mask
from evaluation.metrics import auroc, rank
from inspection.detector import FewShotDetector
from inspection.fitting import DEFAULT_RATE
from models.regad import untrained
from utils.choices import AUTO, tile_side
from utils.config import script_parser
from utils.errors import UserError, run_command
from utils.files import require_writable, write_json
from utils.records import peak_memory_mb, provenance

CELL = (400, 375)  # width and height of a window in the mosaic
GRID = (10, 8)  # windows across and down
SCALE = 1.75  # pixels of the mosaic per pixel of a photograph: blowholes of 12 to 17 pixels get the size DEFECT
MARGIN = 0.12  # of a part's side, on each side
DEFECT = (20, 30)  # pixels of the mosaic, longer side of the box around a defect
CLEAR = 10  # pixels between a defect and the border of its window
NEAR = 40  # pixels around the box of a defect within which the peak of the map counts as at the defect
ATTEMPTS = 300  # windows that are drawn until one shows the defect as asked


class Window(NamedTuple):
    """A window of a part. box: (left, top, right, bottom), as shares of the part's sides."""

    path: Path
    box: np.ndarray

    def cut(self) -> Image.Image:
        """The window at the size of a cell, in mode L."""
        part = decode_image(self.path).convert("L")
        return part.resize(CELL, Image.Resampling.LANCZOS, box=tuple(self.box * np.tile(part.size, 2)))


class Mosaic(NamedTuple):
    """windows: row by row. defect: the box (left, top, right, bottom) of the defect in pixels; None if clean."""

    windows: list[Window]
    defect: np.ndarray | None

    def draw(self, columns: int) -> Image.Image:
        """The mosaic, with `columns` windows in each row."""
        rows = len(self.windows) // columns
        image = Image.new("L", (columns * CELL[0], rows * CELL[1]))
        for number, window in enumerate(self.windows):
            image.paste(window.cut(), (number % columns * CELL[0], number // columns * CELL[1]))
        return image


def draw_window(path: Path, rng: Generator) -> Window:
    """A random window of a part."""
    sides = _window_share(path)
    corner = MARGIN + rng.random(2) * (1 - 2 * MARGIN - sides)
    return Window(path, np.concatenate([corner, corner + sides]))


def _window_share(path: Path) -> np.ndarray:
    """Width and height of a window as shares of the part's."""
    with Image.open(path) as image:
        return np.array(CELL) / SCALE / image.size


def _large_parts(folder: Path) -> list[Path]:
    """The parts in a folder that are large enough for a window within the margin."""
    return [path for path in sorted(folder.iterdir()) if (_window_share(path) <= 1 - 2 * MARGIN).all()]


def draw_defect(path: Path, mask: Path, rng: Generator) -> tuple[Window, np.ndarray] | None:
    """A window with a whole defect of the size DEFECT, and its box in pixels of the cell; None if none was found."""
    pixels = decode_mask(mask).pixels
    rows, columns = np.nonzero(pixels)
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / np.tile(pixels.shape[::-1], 2)
    for _ in range(ATTEMPTS):
        window = draw_window(path, rng)
        low, high = window.box[:2], window.box[2:]
        box = (found - np.tile(low, 2)) / np.tile(high - low, 2) * np.tile(CELL, 2)
        inside = box.min() >= CLEAR and (box[2:] <= np.array(CELL) - CLEAR).all()
        if inside and DEFECT[0] <= (box[2:] - box[:2]).max() <= DEFECT[1]:
            return window, box
    return None


def draw_mosaic(
    parts: Sequence[Path], rng: Generator, grid: tuple[int, int], defect: tuple[Window, np.ndarray] | None = None
) -> Mosaic:
    """A mosaic of different parts; with a defect in one of the windows, at random."""
    count = grid[0] * grid[1]
    windows = [draw_window(parts[number], rng) for number in rng.permutation(len(parts))[:count]]
    if defect is None:
        return Mosaic(windows, None)
    place = int(rng.integers(count))
    windows[place] = defect[0]
    return Mosaic(windows, defect[1] + np.tile([place % grid[0] * CELL[0], place // grid[0] * CELL[1]], 2))


def draw_all(
    category: Path, rng: Generator, grid: tuple[int, int], shot: int, count: int
) -> tuple[list[Mosaic], list[Mosaic], list[Path]]:
    """`shot` support mosaics, then `count` clean and `count` defective ones, and the parts of the support.

    Raises:
        UserError: no blowhole has the size asked for.
    """
    train = _large_parts(category / "train/good")
    train = [train[number] for number in rng.permutation(len(train))]
    support, rest = train[: len(train) // 2], train[len(train) // 2 :] + _large_parts(category / "test/good")
    masks = category / "ground_truth/blowhole"
    pairs = [(path, masks / f"{path.stem}_mask.png") for path in _large_parts(category / "test/blowhole")]
    if not any(draw_defect(*pair, rng) for pair in pairs):
        raise UserError(f"no blowhole in {category} is {DEFECT[0]} to {DEFECT[1]} pixels large in a window")
    shares = np.array_split(np.array(support, object), shot)
    mosaics = [draw_mosaic(_repeated(list(share), grid), rng, grid) for share in shares]
    test = [draw_mosaic(rest, rng, grid) for _ in range(count)]
    while len(test) < 2 * count:  # each blowhole in turn, in new windows
        for number in rng.permutation(len(pairs)):
            defect = draw_defect(*pairs[number], rng)
            if defect and len(test) < 2 * count:
                test.append(draw_mosaic(rest, rng, grid, defect))
    return mosaics, test, support


def _repeated(parts: list[Path], grid: tuple[int, int]) -> list[Path]:
    """The parts, repeated until they fill a mosaic; each is shown in another window."""
    return parts * -(-grid[0] * grid[1] // len(parts))


def score_mosaics(detector: FewShotDetector, mosaics: Sequence[Mosaic], columns: int, folder: Path) -> list[dict]:
    """The score, the place of the peak in pixels and the seconds of each mosaic, which is written as a file first."""
    rows = []
    for mosaic in mosaics:
        path = folder / "mosaic.png"
        image = mosaic.draw(columns)
        image.save(path, compress_level=1)
        begin = time.perf_counter()
        scores, maps = detector.score([path])
        seconds = time.perf_counter() - begin
        row, column = np.unravel_index(maps[0].argmax(), maps[0].shape)
        peak = (np.array([column, row]) + 0.5) * image.size / maps[0].shape[::-1]
        near = None
        if mosaic.defect is not None:
            near = bool((peak >= mosaic.defect[:2] - NEAR).all() and (peak <= mosaic.defect[2:] + NEAR).all())
        rows.append({"score": float(scores[0]), "peak": peak.tolist(), "at_defect": near, "seconds": seconds})
        print(f"{'clean' if near is None else 'defective'}: {scores[0]:.4f}, at the defect: {near}, {seconds:.1f} s")
    return rows


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = script_parser(__doc__)
    parser.add_argument("--shot", type=int, default=4, help="support images: mosaics, or parts with --parts")
    parser.add_argument("--parts", action="store_true", help="support images are single windows instead of mosaics")
    parser.add_argument("--tile", type=tile_side, default=AUTO, help="as of predict.py")
    parser.add_argument("--count", type=int, default=5, help="clean mosaics, and as many defective ones")
    parser.add_argument("--grid", type=int, nargs=2, default=GRID, help="windows across and down")
    parser.add_argument("--seed", type=int, default=1, help="of the mosaics")
    parser.add_argument("--data_path", type=Path, default=DATA, help="folder of the categories")
    parser.add_argument("--weights", default=str(TRUNK), help="ImageNet weights of ResNet-18")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--output", type=Path, default=RESULTS / "tiles.json", help="the JSON file")
    parser.add_argument("--report", action="store_true", help="print the table of the JSON file without measuring")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the result and writes one JSON file."""
    args = get_args_parser().parse_args(argv)
    if args.report:
        print(report(json.loads(args.output.read_text())))
        return
    require_writable(args.output, "--output")
    content = measure(args)
    write_json(args.output, content)
    print(report(content))


def measure(args: argparse.Namespace) -> dict:
    """Fits a detector to support images, and scores clean and defective mosaics."""
    grid, rng = tuple(args.grid), np.random.default_rng(args.seed)
    mosaics = 1 if args.parts else args.shot
    support, test, parts = draw_all(args.data_path / "magnetic_tile", rng, grid, mosaics, args.count)
    images = [draw_window(part, rng).cut() for part in parts[: args.shot]] if args.parts else support
    detector = FewShotDetector(untrained(args.weights).stn, args.device, tile=args.tile)
    begin = time.perf_counter()
    detector.fit(images if args.parts else [mosaic.draw(grid[0]) for mosaic in support])
    detector.calibrate(DEFAULT_RATE)
    fitting = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        rows = score_mosaics(detector, test, grid[0], Path(folder))
    chosen = argparse.Namespace(**{key: value for key, value in vars(args).items() if key not in ("output", "report")})
    content = {"command": command_line("benchmarks.tiles", chosen), **provenance(detector.clock.device)}
    content |= {"date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads()}
    layout = detector.layout_of(grid[0] * CELL[0], grid[1] * CELL[1])
    content |= {"tiles": str(layout), "tile": [detector.tiling.width, detector.tiling.height] if layout else None}
    content |= {"fitting_seconds": fitting, "threshold": detector.threshold._asdict(), "images": rows}
    return content | {"peak_memory_mb": peak_memory_mb()}


def report(content: dict) -> str:
    """What was found, in a few lines."""
    clean, defective = ([row for row in content["images"] if (row["at_defect"] is None) == kind] for kind in (1, 0))
    scores = [np.array([row["score"] for row in rows]) for rows in (clean, defective)]
    ranked = rank(np.concatenate(scores), np.arange(len(content["images"])) >= len(clean))
    limit, seconds = content["threshold"]["value"], np.median([row["seconds"] for row in content["images"]])
    return "\n".join(
        [
            f"{content['command']} (commit {content['commit']}, {content['device']}, {content['threads']} thread(s))",
            f"{content['tiles']} of {content['tile']} pixels",
            f"clean {scores[0].min():.3f} to {scores[0].max():.3f}, "
            f"defective {scores[1].min():.3f} to {scores[1].max():.3f}, AUROC {auroc(ranked):.3f}",
            f"peak at the defect: {sum(row['at_defect'] for row in defective)} of {len(defective)}",
            f"threshold {limit:.3f}: {(scores[0] > limit).sum()} of {len(clean)} clean and "
            f"{(scores[1] > limit).sum()} of {len(defective)} defective flagged",
            f"fitting {content['fitting_seconds']:.0f} s, an image {seconds:.1f} s, "
            f"peak memory {content['peak_memory_mb']:.0f} MB",
        ]
    )


if __name__ == "__main__":
    run_command(main)
