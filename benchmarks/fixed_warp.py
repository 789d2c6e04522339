"""Writes a checkpoint whose warps are the same for all images, to find out whether a trained warp looks at the image.

python -m benchmarks.fixed_warp trained.pt fixed.pt --obj screw --data_path data     the mean warps of test images
python -m benchmarks.fixed_warp trained.pt fixed.pt --warp 5 1 1                     5 degrees in every transformer
python test.py --obj screw --shot 2 --checkpoint fixed.pt                            scores it

Without a checkpoint ("none") the network is untrained.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from datasets.images import read_image
from datasets.mvtec import category_folder, list_test_items
from examples.warp_figure import STN_MODE, rotations_and_scales
from models.networks import RELEASE_IMG_SIZE
from models.regad import RegAD, checkpoint, load_checkpoint, untrained
from utils.config import script_parser
from utils.devices import seed_everything
from utils.errors import UserError, run_command
from utils.files import save_tensors

EVERY = 5  # one test image of so many


def mean_warps(model: RegAD, images: np.ndarray) -> list[tuple[float, float, float]]:
    """Degrees and scales of each transformer, means over `images` (B, S, S, 3) uint8."""
    with torch.no_grad():
        warps = model.stn.eval()(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).warps
    found = [rotations_and_scales(theta) for theta in warps]
    return [(float(angles.mean()), *map(float, scales.mean(axis=0))) for angles, scales in found]


def fix_warps(model: RegAD, warps: Sequence[Sequence[float]]) -> None:
    """Makes the warps of a model independent of the image: degrees and scales of each transformer."""
    for stn, (angle, *scales) in zip((model.stn.stn1, model.stn.stn2, model.stn.stn3), warps, strict=True):
        with torch.no_grad():
            stn.fc[2].weight.zero_()
            stn.fc[2].bias.copy_(torch.tensor([np.deg2rad(angle), *scales]))


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("checkpoint", help="of train.py, in the mode rotation_scale; none: untrained")
    parser.add_argument("output", type=Path, help="the checkpoint to write")
    parser.add_argument("--obj", help="the category whose test images give the mean warp; this or --warp is needed")
    parser.add_argument("--data_path", type=Path, default=Path("data"), help="in MVTec AD's layout")
    parser.add_argument("--warp", type=float, nargs=3, metavar=("DEGREES", "SCALE", "SCALE"), help="this warp instead")
    parser.add_argument("--weights", default="imagenet", help="of the untrained network")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the checkpoint and prints its warps."""
    args = get_args_parser().parse_args(argv)
    if (args.warp is None) == (args.obj is None):
        raise UserError("give --obj or --warp")
    seed_everything(0)
    if args.checkpoint == "none":
        model = untrained(args.weights, STN_MODE)
    else:
        model = load_checkpoint(Path(args.checkpoint), STN_MODE, RELEASE_IMG_SIZE)
    warps = [args.warp] * 3
    if args.obj:
        items = list_test_items(category_folder(args.data_path, "folder", args.obj), need_both=False)
        warps = mean_warps(model, np.stack([read_image(item.image, RELEASE_IMG_SIZE) for item in items[::EVERY]]))
    fix_warps(model, warps)
    save_tensors(args.output, checkpoint(model, {"config": {"select": "last"}}))
    for number, (angle, *scales) in enumerate(warps, start=1):
        print(f"STN {number}: {angle:.2f} degrees, scales {scales[0]:.3f} and {scales[1]:.3f}")
    print(f"checkpoint: {args.output}")


if __name__ == "__main__":
    run_command(main)
