"""Images in every form that the detector takes, as pixels and as network inputs."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

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
)


class ImageFile:
    """An image file that is opened once. Its content stays in memory, and is decoded whenever pixels are needed."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

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


def image_list(images: Sequence[ImageInput]) -> Sequence[ImageInput]:
    """The images themselves; TypeError if they are a single image instead of a list."""
    if isinstance(images, str | Path | Image.Image | ImageFile):
        raise TypeError("give a list of images, not a single one")
    return images


def image_names(images: Sequence[ImageInput]) -> tuple[str, ...]:
    """The paths of files; other images are numbered from 1."""
    return tuple(
        str(image.path if isinstance(image, ImageFile) else image)
        if isinstance(image, str | Path | ImageFile)
        else f"image {number}"
        for number, image in enumerate(images, start=1)
    )


def largest_grey_values(images: Sequence[ImageInput]) -> list[int]:
    """The largest value of each 16-bit grey image among files and PIL images."""
    opened = (io.BytesIO(image.content) if isinstance(image, ImageFile) else image for image in images)
    return [value for _, value in largest_values(i for i in opened if isinstance(i, io.BytesIO | Image.Image))]


def as_pixels(image: ImageInput, size: int, bits: int = FULL_BITS) -> Image.Image | torch.Tensor:
    """An image of any form in mode L or RGB. Float tensors (3, size, size) are network inputs and stay as they are.

    bits: the bit depth of 16-bit grey images; a ClippedWarning names an image that exceeds it.

    Raises:
        ImageError: a file cannot be read.
        TypeError: an array of another type or shape.
    """
    if isinstance(image, torch.Tensor):
        if image.shape == (3, size, size) and image.is_floating_point():
            return image.float()
        values = image if image.dtype == torch.uint8 else (image * 255).round().clamp(0, 255).to(torch.uint8)
        image = values.permute(1, 2, 0).cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise TypeError(f"arrays must be (H, W) or (H, W, 3) uint8, got {image.shape} {image.dtype}")
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        name, pixels = "an image", eight_bit(image, bits)
    elif isinstance(image, ImageFile):
        name, pixels = image.path, image.decode(bits)
    else:
        name, pixels = Path(image), decode_image(Path(image), bits)
    if warning := clipping_note(pixels, name, bits):
        warnings.warn(warning, ClippedWarning, stacklevel=2)
    return pixels


def as_tensor(square: np.ndarray) -> torch.Tensor:
    """A square image (S, S, 3) uint8 as network input (3, S, S), float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1))).float() / 255
