"""Many support images: which are fitted, and that each is scored by a fit without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inspection import detector as module
from inspection.detector import FewShotDetector
from inspection.support import read_support, representatives
from models.networks import scoring_network
from scorers.left_out import FOLDS, left_out

SIZE = 64


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
    network = scoring_network("efficientnet_lite2", "rotation_scale", SIZE, None, "none")
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
