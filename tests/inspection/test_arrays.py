"""Images from Python: shapes x types x ranges of values through the one conversion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from inspection.images import array_image, as_pixels, image_list
from tests.datasets.test_images import exif

GREY = np.random.default_rng(0).integers(0, 256, (6, 5), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (6, 5, 3), dtype=np.uint8)
SHAPES = {
    "(H, W)": (GREY, GREY),
    "(H, W, 1)": (GREY[..., None], GREY),
    "(1, H, W)": (GREY[None], GREY),
    "(H, W, 3)": (COLOUR, COLOUR),
    "(3, H, W)": (COLOUR.transpose(2, 0, 1), COLOUR),
    "(H, W, 4)": (np.concatenate([COLOUR, np.full((6, 5, 1), 255, np.uint8)], axis=2), COLOUR),
}
TYPES = {
    "uint8": lambda values: values,
    "uint16": lambda values: values.astype(np.uint16) * 257,
    "float32": lambda values: (values / 255).astype(np.float32),
    "float64": lambda values: values / 255,
}


@given(st.sampled_from(sorted(SHAPES)), st.sampled_from(sorted(TYPES)), st.booleans())
def test_every_shape_and_type_is_the_same_image(shape, kind, is_tensor):
    values, expected = SHAPES[shape]
    values = np.ascontiguousarray(TYPES[kind](values))
    found = as_pixels(torch.from_numpy(values) if is_tensor else values, 32)
    assert (np.asarray(found) == expected).all() and found.mode == ("L" if expected.ndim == 2 else "RGB")


@given(st.sampled_from(sorted(SHAPES)), st.booleans())
def test_frames_of_opencv(shape, is_deep):
    values, expected = SHAPES[shape]
    values = values.astype(np.uint16) * 4 if is_deep else values
    found = np.asarray(array_image(values, bits=10, bgr=True))
    expected = expected if expected.ndim == 2 else expected[..., ::-1]
    expected = np.rint(expected * (4 * 255 / 1023)) if is_deep else expected
    if values.shape[-1] != 4 or not is_deep:  # the alpha channel of such a frame is not opaque
        assert (found == expected).all()


WRONG = {
    "integers": (GREY.astype(np.int64), "uint8, uint16, or float"),
    "0 to 255": (COLOUR.astype(np.float32), "float values of an image go from 0 to 1, not "),
    "normalised": (torch.randn(3, 8, 8), "undo a normalisation"),
    "normalised network input": (torch.randn(3, 32, 32), "undo a normalisation"),
    "NaN": (np.full((4, 4), np.nan), "go from 0 to 1, not nan"),
    "a batch": (np.zeros((2, 4, 4, 3), np.uint8), r"not \(2, 4, 4, 3\)"),
    "two channels": (np.zeros((6, 5, 2), np.uint8), r"not \(6, 5, 2\)"),
    "empty": (np.zeros((0, 5), np.uint8), r"not \(0, 5\)"),
    "sparse": (torch.zeros(3, 8, 8).to_sparse(), "a dense tensor with values"),
    "without values": (torch.zeros(3, 8, 8, device="meta"), "a dense tensor with values"),
    "masked": (np.ma.masked_less(COLOUR, 9), "without a mask: fill its masked values"),
    "complex": (torch.zeros(3, 8, 8, dtype=torch.cfloat).conj(), "not complex64"),
    "text": (3, "a path, a PIL image, an array or a tensor, not int"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_arrays_are_one_sentence(case):
    image, sentence = WRONG[case]
    with pytest.raises(TypeError, match=sentence):
        as_pixels(image, 32)


def test_a_tensor_with_a_gradient_is_read_without():
    assert not as_pixels(torch.full((3, 32, 32), 0.5, requires_grad=True), 32).requires_grad


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="it is 0x5 pixels"):
        as_pixels(Image.new("L", (0, 5)), 32)


@pytest.mark.parametrize("single", [COLOUR, GREY, torch.zeros(3, 4, 4), "x.png", b"x", Image.new("L", (4, 4)), 3, None])
def test_a_single_image_is_no_list(single):
    with pytest.raises(TypeError, match="a list of images"):
        image_list(single)


def test_a_turned_photo_in_memory_is_turned_like_its_file(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "x.png", exif=exif(6))
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(as_pixels(image, 32), as_pixels(tmp_path / "x.png", 32))
