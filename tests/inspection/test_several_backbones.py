"""Several backbones side by side and normalised input: features, detectors, files and exports."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inspection.detector import FewShotDetector
from inspection.export import ExportedDetector
from models.networks import network_name, resolve_img_size, scoring_network
from models.stn import fuse_conv_bn
from utils.choices import is_trainable
from utils.devices import seed_everything
from utils.errors import UserError

SIZE = 64
BOTH = "resnet18_normalised+efficientnet_lite2"


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    seed_everything(0)
    return scoring_network(BOTH, "rotation_scale", SIZE, None, "none")


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(4)]


def test_features_are_those_of_each_network(network):
    x = torch.rand(2, 3, SIZE, SIZE)
    plain, lite = network.networks[0].network, network.networks[1]
    normalised = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    expected = [*plain.features(normalised), *lite.features(x)]
    assert network.backbone_layers == (3, 3) and network.backbone == BOTH
    for found, fast, reference in zip(network.features(x), fuse_conv_bn(network).features(x), expected, strict=True):
        torch.testing.assert_close(found, reference)
        torch.testing.assert_close(fast, reference, rtol=1e-3, atol=1e-3)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in fuse_conv_bn(network).modules())


@pytest.mark.parametrize("scorer", ["combined", "neighbours", "gaussian"])
def test_a_detector_keeps_its_backbones_in_its_file(network, images, scorer, tmp_path):
    detector = FewShotDetector(network, "cpu", scorer=scorer).fit(images[:2])
    scores, maps = detector.score(images[2:])
    assert scores.min() > 0 and maps.shape == (2, SIZE, SIZE)
    detector.save(tmp_path / "part.regad")
    loaded = FewShotDetector.load(tmp_path / "part.regad", "cpu")
    assert loaded.identity() == detector.identity() and loaded.network.backbone == BOTH
    np.testing.assert_allclose(loaded.score(images[2:])[0], scores, rtol=1e-6)
    exported = ExportedDetector(detector).eval()
    exported_maps, exported_scores = exported(torch.from_numpy(np.stack(images[2:])))
    np.testing.assert_allclose(exported_scores.numpy(), scores, rtol=1e-3)
    np.testing.assert_allclose(exported_maps.numpy(), maps, rtol=1e-2, atol=1e-3)


def test_names_sizes_and_what_is_refused():
    assert resolve_img_size(BOTH, None) == 320 and resolve_img_size("resnet50_normalised", None) == 224
    assert network_name(BOTH, "affine") == "resnet18_normalised-efficientnet_lite2"
    assert not is_trainable("resnet18_normalised") and not is_trainable(BOTH)
    for unknown in ("resnet18+", "resnet18+resnet19", "efficientnet_lite2_normalised", "resnet19_normalised"):
        with pytest.raises(UserError, match="no backbone"):
            resolve_img_size(unknown, SIZE)
