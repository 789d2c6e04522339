"""Images in every form that the detector takes, as pixels and as network inputs."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from datasets.images import (
    FULL_BITS,
    ClippedWarning,
    ImageError,
    clipping_note,
    decode_image,
    eight_bit,
    largest_values,
    read_pixels,
    scale_to_8_bits,
    upright,
)
from utils.files import is_plain

FLOAT_TOLERANCE = 1e-3  # resizing overshoots a little


class ImageFile:
    """An image file that is opened once. Its content stays in memory, and is decoded whenever pixels are needed."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def content(self) -> bytes:
        """The bytes of the file; ImageError if it cannot be read."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise ImageError(f"cannot read the image {self.path}: {error.strerror}") from error

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, in hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, upright."""
        return self.decode().size

    def decode(self, bits: int = FULL_BITS) -> Image.Image:
        """The image as `datasets.images.decode_image` returns it, with the same errors."""
        return read_pixels(io.BytesIO(self.content), partial(eight_bit, bits=bits), str(self.path))


ImageInput = ImageFile | Path | str | Image.Image | np.ndarray | torch.Tensor


class Decoded(NamedTuple):
    """An image that is decoded already.

    image: in mode L or RGB; None if only its network input is known, and then it is never cut. square: its network
    input (3, S, S), uint8, or float32 in [0, 1] if it was given so.
    """

    image: Image.Image | None
    square: torch.Tensor


def image_list(images: Iterable[ImageInput]) -> list[ImageInput]:
    """The images as a list; TypeError if they are a single image, or none at all."""
    is_single = isinstance(images, str | bytes) or (isinstance(images, np.ndarray | torch.Tensor) and images.ndim < 4)
    if is_single or not isinstance(images, Iterable):  # nor are paths and PIL images
        raise TypeError("give a list of images, not a single one")
    return list(images)


def image_names(images: Sequence[ImageInput]) -> tuple[str, ...]:
    """The paths of files; other images are numbered from 1."""
    return tuple(
        str(image) if isinstance(image, str | Path | ImageFile) else f"image {number}"
        for number, image in enumerate(images, start=1)
    )


def largest_grey_values(images: Sequence[ImageInput]) -> list[int]:
    """The largest value of each 16-bit grey image among files and PIL images."""
    opened = (io.BytesIO(image.content) if isinstance(image, ImageFile) else image for image in images)
    arrays = (image for image in images if isinstance(image, np.ndarray | torch.Tensor))
    deep = [int(np.asarray(array).max()) for array in arrays if str(array.dtype).endswith(("uint16", "u2"))]
    return [value for _, value in largest_values(i for i in opened if isinstance(i, io.BytesIO | Image.Image))] + deep


def as_pixels(image: ImageInput, size: int, bits: int = FULL_BITS) -> Image.Image | torch.Tensor:
    """An image of any form in mode L or RGB. Float tensors (3, size, size) are network inputs and stay as they are.

    bits: the bit depth of 16-bit images; a ClippedWarning names an image that exceeds it.

    Raises:
        ImageError: a file cannot be read.
        TypeError: an array of another type, shape or range of values.
    """
    if isinstance(image, np.ndarray | torch.Tensor):
        if (is_tensor := isinstance(image, torch.Tensor)) and not is_plain(image := image.detach()):
            raise TypeError("an image is a dense tensor with values, neither sparse nor nested nor on the meta device")
        values = (image.float() if image.is_floating_point() else image).numpy(force=True) if is_tensor else image
        pixels = array_image(values, channels_first=is_tensor, bits=bits)
        if is_tensor and image.shape == (3, size, size) and image.is_floating_point():
            return image.float()
        name = "an image"
    elif isinstance(image, Image.Image):
        name, pixels = "an image", eight_bit(upright(image), bits)
    elif isinstance(image, ImageFile):
        name, pixels = image.path, image.decode(bits)
    elif isinstance(image, str | Path):
        name, pixels = Path(image), decode_image(Path(image), bits)
    else:
        raise TypeError(f"an image is a path, a PIL image, an array or a tensor, not {type(image).__name__}")
    if warning := clipping_note(pixels, name, bits):
        warnings.warn(warning, ClippedWarning, stacklevel=2)
    return pixels


def array_image(
    values: np.ndarray, channels_first: bool = False, bits: int = FULL_BITS, bgr: bool = False
) -> Image.Image:
    """An array as an image in mode L or RGB: the one conversion of arrays, tensors and camera frames.

    values: (H, W), or with 1, 3 or 4 (alpha) channels last or first; uint8, bool, uint16, scaled by `bits`, or float in
    [0, 1]. channels_first: where both are possible. bgr: the order of OpenCV.

    Raises:
        TypeError: another shape, type or range of values.
    """
    if np.ma.isMaskedArray(values):
        raise TypeError("an image is an array without a mask: fill its masked values, with filled()")
    places = [axis for axis in (0, -1) if values.ndim == 3 and values.shape[axis] in (1, 3, 4)]
    if (values.ndim != 2 and not places) or not values.size:
        raise TypeError(f"an image is (H, W), (H, W, channels) or (channels, H, W) of 1, 3 or 4, not {values.shape}")
    if places:
        axis = places[0 if channels_first else -1]
        values = np.moveaxis(values, axis, -1)
        values = values[..., 0] if values.shape[-1] == 1 else values
    if bgr and values.ndim == 3:
        values = values[..., [2, 1, 0, 3][: values.shape[-1]]]
    if values.dtype.newbyteorder("=") == np.uint16:
        values, note = scale_to_8_bits(values, bits)
    else:
        values, note = _eight_bit_values(values), {}
    image = eight_bit(Image.fromarray(np.ascontiguousarray(values)))
    image.info |= note
    return image


def _eight_bit_values(values: np.ndarray) -> np.ndarray:
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint8:
        return values
    if not np.issubdtype(values.dtype, np.floating):
        raise TypeError(f"values of an image are uint8, uint16, or float from 0 to 1, not {values.dtype}")
    low, high = float(values.min()), float(values.max())
    if not (low >= -FLOAT_TOLERANCE and high <= 1 + FLOAT_TOLERANCE):
        raise TypeError(
            f"float values of an image go from 0 to 1, not {low:.3g} to {high:.3g}: give 0..255 as uint8, and undo a "
            "normalisation by mean and standard deviation"
        )
    return (values * 255).round().clip(0, 255).astype(np.uint8)


def as_tensor(square: np.ndarray) -> torch.Tensor:
    """A square image (S, S, 3) uint8, channels first: (3, S, S) uint8."""
    return torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1)))
