"""Draws what the first spatial transformer does to test images, for the untrained network and checkpoints.

python -m examples.warp_figure --obj ring --data_type folder --data_path demo/data --output demo/warps.png
    --checkpoints released.pt heads.pt --names released "frozen trunk"

Prints the rotations and scales of all three transformers. The mode is rotation_scale, the release's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from datasets.images import read_image
from datasets.mvtec import category_folder, list_test_items
from evaluation.config import DataConfig
from models.networks import RELEASE_IMG_SIZE, scoring_network
from models.stn import RELEASE_BACKBONE
from models.warp import warp
from reports.figures import save_raster
from utils.choices import category_name
from utils.config import Parser, flag
from utils.errors import UserError, run_command
from utils.files import require_writable

STN_MODE = "rotation_scale"
CELL_INCHES, DPI = 0.85, 110


@dataclass(frozen=True, kw_only=True)
class WarpConfig(DataConfig):
    """The flags of the command."""

    obj: str = flag("the category to show", group="data", convert=category_name, metavar="CATEGORY")
    images: int = flag("test images, at even distances", default=20, least=1, metavar="N")
    weights: str = flag("of the untrained network: imagenet, none, or a file", default="imagenet", group="network")
    checkpoints: tuple[Path, ...] = flag(
        "a row for each (default: the untrained network alone)", default=(), group="network"
    )
    names: tuple[str, ...] = flag("the title of each checkpoint (default: none)", default=(), group="network")
    output: Path = flag("a .png file", default=Path("warps.png"))

    def check(self) -> None:
        """Raises UserError where a checkpoint has no title."""
        if len(self.names) != len(self.checkpoints):
            raise UserError(f"--names has {len(self.names)} titles for {len(self.checkpoints)} checkpoints")


def get_args_parser() -> Parser[WarpConfig]:
    """The command line of examples.warp_figure."""
    return Parser(WarpConfig, __doc__.splitlines()[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the images as the first transformer of each network warps them, and prints all warps' statistics."""
    config = get_args_parser().parse_config(argv)
    require_writable(config.output, "--output")
    items = list_test_items(category_folder(config.data_path, config.data_type, config.obj), need_both=False)
    chosen = [items[i] for i in np.linspace(0, len(items) - 1, min(config.images, len(items))).round().astype(int)]
    images = np.stack([read_image(item.image, RELEASE_IMG_SIZE) for item in chosen])  # (N, S, S, 3)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    rows = {}
    for name, file in {"untrained": None, **dict(zip(config.names, config.checkpoints, strict=True))}.items():
        network = scoring_network(RELEASE_BACKBONE, STN_MODE, RELEASE_IMG_SIZE, file, config.weights).eval()
        with torch.no_grad():
            warps = network(pixels).warps
        print("\n".join(describe(name, warps)))
        rows[name] = warps[0]
    save_figure(config.output, pixels, [item.defect or "normal" for item in chosen], rows)
    print(f"figure: {config.output}")


def rotations_and_scales(theta: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Angles (B,) in degrees and scales (B, 2) of the matrices (B, 2, 3) of the mode rotation_scale."""
    angle = torch.asin(theta[:, 1, 0].clamp(-1, 1))
    scales = torch.stack([theta[:, 0, 0], theta[:, 1, 1]], dim=1) / angle.cos()[:, None]
    return torch.rad2deg(angle).numpy(), scales.numpy()


def describe(name: str, warps: Sequence[torch.Tensor]) -> list[str]:
    """A line for each transformer: means of rotation and scales, and their standard deviations over the images."""
    lines = []
    for number, theta in enumerate(warps, start=1):
        angle, scales = rotations_and_scales(theta)
        texts = [f"{values.mean():.3f} +- {values.std():.3f}" for values in (angle, *scales.T)]
        lines.append(f"{name}, STN {number}: rotation {texts[0]} degrees, scales {texts[1]} and {texts[2]}")
    return lines


def save_figure(target: Path, pixels: torch.Tensor, kinds: Sequence[str], rows: Mapping[str, torch.Tensor]) -> None:
    """A column per image of `pixels` (B, 3, S, S): the input, then how each network's matrices (B, 2, 3) warp it."""
    count = len(pixels)
    size = ((count + 1) * CELL_INCHES, (len(rows) + 1) * (CELL_INCHES + 0.3))
    grid = (figure := Figure(figsize=size, layout="constrained")).subplots(len(rows) + 1, count, squeeze=False)
    titles = {
        name: [_text(*one) for one in zip(*rotations_and_scales(theta), strict=True)] for name, theta in rows.items()
    }
    shown = {"input": pixels, **{name: warp(pixels, theta) for name, theta in rows.items()}}
    for axes, (name, images) in zip(grid, shown.items(), strict=True):
        axes[0].set_ylabel(name.replace(", ", "\n"), fontsize=8)
        for axis, image, title in zip(axes, images, titles.get(name, kinds), strict=True):
            axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
            axis.set(xticks=[], yticks=[])
            axis.set_title(title, fontsize=6)
    save_raster(target, figure, DPI)


def _text(angle: float, scales: np.ndarray) -> str:
    return f"{angle:+.1f}°, {scales[0]:.2f}, {scales[1]:.2f}"


if __name__ == "__main__":
    run_command(main)
