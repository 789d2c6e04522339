"""The fast path against the plain definition's numbers in fixtures/plain.npz (see fixtures/make.py), on any machine.

Largest relative differences measured with ATEN_CPU_CAPABILITY=default, avx2 and avx512, with MKL_CBWR=COMPATIBILITY,
and with 1 and 2 threads: 1.2e-13 in float64 (bound 1e-9) and 1.9e-6 in float32 (bound 1e-5).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import default_convert

from evaluation.scoring import compute_test_features, score_rounds
from models.stn import fuse_conv_bn
from scorers.gaussian import Gaussian
from scorers.registry import SCORERS
from tests.fixtures import make
from training.loop import Trainer
from utils.fingerprint import METHOD_VERSION
from utils.stages import StageClock

CPU = torch.device("cpu")
SHOTS = pytest.mark.parametrize("shot", make.SHOTS)


@pytest.fixture(scope="module")
def fixture():
    with np.load(make.FILE) as file:
        return dict(file)


def relative(ours, expected) -> float:
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def test_images_are_drawn_as_they_were(fixture):
    """Up to a rounding that another numpy or processor may give."""
    for name, images in (("support", make.SUPPORT), ("test", make.TEST)):
        drawn, masks = make.draw(images)
        assert np.abs(drawn.astype(int) - fixture[name]).max() <= 1
    assert (fixture["labels"] == masks.any(axis=(1, 2))).all()


def test_the_definition_still_says_so(fixture):
    """A part of the file, made again: the features of an image, its distances at some positions, the first loss."""
    image = make.as_input(fixture["test"][:1])
    features = make.plain_features(image)
    for layer, found in enumerate(features, start=1):
        assert relative(found[0, :: make.EVERY].numpy(), fixture[f"features{layer}"][0]) < 1e-9
    support = make.plain.embedding(make.plain_features(make.all_views(fixture["support"][:1])))
    some = slice(100, 108)
    distances = make.plain.distances(support[..., some], make.plain.embedding(features)[..., some])
    assert relative(distances[0].numpy(), fixture["distances_1"][0].ravel()[some]) < 1e-9
    assert make.plain_losses(fixture["support"], count=1) == pytest.approx(fixture["losses"][:1], abs=1e-9)


@pytest.mark.parametrize(("version", "dtype", "bound"), [
    ("eager", torch.float64, 1e-9), ("fused", torch.float64, 1e-9), ("eager", torch.float32, 1e-5),
    ("fused", torch.float32, 1e-5),
])  # fmt: skip
def test_features(version, dtype, bound, fixture):
    network = make.model(dtype).stn
    network = network if version == "eager" else fuse_conv_bn(network)
    for layer, found in enumerate(network.features(make.as_input(fixture["test"], dtype)), start=1):
        assert relative(found[::3, :: make.EVERY].numpy(), fixture[f"features{layer}"]) < bound, layer


@pytest.fixture(scope="module", params=[(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"])
def prepared(request, fixture):
    """What the Gaussian keeps of the support views and of the test images, and how near to the definition it is."""
    dtype, bound = request.param
    network = fuse_conv_bn(make.model(dtype).stn)
    images = (make.all_views(fixture["support"]).to(dtype), make.as_input(fixture["test"], dtype))
    return *(Gaussian().prepare(network.features(of)) for of in images), bound


@SHOTS
def test_distance_maps(shot, prepared, fixture):
    """Fitted once, and measured in one go."""
    support, test, bound = prepared
    views = [layer[: shot * make.VIEWS_PER_IMAGE] for layer in support]
    gaussian, expected = Gaussian(), fixture[f"distances_{shot}"]
    assert relative(gaussian.distance_maps(gaussian.fit(views), test).numpy(), expected) < bound
    assert relative(gaussian.measure(views, test, StageClock(CPU)).numpy(), expected) < bound


@SHOTS
def test_scores_of_a_round(shot, fixture):
    """Images to numbers by the code of train.py and test.py, in float32."""
    network, clock = fuse_conv_bn(make.model(torch.float32).stn), StageClock(CPU)
    masks = np.unpackbits(fixture["masks"]).reshape(-1, make.SIZE, make.SIZE).astype(bool)
    images = torch.from_numpy(fixture["test"]).permute(0, 3, 1, 2)
    dataset = [
        default_convert({"image": image, "mask": mask, "valid_mask": np.ones_like(mask)})
        for image, mask in zip(images, masks, strict=True)
    ]
    test = compute_test_features(network, [Gaussian()], dataset, fixture["labels"], clock, 4, 0)
    rounds = [make.as_input(fixture["support"][:shot], torch.float32)]
    (found,) = (one["gaussian"] for one in score_rounds(network, test, rounds, clock, 22))
    assert relative(found.distances.numpy(), fixture[f"distances_{shot}"]) < 1e-5
    assert relative(found.maps.numpy()[:, ::4, ::4], fixture[f"maps_{shot}"]) < 1e-5
    assert found.maps.numpy().max(axis=(1, 2)) == pytest.approx(fixture[f"image_scores_{shot}"], rel=1e-5)
    assert [found.numbers["image_auroc"], found.numbers["pixel_auroc"]] == pytest.approx(
        fixture[f"aurocs_{shot}"], abs=1e-5
    )


def check_numbers(fixture, scorer: str) -> None:
    """Fails if results have changed and METHOD_VERSION has not, and if the fixture belongs to another version."""
    again = "run python -m tests.fixtures.make"
    assert fixture["method_version"] == METHOD_VERSION, f"METHOD_VERSION was raised: {again}"
    unchanged = relative(make.scorer_distances(scorer, fixture), fixture[f"{scorer}_distances"]) < 1e-9
    assert unchanged, f"the numbers changed: raise METHOD_VERSION in utils/fingerprint.py and {again}"


@pytest.mark.parametrize("scorer", SCORERS)
def test_changed_numbers_need_another_method_version(scorer, fixture):
    check_numbers(fixture, scorer)


@pytest.mark.parametrize(
    ("scorer", "constant", "value"),
    [
        ("gaussian", "scorers.gaussian.COVARIANCE_EPS", 0.01001),
        ("neighbours", "scorers.coordinates.SHRINKAGE", 0.01001),
        ("gaussian", "tests.test_fixture.METHOD_VERSION", 0),
    ],
)
def test_a_forgotten_method_version_is_noticed(scorer, constant, value, fixture, monkeypatch):
    monkeypatch.setattr(constant, value)
    with pytest.raises(AssertionError, match=r"METHOD_VERSION .* python -m tests\.fixtures\.make"):
        check_numbers(fixture, scorer)


def test_losses_of_the_training_steps(fixture):
    trainer = Trainer(make.model().train(), make.LR, make.MOMENTUM)
    losses = [trainer.step(*step, StageClock(CPU)).item() for step in make.steps(fixture["support"])]
    assert losses == pytest.approx(fixture["losses"], abs=1e-9)


def test_the_first_loss_in_float32(fixture):
    trainer = Trainer(make.model(torch.float32).train(), make.LR, make.MOMENTUM)
    loss = trainer.step(*make.steps(fixture["support"], torch.float32)[0], StageClock(CPU))
    assert loss.item() == pytest.approx(fixture["losses"][0], abs=1e-5)
