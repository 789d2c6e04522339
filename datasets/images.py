"""The image reader of every command: image files to (S, S, 3) uint8 RGB. Masks are read by datasets/masks.py.

Image size and resampling follow the release's data loader.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, ImagePalette
from PIL.ExifTags import Base as Tag
from torch.utils.data import Dataset, default_collate

from utils.choices import AUTO_BITS, BIT_DEPTHS
from utils.errors import UserError
from utils.stages import in_threads

FULL_BITS = BIT_DEPTHS[-1]
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp"})
IGNORED_NAMES = frozenset({"@eadir", "__macosx", "thumbs.db", "desktop.ini", "lost+found"})  # of systems
LOW_BYTES = "low bytes of 16-bit colours"  # keys of Image.info
TRANSPARENT, SEVERAL = "transparent parts", "several pages or frames"
HOW_READ = {TRANSPARENT: "they are laid on black", SEVERAL: "only the first is read"}
RAW_16_BITS = ("RGB;16", "RGBA;16", "RGBX;16", "LA;16")  # Pillow's names, without the order of the bytes
SHALLOW = {"L;2": 85, "L;4": 17}  # by how much Pillow multiplies the values, but not a transparent one
TURNED = "EXIF orientation by which it was turned"
CODESTREAM = b"\xff\x4f\xff\x51"  # how the image begins in a JPEG 2000 file
PNG_EXIF = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # how EXIF or XMP begins in a PNG
CLIPPED_FROM = "largest value before clipping"  # key of Image.info, set where an image exceeds the bit depth
PILLOW_REJECTS_ABOVE = 2  # times Image.MAX_IMAGE_PIXELS; Pillow only warns between once and twice that number

Pixels = TypeVar("Pixels")
Facts = TypeVar("Facts")


class ImageError(UserError):
    """An image that cannot be used. The message holds its path and the reason."""


class ClippedWarning(UserWarning):
    """A 16-bit image has values beyond its bit depth."""


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name never counts: hidden ones (.ipynb_checkpoints), and IGNORED_NAMES."""
    return name.startswith(".") or name.lower() in IGNORED_NAMES


