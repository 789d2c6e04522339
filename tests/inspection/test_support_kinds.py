"""Support images that are none: label files and black images among photos, and transparent parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.images import eight_bit
from inspection.detector import FewShotDetector
from models.regad import untrained
from utils.errors import UserError


@pytest.fixture(scope="module")
def detector() -> FewShotDetector:
    return FewShotDetector(untrained("none", img_size=32).stn.eval(), "cpu")


PHOTOS = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32), dtype=np.uint8)) for seed in range(2)]
LABELS = {
    "two values": Image.fromarray(np.eye(32, dtype=np.uint8) * 255),
    "classes": Image.fromarray(np.eye(32, dtype=np.uint8) * 2),
    "black": Image.new("RGB", (32, 32)),
}


@pytest.mark.parametrize("label", LABELS)
def test_label_files_and_black_images_are_no_support(label, detector):
    with pytest.raises(UserError, match="1 of 3 support images have at most 4 grey values"):
        detector.fit([*PHOTOS, LABELS[label]])


def test_support_images_with_and_without_transparent_parts_are_said(detector):
    detector.fit([with_alpha(PHOTOS[0]), PHOTOS[1]])
    (note,) = detector.warnings
    assert note.startswith("1 of 2 support images have transparent parts") and "not comparable" in note


def with_alpha(image: Image.Image) -> Image.Image:
    clear = image.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    return clear


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("of_support", [False, True])
def test_mixed_transparency_is_said_by_every_detector_that_knows_its_support(of_support, of_input, detector):
    support, other = (
        [with_alpha(image) if alpha else image for image in PHOTOS[:2]] for alpha in (of_support, of_input)
    )
    detector.fit(support)
    earlier = detector.state()
    del earlier["support_alpha"]
    image, square = eight_bit(other[0]), torch.zeros(3, 32, 32, dtype=torch.uint8)
    for made in (detector, FewShotDetector.from_state(detector.state(), "cpu")):
        said = made.doubts(image, square, "x.png") or ""
        assert ("the support images have none" in said) == (of_input and not of_support)
        assert ("x.png has no transparent parts" in said) == (of_support and not of_input)
    said = FewShotDetector.from_state(earlier, "cpu").doubts(image, square, "x.png") or ""
    assert said == ("x.png has transparent parts: they are laid on black" if of_input else "")


def test_a_scored_support_image_is_said(detector):
    detector.fit(PHOTOS)
    for number, photo in enumerate(PHOTOS[:2]):
        shown = photo if number else photo.point(lambda value: value ^ 1)
        square = detector.decode(shown).square
        assert bool(detector.doubts(shown, square, "x.png")) == bool(number)


def test_generators_are_fitted_and_scored_like_lists(detector):
    expected = detector.fit(PHOTOS).score(PHOTOS)
    identity = detector.identity()
    found = detector.fit(photo for photo in PHOTOS).score(photo for photo in PHOTOS)
    assert detector.identity() == identity and all(map(np.array_equal, found, expected))
