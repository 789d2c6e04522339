"""The few-shot detector: agreement with the evaluation, independence of the batch, files and thresholds."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.reference import DATA
from datasets.images import decode_image, read_image
from datasets.support import read_support_images
from evaluation import scoring
from evaluation.round_metrics import GroundTruth
from inspection.detector import FewShotDetector
from inspection.export import ExportedDetector
from inspection.threshold import NormalScores, normal_threshold
from models.efficientnet_lite import EfficientNetLite
from models.regad import RegAD, checkpoint, untrained
from models.stn import fuse_conv_bn
from scorers.features import FeatureStore
from scorers.maps import score_maps_at
from scorers.views import support_views
from tests.reference import needs_reference
from utils.devices import seed_everything
from utils.errors import UserError
from utils.files import PROJECT_ROOT, save_tensors
from utils.stages import StageClock

SIZE = 64


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = RegAD("affine", SIZE)
    for stn in (model.stn.stn1, model.stn.stn2, model.stn.stn3):
        torch.nn.init.normal_(stn.fc[2].weight, std=0.01)  # non-trivial warps
    return model.stn.eval()


@pytest.fixture(scope="module")
def files(demo_data):
    """Three normal images, followed by nineteen other images."""
    ring = demo_data / "ring"
    others = [p for folder in sorted((ring / "test").iterdir()) for p in sorted(folder.iterdir())]
    others += sorted((demo_data / "weave" / "test/good").iterdir())
    return sorted((ring / "train/good").iterdir())[:3], others


@pytest.fixture(scope="module")
def detector(network, files):
    return FewShotDetector(network, "cpu").fit(files[0])


def test_an_untrained_detector_keeps_no_heads(files, tmp_path):
    """Its file lacks them, is read again, and scores as with them; the network given stays as it is."""
    untrained, origin = (
        RegAD("affine", SIZE).stn.eval(),
        {"support": [{"path": path.name, "sha256": "0"} for path in files[0]]},
    )
    detector = FewShotDetector(untrained, "cpu", origin=origin).fit(files[0])
    detector.calibrate(0.05)
    detector.save(tmp_path / "part.regad")
    loaded = FewShotDetector.load(tmp_path / "part.regad", "cpu")
    assert loaded.threshold == detector.threshold and loaded.origin == origin
    assert untrained.stn1 is not None and loaded.network.stn1 is None and loaded.identity() == detector.identity()
    sizes = [sum(value.nbytes for value in network.state_dict().values()) for network in (loaded.network, untrained)]
    assert sizes[0] < 0.9 * sizes[1]
    quick, maps = loaded.score(files[1])
    for found, own in zip((quick, maps), detector.score(files[1]), strict=True):
        assert (found == own).all()
    detector.fast_network = untrained  # warps and un-warps at the identity
    slow, _ = detector.score(files[1])
    np.testing.assert_allclose(quick, slow, atol=1e-5 * slow.max())
    squares = torch.from_numpy(np.stack([read_image(file, SIZE) for file in files[1]]))
    with torch.no_grad():  # exported files have no warps either
        _, exported = ExportedDetector(loaded)(squares)
    np.testing.assert_allclose(exported, slow, atol=1e-5 * slow.max())


def test_same_maps_as_the_evaluation(detector, network, files):
    images = read_support_images(files[1], SIZE)
    store = FeatureStore([detector.scorer], len(images))
    store.write(0, fuse_conv_bn(network).features(images))
    test = scoring.TestFeatures(store, GroundTruth(np.arange(len(images)) > 2, None))
    clock = StageClock(torch.device("cpu"))
    (results,) = scoring.score_rounds(fuse_conv_bn(network), test, [read_support_images(files[0], SIZE)], clock, 32)
    result = results[detector.scorer.name]
    scores, maps = detector.score(files[1])
    np.testing.assert_allclose(maps, result.maps.numpy(), rtol=1e-4)
    np.testing.assert_allclose(scores, result.image_scores, rtol=1e-4)
    of_scores = score_maps_at(result.distances[:, 1], SIZE)[1].numpy()
    assert (scores <= of_scores.max(axis=(1, 2)) * (1 + 1e-6)).all()  # the border counts less
    assert maps.shape == (len(images), SIZE, SIZE)


@pytest.mark.parametrize("name", ["gaussian", "combined"])
def test_an_image_alone_gets_the_score_it_gets_among_others(name, network, files):
    """Equal up to rounding: convolutions may differ in the last bit between batch sizes."""
    detector = FewShotDetector(network, "cpu", scorer=name).fit(files[0])
    grey = Image.open(files[1][0]).convert("L")
    images = [*files[1][:3], grey, *files[1][3:], grey] + files[1][:7]
    scores, maps = detector.score(images)
    assert len(images) > 16  # more than one group
    for index in (0, 3, 5, len(images) - 1):
        alone, own_map = detector.score([images[index]])
        np.testing.assert_allclose(alone[0], scores[index], rtol=1e-5)
        np.testing.assert_allclose(own_map[0], maps[index], rtol=1e-4)
    backwards, _ = detector.score(images[::-1])
    np.testing.assert_allclose(backwards[::-1], scores, rtol=1e-5)


def test_kinds_of_images_agree(detector, files):
    path = files[1][0]
    array = read_image(path, SIZE)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds = [path, str(path), decode_image(path), array, array / 255.0, tensor, tensor.float() / 255]
    scores, _ = detector.score(kinds)
    np.testing.assert_allclose(scores, scores[0], rtol=1e-5)
    np.testing.assert_allclose(detector.score(torch.stack([tensor, tensor]))[0], scores[:2], rtol=1e-5)
    assert detector.score([])[1].shape == (0, SIZE, SIZE)


@pytest.mark.parametrize("name", ["gaussian", "neighbours"])
def test_leave_one_out_is_fitting_without_the_image(name, network, files):
    detector = FewShotDetector(network, "cpu", scorer=name).fit(files[0])
    for index, left_out in enumerate(files[0]):
        others = [path for path in files[0] if path != left_out]
        views = support_views(read_support_images([left_out], SIZE))[list(detector.scorer.views)]
        views = views if name == "gaussian" else views[:1]
        scores, maps = FewShotDetector(network, "cpu", scorer=name).fit(others).score(views)
        np.testing.assert_allclose(maps[0], detector.loo_scores.maps[index], rtol=1e-3)
        np.testing.assert_allclose(scores, detector.loo_scores.scores[index], rtol=1e-3)


def test_one_support_image(network, files):
    detector = FewShotDetector(network, "cpu").fit(files[0][:1])
    assert detector.loo_scores is None and np.isfinite(detector.score(files[1][:1])[0]).all()
    with pytest.raises(UserError, match=r"scores of two normal images"):
        detector.calibrate(0.05)
    assert detector.calibrate(0.05, files[0][1:]).value > 0


ODD = {  # content of another type or shape
    "left_out": "text",
    "img_size": 2 * SIZE,
    "fitted": {"memory": torch.zeros(3, 3)},
    "likeness": {"limit": torch.zeros(3, 3)},
    "tiling": "text",
    "origin": 3,
    "support_digests": None,
    "min_area": "text",
    "document": None,
    "learned": 3,
    "threshold": dict.fromkeys(("value", "how", "typical", "region"), "0.5"),
    "quality": {"support": torch.zeros(2)},
    "calibration": {"scores": torch.ones(2, 1), "maps": torch.ones(3, 0, 0), "left_out": False},
}


def test_damaged_and_foreign_detector_files(detector, network, tmp_path):
    whole = tmp_path / "part.regad"
    detector.save(whole)
    content = bytearray(whole.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped").write_bytes(content)
    (tmp_path / "short").write_bytes(content[: len(content) // 2])
    (tmp_path / "page").write_text("<html>")
    save_tensors(tmp_path / "checkpoint", checkpoint(RegAD("affine", SIZE), {}))
    plain = torch.load(whole, weights_only=True)
    torch.save(plain | {"version": 99}, tmp_path / "later")
    for scorer in ("positions", "combined"):
        torch.save(plain | {"version": 4, "scorer": scorer}, tmp_path / f"earlier_{scorer}")
    torch.save({key: value for key, value in plain.items() if key != "fitted"}, tmp_path / "lacking")
    for name, value in {"version": torch.zeros(2), "backbone": [], **ODD}.items():
        torch.save(plain | {name: value}, tmp_path / name)
    sentences = {
        "version": "has version tensor",
        "backbone": "inconsistent .AttributeError",
        **dict.fromkeys(ODD, "incomplete or inconsistent"),
        "flipped": "is damaged",
        "short": "damaged or not a detector",
        "page": "damaged or not a detector",
        "checkpoint": "is not a detector",
        "later": "has version 99",
        "earlier_positions": "has an earlier scorer positions: fit a new one",
        "earlier_combined": "has an earlier scorer combined: fit a new one",
        "lacking": "incomplete.*KeyError.*fitted",
        "missing": "no detector file",
    }
    for name, sentence in sentences.items():
        with pytest.raises(UserError, match=sentence):
            FewShotDetector.load(tmp_path / name, "cpu")
    with pytest.raises(UserError, match="must be fitted"):
        FewShotDetector(network, "cpu").score([])


@pytest.mark.parametrize(
    "given",
    [
        *({"tile": tile} for tile in (3, True, 64.5, "on", None)),
        *(
            {"region": region}
            for region in (np.zeros((8, 8), bool), np.full((8, 8), 0.5), np.ones((8, 8, 3), bool), [[1]])
        ),
    ],
)
def test_settings_that_cannot_be_meant(given, network):
    """An empty region, for example, would call every image normal."""
    with pytest.raises(ValueError, match=r"tile must be auto, off or|a region is an array"):
        FewShotDetector(network, "cpu", **given)


@pytest.mark.parametrize("name", ["gaussian", "neighbours"])
def test_calibration_takes_views_where_the_rule_needs_them(name, network, files):
    detector, normal = FewShotDetector(network, "cpu", scorer=name).fit(files[0]), files[1][:3]
    views = [support_views(read_support_images([path], SIZE))[list(detector.scorer.views)] for path in normal]
    scores = np.stack([detector.score(image)[0] for image in views])[:, : None if name == "gaussian" else 1]
    prior = detector.scorer.prior

    def value(scores: np.ndarray, rate: float, is_loo: bool) -> float:
        seen = NormalScores(scores, np.zeros((len(scores), 2, 2)), is_loo)
        return normal_threshold(seen, rate, prior, "").value

    assert detector.calibrate(0.05, normal).value == pytest.approx(value(scores, 0.05, False), rel=1e-5)
    assert detector.calibrate(0.25, normal).value == pytest.approx(scores[:, 0].max(), rel=1e-5)
    before = detector.decision_identity(), detector.calibration, detector.warnings
    with pytest.raises(UserError, match="of 2 normal images, 1 are duplicates"):
        detector.calibrate(0.25, normal[:1] * 2)
    assert (detector.decision_identity(), detector.calibration, detector.warnings) == before
    assert detector.calibrate(0.05).value == value(detector.loo_scores.scores, 0.05, True)


def test_the_readme_s_python(files, tmp_path, monkeypatch):
    """Runs the example from the docs on the images it names."""
    block = re.search(
        r"```python\n(from inspection\.detector import FewShotDetector.*?)```",
        (PROJECT_ROOT / "docs/inspection.md").read_text(),
        re.DOTALL,
    )[1]
    for number, path in enumerate(files[0], start=1):
        shutil.copy(path, tmp_path / f"good_{number}.png")
    shutil.copy(files[1][0], tmp_path / "new.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    assert names["scores"].shape == (1,) and names["maps"].shape == (1, 320, 320)
    assert names["detector"].threshold.value > 0


def test_the_identity_of_a_detector(demo_data):
    """It depends on everything that scores depend on, and on nothing else; fitting again gives the same one."""
    support = sorted((demo_data / "ring/train/good").iterdir())[:3]

    def fitted(images, seed=0, **options) -> FewShotDetector:
        seed_everything(seed)
        return FewShotDetector(untrained("none", img_size=64).stn.eval(), "cpu", **options).fit(images, False)

    first = fitted(support)
    own = first.identity()
    first.set_threshold(1.0)
    assert first.identity() == own == fitted(support).identity()
    others = [fitted(support[:2]), fitted(support, seed=1), fitted(support, keep_aspect=True)]
    others += [fitted(support, scorer="gaussian"), fitted(support, bits=12), fitted(support, tile="auto")]
    others += [fitted(support, region=np.tri(64, dtype=bool))]
    assert len({own, *(other.identity() for other in others)}) == 8


@needs_reference
def test_eight_good_tiles_and_the_default_rate():
    """Real images at 160 pixels. It used to call 11 % of the normal tiles defective, and to find 6 of 30 defects."""

    def tiles(folder: str, count: int) -> list[Path]:
        return sorted((DATA / "magnetic_tile" / folder).glob("*.jpg"))[:count]

    detector = FewShotDetector(EfficientNetLite(img_size=160), "cpu").fit(tiles("train/good", 8))
    normal = detector.score(tiles("test/good", 40))[0]
    defective = detector.score([path for kind in ("blowhole", "break") for path in tiles(f"test/{kind}", 10)])[0]
    threshold = detector.calibrate(0.01)
    above = [(kind > threshold.review).mean() for kind in (normal, defective)]
    assert (normal > threshold.value).mean() <= 0.05 and above[0] <= 0.05 and above[1] >= 0.1, above
    assert "8 normal images are too few" in threshold.warnings[0]
