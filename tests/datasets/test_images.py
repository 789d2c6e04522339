"""The image reader against Pillow's own result, on every kind of image, and on damaged files."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from benchmarks.reference import DATA
from datasets.images import (
    ImageError,
    content_box,
    decode_image,
    limit_pixels,
    read_batches,
    read_image,
    restore_map,
    to_square,
)
from datasets.masks import decode_mask, to_square_mask
from datasets.mvtec import LabelledDataset, LabelledImage
from tests.reference import needs_reference
from utils.choices import MAX_PIXELS

BLOCK = 16  # pixels; a test image is 2 x 2 blocks of one colour each
SIDE = 2 * BLOCK
ORIENTATION = 0x0112  # EXIF tag


def blocks(colours: list[list]) -> np.ndarray:
    return np.array(colours, np.uint8).repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)


COLOURS = blocks([[(200, 30, 40), (20, 180, 60)], [(10, 20, 190), (250, 240, 30)]])
GREYS = blocks([[0, 100], [180, 255]])
ALPHA = Image.fromarray(blocks([[255, 128], [0, 1]]))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def coloured() -> Image.Image:
    return Image.fromarray(COLOURS)


def grey() -> Image.Image:
    return Image.fromarray(GREYS)


def palette() -> Image.Image:
    """Mode P; colour number i is the i-th block's."""
    image = Image.fromarray(blocks([[0, 1], [2, 3]]))
    image.putpalette(COLOURS[::BLOCK, ::BLOCK].tobytes())
    return image


def with_alpha(image: Image.Image, mode: str) -> Image.Image:
    image = image.convert(mode)
    image.putalpha(ALPHA)
    return image


def sixteen_bit(values: np.ndarray, mode: str = "I;16") -> Image.Image:
    order = ">u2" if mode == "I;16B" else "<u2"
    return Image.frombytes(mode, values.shape[::-1], values.astype(order).tobytes())


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    content = Image.Exif()
    content[ORIENTATION] = orientation
    return content


SIDEWAYS = exif(6)


def read_mask(path: Path, size: int, keep_aspect: bool = False) -> np.ndarray:
    return to_square_mask(decode_mask(path).pixels, size, keep_aspect)


