"""Images that are unlike the support, duplicates among normal images, and how the detector reports them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.out_of_distribution import make_frames
from benchmarks.reference import DATA, TRUNK
from datasets.images import decode_image
from inspection.detector import FewShotDetector
from inspection.out_of_distribution import LEAST_LIMIT, OutOfDistributionCheck, relative_distances
from models.regad import untrained
from tests.reference import needs_reference
from utils.errors import UserError

SIZE = 224


@pytest.fixture(scope="module")
def network():
    return untrained(str(TRUNK), img_size=SIZE).stn


@pytest.mark.parametrize("side", [1, 5])
def test_statistics_are_mean_and_standard_deviation(side):
    layers = [torch.randn(3, channels, side, side).to(memory_format=torch.channels_last) for channels in (8, 4)]
    found = OutOfDistributionCheck().prepare(layers)[:4]
    expected = [
        part for layer in layers for part in (layer.mean((2, 3)), layer.std((2, 3), correction=min(1, side - 1)))
    ]
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain)


def normal_images(category: str, count: int, start: int = 0):
    return sorted((DATA / category / "train/good").glob("*.[pj][np]g"))[start : start + count]


@pytest.fixture(scope="module")
def transistors(network):
    return FewShotDetector(network, "cpu").fit(normal_images("transistor", 3))


@needs_reference
def test_frames_and_other_parts_are_unusual_and_own_images_are_not(transistors):
    own = normal_images("transistor", 3, 3)
    others = [normal_images(category, 1)[0] for category in ("screw", "magnetic_tile", "solar_poly", "bottle", "grid")]
    assert transistors.inspect(own).reasons == [""] * 3
    assert all("unlike the support images" in reason for reason in transistors.inspect(others).reasons)
    frames = make_frames(transistors.on_device([transistors.decode(own[0]).square]))
    reasons = {kind: transistors.inspect(list(images)).reasons for kind, images in frames.items()}
    assert all(all(found) for found in reasons.values()), reasons
    for kind in ("black", "white", "grey", "lens cap", "lamp off"):
        assert reasons[kind] == ["hardly any contrast"]
    assert reasons["upside down"] == ["turned"]


@needs_reference
def test_parts_without_a_direction_may_be_turned(network):
    """Screws lie in any direction."""
    detector = FewShotDetector(network, "cpu").fit(normal_images("screw", 3))
    turned = [decode_image(path).rotate(180) for path in normal_images("screw", 3)]
    assert not detector.check["direction"] and detector.inspect(turned).reasons == [""] * 3


@needs_reference
def test_saved_detectors_know_what_is_unusual_and_older_ones_do_not(transistors, tmp_path):
    transistors.save(tmp_path / "part.regad")
    frame = torch.zeros(3, SIZE, SIZE)
    loaded = FewShotDetector.load(tmp_path / "part.regad", "cpu")
    assert loaded.inspect([frame]).reasons == transistors.inspect([frame]).reasons == ["hardly any contrast"]
    content = torch.load(tmp_path / "part.regad", weights_only=True)
    torch.save(content | {"likeness": {}, "quality": None}, tmp_path / "old.regad")
    loaded = FewShotDetector.load(tmp_path / "old.regad", "cpu")
    assert loaded.inspect([frame]).reasons == [""]
    assert loaded.calibrate(0.05).value == pytest.approx(transistors.calibrate(0.05).value)


def test_duplicates_among_support_images_count_once_and_are_named(demo_data, tmp_path):
    """Copies leave detector and threshold as they were."""
    network = untrained("none", img_size=64).stn
    support = sorted((demo_data / "ring/train/good").iterdir())[:3]
    plain = FewShotDetector(network, "cpu").fit(support)
    duplicates = [tmp_path / name for name in ("copy.png", "again.bmp")]
    for path in duplicates:
        decode_image(support[0]).save(path)
    detector = FewShotDetector(network, "cpu").fit([*support, *duplicates])
    said = " ".join(detector.duplicates)
    assert len(detector.duplicates) == 2 and all(str(path) in said for path in duplicates) and str(support[0]) in said
    assert detector.loo_scores.names == tuple(map(str, support))
    for name, tensor in plain.fitted.items():
        torch.testing.assert_close(detector.fitted[name], tensor)
    assert detector.calibrate(0.05).value == pytest.approx(plain.calibrate(0.05).value)
    twice = FewShotDetector(network, "cpu").fit([*support, *support])
    assert twice.calibrate(0.05).value == pytest.approx(plain.calibrate(0.05).value)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 9))
def test_relative_distances_by_the_definition(count, others, width, seed):
    rng = np.random.default_rng(seed)
    one, other = ([rng.normal(size=(n, width)) for _ in range(2)] for n in (count, others))
    expected = [
        [
            np.mean(
                [np.linalg.norm(a[i] - b[j]) / np.sqrt(np.linalg.norm(a[i]) * np.linalg.norm(b[j])) for a, b in pairs]
            )
            for j in range(others)
        ]
        for pairs in [list(zip(one, other, strict=True))]
        for i in range(count)
    ]
    found = relative_distances([torch.from_numpy(part) for part in one], [torch.from_numpy(part) for part in other])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_one_support_image_has_a_limit_and_no_direction():
    check, views = OutOfDistributionCheck(), len(OutOfDistributionCheck.views)
    maps = [torch.rand(views, channels, 8, 8) for channels in (4, 8)]
    fitted = check.fit(check.prepare(maps), torch.tensor([0.2]))
    assert fitted["limit"] == pytest.approx(LEAST_LIMIT) and not fitted["direction"]
    measured = check.measure(fitted, check.prepare([layer[:1] for layer in maps]), torch.tensor([0.2]))
    assert check.reasons(measured.tolist()) == [""]


def test_networks_with_one_layer_have_statistics_and_grids_too():
    """A vision transformer gives one layer: its standard deviations are no grid."""
    check = OutOfDistributionCheck()
    maps = torch.rand(2 * len(check.views), 8, 16, 16, generator=torch.Generator().manual_seed(0))
    prepared = check.prepare((maps,))
    fitted = check.fit(prepared, torch.ones(2))
    mean, deviation, grid = prepared
    assert torch.equal(fitted["statistic0"], mean) and torch.equal(fitted["statistic1"], deviation)
    assert torch.equal(fitted["upright0"], grid[:: len(check.views)]) and "upright1" not in fitted
    first = [part[:1] for part in prepared]
    assert check.measure(fitted, first, torch.ones(1))[0, 1] < 1e-3


def test_duplicates_among_calibration_images_count_once_and_are_named(tmp_path):
    """Copies of each other and of support images, whose digests a saved detector keeps."""
    values = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    fitted = FewShotDetector(untrained("none", img_size=64).stn, "cpu").fit([*values[:2], values[0]])
    of_support = ["image 3: duplicate of image 1, ignored"]
    expected = ["image 5: duplicate of image 1, ignored", "image 6: duplicate of a support image, ignored"]
    fitted.save(tmp_path / "part.regad")
    alone = fitted.calibrate(0.2, values[2:]).value
    for detector, notes in ((fitted, of_support), (FewShotDetector.load(tmp_path / "part.regad", "cpu"), [])):
        assert detector.calibrate(0.2, [*values[2:], values[2], values[1]]).value == pytest.approx(alone)
        assert detector.duplicates == [*notes, *expected]
        assert detector.calibration.names == tuple(f"image {n}" for n in range(1, 5))
    fitted.calibrate(0.1)
    assert fitted.duplicates == of_support


def test_calibration_with_nothing_but_duplicates_is_refused_by_name():
    values = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    detector = FewShotDetector(untrained("none", img_size=64).stn, "cpu").fit(list(values[:2]))
    with pytest.raises(UserError, match="of 4 normal images, 3 are duplicates of each other or of support images"):
        detector.calibrate(0.1, [*values, values[2]])
