"""Kinds of image files that were misread: 16-bit colours, transparency, EXIF orientation, shared masks, caches."""

from __future__ import annotations

import io
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

import check_data
import predict
from datasets.images import (
    BIT_DEPTHS,
    SEVERAL,
    TRANSPARENT,
    ImageError,
    decode_image,
    largest_values,
    parts_of,
    read_header,
    read_pixels,
    with_facts,
)
from datasets.mvtec import LabelledDataset, list_test_items
from inspection.images import ImageFile, as_pixels, largest_grey_values
from tests.commands.test_commands import test_command
from tests.datasets.test_images import exif
from tests.flags import small_run
from utils.errors import UserError


def png(values: np.ndarray, orientation: int = 1, transparent: Sequence[int] = (), depth: int = 16) -> bytes:
    """A PNG of (H, W, channels); Pillow writes none with 16-bit colours. transparent: the values of a clear pixel."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    shifts = np.arange(depth)[::-1]
    rows = b"".join(b"\0" + np.packbits((row[..., None] >> shifts) & 1).tobytes() for row in values)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))]
    parts += [(b"eXIf", exif(orientation).tobytes()[6:])] if orientation > 1 else []
    parts += [(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))] if transparent else []
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(values: np.ndarray, order: str, planes: bool = False) -> bytes:
    """An uncompressed 16-bit TIFF of (H, W, 3). planes: each colour has a plane."""
    stream = io.BytesIO()
    how = {"photometric": "rgb", "planarconfig": "separate" if planes else "contig", "byteorder": order}
    tifffile.imwrite(stream, (np.moveaxis(values, -1, 0) if planes else values).astype(np.uint16), **how)
    return stream.getvalue()


@given(st.sampled_from(BIT_DEPTHS), st.sampled_from([1, 2, 3, 4, "<", ">"]), st.sampled_from([1, 3, 6, 8]), st.data())
def test_sixteen_bits_are_read_whole(bits, kind, orientation, data):
    """Bit depths x channels x file types x orientations: each value is scaled by the depth, and turned."""
    channels = kind if isinstance(kind, int) else 3
    seed = data.draw(st.integers(0, 99))
    values = np.random.default_rng(seed).integers(0, 2**bits, (5, 4, channels))
    if channels in (2, 4):
        values[..., -1] = 65535
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.png" if isinstance(kind, int) else "x.tif")
        path.write_bytes(png(values, orientation) if isinstance(kind, int) else tiff(values, kind))
        colours = values[..., : 1 if channels < 3 else 3]
        turns = {1: 0, 3: 2, 6: 3, 8: 1}[orientation] if isinstance(kind, int) else 0
        expected = np.rot90(np.rint(colours * 255 / (2**bits - 1)), turns)
        found = np.asarray(decode_image(path, bits).convert("RGB"))
        assert (found == np.broadcast_to(expected, found.shape)).all()
        assert largest_values([path]) == [(str(path), colours.max())]
        assert (np.asarray(read_pixels(io.BytesIO(path.read_bytes()), lambda image: image.copy(), "x")) >= 0).all()


@given(st.sampled_from(["LA", "RGBA", "PA"]), st.sampled_from(["png", "tif", "webp"]), st.integers(0, 255))
def test_what_lies_under_transparent_parts_does_not_matter(mode, suffix, under):
    hidden = np.zeros((8, 8), bool)
    hidden[:4] = True
    with tempfile.TemporaryDirectory() as folder:
        shown = []
        for value in (0, under):
            image = Image.fromarray(np.where(hidden, value, 90).astype(np.uint8)).convert(mode.replace("PA", "RGBA"))
            image.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
            path = Path(folder, f"x.{suffix}")
            image.save(path, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
            shown.append(decode_image(path))
        assert TRANSPARENT in shown[0].info and np.array_equal(*map(np.asarray, shown))
        assert not np.asarray(shown[1])[hidden].any()


FORMS = {  # of one grey picture whose left half is clear
    "grey and alpha": lambda shown, alpha: Image.merge("LA", [shown, alpha]),
    "colours and alpha": lambda shown, alpha: Image.merge("RGBA", [shown, shown, shown, alpha]),
    "premultiplied": lambda shown, alpha: Image.merge("RGBA", [shown, shown, shown, alpha]).convert("RGBa"),
    "palette": lambda shown, alpha: Image.merge("RGBA", [shown, shown, shown, alpha]).quantize(),
    "a clear grey": lambda shown, alpha: clear_value(Image.composite(shown, Image.new("L", shown.size, 7), alpha), 7),
    "a clear colour": lambda shown, alpha: clear_value(
        Image.composite(shown, Image.new("L", shown.size, 7), alpha).convert("RGB"), (7, 7, 7)
    ),
}


def clear_value(image: Image.Image, value: int | tuple[int, ...]) -> Image.Image:
    image.info["transparency"] = value
    return image


@given(st.sampled_from(sorted(FORMS)), st.sampled_from(["memory", "array", "tensor", "png", "tif", "webp", "gif"]))
def test_every_form_of_transparency_is_the_same_picture(form, kind):
    """Forms of transparency x file types and images in memory."""
    grey = np.where(np.arange(8) % 2, np.uint8(60), np.uint8(200))[None].repeat(8, axis=0)
    hidden = np.arange(8)[None].repeat(8, axis=0) < 4
    image = FORMS[form](Image.fromarray(grey), Image.fromarray(np.where(hidden, np.uint8(0), np.uint8(255))))
    if kind in ("array", "tensor"):
        values = np.array(image.convert("RGBA"))
        found = as_pixels(values if kind == "array" else torch.from_numpy(values.transpose(2, 0, 1).copy()), 32)
    elif kind == "memory":
        found = as_pixels(image, 32)
    else:
        image = image.convert("RGBA") if kind in ("tif", "webp", "gif") or image.mode == "RGBa" else image
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"x.{kind}")
            image.save(path, **({"lossless": True} if kind == "webp" else {}))
            found, other = decode_image(path), as_pixels(ImageFile(path), 32)
            assert np.array_equal(found, other) and parts_of(other) == parts_of(found)
    assert np.array_equal(np.asarray(found.convert("L")), np.where(hidden, 0, grey)) and TRANSPARENT in found.info


@pytest.mark.parametrize("order", "<>")
def test_arrays_of_16_bits_in_any_byte_order(order):
    values = np.arange(0, 4096, 16, dtype=f"{order}u2").reshape(16, 16)
    assert largest_grey_values([values]) == [4080]
    assert (np.asarray(as_pixels(values, 16, bits=12)) == np.rint(values.astype(int) * (255 / 4095))).all()


@given(st.sampled_from([1, 3]), st.integers(0, 255))
def test_a_transparent_colour_of_16_bits_is_compared_whole(channels, low):
    """Two colours of equal high bytes, one of which is transparent."""
    values = np.full((4, 4, channels), 256 * 9 + low)
    values[:2] += 1 if low < 255 else -1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.png")
        path.write_bytes(png(values, transparent=values[3, 3].tolist()))
        found = decode_image(path, 12)
    assert parts_of(found) == (TRANSPARENT,)
    assert (np.asarray(found)[:2] > 0).all() and not np.asarray(found)[2:].any()


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("clear", [0, 1])
def test_a_transparent_grey_of_few_bits(depth, clear, tmp_path):
    values = np.array([[[0], [1], [2**depth - 1]]])
    (tmp_path / "x.png").write_bytes(png(values, transparent=[clear], depth=depth))
    found = decode_image(tmp_path / "x.png")
    assert parts_of(found) == (TRANSPARENT,)
    assert (np.asarray(found) == np.where(values == clear, 0, values * (255 // (2**depth - 1)))[..., 0]).all()


def jpeg_2000(bits: int, grey: type[np.integer] | None = None) -> bytes:
    """A JPEG 2000 file whose header says that its colours, or its values of type `grey`, have so many bits."""
    stream = io.BytesIO()
    image = Image.fromarray(np.ones((8, 8), grey)) if grey else Image.new("RGB", (8, 8), "red")
    image.save(stream, "JPEG2000")
    content = bytearray(stream.getvalue())
    content[content.index(b"\xff\x4f\xff\x51") + 42] = bits - 1
    return bytes(content)


def sgi(depth: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "SGI", bpc=depth // 8)
    return stream.getvalue()


def signed() -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, np.full((4, 4), -9, np.int8), photometric="minisblack")
    return stream.getvalue()


def white_is_zero() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), 9, np.uint16)).save(stream, "TIFF", tiffinfo={262: 0})
    return stream.getvalue()


MISREAD = {  # by Pillow
    "planes": (tiff(np.zeros((4, 4, 3)), "<", planes=True), "save it as plain 16-bit RGB"),
    "PPM": (b"P6 1 1 65535 abcdef", "save it as plain 16-bit RGB"),
    "plain PPM": (b"P3 1 1 4095 1 2 3", "save it as plain 16-bit RGB"),
    "JPEG 2000": (jpeg_2000(12), "save it as plain 16-bit RGB"),
    "SGI": (sgi(16), "save it as plain 16-bit RGB"),
    "PGM": (b"P5 1 1 4095 ab", "grey values of 12 bits in a file type that is read as 16 bits"),
    "grey JPEG 2000": (jpeg_2000(10, np.uint16), "grey values of 10 bits in a file type that is read as 16 bits"),
    "signed": (signed(), "signed values of 8 bits; save it with values from 0 to 255"),
    "white is zero": (white_is_zero(), "of which 0 is white; save it with 0 as black"),
}


@pytest.mark.parametrize("case", MISREAD)
def test_sixteen_bits_that_pillow_misreads_are_refused(case, tmp_path):
    content, sentence = MISREAD[case]
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(ImageError, match=sentence):
        decode_image(tmp_path / "x.tif")


@pytest.mark.parametrize("content", [b"P6 1 1 255 abc", b"P3 1 1 255 1 2 3", b"P5 1 1 65535 ab", jpeg_2000(8), sgi(8)])
def test_eight_bits_and_grey_of_the_same_file_types_are_read(content, tmp_path):
    (tmp_path / "x.tif").write_bytes(content)
    with Image.open(io.BytesIO(content)) as stored:
        assert decode_image(tmp_path / "x.tif").size == stored.size


@given(st.sampled_from(range(10)), st.sampled_from(["png", "jpg", "tif", "webp"]), st.sampled_from(["L", "RGB", "P"]))
def test_the_orientation_and_size_of_every_file_type(orientation, suffix, mode):
    stored = Image.linear_gradient("L").resize((24, 16)).convert(mode if suffix in ("png", "tif") else "RGB")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"x.{suffix}")
        stored.save(path, exif=exif(orientation), **({"lossless": True} if suffix == "webp" else {"quality": 100}))
        image, facts = read_pixels(path, with_facts)
        expected = ImageOps.exif_transpose(with_orientation(stored, orientation))
        assert facts.orientation == (orientation if orientation in range(1, 9) else 1)
        assert read_header(path) == (image.size, facts.orientation) and image.size == expected.size
        pixels = (np.asarray(one.convert("RGB")).astype(int) for one in (image, expected))
        assert abs(np.subtract(*pixels)).max() <= 2


def test_the_orientation_in_the_xmp_data_of_a_png(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    Image.new("L", (24, 16)).save(tmp_path / "x.png", pnginfo=info)
    assert read_header(tmp_path / "x.png") == (decode_image(tmp_path / "x.png").size, 6) == ((16, 24), 6)


def test_a_palette_of_8_bits(tmp_path):
    """Some programs write the colours of a TIFF's palette without the low byte."""
    values, colours = np.arange(16, dtype=np.uint8).reshape(4, 4), np.arange(256, dtype=np.uint16)[None].repeat(3, 0)
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="palette", colormap=colours)
    assert np.array_equal(np.asarray(decode_image(tmp_path / "x.tif"))[..., 0], values)