def resized(values: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(values).convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


@pytest.mark.parametrize(("stored", "size"), [(50, 224), (224, 224), (300, 224), (257, 64), (16, 17), (64, 1)])
@pytest.mark.parametrize("channels", [(3,), ()])
def test_bit_equal_with_pillow(stored, size, channels, tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(noise(stored, stored, *channels)).save(path)
    with Image.open(path) as image:
        expected = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    found = read_image(path, size)
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(expected))


# name: suffix of the file, image, save options, expected RGB or grey values, largest difference allowed
KINDS = {
    "RGB": ("png", coloured, {}, COLOURS, 0),
    "grey": ("png", grey, {}, GREYS, 0),
    "grey and alpha": ("png", lambda: with_alpha(grey(), "LA"), {}, GREYS, 0),
    "1 bit": ("png", lambda: grey().point(lambda v: 255 * (v > 127), mode="1"), {}, GREYS // 128 * 255, 0),
    "palette": ("png", palette, {}, COLOURS, 0),
    "palette, one colour transparent": ("png", palette, {"transparency": 2}, COLOURS, 0),
    "palette with opacities": ("png", palette, {"transparency": bytes([0, 9, 200, 255])}, COLOURS, 0),
    "RGBA": ("png", lambda: with_alpha(coloured(), "RGBA"), {}, COLOURS, 0),
    "RGB, one colour transparent": ("png", coloured, {"transparency": (10, 20, 190)}, COLOURS, 0),
    "16-bit grey": ("png", lambda: sixteen_bit(GREYS * np.uint16(257)), {}, GREYS, 0),
    "16-bit TIFF": ("tif", lambda: sixteen_bit(GREYS * np.uint16(257)), {}, GREYS, 0),
    "16-bit big-endian TIFF": ("tif", lambda: sixteen_bit(GREYS * np.uint16(257), "I;16B"), {}, GREYS, 0),
    "TIFF": ("tiff", coloured, {"compression": "tiff_lzw"}, COLOURS, 0),
    "bitmap": ("bmp", coloured, {}, COLOURS, 0),
    "WebP": ("webp", coloured, {"lossless": True}, COLOURS, 0),
    "JPEG": ("jpg", coloured, {"quality": 100, "subsampling": 0}, COLOURS, 4),
    "CMYK JPEG": ("jpg", lambda: coloured().convert("CMYK"), {"quality": 100}, COLOURS, 4),
    "grey JPEG": ("jpeg", grey, {"quality": 100}, GREYS, 2),
}


@pytest.mark.parametrize("size", [SIDE, 224, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image(kind, size, tmp_path):
    suffix, image, options, values, tolerance = KINDS[kind]
    path = tmp_path / f"x.{suffix}"
    image().save(path, **options)
    found = read_image(path, size)
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    assert decode_image(path).mode == ("L" if values.ndim == 2 else "RGB")
    with Image.open(path) as opened:
        if opened.has_transparency_data:  # transparent parts are laid on black
            rgba = np.asarray(opened.convert("RGBA")).astype(float)
            values, tolerance = np.rint(rgba[..., :3] * rgba[..., 3:] / 255).astype(np.uint8), 1
    assert difference(found, resized(values, size)) <= tolerance


UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),  # the stored left edge is the top
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_orientations(orientation, suffix, tmp_path):
    stored = noise(SIDE, SIDE, 3)
    Image.fromarray(stored).save(tmp_path / f"x.{suffix}", exif=exif(orientation))
    np.testing.assert_array_equal(read_image(tmp_path / f"x.{suffix}", SIDE), UPRIGHT[orientation](stored))


def test_photograph_taken_sideways_is_turned_upright(tmp_path):
    """JPEG, orientation 6, not square: the stored left edge becomes the top, in the mask too."""
    stored = np.zeros((10, 60), np.uint8)
    stored[:, :30] = 255
    Image.fromarray(stored).save(tmp_path / "x.jpg", exif=SIDEWAYS, quality=95)
    image, mask = read_image(tmp_path / "x.jpg", 8), read_mask(tmp_path / "x.jpg", 8)
    assert image[:3].min() > 230 and image[5:].max() < 25
    assert mask[:3].all() and not mask[5:].any()


GARBAGE = {
    "no EXIF at all": b"garbage",
    "any bytes": b"Exif\0\0" + bytes(range(200)),
    "offset outside": b"Exif\0\0MM\0*\xff\xff\xff\xff",
    "value outside": b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x05\0\x01\0\0\0\xff\xff\xff\x7f",
    "orientation 255": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\xff\0\0",
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_exif_does_not_matter(garbage, tmp_path):
    (tmp_path / "clean.jpg").write_bytes(encoded(coloured(), "JPEG"))
    (tmp_path / "garbage.jpg").write_bytes(encoded(coloured(), "JPEG", exif=GARBAGE[garbage]))
    np.testing.assert_array_equal(read_image(tmp_path / "garbage.jpg", 20), read_image(tmp_path / "clean.jpg", 20))


@pytest.mark.parametrize("shape", [(10, 60), (60, 10), (5, 2000), (2000, 5), (1, 2), (1, 300)])
def test_images_that_are_not_square_are_stretched(shape, tmp_path):
    """Nothing is cut off: the left half remains the left half, the top half the top half."""
    stored = np.zeros((*shape, 3), np.uint8)
    stored[:, : shape[1] // 2, 0] = 255
    stored[: shape[0] // 2, :, 1] = 255
    Image.fromarray(stored).save(tmp_path / "x.png")
    found = read_image(tmp_path / "x.png", 16)
    np.testing.assert_array_equal(found, resized(stored, 16))
    across, down = found.mean(axis=0)[:, 0], found.mean(axis=1)[:, 1]
    assert across[:5].min() > 200 and across[-5:].max() < 55
    assert shape[0] == 1 or (down[:5].min() > 200 and down[-5:].max() < 55)


def half(kind: str) -> bytes:
    whole = encoded(Image.fromarray(noise(SIDE, SIDE, 3)), kind)
    return whole[: len(whole) // 2]


def tiff_with_fractional_offset() -> bytes:
    """The offset of the pixels is not an integer; Pillow raises a TypeError."""
    whole = encoded(grey(), "TIFF")
    tag, long, real = 273, 4, 11
    at = whole.index(struct.pack("<HHI", tag, long, 1))
    return whole[:at] + struct.pack("<HHIf", tag, real, 1, 0.5) + whole[at + 12 :]


def flipped_png() -> bytes:
    """One wrong bit among the compressed pixels."""
    whole = bytearray(encoded(Image.fromarray(noise(SIDE, SIDE, 3)), "PNG"))
    whole[len(whole) // 2] ^= 1
    return bytes(whole)


ANY = "."  # the reason is worded by Pillow
REJECTED = {
    "truncated PNG": (lambda: half("PNG"), "truncated"),
    "truncated JPEG": (lambda: half("JPEG"), ANY),
    "truncated TIFF": (lambda: half("TIFF"), ANY),
    "flipped bit": (flipped_png, ANY),
    "zero bytes": (lambda: b"", "not an image that Pillow reads, or damaged"),
    "text": (lambda: b"this is no image\n" * 30, "not an image that Pillow reads, or damaged"),
    "web page": (lambda: b"<!DOCTYPE html><html></html>", "not an image that Pillow reads, or damaged"),
    "float TIFF": (lambda: encoded(Image.fromarray(GREYS.astype(np.float32)), "TIFF"), "save it with 8 or 16 bits"),
    "TIFF with a fractional offset": (tiff_with_fractional_offset, ANY),
}
WITHOUT_RANGE = {  # masks may have such values
    "32-bit TIFF": (
        lambda: encoded(Image.fromarray(GREYS.astype(np.int32) * 1000), "TIFF"),
        r"0\.\.255000 do not fit 16",
    ),
    "negative TIFF": (lambda: encoded(Image.fromarray(-GREYS.astype(np.int32)), "TIFF"), r"-255\.\.0 do not fit 16"),
}
BROKEN = [(case, read) for case in REJECTED for read in (read_image, read_mask)]


def assert_rejected(read, path: Path, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        read(path, 16)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and not message.endswith(": ")


@pytest.mark.parametrize(("case", "read"), [*BROKEN, *((case, read_image) for case in WITHOUT_RANGE)])
def test_broken_files_are_rejected_by_name(case, read, tmp_path):
    make, reason = (REJECTED | WITHOUT_RANGE)[case]
    (tmp_path / "x.png").write_bytes(make())
    assert_rejected(read, tmp_path / "x.png", reason)


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_missing_files_and_folders_are_rejected_by_name(read, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "missing.png")
    assert_rejected(read, tmp_path / "folder.png", "directory")
    assert_rejected(read, tmp_path / "missing.png", "No such file")
    assert_rejected(read, tmp_path / "dangling.png", "No such file")


@pytest.fixture
def pixel_limit():
    """The limit holds for the whole process; the default is restored after the test."""
    yield limit_pixels
    limit_pixels(MAX_PIXELS)


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_decompression_bombs(read, tmp_path, pixel_limit):
    grey().save(tmp_path / "x.png")
    pixel_limit(SIDE * SIDE)
    assert read(tmp_path / "x.png", 16).any()
    pixel_limit(SIDE * SIDE - 2)
    sentence = r"\(1024 pixels\) exceeds limit of 1022 pixels, .*bomb.*"
    assert_rejected(read, tmp_path / "x.png", sentence)


def test_a_bomb_takes_no_memory(tmp_path):
    """A file of 24 KB with 196 million pixels is rejected before it is decoded."""
    Image.new("1", (14000, 14000)).save(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size < 30_000
    tracemalloc.start()
    assert_rejected(read_image, tmp_path / "x.png", "exceeds limit of 178956970 pixels")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_obey_the_limit_and_name_the_file(workers, tmp_path, pixel_limit):
    grey().save(tmp_path / "a.png")
    Image.new("L", (SIDE, SIDE + 1)).save(tmp_path / "b.png")
    pixel_limit(SIDE * SIDE)
    items = [LabelledImage(tmp_path / name, (), "good") for name in ("a.png", "b.png")]
    images = read_batches(LabelledDataset(items, 8), 1, workers)
    assert next(images)["image"].shape == (1, 3, 8, 8)
    with pytest.raises(ImageError, match=r"cannot read the image .*b\.png: .*limit of 1024 pixels") as caught:
        next(images)
    assert "\n" not in str(caught.value) and caught.value.options == ("max_pixels",)


class Numbers(Dataset):
    """Items that hold their number."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"number": torch.tensor(number)}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_in_order(workers):
    batches = [batch["number"].tolist() for batch in read_batches(Numbers(), 4, workers)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [item["number"].item() for item in read_batches(Numbers(), None, workers)] == list(range(11))


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (1, 9), (50, 20000), (7, 7), (1, 1)])
def test_keeping_the_aspect_pads_by_reflection(shape, tmp_path):
    """Against the definition: the longer side becomes `size`, and the image is mirrored at its edges."""
    stored, size = noise(*shape, 3), 20
    Image.fromarray(stored).save(tmp_path / "x.png")
    height, width = (max(1, round(size * side / max(shape))) for side in shape)
    inner = np.asarray(Image.fromarray(stored).resize((width, height), Image.Resampling.LANCZOS))
    rows, columns = (reflected(size, side) for side in (height, width))
    found = read_image(tmp_path / "x.png", size, keep_aspect=True)
    np.testing.assert_array_equal(found, inner[rows][:, columns])


def reflected(size: int, inner: int) -> list[int]:
    """Indices 0..inner-1, centred in `size` places and mirrored on both sides: .. 1 0 0 1 .. n n .."""
    places = [(place - (size - inner) // 2) % (2 * inner) for place in range(size)]
    return [place if place < inner else 2 * inner - 1 - place for place in places]


def test_a_mask_is_padded_like_its_image(tmp_path):
    stored = (noise(12, 30) > 127) * np.uint8(255)
    Image.fromarray(stored).save(tmp_path / "x.png")
    mask = read_mask(tmp_path / "x.png", 30, keep_aspect=True)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, stored[reflected(30, 12)] > 127)


@pytest.mark.parametrize("keep_aspect", [False, True])
@pytest.mark.parametrize(("width", "height"), [(90, 40), (40, 90), (64, 64), (500, 3), (1, 1)])
def test_a_map_is_restored_to_the_frame_of_its_image(width, height, keep_aspect):
    """The restored map is bright where the image is bright."""
    values = np.full((height, width), 10, np.uint8)
    values[: height if height < 10 else height // 3, width // 2 :] = 250
    square = to_square(Image.fromarray(values), 64, keep_aspect)[..., 0].astype(np.float32)
    restored = restore_map(square, width, height, keep_aspect)
    assert restored.shape == (height, width) and restored.dtype == np.float32
    assert np.abs(restored - values).mean() < 8


def test_restored_map_of_a_small_example():
    """An image of 3 to 2 is 6 x 4 in a square of 6: one row of padding above, one below."""
    scores = np.zeros((6, 6), np.float32)
    scores[0] = scores[5] = 99  # padding
    scores[1:5, :3] = 4
    assert content_box(3, 2, 6, True) == (0, 1, 6, 5) and content_box(3, 2, 6, False) == (0, 0, 6, 6)
    restored = restore_map(scores, 12, 8, keep_aspect=True)
    assert restored[:, :5].tolist() == [[4] * 5] * 8 and not restored[:, 7:].any() and (restored[:, 5] == 3).all()


def damaged(generator: random.Random, whole: bytes) -> bytes:
    """`whole` with flipped bits, a zeroed stretch or a cut end; half of the damage is in the first 150 bytes."""
    content = bytearray(whole)
    for _ in range(generator.choice((1, 2, 5))):
        at = generator.randrange(generator.choice((len(content), min(150, len(content)))))
        action = generator.choice(("flip", "flip", "zero", "cut"))
        if action == "flip":
            content[at] ^= 1 << generator.randrange(8)
        elif action == "zero":
            stretch = generator.choice((1, 4, 30))
            content[at : at + stretch] = bytes(len(content[at : at + stretch]))
        else:
            del content[max(at, 1) :]
    return bytes(content)


def with_right_checksums(png: bytes) -> bytes:
    """A damaged PNG with the checksums recomputed, so that the damage reaches the decoder."""
    parts, at = [png[:8]], 8
    while at + 12 <= len(png) and at + 12 + (length := int.from_bytes(png[at : at + 4], "big")) <= len(png):
        body = png[at + 4 : at + 8 + length]
        parts += [png[at : at + 4], body, struct.pack(">I", zlib.crc32(body))]
        at += 12 + length
    return b"".join(parts) + png[at:]


MUTATIONS = 250  # per file
FUZZED = {
    "RGB.png": lambda: encoded(coloured(), "PNG", exif=SIDEWAYS),
    "palette.png": lambda: encoded(palette(), "PNG", transparency=bytes([0, 10, 200, 3])),
    "16 bit.png": lambda: encoded(sixteen_bit(GREYS * np.uint16(257)), "PNG"),
    "RGB.jpg": lambda: encoded(coloured(), "JPEG", exif=SIDEWAYS, dpi=(72, 72)),
    "progressive.jpg": lambda: encoded(coloured(), "JPEG", progressive=True),
    "CMYK.jpg": lambda: encoded(coloured().convert("CMYK"), "JPEG"),
    "RGB.tif": lambda: encoded(coloured(), "TIFF", exif=SIDEWAYS),
    "packed.tif": lambda: encoded(coloured(), "TIFF", compression="tiff_lzw"),
    "1 bit.tif": lambda: encoded(grey().convert("1"), "TIFF", compression="group4"),
    "float.tif": lambda: encoded(Image.fromarray(GREYS.astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("name", FUZZED)
def test_damaged_files_give_an_image_or_an_image_error(name, tmp_path, pixel_limit):
    """Never a warning: pytest turns warnings into errors."""
    pixel_limit(2 * 10**5)  # a flipped bit in the width must not take seconds
    whole, generator, path = FUZZED[name](), random.Random(0), tmp_path / name
    rejected = 0
    for number in range(MUTATIONS):
        content = damaged(generator, whole)
        path.write_bytes(with_right_checksums(content) if name.endswith("png") and number % 2 else content)
        try:
            found = read_image(path, 8)
            assert found.shape == (8, 8, 3) and found.dtype == np.uint8
        except ImageError as error:
            assert str(path) in str(error)
            rejected += 1
    assert rejected > 5 and (rejected < MUTATIONS or name == "float.tif")


@needs_reference
@pytest.mark.parametrize("name", ["magnetic_tile/train/good/000.jpg", "solar_mono/train/good/000.png"])
def test_real_images(name):
    with Image.open(DATA / name) as image:
        assert (image.width != image.height) == name.startswith("magnetic_tile")
        expected = image.convert("RGB").resize((224, 224), Image.Resampling.LANCZOS)
    found = read_image(DATA / name, 224)
    np.testing.assert_array_equal(found, np.asarray(expected))
    assert found.std() > 5 and (found[..., 0] == found[..., 2]).all()