def is_image_file(path: Path) -> bool:
    """Whether the name has an image's suffix and is not ignored."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not is_ignored(path.name)


def read_image(path: Path, size: int, keep_aspect: bool = False, bits: int = FULL_BITS) -> np.ndarray:
    """The image as RGB, (size, size, 3) uint8; see `decode_image` and `to_square`.

    Raises:
        ImageError: as `decode_image`.
    """
    return to_square(decode_image(path, bits), size, keep_aspect)


def decode_image(path: Path, bits: int = FULL_BITS) -> Image.Image:
    """The decoded image in mode L or RGB, turned upright by its EXIF orientation. Safe to call from several threads.

    Grey and 1-bit images become L; palette, RGBA and CMYK images become RGB. Transparent parts are laid on black. 16
    bits are scaled to 8 by the full range of `bits`, see `eight_bit`. Only the first of several frames or pages
    is read. The image's `info` has the keys of HOW_READ that apply.

    Raises:
        ImageError: the file is missing, damaged, no image or too large, or its values have no fixed range (float TIFF)
            or a form of 16 bits that Pillow does not read.
    """
    return read_pixels(path, partial(eight_bit, bits=bits))


def read_pixels(
    path: Path | BinaryIO,
    convert: Callable[[Image.Image], Pixels],
    name: str = "",
    formats: Sequence[str] | None = None,
) -> Pixels:
    """What `convert` makes of the decoded image in its stored mode, turned upright. Safe to call from several threads.

    name: for messages; default: the path. formats: Pillow's names of the formats that are accepted; None: all.

    Raises:
        ImageError: the file is missing, damaged, no image or too large, or `convert` raises an error.
    """
    try:
        with Image.open(path, formats=formats) as image:
            known = {LOW_BYTES: _low_bytes(path, image), SEVERAL: _has_several(image)}
            if (factor := SHALLOW.get(_raw_mode(image))) and "transparency" in image.info:
                image.info["transparency"] *= factor
            return convert(_with_info(upright(image), **{key: value for key, value in known.items() if value}))
    except Exception as error:  # Pillow raises errors of any type on damaged files: SyntaxError, TypeError, ...
        options = ("max_pixels",) if isinstance(error, Image.DecompressionBombError) else ()
        is_unknown = isinstance(error, Image.UnidentifiedImageError)
        said = getattr(error, "strerror", None) or " ".join(str(error).split()) or repr(error)
        reason = "not an image that Pillow reads, or damaged" if is_unknown else said
        raise ImageError(f"cannot read the image {name or path}: {reason}", options) from error


def _has_several(image: Image.Image) -> bool:
    """Whether a file has several pages or frames. Not MPO, the format of phones: one image, with extras."""
    return getattr(image, "is_animated", False) and image.format != "MPO"


def _low_bytes(path: Path | BinaryIO, image: Image.Image) -> Image.Image | None:
    """The low bytes of an image whose colours have 16 bits, of which Pillow decodes the high bytes; None of others.

    Pillow is told that the bytes have the opposite order. Grey with alpha is read as four bytes per pixel.
    """
    raw = _deep_mode(image)
    if raw is None:
        return None
    is_little = raw.endswith("L") or (raw.endswith("N") and sys.byteorder == "little")
    other = "RGBA" if raw.startswith("LA") else f"{raw[:-1]}{'B' if is_little else 'L'}"
    with Image.open(path, formats=[image.format]) as low:
        low.tile = [
            tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:])) for tile in low.tile
        ]
        turned = upright(low)
        return turned.getchannel("G").convert("RGB") if raw.startswith("LA") else turned.convert("RGB")


def _raw_mode(image: Image.Image) -> str:
    """Pillow's name of how the pixels lie in a file that was not decoded yet."""
    args = image.tile[0].args if image.tile else ""
    return args if isinstance(args, str) else str((args or [""])[0])


def _deep_mode(image: Image.Image) -> str | None:
    """How 16-bit colours, or 16-bit with alpha, lie in a file that was not decoded yet; None of other images.

    Raises:
        ValueError: Pillow would read other values than those of the file, or 8 bits of 16.
    """
    raw, tags, bits = _raw_mode(image), getattr(image, "tag_v2", {}), _bits_per_value(image)
    is_known, is_grey = raw[:-1] in RAW_16_BITS, image.mode[0] in "IF"
    if bits > 8 and not is_grey and not (is_known and tags.get(Tag.PlanarConfiguration, 1) == 1):
        raise ValueError(
            "16-bit colours in planes, CMYK, with premultiplied alpha or in another file type than PNG and TIFF; save "
            "it as plain 16-bit RGB"
        )
    if is_grey and tags.get(Tag.PhotometricInterpretation) == 0:
        raise ValueError("16-bit grey values of which 0 is white; save it with 0 as black")
    if is_grey and 8 < bits < FULL_BITS and image.format in ("PPM", "JPEG2000"):
        raise ValueError(f"grey values of {bits} bits in a file type that is read as 16 bits; save it as PNG or TIFF")
    if bits <= 8 and 2 in tags.get(Tag.SampleFormat, ()):
        raise ValueError("signed values of 8 bits; save it with values from 0 to 255")
    return raw if is_known else None


def _bits_per_value(image: Image.Image) -> int:
    """The bits of each colour in a file that was not decoded yet, as far as the file type may have more than 8."""
    args = image.tile[0].args if image.tile else ""
    if image.format == "PPM":  # its largest value
        return 8 if isinstance(args, str) else int(args[-1]).bit_length()
    if image.format == "SGI":
        return 16 if image.tile[0][0] == "SGI16" or args[-1] == 2 else 8
    if image.format == "JPEG2000":
        image.fp.seek(0)
        head = b""
        while CODESTREAM not in head and (block := image.fp.read(2**16)):
            head += block
        return ((head + image.fp.read(99)).partition(CODESTREAM)[2][38] & 127) + 1
    return max(getattr(image, "tag_v2", {}).get(Tag.BitsPerSample, (8,)))


