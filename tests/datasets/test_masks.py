"""Masks of any integer mode and any values: the rule against its plain definition, and the hints."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from datasets.images import ImageError
from datasets.masks import (
    ALPHA,
    MIXED,
    MOST_CLASSES,
    PAGES,
    MaskFacts,
    decode_mask,
    mask_notes,
)
from datasets.mvtec import LabelledDataset, LabelledImage
from tests.datasets.test_images import read_mask

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))
SIZES = st.integers(1, 20)
DEEP = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}  # Pillow's modes of more than 8 bits
MOST = {"L": 254, "LA": 254, "RGB": 254, "RGBA": 254, "I;16": 65534, "I;16B": 65534, "I": 2**31 - 1}


def as_image(values: np.ndarray, mode: str) -> Image.Image:
    """Values (H, W) in an image of any integer mode; in colours the red channel has them."""
    if mode in DEEP:
        return Image.frombytes(mode, values.shape[::-1], values.astype(DEEP[mode]).tobytes())
    grey = Image.fromarray(values.astype(np.uint8))
    if not mode.startswith("RGB"):
        return grey.convert(mode)
    image = Image.merge("RGB", (grey, grey.point(lambda value: value // 2), Image.new("L", grey.size)))
    return image.convert(mode)


def stored(image: Image.Image) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, "TIFF" if image.mode in DEEP else "PNG")
    return stream


def nearest(marks: np.ndarray, size: int) -> np.ndarray:
    """The marks in a square, by Pillow's NEAREST."""
    return np.asarray(Image.fromarray(marks * np.uint8(255)).resize((size, size), Image.Resampling.NEAREST)) > 127


@given(arrays(np.uint8, SHAPES), st.sampled_from(["L", "LA", "RGB", "RGBA"]), SIZES, st.data())
def test_grey_levels_have_the_release_s_rule(values, mode, size, data):
    """Any values next to 255, so any antialiased edge: NEAREST on the values, then > 127."""
    values[data.draw(st.integers(0, values.shape[0] - 1)), data.draw(st.integers(0, values.shape[1] - 1))] = 255
    release = Image.fromarray(values).resize((size, size), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(read_mask(stored(as_image(values, mode)), size), np.asarray(release) > 127)


@given(arrays(np.uint8, SHAPES), st.sampled_from(sorted(DEEP)), st.sampled_from([1, 257]), SIZES)
def test_deep_grey_levels_are_those_of_eight_bits(values, mode, scale, size):
    values[0, 0] = 255
    found = read_mask(stored(as_image(values.astype(np.int64) * scale, mode)), size)
    np.testing.assert_array_equal(found, nearest(values > 127, size))


@st.composite
def class_numbers(draw) -> tuple[str, np.ndarray]:
    """A mode and an array of up to MOST_CLASSES numbers of any size other than 0, none the full scale."""
    mode = draw(st.sampled_from(sorted(MOST)))
    number = st.integers(1, MOST[mode]).filter(lambda value: value != 255)
    numbers = draw(st.lists(st.one_of(st.integers(1, 5), number), max_size=MOST_CLASSES))
    return mode, draw(arrays(np.int64, SHAPES, elements=st.sampled_from([0, *numbers])))


@given(class_numbers(), SIZES)
def test_class_numbers_are_defective_where_not_0(drawn, size):
    mode, values = drawn
    np.testing.assert_array_equal(read_mask(stored(as_image(values, mode)), size), nearest(values != 0, size))


@given(st.integers(128, 254), st.sets(st.integers(1, 254), min_size=MOST_CLASSES, max_size=40))
def test_many_values_are_grey_levels_without_the_full_scale_too(most, others):
    """A thin defect with antialiased edges, which nowhere reaches 255; a JPEG whose white is 250."""
    values = np.array([[0, most, *sorted(others - {most}, key=lambda value: value * 97 % 255)]])
    found = decode_mask(stored(as_image(values, "L"))).pixels
    different = len(set(values.ravel()) - {0})
    np.testing.assert_array_equal(found, values > (127 if different > MOST_CLASSES else 0))


def test_the_masks_that_were_lost():
    """Class numbers in 16 bits, 1 next to 200, and instance numbers above 65535."""
    for values, mode in (([0, 1, 2, 5], "I;16"), ([0, 1, 200, 1], "L"), ([0, 1, 70000, 3], "I"), ([0, 1, 1, 1], "1")):
        image = Image.fromarray(np.array([values]) > 0) if mode == "1" else as_image(np.array([values]), mode)
        assert decode_mask(stored(image)).pixels.tolist() == [[False, True, True, True]]


def test_a_palette_without_visible_colours_counts_by_its_numbers():
    image = Image.fromarray(np.array([[0, 1, 2, 0]], np.uint8))
    image.putpalette([0] * 9)
    assert decode_mask(stored(image)).pixels.tolist() == [[False, True, True, False]]
    image.putpalette([255, 255, 255, 0, 0, 0, 0, 0, 0])  # white first, as some programs order it
    assert decode_mask(stored(image)).pixels.tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("values", [np.array([[0, -1]]), np.array([[0.0, 1.0]], np.float32)])
def test_values_that_are_no_mask_are_refused(values, tmp_path):
    Image.fromarray(values.astype(np.int32) if values.dtype == np.int64 else values).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match=r"cannot read the image .*x\.tif: .*(negative|floating-point)"):
        decode_mask(tmp_path / "x.tif")


