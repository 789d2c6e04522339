"""A detector that learns: rejected good parts become normal, in any order, within limits."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from inspection import learning
from inspection.detector import FewShotDetector, OtherPartError
from inspection.learning import accept
from models.networks import scoring_network
from scorers.positions import Positions
from tests.scorers.test_combined import gaussians
from utils.devices import seed_everything
from utils.errors import UserError

SIZE = 64


@pytest.fixture(scope="module")
def fitted(rings) -> FewShotDetector:
    seed_everything(0)
    network = scoring_network("efficientnet_lite2", "rotation_scale", SIZE, None, "none")
    detector = FewShotDetector(network, "cpu").fit(rings["support"][:3])
    detector.calibrate(0.01)
    return detector


def test_what_is_accepted_is_normal_then_and_the_thresholds_stay(fitted, rings):
    """A chipped ring stands for a rejected good part: similar images score lower, others hardly change."""
    detector = copy.copy(fitted)
    (row, *_), path = accept(detector, rings["defect"][:1]), rings["defect"][0]
    (before,), (after,) = fitted.score([path])[0], detector.score([path])[0]
    assert (
        row.name == str(path) and row.before == pytest.approx(before) and row.after == pytest.approx(before, rel=0.02)
    )
    assert after < 0.8 * before
    assert detector.threshold == fitted.threshold and len(detector.gate.support) == 4
    assert detector.identity() != fitted.identity() and len(fitted.learned) == 0
    assert accept(detector, [path, rings["support"][0]]) == [row]  # known already
    detector.calibrate(0.01, rings["good"])
    assert len(detector.gate.support) == 4 and len(detector.gate.further) == len(rings["good"])


def test_neither_order_nor_number_of_calls_matters(fitted, rings, tmp_path):
    paths = [*rings["defect"], *rings["good"]]
    at_once, one_by_one = copy.copy(fitted), copy.copy(fitted)
    accept(at_once, paths, force=True)
    for number, path in enumerate(reversed(paths)):
        accept(one_by_one, [path], force=True)
        if number == 1:  # with a file in between
            one_by_one.save(tmp_path / "part.regad")
            one_by_one = FewShotDetector.load(tmp_path / "part.regad", "cpu")
    assert one_by_one.score(paths)[0] == pytest.approx(at_once.score(paths)[0], rel=1e-3)
    assert one_by_one.learned["after"] == pytest.approx(at_once.learned["after"], rel=1e-3)
    assert one_by_one.gate.mean == pytest.approx(at_once.gate.mean)


def test_limits(fitted, rings, monkeypatch):
    detector = copy.copy(fitted)
    with pytest.raises(OtherPartError, match="1 of 1 images are not like the support images"):
        accept(detector, [Image.new("RGB", (SIZE, SIZE), (90, 90, 90))])
    monkeypatch.setattr(learning, "MOST_ACCEPTED", 1)
    with pytest.raises(UserError, match="at most 1 images"):
        accept(detector, rings["good"])
    detector = FewShotDetector(fitted.network, "cpu", scorer="gaussian").fit(rings["support"][:2])
    with pytest.raises(UserError, match="gaussian cannot learn"):
        accept(detector, rings["good"][:1])


def test_positions_learn_mean_and_covariance():
    """With a rank that holds all directions, the update is that of a fit to all rows."""
    rng, scorer = np.random.default_rng(0), Positions()
    support = [torch.from_numpy(rng.normal(size=(5, 16, 6)).astype(np.float32))]
    more = [torch.from_numpy(rng.normal(size=(2, 16, 6)).astype(np.float32))]
    fitted = scorer.fit(support)
    extended = scorer.extend(fitted, more, known=5)
    weight = len(scorer.views)
    rows = [torch.addmm(fitted["offset"], one[0].flatten(0, 1), fitted["directions"]) for one in (support, more)]
    rows = [one * (one.square().sum(1, keepdim=True) + fitted["damping"]).rsqrt() for one in rows]
    first, second = (one.unflatten(0, (-1, 16)).numpy() for one in rows)
    means, covariances = gaussians(np.concatenate([first, second.repeat(weight, axis=0)]))
    assert extended["mean"].numpy() == pytest.approx(means, abs=1e-5)
    values, vectors = np.linalg.eigh(covariances)
    expected = (vectors * (values / (values + fitted["ridge"].numpy()))[:, None]) @ vectors.swapaxes(1, 2)
    found = extended["factors"] @ extended["factors"].mT
    assert found.numpy() == pytest.approx(expected, abs=1e-4)


def test_the_command_keeps_the_old_file(rings, tmp_path, capsys):
    part, new = tmp_path / "part.regad", tmp_path / "new.regad"
    flags = ("--device", "cpu")
    support = map(str, rings["support"][:3])
    predict.main(["--support", *support, "--weights", "none", "--img_size", str(SIZE), "--save", str(part), *flags])
    assert "expect missed defects: with 2 support images, 0 to 82 % of the defects" in capsys.readouterr().out
    content = part.read_bytes()
    given = [str(rings["good"][0]), str(rings["support"][0])]
    predict.main(["--detector", str(part), "--accept", *given, "--save", str(new), *flags])
    printed = capsys.readouterr().out
    assert "learned from 1 accepted images" in printed and "left out: 1 of 2 images, whose pixels are known" in printed
    assert re.search(r"^ +\d\.\d{3} +\d\.\d{3}  \S.*\.png$", printed, re.MULTILINE)  # before and after
    assert part.read_bytes() == content
    history = FewShotDetector.load(new, "cpu").document["history"]
    assert history[-1]["change"] == "1 good images accepted" and len(history[-1]["images"]) == 2