def test_a_header_is_read_again_where_the_file_was_replaced(tmp_path):
    """By one of the same size and time, as by `cp -p` or `rsync -t`."""
    for size in ((24, 16), (16, 24)):
        Image.new("L", size).save(tmp_path / "new.bmp")
        os.utime(tmp_path / "new.bmp", (1, 1))
        (tmp_path / "new.bmp").replace(tmp_path / "x.bmp")
        assert read_header(tmp_path / "x.bmp") == (size, 1)


@pytest.mark.parametrize("suffix", ["tif", "png", "webp", "gif"])
def test_several_pages_are_said(suffix, tmp_path):
    first, other = (Image.new("L", (8, 8), value) for value in (200, 0))
    first.save(tmp_path / f"x.{suffix}", save_all=True, append_images=[other])
    first.save(tmp_path / f"y.{suffix}")
    found = [decode_image(tmp_path / f"{name}.{suffix}") for name in "xy"]
    assert [parts_of(image) for image in found] == [(SEVERAL,), ()]
    assert all(abs(np.asarray(image).astype(int) - 200).max() < 3 for image in found)


def test_the_preview_in_a_photo_of_a_phone_is_no_page(tmp_path):
    first, preview = (Image.new("RGB", (8, 8), value) for value in ("red", "blue"))
    first.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[preview])
    assert not parts_of(decode_image(tmp_path / "x.jpg"))


