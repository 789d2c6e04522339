"""Rehearsal of CUDA on any machine: every way of images through the code on a pretended device, and how often it waits.

Nothing is computed on the device, so no number is checked here; `pytest -m cuda` does that on a machine with one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import predict
import test as test_command
import train
from datasets.cache import SourceImages
from datasets.episodes import draw_episodes
from datasets.mvtec import LabelledDataset, list_source_images, list_test_items
from datasets.support import read_support_images
from evaluation.scoring import compute_test_features, score_rounds
from inspection.detector import FewShotDetector
from inspection.export import ExportedDetector
from models.networks import scoring_network
from models.regad import RegAD
from models.stn import fuse_conv_bn
from scorers import features, maps, neighbours
from scorers.registry import SCORERS, make_scorer
from tests.device.pretend import PretendCuda
from tests.flags import small_run
from training.loop import Trainer
from utils.stages import StageClock

CUDA = torch.device("cuda")
SIZE = 64
WAITS_OF_A_ROUND, WAITS_OF_A_BATCH = 3, 1  # largest number allowed


@pytest.fixture
def pretend():
    with PretendCuda() as mode:
        yield mode


@pytest.fixture(scope="module")
def normal(demo_data):
    return sorted((demo_data / "ring/train/good").iterdir())


def waits_of(pretend: PretendCuda, work: Callable[[], object]) -> dict[str, int]:
    """What a host would wait for in `work`, once everything that is made only once is there."""
    work()
    pretend.waits.clear()
    work()
    return dict(pretend.waits)


def trainer_and_images(demo_data, **options) -> tuple[Trainer, SourceImages, list]:
    sources = list_source_images(demo_data, "folder", "weave")
    images = SourceImages(sources, SIZE, None, 0, CUDA)
    names = {category: [path.name for path in paths] for category, paths in sources.items()}
    episodes = draw_episodes(names, 2, 3, 0, 1)
    return Trainer(RegAD("rotation_scale", SIZE).to(CUDA), 0.01, 0.9, **options), images, episodes


@pytest.mark.parametrize(("resident", "bf16"), [(True, False), (False, True)])
def test_a_training_step_waits_for_nothing(pretend, demo_data, resident, bf16):
    trainer, images, episodes = trainer_and_images(demo_data, bf16=bf16)
    assert images.resident
    images.resident = images.resident if resident else {}
    step = lambda: trainer.step(*images.episode(episodes[0]), StageClock())  # noqa: E731
    assert waits_of(pretend, step) == {}
    assert step().device.type == "cuda"


def test_a_training_epoch(pretend, demo_data):
    trainer, images, episodes = trainer_and_images(demo_data)
    trainer.progress.epoch = 1
    trainer.train_epoch(episodes, images, 2, StageClock(), lambda: None, 1e9)
    assert len(trainer.progress.losses) == len(episodes)
    assert trainer.optimizer.state_dict()["state"][0]["momentum_buffer"].device.type == "cuda"


def rounds(normal, scorer: str, demo_data, dataset=None) -> Callable[[], object]:
    """A call that scores one more round of the category ring."""
    items = list_test_items(demo_data / "ring")
    kinds = [item.defect for item in items]
    kinds = kinds[::2] + kinds[1::2]  # kinds that are not together, so that they are chosen by index
    items = items[::2] + items[1::2]
    network, clock = fuse_conv_bn(RegAD("rotation_scale", SIZE).stn.to(CUDA)), StageClock(CUDA)
    dataset = dataset or LabelledDataset(items, SIZE)
    labels = [item.label for item in items]
    test = compute_test_features(network, [make_scorer(scorer)], dataset, labels, clock, None, 0, kinds)
    valid_mask = np.ones_like(test.truth.masks)
    valid_mask[:, :3] = False
    test = test._replace(truth=test.truth._replace(valid_mask=valid_mask))
    sets = [read_support_images(normal[at : at + 3], SIZE) for at in (0, 1, 2)]
    scored = score_rounds(network, test, sets, clock, all_metrics=True)
    return lambda: next(scored)


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_round_waits_at_most_three_times(pretend, demo_data, normal, scorer):
    """Apart from eigenvalues, for which torch waits: combined computes them for its fit and without each image."""
    waits = waits_of(pretend, rounds(normal, scorer, demo_data))
    of_eigenvalues = sum(number for what, number in waits.items() if "eigh" in what)
    assert of_eigenvalues == {"gaussian": 0, "neighbours": 1, "positions": 2, "combined": 3 * (1 + 3)}[scorer]
    assert 1 <= sum(waits.values()) - of_eigenvalues <= WAITS_OF_A_ROUND, waits


@pytest.fixture
def detector(pretend, normal):
    def fit(for_threshold: bool = False, **options) -> FewShotDetector:
        network = RegAD("rotation_scale", SIZE).stn
        return FewShotDetector(network, "cuda", **options).fit(normal[:3], for_threshold)

    return fit


@pytest.mark.parametrize(("scorer", "region"), [("gaussian", False), ("neighbours", False), ("neighbours", True)])
def test_an_image_batch_waits_once(pretend, detector, normal, scorer, region):
    inside = np.tri(SIZE, dtype=bool) if region else None
    fitted = detector(scorer=scorer, region=inside)
    waits = waits_of(pretend, lambda: fitted.inspect(normal))
    assert sum(waits.values()) == WAITS_OF_A_BATCH, waits


@pytest.mark.parametrize(("scorer", "tile"), [("gaussian", "off"), ("neighbours", 48)])
def test_a_detector_is_calibrated_saved_and_loaded(pretend, detector, normal, tmp_path, scorer, tile):
    fitted = detector(for_threshold=True, scorer=scorer, tile=tile)
    fitted.calibrate(0.1)
    fitted.save(tmp_path / "part.regad")
    loaded = FewShotDetector.load(tmp_path / "part.regad", "cuda")
    scores, score_maps = loaded.score(normal[3:])
    assert len(scores) == len(score_maps) == len(normal[3:])


@pytest.mark.parametrize("scorer", SCORERS)
def test_predict_command(pretend, normal, tmp_path, scorer):
    given = ["--support", *map(str, normal[:3]), "--input", str(normal[0].parent), "--output", str(tmp_path / "out")]
    given += ["--weights", "none", "--img_size", str(SIZE), "--scorer", scorer, "--device", "cuda"]
    predict.main([*given, "--calibrate", *map(str, normal[2:]), "--force"])
    assert len((tmp_path / "out/scores.csv").read_text().splitlines()) == 1 + len(normal)


ON_DEVICE = {"device": "cuda", "shot": 2, "inferences": 2}


def test_test_command(pretend, demo_data, tmp_path):
    flags = {"untrained": True, "scorer": ("gaussian", "neighbours"), "output": tmp_path}
    test_command.main(small_run(demo_data, **ON_DEVICE, **flags))


def test_train_command(pretend, demo_data, tmp_path):
    flags = {"epochs": 1, "batch_size": 3, "save_dir": tmp_path / "save", "cache_dir": tmp_path / "cache"}
    train.main(small_run(demo_data, **ON_DEVICE, **flags))
    assert list((tmp_path / "save").rglob("*_model.pt"))


def test_a_network_of_timm(pretend, normal):
    pytest.importorskip("timm")
    network = scoring_network("timm:test_resnet", "affine", SIZE, None, "none")
    fitted = FewShotDetector(network, "cuda").fit(normal[:2])
    assert len(fitted.score(normal)[0]) == len(normal)


def test_a_detector_on_the_device_is_exported_from_the_cpu(pretend, detector, normal):
    module = ExportedDetector(detector(region=np.tri(SIZE, dtype=bool)))
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}
    maps_of_images, scores = module(torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8))
    assert maps_of_images.shape == (1, SIZE, SIZE) and scores.device.type == "cpu"


# Planted faults: the rehearsal notices each of them.


def test_a_tensor_on_the_cpu_is_noticed(pretend, demo_data, normal, monkeypatch):
    of_cpu = maps.score_map_matrix
    monkeypatch.setattr(maps, "score_map_matrix", lambda grid, size, _: of_cpu(grid, size, "cpu"))
    with pytest.raises(RuntimeError, match="found at least two devices"):
        rounds(normal, "neighbours", demo_data)()


def test_a_wait_in_a_training_step_is_noticed(pretend, demo_data):
    trainer, images, episodes = trainer_and_images(demo_data)
    step = lambda: trainer.step(*images.episode(episodes[0]), StageClock()).item()  # noqa: E731
    assert sum(waits_of(pretend, step).values()) == 1
    trainer.loss = lambda query, support, each: trainer.model(
        query, support[support.isfinite().flatten(1).all(dim=1)], each
    )
    step = lambda: trainer.step(*images.episode(episodes[0]), StageClock())  # noqa: E731
    assert list(waits_of(pretend, step).values()) == [1]


def test_a_wait_in_a_round_is_noticed(pretend, demo_data, normal, monkeypatch):
    monkeypatch.setattr(features, "_pick", lambda layer, places, views: layer[list(range(len(layer)))])
    assert sum(waits_of(pretend, rounds(normal, "gaussian", demo_data)).values()) > WAITS_OF_A_ROUND


def test_a_wait_in_an_image_batch_is_noticed(pretend, detector, normal, monkeypatch):
    damp = neighbours.damp
    monkeypatch.setattr(neighbours, "damp", lambda rows, by: damp(rows, by) if by.item() else rows)
    fitted = detector()
    assert sum(waits_of(pretend, lambda: fitted.score(normal)).values()) > WAITS_OF_A_BATCH
