"""Score maps of the test images of a round as files: .npz of all images, or a TIFF file of each."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.layouts import LabelledImage
from evaluation.per_image import image_name
from utils.errors import UserError
from utils.files import whole_file
from utils.naming import ROUND


def save_maps(path: Path, items: Sequence[LabelledImage], maps: np.ndarray) -> None:
    """Writes the score maps of a round as .npz: `names` (B,), as in the CSV file, and `maps` (B, S, S).

    float32 keeps the metrics of the record; float16 would merge neighbouring scores. The file is not compressed:
    compression would save a tenth of the space and take seconds.
    """
    with whole_file(path) as aside, open(aside, "wb") as stream:
        np.savez(stream, names=np.array([image_name(item) for item in items]), maps=maps)


def read_maps(path: Path, items: Sequence[LabelledImage]) -> np.ndarray:
    """The maps (B, S, S) of a round in the order of `items`.

    Raises:
        UserError: the file cannot be read, an image is missing or repeated, or maps are not square or not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            names, maps = stored["names"].tolist(), stored["maps"]
    except Exception as error:  # damage leads to errors of many types: zip, value, key, OS
        raise UserError(
            f"cannot read the maps {path} ({type(error).__name__}: {error}); --maps is a folder with {ROUND}0.npz, "
            f"{ROUND}1.npz, ... each with the arrays names (B,) and maps (B, S, S)"
        ) from error
    if maps.ndim != 3 or maps.shape[0] != len(names) or maps.shape[1] != maps.shape[2] or maps.dtype.kind not in "fiu":
        raise UserError(f"{path}: maps {maps.shape} {maps.dtype} of {len(names)} names; they must be numbers (B, S, S)")
    place = {name: number for number, name in enumerate(names)}
    lacking = [image_name(item) for item in items if image_name(item) not in place]
    if lacking or len(names) != len(items):
        first = lacking[0] if lacking else "a name is repeated or not that of a test image"
        raise UserError(
            f"{path} has {len(names)} maps for {len(items)} test images; {'missing: ' if lacking else ''}{first}"
        )
    order = [place[image_name(item)] for item in items]
    maps = (maps if order == [*range(len(order))] else maps[order]).astype(np.float32, copy=False)
    if not np.isfinite(maps).all():
        raise UserError(f"{path} has values that are not finite numbers")
    return maps


def save_tiff(path: Path, scores: np.ndarray) -> None:
    """Writes a score map (H, W) float32 as a TIFF file of one channel of 32-bit floats."""
    encoded = io.BytesIO()  # Pillow may overlook that a full disk took only a part
    Image.fromarray(scores).save(encoded, format="TIFF")
    with whole_file(path, durable=False) as aside:
        aside.write_bytes(encoded.getbuffer())