def _with_info(image: Image.Image, **info: object) -> Image.Image:
    image.info.update(info)
    return image


def to_square(image: Image.Image, size: int, keep_aspect: bool = False) -> np.ndarray:
    """An image from `decode_image` as the network's RGB input, (size, size, 3) uint8.

    Pillow's LANCZOS with antialiasing resizes it (release behaviour). An image that is not square is stretched. With
    `keep_aspect` its longer side becomes `size` and reflection pads the other one; see `content_box`.
    """
    square = resize(image, size, keep_aspect, Image.Resampling.LANCZOS)
    return square if square.ndim == 3 else square[..., None].repeat(3, axis=2)


def unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels as network input: uint8 as float32 in [0, 1], with the same bits on every device; others as they are.

    On CUDA, PyTorch divides by a number of Python through its reciprocal, which can be one unit in the last place off.
    """
    if pixels.dtype != torch.uint8:
        return pixels
    return pixels.float().div_(torch.full((), 255.0, device=pixels.device))


def content_box(width: int, height: int, size: int, keep_aspect: bool) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) in pixels of an image of `width` x `height` in its square of side `size`.

    Convention: origin top left, right and bottom exclusive. With `keep_aspect` the image is centred and the rest of the
    square is padding; without it the image fills the square.
    """
    if not keep_aspect:
        return 0, 0, size, size
    inner = [max(1, round(size * side / max(width, height))) for side in (width, height)]
    left, top = ((size - side) // 2 for side in inner)
    return left, top, left + inner[0], top + inner[1]


def restore_map(scores: np.ndarray, width: int, height: int, keep_aspect: bool = False) -> np.ndarray:
    """A score map (S, S), or (H, W) of an image cut into tiles, at the size of its image, (height, width) float32.

    The padding of `keep_aspect` is cut off first. The map is enlarged bilinearly and averaged where it is reduced.
    Convention: pixel centres, as Pillow's resize (align_corners False).
    """
    if keep_aspect:
        left, top, right, bottom = content_box(width, height, len(scores), keep_aspect)
        scores = scores[top:bottom, left:right]
    inner = Image.fromarray(np.ascontiguousarray(scores, dtype=np.float32))
    return np.asarray(inner.resize((width, height), Image.Resampling.BILINEAR))


def limit_pixels(count: int) -> None:
    """Rejects images of more than `count` pixels (rounded up to an even number) from now on in this process."""
    Image.MAX_IMAGE_PIXELS = -(-count // PILLOW_REJECTS_ABOVE)


def read_batches(dataset: Dataset, batch_size: int | None, num_workers: int) -> Iterator:
    """Yields the items of `dataset` in order, stacked in batches of `batch_size`, or one by one with None.

    `num_workers` threads read them ahead of their use; with 0 they are read when they are used.
    """
    ahead = 2 * num_workers + (batch_size or 0)
    read, numbers = dataset.__getitem__, range(len(dataset))
    items = in_threads(read, numbers, num_workers, ahead) if num_workers else map(read, numbers)
    if batch_size is None:
        yield from items
    while batch_size and (batch := list(itertools.islice(items, batch_size))):
        yield default_collate(batch)


def resize(image: Image.Image, size: int, keep_aspect: bool, resampling: Image.Resampling) -> np.ndarray:
    """`image` resized into its `content_box` and padded by reflection, (size, size) or (size, size, 3) uint8."""
    left, top, right, bottom = content_box(*image.size, size, keep_aspect)
    inner = np.asarray(image.resize((right - left, bottom - top), resampling))
    around = ((top, size - bottom), (left, size - right), (0, 0))
    return np.pad(inner, around[: inner.ndim], mode="symmetric") if inner.shape[:2] != (size, size) else inner


def size_mismatch(mask_path: Path, mask: Sequence[int], image: Sequence[int]) -> str | None:
    """A sentence where a mask (width, height) and its upright image (width, height) differ in size, else None.

    The pixels of such a mask would mark other places of the image.
    """
    if tuple(mask) == tuple(image):
        return None
    return f"the mask {mask_path} is {mask[0]}x{mask[1]} pixels instead of the {image[0]}x{image[1]} of its image"


def upright(image: Image.Image) -> Image.Image:
    """The decoded image turned by its EXIF orientation, which its `info` says."""
    tags = getattr(image, "tag_v2", {})
    before = tags.get(Tag.Orientation, 1)  # Pillow turns a TIFF when it decodes it
    if image.mode == "P" and max(colours := tags.get(Tag.ColorMap, (256,))) < 256:  # 8 bits, read as 16
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))
    # With a name, Pillow would map the file into memory: a TIFF to be turned with the wrong width, and any file so that
    # the process is killed where another one cuts it off.
    name, image.filename = getattr(image, "filename", ""), ""
    image.load()
    image.filename = name
    try:
        orientation = image.getexif().get(Tag.Orientation, before)
        return _with_info(
            ImageOps.exif_transpose(image), **({TURNED: orientation} if orientation in range(2, 9) else {})
        )
    except Exception:  # damaged EXIF data raises errors of any type; the pixels are intact
        return image


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W) bool turned as `upright` turns an image of this EXIF orientation."""
    image = Image.fromarray(pixels.astype(np.uint8))
    image.getexif()[Tag.Orientation] = orientation
    return np.asarray(upright(image)).astype(bool)


def _kept_until_changed(read: Callable[[Path], Facts]) -> Callable[[Path], Facts]:
    """`read`, which is called once for a file, and again where the file was replaced."""
    kept = functools.lru_cache(maxsize=2**16)(lambda path, _changed: read(path))
    return functools.wraps(read)(lambda path: kept(path, path.stat().st_ctime_ns))


@_kept_until_changed
def read_header(path: Path) -> tuple[tuple[int, int], int]:
    """The width and height of an image as `decode_image` gives it, and its EXIF orientation, without its pixels."""
    with Image.open(path) as image:
        if image.format == "PNG" and not any(mark in path.read_bytes() for mark in PNG_EXIF):
            return image.size, 1  # Pillow decodes a PNG before it says that there is no EXIF
        orientation, tags = image.getexif().get(Tag.Orientation, 1), getattr(image, "tag_v2", {})
        stored = tags.get(Tag.ImageWidth, image.width), tags.get(Tag.ImageLength, image.height)
        return stored[::-1] if orientation in range(5, 9) else stored, orientation if orientation in range(2, 9) else 1


def eight_bit(image: Image.Image, bits: int = FULL_BITS) -> Image.Image:
    """`image` in mode L or RGB, values 0..255.

    Grey images stay in one channel: to resize one channel and copy it costs half as much as to resize three.

    Transparent parts are laid on black, whatever colours lie under them, and the result's `info` says so.

    bits: one of BIT_DEPTHS, of 16-bit images. Their values 0..2**bits - 1 become 0..255, whatever the brightest
    pixel is. Larger values become 255; the largest is kept in the result's `info` for `clipping_note`.

    Raises:
        ValueError: it has no pixels, or its values have no fixed range or do not fit 16 bits.
    """
    if not all(image.size):
        raise ValueError(f"it is {image.width}x{image.height} pixels, which are none")
    if image.mode == "F":
        raise ValueError("floating-point images have no fixed value range; save it with 8 or 16 bits")
    values, alpha = deep_values(image), _alpha(image)
    if values is None:
        shown = image if image.mode == "L" else image.convert("L" if image.mode in ("1", "LA") else "RGB")
    else:
        largest = int(values.max())
        if values.min() < 0 or largest > full_scale(FULL_BITS):
            raise ValueError(f"its values {values.min()}..{largest} do not fit 16 bits")
        scaled, info = scale_to_8_bits(values, bits)
        shown = _with_info(Image.fromarray(scaled), **info)
    kept = {key: value for key, value in (shown.info | image.info).items() if key in (CLIPPED_FROM, SEVERAL)}
    if alpha is not None:
        shown, kept = Image.composite(shown, Image.new(shown.mode, shown.size), alpha), kept | {TRANSPARENT: True}
    return _with_info(shown, **kept)


class ImageFacts(NamedTuple):
    """What the findings on a data set need to know of an image."""

    size: tuple[int, int]  # width and height in pixels, upright
    mode: str  # Pillow's name of the stored format
    pixels: bytes  # digest, equal for equal images in any format
    orientation: int  # in EXIF, by which it was turned; 1: it was not
    parts: tuple[str, ...]  # the keys of HOW_READ that apply
    largest: int  # of 16-bit values; 0 for other images
    is_grey: bool | None  # whether all pixels are grey; None: not known


def with_facts(image: Image.Image, bits: int = FULL_BITS) -> tuple[Image.Image, ImageFacts]:
    """`eight_bit` of an upright image, and its facts. The digest is that of 16-bit values, or else of RGB values."""
    read, deep = eight_bit(image, bits), deep_values(image)
    pixels = np.asarray(read.convert("RGB")) if deep is None else deep
    digest = hashlib.sha256(repr((pixels.shape, pixels.dtype)).encode())
    digest.update(np.ascontiguousarray(pixels))
    mode = image.mode if deep is None or deep.ndim == 2 else f"{image.mode};16"
    largest = 0 if deep is None else int(deep.max())
    is_grey = read.mode == "L" or (_is_grey(pixels[::8, ::8]) and _is_grey(pixels))  # the last is slow
    facts = image.size, mode, digest.digest(), image.info.get(TURNED, 1), parts_of(read), largest, is_grey
    return read, ImageFacts(*facts)


def _is_grey(colours: np.ndarray) -> bool:
    """Whether (H, W, 3) values are equal in all channels."""
    return bool((colours[..., :1] == colours[..., 1:]).all())


def scale_to_8_bits(values: np.ndarray, bits: int) -> tuple[np.ndarray, dict[str, int]]:
    """16-bit values as uint8, 2**bits - 1 and more as 255, and what `info` of the image says of larger values."""
    largest = int(values.max())
    scaled = np.minimum(np.rint(values * (255 / full_scale(bits))), 255).astype(np.uint8)
    return scaled, {CLIPPED_FROM: largest} if largest > full_scale(bits) else {}


def _alpha(image: Image.Image) -> Image.Image | None:
    """The alpha channel where it is not opaque everywhere, from any kind of transparency that files know."""
    if not image.has_transparency_data:
        return None
    deep, key = deep_values(image), image.info.get("transparency")
    if deep is not None and key is not None:  # Pillow would compare 8 bits
        alpha = Image.fromarray(np.atleast_3d(deep != key).any(axis=2)).convert("L")
    else:
        alpha = (image if image.mode.endswith("A") else image.convert("RGBA")).getchannel("A")
    return alpha if alpha.getextrema()[0] < 255 else None


def deep_values(image: Image.Image) -> np.ndarray | None:
    """The values of a 16-bit image, (H, W) or (H, W, 3) int64; None of other images."""
    if image.mode.startswith("I"):  # I;16, I;16B, and I for 16-bit PNG in some versions of Pillow
        return np.asarray(image).astype(np.int64)
    low = image.info.get(LOW_BYTES)
    if low is None:
        return None
    return 256 * np.asarray(image.convert("RGB")).astype(np.int64) + np.asarray(low)


def full_scale(bits: int) -> int:
    """The largest value of `bits` bits."""
    return 2**bits - 1


def clipping_note(image: Image.Image, name: Path | str, bits: int) -> str | None:
    """A sentence where `eight_bit` clipped values of the image called `name`, else None."""
    return next(iter(clipping_summary([(str(name), image.info.get(CLIPPED_FROM, 0))], bits)), None)


def parts_of(image: Image.Image) -> tuple[str, ...]:
    """The keys of HOW_READ that apply to an image from `eight_bit`."""
    return tuple(part for part in HOW_READ if part in image.info)


def reading_note(image: Image.Image, name: Path | str, bits: int) -> str | None:
    """Sentences where `eight_bit` clipped values of an image, or where HOW_READ applies; None otherwise."""
    notes = [f"{name} has {part}: {HOW_READ[part]}" for part in parts_of(image)]
    return "; ".join(filter(None, (clipping_note(image, name, bits), *notes))) or None


def reading_summary(named: Sequence[tuple[str, Sequence[str]]], total: int, what: str) -> list[str]:
    """A sentence for each part of HOW_READ that some of `total` images, called `what`, have.

    named: the name of images and their `parts_of`.
    """
    notes = []
    for part, how in HOW_READ.items():
        if names := [name for name, parts in named if part in parts]:
            rest = ", and the others are not comparable" if part == TRANSPARENT and len(names) < total else ""
            notes.append(f"{len(names)} of {total} {what} have {part}, e.g. {names[0]}: {how}{rest}")
    return notes


def clipping_summary(values: Sequence[tuple[str, int]], bits: int) -> list[str]:
    """A sentence on the images whose values exceed `bits` bits; [] if there are none.

    values: the name and the largest value of images, as from `largest_values`.
    """
    exceeding = [(name, value) for name, value in values if value > full_scale(bits)]
    if not exceeding:
        return []
    name, value = max(exceeding, key=lambda item: item[1])
    more = f" (and {len(exceeding) - 1} more images)" if len(exceeding) > 1 else ""
    return [f"{name}{more} has values up to {value}, above the {full_scale(bits)} of {bits} bits; they are clipped"]


def largest_values(images: Iterable[Path | Image.Image]) -> list[tuple[str, int]]:
    """The name and the largest value of every 16-bit image among files and decoded images.

    Only the headers of other files are read. Files that cannot be read are skipped; decoding them raises the error.
    """
    with ThreadPoolExecutor() as pool:
        values = list(filter(None, pool.map(_largest_value, images)))
    return [(name, value) for name, value in values if value <= full_scale(FULL_BITS)]


def _largest_value(image: Path | BinaryIO | Image.Image) -> tuple[str, int] | None:
    try:
        if isinstance(image, Image.Image):
            values, name = deep_values(image), "an image"
        else:
            is_deep, _ = read_odd_header(image)
            values, name = read_pixels(image, deep_values) if is_deep else None, str(image)
        return None if values is None else (name, int(values.max()))
    except Exception:  # as in read_pixels
        return None


def read_odd_header(file: Path | BinaryIO) -> tuple[bool, bool]:
    """What a header says: whether there are values of 16 bits, and whether HOW_READ may apply; any error of Pillow."""
    if isinstance(file, Path):
        return _read_odd_header(file)
    with Image.open(file) as image:
        is_deep = image.mode.startswith("I") or _deep_mode(image) is not None
        return is_deep, image.has_transparency_data or _has_several(image)


@_kept_until_changed
def _read_odd_header(path: Path) -> tuple[bool, bool]:
    with open(path, "rb") as stream:
        return read_odd_header(stream)


def smallest_depth(values: Iterable[int]) -> int:
    """The smallest of BIT_DEPTHS that holds all values; FULL_BITS where there are none."""
    largest = max(values, default=full_scale(FULL_BITS))
    return next(bits for bits in BIT_DEPTHS if largest <= full_scale(bits))


def resolve_bits(asked: int | str, paths: Sequence[Path], of: str) -> int:
    """The bit depth `asked`; for AUTO_BITS, the smallest that holds the 16-bit images of `paths`.

    Where `paths` has 16-bit images, prints the depth, and a warning if some exceed it. of: what they are.
    """
    named = [] if asked == FULL_BITS else largest_values(paths)
    values = [value for _, value in named]
    bits = smallest_depth(values) if asked == AUTO_BITS else asked
    if values:
        print(f"bits: {bits} ({len(values)} 16-bit image(s) of {of}, largest value {max(values)})")
    for sentence in clipping_summary(named, bits):
        print(f"warning: {sentence}")
    return bits
