"""Packs what benchmarks/cuda.sh needs into one folder that can travel: images at the network's size, and weights.

python -m benchmarks.pack --output packed    then: bash benchmarks/cuda.sh --packed packed
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks.reference import DATA, GOLDEN_CHECKPOINT, TRUNK
from datasets.images import read_image
from datasets.masks import decode_mask, to_square_mask
from datasets.mvtec import list_test_items, list_train_images
from utils.config import script_parser
from utils.errors import UserError, run_command
from utils.files import require_writable

LIMIT = 64 * 2**20  # bytes that a lent machine receives
SOURCE_IMAGES = 40  # of each further category, for training
DATA_FOLDER, WEIGHTS_FILE, CHECKPOINT_FILE = "data", "trunk.pth", "checkpoint.pt"


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the script."""
    parser = script_parser(__doc__)
    parser.add_argument("--obj", default="screw", help="the target: every second image of it is packed")
    parser.add_argument("--sources", nargs="+", default=["grid", "bottle"], help="further categories, for training")
    parser.add_argument("--data_path", type=Path, default=DATA, help="folder of the categories")
    parser.add_argument("--weights", type=Path, default=TRUNK, help="ImageNet weights of ResNet-18")
    parser.add_argument("--checkpoint", type=Path, default=GOLDEN_CHECKPOINT, help="with stn_mode rotation_scale")
    parser.add_argument("--img_size", type=int, default=224, help="side of the network's input in pixels")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the folder and prints its size; UserError if it exists or exceeds LIMIT."""
    args = get_args_parser().parse_args(argv)
    require_writable(args.output, "--output", folder=True)
    if args.output.exists():
        raise UserError(f"{args.output} exists; give another --output")
    for category in [args.obj, *args.sources]:
        folder, target = args.data_path / category, args.output / DATA_FOLDER / category
        images = list_train_images(folder)
        for path in images[::2] if category == args.obj else images[:SOURCE_IMAGES]:
            _pack_image(path, target / "train/good", args.img_size)
    _pack_test(args.data_path / args.obj, args.output / DATA_FOLDER / args.obj, args.img_size)
    shutil.copyfile(args.weights, args.output / WEIGHTS_FILE)
    shutil.copyfile(args.checkpoint, args.output / CHECKPOINT_FILE)
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    print(f"{args.output}: {size / 2**20:.1f} of at most {LIMIT / 2**20:.0f} MiB")
    if size > LIMIT:
        raise UserError(f"{args.output} is too large to travel: give fewer --sources or a smaller --img_size")


def _pack_test(folder: Path, target: Path, size: int) -> None:
    """Every second test image of each type, with its masks as one."""
    items = list_test_items(folder)
    by_type = {item.defect: [one for one in items if one.defect == item.defect] for item in items}
    for defect, of_type in by_type.items():
        for item in of_type[::2]:
            _pack_image(item.image, target / "test" / defect, size)
            for mask in item.masks[:1]:
                place = target / "ground_truth" / defect / f"{item.image.stem}_mask.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(to_square_mask(decode_mask(mask).pixels, size)).convert("L").save(place)


def _pack_image(path: Path, folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(read_image(path, size)).save(folder / f"{path.stem}.png")


if __name__ == "__main__":
    run_command(main)
