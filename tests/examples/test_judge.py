"""Single images: the result is that of the detector, and what may mislead is said."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image

from datasets.images import decode_image
from examples.judge import Judge
from inspection.detector import FewShotDetector
from inspection.results import decide
from models.regad import untrained
from utils.devices import seed_everything

SIZE = 64


@pytest.fixture(scope="module")
def detector(demo_data) -> FewShotDetector:
    seed_everything(0)
    support = sorted((demo_data / "ring/train/good").iterdir())[:3]
    network = untrained("none", img_size=SIZE).stn.eval()
    fitted = FewShotDetector(network, "cpu", bits=12, tile="off").fit(support)
    fitted.calibrate(0.2)
    return fitted


def test_a_result_has_the_values_of_the_detector(detector, demo_data):
    path = next((demo_data / "ring/test/chip").iterdir())
    image = decode_image(path).resize((90, 70))
    (score,), (scores,), (stopped,), _ = detector.inspect([image])
    result = Judge(detector).judge(image)
    assert (result.score, result.decision, result.reason) == (score, *decide(float(score), detector.threshold, stopped))
    assert np.array_equal(result.map, detector.restore(scores, 90, 70)) and result.map.shape == (70, 90)
    plain = result.plain()
    assert set(plain) == set(result._fields) - {"map"} and plain["detector"] == detector.identity()


def test_without_a_threshold_nothing_is_decided(detector, demo_data, monkeypatch):
    monkeypatch.setattr(detector, "threshold", None)
    result = Judge(detector).judge(decode_image(next((demo_data / "ring/test/good").iterdir())))
    assert (result.decision, result.threshold, result.relative, result.boxes) == (None, None, None, [])


def test_warnings(detector, tmp_path):
    """Of values beyond the bit depth and of an image that shrinks, in the result and nowhere else."""
    Image.fromarray(np.full((60, 400), 5000, np.uint16)).save(tmp_path / "bright.png")
    image = decode_image(tmp_path / "bright.png", detector.bits)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        result = Judge(detector).judge(image)
    assert not raised
    clipped, shrinks = result.warning.split("; ", 1)[0], result.warning
    assert "values up to 5000" in clipped and "400 x 60 pixels shrink 6.2 times" in shrinks
