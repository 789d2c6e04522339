"""How batches, resident images and readers follow the device: its free memory, and the cores of the process.

Where there is no CUDA, its memory is made up (tests/device/pretend.py).
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from datasets.cache import RESIDENT_SHARE, SourceImages
from datasets.episodes import Episode
from datasets.images import unit_range
from datasets.mvtec import list_source_images
from inspection.detector import FewShotDetector
from inspection.images import Decoded
from inspection.scoring import NETWORK_GROUP, SCORE_GROUP
from models.regad import RegAD
from models.stn import fuse_conv_bn
from scorers import features
from scorers.features import CUDA_IMAGES, CUDA_SHARE, FeatureStore, images_per_pass
from scorers.registry import make_scorer
from tests.device.pretend import PretendCuda
from training.loop import Trainer
from utils.devices import CPU, CPU_READERS, MOST_READERS, free_memory, reader_threads, run_batch, upload
from utils.errors import UserError
from utils.stages import StageClock

CUDA = torch.device("cuda")
SIZE = 64


def lack(most: int, count: int) -> int:
    """Work on `count` items that lacks memory above `most`."""
    if count > most:
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {count} GiB\nmore")
    return count


@pytest.fixture
def pretend():
    with PretendCuda() as mode:
        yield mode


def test_a_batch_that_does_not_fit_names_one_that_does():
    assert run_batch(lambda count: lack(32, count), 32, "queries") == 32
    with pytest.raises(UserError) as error:
        run_batch(lambda count: lack(10, count), 32, "queries")
    assert str(error.value) == (
        "not enough memory for 32 queries (CUDA out of memory. Tried to allocate 32 GiB); 8 would fit"
    )
    assert "batch_size" in error.value.options
    with pytest.raises(UserError, match="not even one fits"):
        run_batch(lambda count: lack(0, count), 32, "queries")
    with pytest.raises(ZeroDivisionError):
        run_batch(lambda count: 1 / 0, 32, "queries")


def test_a_training_step_that_does_not_fit(monkeypatch):
    trainer = Trainer(RegAD("rotation_scale", SIZE), 0.01, 0.9)
    monkeypatch.setattr(trainer, "step", lambda query, support, clock: lack(2, len(query)))
    pixels = torch.rand(6, 3, SIZE, SIZE)
    images = SimpleNamespace(episode=lambda episode: (pixels, pixels[:, None]))
    episode = Episode("weave", tuple("abcdef"), tuple((name,) for name in "bcdefa"))
    with pytest.raises(UserError, match=r"not enough memory for 6 queries per step .*; 1 would fit"):
        trainer.train_epoch([episode], images, 1, StageClock(), lambda: None, 1e9)


def test_the_cpu_keeps_its_batches():
    assert images_per_pass(None, CPU, NETWORK_GROUP) == NETWORK_GROUP
    detector = FewShotDetector(RegAD("rotation_scale", SIZE).stn, "cpu")
    assert (detector.pass_images, detector.group_images) == (NETWORK_GROUP, SCORE_GROUP)


@pytest.mark.parametrize("images", [0, 1, 7, 10 * CUDA_IMAGES])
def test_a_network_pass_follows_the_free_memory(pretend, images):
    """At least one image, and no more than help."""
    network = fuse_conv_bn(RegAD("rotation_scale", SIZE).stn.to(CUDA))
    pretend.free = int(images * pretend.of_image / CUDA_SHARE)
    assert images_per_pass(network, CUDA, NETWORK_GROUP) == min(max(1, images), CUDA_IMAGES)


def test_memory_that_pytorch_keeps_is_free(pretend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 5000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 2000)
    assert free_memory(CUDA) == pretend.free + 3000


def test_a_detector_on_a_small_device(pretend, demo_data):
    """Support views go through the network in passes of less than an image's, test images one by one."""
    pretend.free = int(5 * pretend.of_image / CUDA_SHARE)
    normal = sorted((demo_data / "ring/train/good").iterdir())
    detector = FewShotDetector(RegAD("rotation_scale", SIZE).stn, "cuda")
    assert detector.pass_images == 5
    passes, network = [], detector.fast_network.features
    detector.fast_network.features = lambda images: passes.append(len(images)) or network(images)
    detector.fit(normal[:2])
    assert max(passes) == 5
    passes.clear()
    assert len(detector.score(normal)[0]) == len(normal) and set(passes) <= {1, 2, 3, 4, 5}


