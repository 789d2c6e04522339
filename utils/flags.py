"""Flags that several commands share. What only one command knows stays in that command."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from utils.devices import DEFAULT_SEED

MAX_PIXELS = 178_956_970  # Pillow's own limit: larger images can be bombs, a few KB that take all memory
DEFAULT_SUPPORT_PATH = Path("./support_set")
DEFAULT_SAVE_DIR = Path("./save_checkpoints")

Group = argparse.ArgumentParser | argparse._ArgumentGroup


def add_data_flags(group: Group, data_types: Iterable[str]) -> None:
    """Which data set: its kind, one of `data_types`, and where it lies."""
    group.add_argument("--data_type", choices=list(data_types), default="mvtec", help="folder: any names, same layout")
    group.add_argument("--data_path", type=Path, default=Path("./MVTec/"), help="folder that holds the categories")


def add_image_flags(group: Group, strict: bool = True) -> None:
    """How images are read; `strict`: also what to do with a missing mask."""
    add_keep_aspect_flag(group)
    if strict:
        group.add_argument("--strict", action="store_true", help="refuse a defective test image without a mask")
    add_max_pixels_flag(group)


def add_keep_aspect_flag(group: Group) -> None:
    """Whether an image that is not square is padded."""
    group.add_argument("--keep_aspect", action="store_true", help="pad by reflection instead of squeezing to a square")


def add_max_pixels_flag(group: Group) -> None:
    """Up to which size images are read."""
    group.add_argument("--max_pixels", type=int, default=MAX_PIXELS, help="larger images are refused")


def add_network_flags(group: Group, stn_modes: Iterable[str], size_divisor: int) -> None:
    """What the network is, before its weights."""
    group.add_argument("--stn_mode", choices=list(stn_modes), default="rotation_scale")
    group.add_argument("--img_size", type=int, default=224, help=f"side in pixels, a multiple of {size_divisor}")


def add_weights_flag(group: Group, use: str) -> None:
    """The trunk's weights; `use`: what for."""
    group.add_argument("--weights", default="imagenet", help=f"{use}: imagenet, none, or a file")


def add_seed_flag(group: Group, use: str = "") -> None:
    """The one seed; `use`: what it decides where that is not everything."""
    group.add_argument("--seed", type=int, default=DEFAULT_SEED, help=use or None)


def add_support_flags(group: Group) -> None:
    """The support sets of a scored category."""
    group.add_argument("--inferences", type=int, default=10, metavar="ROUNDS", help="rounds per support set")
    group.add_argument("--support_path", type=Path, help="default: ./support_set, or drawn with seed 0")


def add_device_flag(group: Group) -> None:
    """Where the network runs."""
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def add_workers_flag(group: Group) -> None:
    """How many processes decode."""
    group.add_argument("--num_workers", type=int, default=2, help="processes that decode images; 0: in this one")