@pytest.fixture
def ring(tmp_path, demo_data) -> Path:
    return Path(shutil.copytree(demo_data / "ring", tmp_path / "ring"))


@pytest.fixture
def said(ring, tmp_path, capsys):
    """What check_data.py and test.py say of the ring, without the sentence of each on the images in all."""

    def said(*flags: str) -> list[set[str]]:
        common = ["--obj", "ring", "--data_type", "folder", "--data_path", str(ring.parent), *flags]
        capsys.readouterr()
        with suppress(SystemExit):
            check_data.main(common)
        check = {line.removeprefix("  ") for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
        given = {"shot": 1, "inferences": 1, "untrained": True, "metrics": "auroc", "output": tmp_path / "o"}
        test_command.main([*small_run(ring.parent, **given), *flags])
        test = {line[6:] for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")}
        return [check, test]

    return said


def defect(ring: Path) -> tuple[Path, Path]:
    """A defective image and its mask."""
    path = next((ring / "test").glob("[!g]*/000.png"))
    return path, ring / "ground_truth" / path.parent.name / "000_mask.png"


def edit(path: Path, change: Callable[[Image.Image], Image.Image], **options: object) -> None:
    with Image.open(path) as image:
        changed = change(image)
    changed.save(path, **options)


def clear(image: Image.Image) -> Image.Image:
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def turned(ring: Path) -> None:
    edit(defect(ring)[0], Image.Image.copy, exif=exif(6))


def turned_tiff(ring: Path) -> None:
    path = defect(ring)[0]
    with Image.open(path) as image:
        image.save(path.with_suffix(".tif"), exif=exif(6))
    path.unlink()


def sixteen_bits(ring: Path) -> None:
    for path in ring.glob("t*/*/*.png"):
        edit(path, lambda image: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 4))
    edit(defect(ring)[0], lambda image: Image.fromarray(np.asarray(image) + np.uint16(5000)))


# what is done to the ring, and the sentence on it
FINDINGS = {
    "transparent": (lambda ring: edit(defect(ring)[0], clear), "1 of 9 test images have transparent parts"),
    "transparent training images": (
        lambda ring: [edit(path, clear) for path in ring.glob("train/good/*")],
        "5 of 5 training images have transparent parts",
    ),
    "another suffix": (
        lambda ring: shutil.copy(defect(ring)[0], ring / "test/good/photo.heic"),
        "ring: left out: 1 .heic",
    ),
    "no normal images": (lambda ring: shutil.rmtree(ring / "test/good"), "test has no normal images to score"),
    "grey among coloured": (
        lambda ring: edit(defect(ring)[0], lambda image: image.convert("L").convert("RGB")),
        "1 of 9 test images are grey, e.g. ",
    ),
    "pages": (
        lambda ring: edit(defect(ring)[0], Image.Image.copy, save_all=True, append_images=[Image.new("RGB", (64, 64))]),
        "1 of 9 test images have several pages or frames",
    ),
    "empty mask": (lambda ring: Image.new("L", (64, 64)).save(defect(ring)[1]), "marks no pixel"),
    "orientation": (turned, "1 of 6 masks are of images with an EXIF orientation and have none"),
    "orientation of a TIFF": (turned_tiff, "1 of 6 masks are of images with an EXIF orientation and have none"),
    "shared mask": (
        lambda ring: shutil.copy(defect(ring)[0], defect(ring)[0].with_suffix(".tif")),
        "2 images named 000",
    ),
    "training image": (
        lambda ring: shutil.copy(ring / "train/good/000.png", ring / "test/good/001.png"),
        "test/good/001.png has the same pixels as the training image",
    ),
    "training images": (
        lambda ring: shutil.copy(ring / "train/good/000.png", ring / "train/good/9.png"),
        "train/good/9.png has the same pixels as the training image",
    ),
    "both classes": (lambda ring: shutil.copy(ring / "test/good/000.png", defect(ring)[0]), "as the normal test image"),
    "16 bits": (sixteen_bits, "above the 4095 of 12 bits; they are clipped"),
    "normal images in Good": (
        lambda ring: (
            (ring / "test/chip").rename(ring / "test/Good")
            and (ring / "ground_truth/chip").rename(ring / "ground_truth/Good")
        ),
        "/test/Good count as defective: those of normal images are expected in ",
    ),
    "stray": (lambda ring: shutil.copy(ring / "test/good/000.png", ring / "test"), "are not read"),
}


@pytest.mark.parametrize("finding", FINDINGS)
def test_both_commands_say_the_same_and_strict_refuses_it(finding, ring, said):
    spoil, sentence = FINDINGS[finding]
    spoil(ring)
    check, test = said()
    assert check == test and len(check) == 1 and sentence in min(check)
    with pytest.raises(UserError) as caught:
        said("--strict")
    assert str(caught.value) in check and "strict" in caught.value.options


IN_PREDICT = {
    "transparent": "transparent parts: they are laid on black",
    "pages": "several pages or frames: only the first is read",
    "16 bits": "above the 4095 of 12 bits; they are clipped",
    "training image": "has the same pixels as a support image",
    "another suffix": "left out: 1 .heic",
}


@pytest.mark.parametrize("finding", IN_PREDICT)
def test_predict_says_what_the_others_say_of_the_images_that_it_scores(finding, ring, tmp_path, capsys):
    FINDINGS[finding][0](ring)
    support = ["--support", str(ring / "train/good"), "--weights", "none", "--img_size", "64", "--device", "cpu"]
    predict.main([*support, "--input", str(ring / "test"), "--output", str(tmp_path / "out"), "--no_images"])
    printed = capsys.readouterr()
    assert IN_PREDICT[finding] in printed.out + printed.err


@pytest.mark.parametrize("orientation", range(2, 9))
def test_masks_drawn_on_stored_pixels(orientation, ring, said):
    """Image and mask of a wide photo, both as the sensor stores them, are those of the upright files."""
    image, mask = defect(ring)
    (expected,) = (LabelledDataset([item], 32)[0] for item in list_test_items(ring) if item.image == image)
    back = {6: 8, 8: 6}.get(orientation, orientation)
    edit(image, lambda upright: ImageOps.exif_transpose(with_orientation(upright, back)), exif=exif(orientation))
    edit(mask, lambda upright: ImageOps.exif_transpose(with_orientation(upright, back)))
    item = next(item for item in list_test_items(ring) if item.image == image)
    found = LabelledDataset([item], 32, mask_orientation="stored")[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    if orientation == 6:
        assert not set.union(*said("--mask_orientation", "stored"))


def with_orientation(image: Image.Image, orientation: int) -> Image.Image:
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return image