@pytest.mark.parametrize("fits", [True, False])
def test_source_images_are_resident_where_the_memory_is_free(pretend, demo_data, fits):
    sources = list_source_images(demo_data, "folder", "weave")
    needed = sum(map(len, sources.values())) * SIZE * SIZE * 3
    pretend.free = int(needed / RESIDENT_SHARE) + (1 if fits else -8)
    images = SourceImages(sources, SIZE, None, 0, CUDA)
    assert bool(images.resident) == fits


@pytest.mark.parametrize("share", [1, 4])
def test_features_that_exceed_the_free_memory_lie_in_a_file(pretend, monkeypatch, tmp_path, share):
    scorer = make_scorer("neighbours")
    maps = [torch.rand(2, channels, SIZE // side, SIZE // side) for channels, side in ((64, 4), (128, 8), (256, 16))]
    of_two = sum(tensor.nbytes for tensor in scorer.prepare(maps))
    monkeypatch.setattr(features, "PART_BYTES", of_two)
    pretend.free = int(4 * of_two / CUDA_SHARE / share)
    store = FeatureStore([scorer], 8, folder=tmp_path)
    for start in range(0, 8, 2):
        store.write(start, [upload(layer, CUDA) for layer in maps])
    parts = list(store.parts(scorer.name))
    assert store.is_in_parts == (share > 1) and len(parts) == (4 if share > 1 else 1)
    assert {tensor.device.type for part in parts for tensor in part} == {"cuda"}
    assert sum(len(part[0]) for part in parts) == 8


def test_features_in_memory_that_is_not_there(pretend):
    scorer = make_scorer("neighbours")
    maps = [torch.rand(1, channels, 16 // side, 16 // side) for channels, side in ((64, 1), (128, 2), (256, 4))]
    pretend.free = 1000
    with pytest.raises(UserError, match=r"the features of 8 images need .* of memory"):
        FeatureStore([scorer], 8).write(0, [upload(layer, CUDA) for layer in maps])


@pytest.mark.parametrize("threads", [1, 8, 64])
def test_readers_follow_the_cores_of_the_process(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert reader_threads(None, CPU) == CPU_READERS
    assert reader_threads(None, CUDA) == min(threads, MOST_READERS)
    assert reader_threads(0, CPU) == 0 and reader_threads(3, CUDA) == 3


def test_pixels_travel_as_bytes(pretend, demo_data, monkeypatch):
    """What predict.py copies to the device: a byte per value."""
    normal = sorted((demo_data / "ring/train/good").iterdir())
    detector = FewShotDetector(RegAD("rotation_scale", SIZE).stn, "cuda", tile=SIZE).fit(normal[:2])
    squares, uploaded = [detector.decode(path).square for path in normal], []
    count = pretend._count_upload
    monkeypatch.setattr(pretend, "_count_upload", lambda tensor, late: uploaded.append(tensor) or count(tensor, late))
    detector.score([Decoded(None, square) for square in squares])
    of_images = [tensor.dtype for tensor in uploaded if tensor.shape[1:] == squares[0].shape]
    assert of_images and set(of_images) == {torch.uint8}


def test_bytes_become_the_same_numbers_as_before():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(unit_range(pixels), pixels.float() / 255)
    assert torch.equal(unit_range(pixels), torch.from_numpy(pixels.numpy() / 255).float())
    given = torch.rand(5)
    assert unit_range(given) is given


def test_bytes_and_numbers_have_the_same_scores(demo_data):
    """Images as files, as bytes, as float values, and together."""
    normal = sorted((demo_data / "ring/train/good").iterdir())
    detector = FewShotDetector(RegAD("rotation_scale", SIZE).stn, "cpu", scorer="neighbours").fit(normal[:2])
    squares = [detector.decode(path).square for path in normal]
    expected, maps = detector.score([square.float() / 255 for square in squares])
    mixed = [square if number % 2 else square.float() / 255 for number, square in enumerate(squares)]
    for images in (normal, [Decoded(None, square) for square in squares], [Decoded(None, square) for square in mixed]):
        scores, found = detector.score(images)
        assert (scores == expected).all() and (found == maps).all()
