"""Support images: label files, transparent parts, generators; of many, which are fitted, and how the others score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.images import eight_bit
from inspection import detector as module
from inspection.detector import FewShotDetector
from inspection.support import read_support, representatives
from models.efficientnet_lite import EfficientNetLite
from models.regad import untrained
from scorers.left_out import FOLDS, left_out
from utils.errors import UserError

SIZE = 64


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


def test_a_fit_that_fails_leaves_the_detector_as_it_was():
    detector = FewShotDetector(untrained("none", img_size=32).stn.eval(), "cpu")
    with pytest.raises(UserError, match="must be fitted"):
        detector.calibrate(0.05, PHOTOS)
    detector.fit(PHOTOS).calibrate(0.05)
    before, detector.document["part"] = detector.decision_identity(), "housing"
    with pytest.raises(UserError, match="1 of 3 support images have at most 4 grey values"):
        detector.fit([*PHOTOS[::-1], LABELS["classes"]])
    assert detector.decision_identity() == before and detector.document == {"part": "housing"}
    assert detector.fit(PHOTOS).document == {} and detector.threshold is None


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1.0])
def test_representatives_differ_even_if_images_hardly_do(spread):
    rng = np.random.default_rng(0)
    statistics = [torch.from_numpy(3 + spread * rng.normal(size=(60, 64)).astype(np.float32))]
    chosen = representatives(statistics, 32)
    assert len(set(chosen)) == 32 and chosen == sorted(chosen)


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


def test_the_extremes_are_chosen_whatever_the_order():
    points = torch.tensor([[10.0, 0], [10.1, 0], [9.9, 0], [10, 5], [10, -5], [10, 0.2]])
    assert representatives([points], 3) == [0, 3, 4]
    assert representatives([points.flip(0)], 3) == [1, 2, 5]
    assert representatives([points[:2]], 5) == [0, 1]


@pytest.mark.parametrize("images", [2, FOLDS, FOLDS + 3, 3 * FOLDS])
def test_every_image_is_left_out_once(images):
    """Two views per image; each measure sees all views of the others and the first view of its own."""
    rows = [torch.arange(2.0 * images)]
    calls = []

    def measure(others, own):
        calls.append(len(own[0]))
        assert not set(own[0].tolist()) & set(others[0].tolist())
        assert len(others[0]) == 2 * (images - len(own[0]))
        return own[0]

    assert left_out(rows, 2, 1, measure).tolist() == rows[0][::2].tolist()
    assert len(calls) == min(images, FOLDS) and max(calls) - min(calls) <= 1


def test_further_images_are_scored_and_not_fitted(demo_data, monkeypatch, tmp_path):
    """With five images and room for three: all have scores, in their order, and the file keeps no maps of many."""
    monkeypatch.setattr(module, "MOST_FITTED", 3)
    paths = sorted((demo_data / "ring/train/good").iterdir())
    network = EfficientNetLite("none", SIZE)
    detector = FewShotDetector(network, "cpu").fit(paths)
    assert detector.loo_scores.names == tuple(map(str, paths)) and detector.loo_scores.maps.shape == (5, SIZE, SIZE)
    chosen = detector._representatives(read_support(paths, detector.decode).squares)
    others = [number for number in range(5) if number not in chosen]
    scores, maps = detector.score([paths[number] for number in others])
    assert len(chosen) == 3 and detector.loo_scores.scores[others, 0] == pytest.approx(scores, rel=1e-5)
    np.testing.assert_allclose(detector.loo_scores.maps[others], maps, rtol=1e-4)
    small = FewShotDetector(network, "cpu").fit([paths[number] for number in chosen])
    assert detector.loo_scores.scores[chosen, 0] == pytest.approx(small.loo_scores.scores[:, 0], rel=1e-5)
    detector.calibrate(0.05)
    detector.save(tmp_path / "part.regad")
    loaded = FewShotDetector.load(tmp_path / "part.regad", "cpu")
    assert not loaded.loo_scores.maps.size and loaded.calibrate(0.05) == detector.threshold
