"""Flags that several commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils.devices import DEFAULT_SEED

DEFAULT_SAVE_DIR = Path("./save_checkpoints")

Group = argparse.ArgumentParser | argparse._ArgumentGroup


def category_name(text: str) -> str:
    """The name of a category as a flag gives it. `ring/` and `./ring`, as tab completion writes them, are `ring`.

    Raises:
        argparse.ArgumentTypeError: not the name of a folder directly in the data folder.
    """
    name = os.path.normpath(text) if text else ""
    if name in ("", ".", "..") or Path(name).name != name:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a category: give the folder's name alone")
    return name


def add_data_flags(group: Group, data_types: Iterable[str]) -> None:
    """Adds --data_type, one of `data_types`, and --data_path."""
    group.add_argument(
        "--data_type", choices=list(data_types), default="mvtec", help="folder: MVTec AD's layout, any names"
    )
    group.add_argument("--data_path", type=Path, default=Path("./MVTec/"), help="folder that holds the categories")


def add_source_flags(group: Group) -> None:
    """Adds --sources and --source_path."""
    group.add_argument(
        "--sources",
        type=category_name,
        nargs="+",
        metavar="CATEGORY",
        help="train on these categories; default: all but the target",
    )
    group.add_argument(
        "--source_path", type=Path, metavar="DIR", help="data set of the sources; default: that of the target"
    )


def add_image_flags(group: Group, strict: bool = True) -> None:
    """Adds --keep_aspect, --bits and --max_pixels; with `strict`, also --strict."""
    add_keep_aspect_flag(group)
    add_bits_flag(group, "the training images")
    if strict:
        group.add_argument("--strict", action="store_true", help="reject defective test images without a mask")
    add_max_pixels_flag(group)


def add_keep_aspect_flag(group: Group) -> None:
    """Adds --keep_aspect."""
    group.add_argument("--keep_aspect", action="store_true", help="pad by reflection instead of stretching to a square")


def add_bits_flag(group: Group, measured: str) -> None:
    """Adds --bits: 8 to 16, or auto (default). measured: the images that decide for auto."""
    group.add_argument(
        "--bits",
        type=lambda text: text if text == "auto" else int(text),
        choices=("auto", 8, 10, 12, 14, 16),
        default="auto",
        help=f"bit depth of 16-bit grey files; auto: the smallest that holds the values of {measured}",
    )


def add_max_pixels_flag(group: Group) -> None:
    """Adds --max_pixels."""
    group.add_argument("--max_pixels", type=int, default=178_956_970, help="larger images are rejected")


def add_network_flags(group: Group, stn_modes: Iterable[str], backbones: Sequence[str], timm: bool = True) -> None:
    """What the network is, before its weights.

    backbones: names, the release's first. timm: whether the backbone may also be a model of timm.
    """
    other = ", or timm:NAME for any model of the timm library, without registration" if timm else ""
    group.add_argument("--stn_mode", choices=list(stn_modes), default="rotation_scale")
    group.add_argument("--backbone", default=backbones[0], help=f"{', '.join(backbones)}{other}")
    group.add_argument("--img_size", type=int, help="side in pixels, a multiple of 16; default: 224, or timm's own")


def add_weights_flag(group: Group, use: str) -> None:
    """Adds --weights; `use` says what they are for."""
    group.add_argument("--weights", default="imagenet", help=f"{use}: imagenet, none, or a file")


def add_seed_flag(group: Group, use: str = "") -> None:
    """Adds --seed; `use` says what it affects if that is not everything."""
    group.add_argument("--seed", type=int, default=DEFAULT_SEED, help=use or None)


def add_support_flags(group: Group) -> None:
    """Adds --inferences and --support_path."""
    group.add_argument("--inferences", type=int, default=10, metavar="ROUNDS", help="rounds per support set")
    group.add_argument("--support_path", type=Path, help="default: ./support_set, or drawn with seed 0")


def add_device_flag(group: Group) -> None:
    """Adds --device."""
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def add_workers_flag(group: Group) -> None:
    """Adds --num_workers."""
    group.add_argument("--num_workers", type=int, default=2, help="threads that decode images")
