"""Test sets that do not fit into memory: features in a file and maps in parts give the numbers of all at once."""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datasets.mvtec import LabelledDataset, list_test_items
from datasets.support import read_support_images
from evaluation import round_metrics, scoring
from evaluation.round_metrics import RoundMetrics
from models.regad import untrained
from models.stn import fuse_conv_bn
from scorers import features
from scorers.features import FeatureStore
from scorers.gaussian import Gaussian
from scorers.registry import make_scorers
from tests.evaluation.test_round_metrics import rounds
from utils.devices import seed_everything
from utils.errors import UserError
from utils.stages import StageClock

SIZE, BATCH = 64, 2
CPU = torch.device("cpu")


@pytest.fixture
def streamed(monkeypatch, tmp_path):
    """Lowers the limits, so that a few images count as many."""

    def lower() -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        for module, name, value in (
            (features, "MOST_BYTES", 0),
            (features, "PART_BYTES", 0),
            *((module, "IMAGES_AT_ONCE", 4) for module in (scoring, round_metrics)),
        ):
            monkeypatch.setattr(module, name, value)

    return lower


@pytest.fixture(scope="module")
def scored(demo_data):
    """Scores the ring with every scorer; returns the results by scorer, and whether the features were in parts."""
    seed_everything(0)
    network = fuse_conv_bn(untrained("none", img_size=SIZE).stn.eval())
    scorers, ring = make_scorers(["gaussian", "neighbours", "combined"]), list_test_items(demo_data / "ring")
    support = [read_support_images(sorted((demo_data / "ring/train/good").iterdir())[:2], SIZE)]

    def score(keep_aspect: bool, images: int):
        items = (ring * images)[:images]
        dataset, labels, kinds = (
            LabelledDataset(items, SIZE),
            [one.label for one in items],
            [one.defect for one in items],
        )
        if keep_aspect:
            for item in dataset:
                item["valid_mask"][:9] = item["mask"][:9] = False
        test = scoring.compute_test_features(network, scorers, dataset, labels, StageClock(CPU), BATCH, 0, kinds)
        (found,) = scoring.score_rounds(network, test, support, StageClock(CPU), all_metrics=True)
        return found, test.features.is_in_parts

    return score


@pytest.mark.parametrize(
    ("keep_aspect", "images"), [(False, 9), (True, 9), pytest.param(False, 400, marks=pytest.mark.slow)]
)
def test_numbers_of_parts_are_those_of_all_at_once(keep_aspect, images, scored, streamed, tmp_path):
    within = 1e-4 if images == 9 else 1e-3  # copies of an image are equal up to rounding, which ranks them
    expected, in_parts = scored(keep_aspect, images)
    assert not in_parts and all(isinstance(one.maps, torch.Tensor) for one in expected.values())
    streamed()
    found, in_parts = scored(keep_aspect, images)
    assert in_parts and not list(tmp_path.rglob("*.*"))  # the file has no name
    for name, one in expected.items():
        other = found[name]
        np.testing.assert_allclose(other.image_scores, one.image_scores, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(other.maps.cpu().numpy(), one.maps.numpy(), rtol=1e-3, atol=1e-6)
        assert other.numbers == pytest.approx(one.numbers, abs=within)
        assert other.by_defect_type == {
            kind: pytest.approx(own, abs=within) for kind, own in one.by_defect_type.items()
        }


@given(rounds(), st.integers(1, 3))
def test_metrics_of_parts_are_exactly_those_of_all_at_once(case, at_once):
    """Counts are integers: no part changes them."""
    defect_types, labels, maps, masks, valid_mask = case
    truth = round_metrics.GroundTruth(labels, masks if masks.any() else None, valid_mask, defect_types)
    found = []
    with pytest.MonkeyPatch.context() as patched:
        for value in (len(labels), at_once):
            patched.setattr(round_metrics, "IMAGES_AT_ONCE", value)
            found.append(RoundMetrics(truth, CPU).of_round(maps.max(axis=(1, 2)), torch.from_numpy(maps)))
    assert found[0] == found[1]


@pytest.mark.parametrize("images", [1, 2, 3, 6, 7])
def test_features_in_a_file_come_back_in_the_same_layout(images, streamed, tmp_path):
    scorers = make_scorers(["gaussian", "neighbours"])
    maps = [torch.rand(images, c, side, side) for c, side in ((64, 16), (128, 8), (256, 4))]
    whole, parts = FeatureStore(scorers, images), None
    whole.write(0, maps)
    streamed()
    parts = FeatureStore(scorers, images, folder=tmp_path)
    for at in range(0, images, BATCH):
        parts.write(at, [layer[at : at + BATCH] for layer in maps])
    for scorer in scorers:
        found = list(parts.parts(scorer.name))
        assert len(found) == math.ceil(images / BATCH)
        for number, tensor in enumerate(whole.prepared[scorer.name]):
            assert torch.equal(torch.cat([part[number] for part in found]), tensor)
            strides = {part[number][:1].stride()[1:] for part in found if len(part[number]) == BATCH}
            assert len(strides) <= 1  # those that the scorer chose


def test_a_disk_that_is_too_small_is_one_sentence(streamed, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(2**30))
    streamed()
    maps = [torch.rand(1, c, side, side) for c, side in ((64, 56), (128, 28), (256, 14))]
    with pytest.raises(
        UserError, match=r"10000 images need 13\.1 GB of disk in .*, 1\.0 GB are free: .*XDG_CACHE_HOME"
    ):
        FeatureStore([Gaussian()], 10_000, folder=tmp_path).write(0, maps)