@given(st.lists(arrays(bool, (6, 6)), max_size=4))
def test_several_masks_of_an_image_count_together(marks):
    with tempfile.TemporaryDirectory() as folder:
        Image.new("L", (6, 6)).save(Path(folder, "image.png"))
        files = tuple(Path(folder, f"{number}.png") for number in range(len(marks)))
        for number, (file, one) in enumerate(zip(files, marks, strict=True)):
            Image.fromarray(one * np.uint8(254 - number)).save(file)
        (item,) = LabelledDataset([LabelledImage(Path(folder, "image.png"), files, "dent")], 6)
        np.testing.assert_array_equal(item["mask"], np.any([np.zeros((6, 6), bool), *marks], axis=0))


def test_one_of_several_masks_with_another_size_is_named(tmp_path):
    for name, size in (("image.png", (6, 4)), ("a.png", (6, 4)), ("b.png", (4, 6))):
        Image.new("L", size, 255).save(tmp_path / name)
    item = LabelledImage(tmp_path / "image.png", (tmp_path / "a.png", tmp_path / "b.png"), "dent")
    with pytest.raises(ImageError, match=r"b\.png is 4x6 pixels instead of the 6x4 of its image"):
        LabelledDataset([item], 8)[0]


SQUARE = np.zeros((9, 9), np.uint8)
SQUARE[2:5, 2:5] = 255


def with_alpha(colour: np.ndarray, alpha: np.ndarray, mode: str = "RGBA") -> Image.Image:
    image = Image.fromarray(colour).convert(mode)
    image.putalpha(Image.fromarray(alpha))
    return image


def several_pages() -> Image.Image:
    stream = io.BytesIO()
    Image.fromarray(SQUARE).save(stream, "PNG", save_all=True, append_images=[Image.fromarray(255 - SQUARE)])
    return Image.open(stream)


DOUBTFUL = {
    "marks in alpha": (with_alpha(SQUARE * 0, SQUARE), ALPHA),
    "grey, marks in alpha": (with_alpha(SQUARE * 0 + 255, SQUARE, "LA"), ALPHA),
    "alpha says the same": (with_alpha(SQUARE, SQUARE), None),
    "alpha says nothing": (with_alpha(SQUARE, SQUARE * 0 + 255), None),
    "several pages": (several_pages(), PAGES),
    "1 next to 255": (Image.fromarray(np.where(np.eye(9, dtype=bool), np.uint8(1), SQUARE)), MIXED),
    "antialiased": (Image.fromarray(SQUARE).resize((13, 13), Image.Resampling.BILINEAR), None),
    "class numbers": (Image.fromarray(SQUARE // 100), None),
    "grey": (Image.fromarray(SQUARE), None),
    "empty": (Image.fromarray(SQUARE * 0), None),
}


@pytest.mark.parametrize("case", DOUBTFUL)
def test_doubtful_masks_are_reported(case, tmp_path):
    image, doubt = DOUBTFUL[case]
    image.save(tmp_path / "x.png", save_all=True)
    found = mask_notes([(tmp_path / "x.png", decode_mask(tmp_path / "x.png").facts)])
    notes = [note for note in found if "inverted" not in note and "marks no" not in note]
    assert notes == ([f"1 of 1 masks {doubt}, e.g. {tmp_path / 'x.png'}"] if doubt else [])


@pytest.mark.parametrize(
    ("inverted", "others", "reported"), [(10, 0, True), (18, 2, True), (8, 2, False), (0, 3, False)]
)
def test_inverted_masks_are_reported_if_nearly_all_are(inverted, others, reported):
    shares = [0.9] * inverted + [0.1] * others
    notes = mask_notes([(Path(f"{number}.png"), MaskFacts((9, 9), share, None)) for number, share in enumerate(shares)])
    sentence = f"{inverted} of {len(shares)} masks mark more than half of their image, e.g. 0.png: are they inverted?"
    assert [note.startswith(sentence) for note in notes] == [True] * reported
