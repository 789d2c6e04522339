"""The project's scores and metrics against those of the release, on real screws."""

from __future__ import annotations

import functools
import zlib

import numpy as np
import pytest
import torch

from benchmarks.reference import DATA, GOLDEN, GOLDEN_CHECKPOINT, TRUNK, golden_rounds
from datasets.images import read_image
from datasets.mvtec import LabelledDataset, list_test_items
from datasets.support import load_support_rounds, support_file
from evaluation.metrics import auroc, rank
from evaluation.scoring import compute_test_features, score_rounds
from models.regad import RegAD, load_checkpoint
from models.stn import STN_MODES, fuse_conv_bn
from scorers.gaussian import Gaussian
from tests.reference import needs_reference
from utils.stages import StageClock

pytestmark = needs_reference
CPU = torch.device("cpu")


def relative(ours: np.ndarray, golden: np.ndarray) -> float:
    return float(np.linalg.norm(ours - golden) / np.linalg.norm(golden))


def recipe_value(part: str, name: str, shape: tuple[int, ...], identity: tuple[float, ...]) -> np.ndarray:
    """One tensor outside the backbone, by the first matching rule in the README of the golden data."""
    x = np.random.RandomState(zlib.crc32(f"{part}.{name}".encode())).standard_normal(shape)
    rules = (
        (name.endswith("running_var"), lambda: 1 + 0.1 * np.abs(x)),
        (name.endswith("running_mean"), lambda: 0.1 * x),
        (name.endswith("weight") and x.ndim == 1, lambda: 1 + 0.1 * x),
        (name.endswith("fc.2.bias"), lambda: np.array(identity) + 0.1 * x),
        (name.endswith("bias"), lambda: 0.1 * x),
        (name.endswith("fc.2.weight"), lambda: 0.01 * x / np.sqrt(1024)),
        (True, lambda: x * np.sqrt(2 / np.prod(shape[1:]))),
    )
    return next(value() for fits, value in rules if fits).astype(np.float32)


def recipe_model(stn_mode: str) -> RegAD:
    """The model that produced features_*.npz."""
    model = RegAD(stn_mode)
    trunk = torch.load(TRUNK, weights_only=True)
    for part, network in (("STN", model.stn), ("ENC", model.encoder), ("PRED", model.predictor)):
        state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
        for name, value in state.items():
            if part == "STN" and name in trunk:
                state[name] = trunk[name]
            else:
                identity = STN_MODES[stn_mode].identity
                state[name] = torch.from_numpy(recipe_value(part, name, tuple(value.shape), identity))
        network.load_state_dict(state, strict=False)
    return model.eval()


@pytest.mark.parametrize("stn_mode", ["rotation_scale", "affine", "rotation_translation_scale"])
@pytest.mark.parametrize("version", ["eager", "fused"])
def test_features(stn_mode, version):
    model = recipe_model(stn_mode)
    network = model.stn if version == "eager" else fuse_conv_bn(model.stn)
    images = [read_image(DATA / "screw/test" / name, 224) for name in ("good/000.png", "thread_top/000.png")]
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    golden = np.load(GOLDEN / f"features_{stn_mode}.npz")
    with torch.no_grad():
        registered = network(images)
        z = model.encoder(registered.maps[-1])
        found = dict(zip(("f1", "f2", "f3"), network.features(images), strict=True))
        found |= {"x3": registered.maps[-1], "z": z, "p": model.predictor(z)}
    for name, tensor in found.items():
        assert relative(tensor[:, ::8].numpy(), golden[name]) < 1e-5, name
    for number, theta in enumerate(registered.warps, start=1):
        assert relative(theta.numpy(), golden[f"theta{number}"]) < 1e-5, number


@pytest.fixture(scope="module")
def scored():
    """The results of the golden checkpoint by K, computed when they are asked for, and the labels."""
    network, clock = fuse_conv_bn(load_checkpoint(GOLDEN_CHECKPOINT, "rotation_scale", 224).stn), StageClock(CPU)
    items = list_test_items(DATA / "screw")
    labels = [item.label for item in items]
    test = compute_test_features(network, [Gaussian()], LabelledDataset(items, 224), labels, clock, 16, 0)

    @functools.cache
    def results(shot: str) -> list:
        count = len(golden_rounds()[shot])
        file = support_file(GOLDEN / "support_set", "screw", int(shot), count)
        rounds = load_support_rounds(file, int(shot), count, 224)
        return [result["gaussian"] for result in score_rounds(network, test, rounds, clock, 22)]

    return results, test.truth.labels


@pytest.mark.parametrize(
    ("shot", "number"), [("2", 0), ("2", 1), ("4", 0), pytest.param("8", 0, marks=pytest.mark.slow)]
)
def test_distance_maps_scores_and_aurocs(scored, shot, number):
    result = scored[0](shot)[number]
    golden = np.load(GOLDEN / f"screw_{shot}_round{number}.npz")
    maps = result.maps.numpy()
    assert relative(result.distances.numpy(), golden["distance"]) < 1e-5
    assert relative(maps[:4], golden["score_first4"]) < 1e-5
    assert relative(maps.max(axis=(1, 2)), golden["image_score"]) < 1e-5
    for name in ("image_auroc", "pixel_auroc"):
        assert result.numbers[name] == pytest.approx(golden_rounds()[shot][number][name], abs=1e-6)


def test_our_ranking_of_the_release_s_scores(scored):
    """The recorded image scores give the recorded image AUROC: labels and order match the release."""
    golden = np.load(GOLDEN / "screw_2_round0.npz")["image_score"]
    assert auroc(rank(golden, scored[1])) == pytest.approx(golden_rounds()["2"][0]["image_auroc"], abs=1e-9)
