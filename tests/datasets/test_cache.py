"""The cache of decoded images: equal to the reader, decoded once, safe against kills, renewed after a change."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import cache
from datasets.cache import SourceImages, decoded_images
from datasets.episodes import Episode
from datasets.images import read_image
from utils.errors import UserError
from utils.files import PROJECT_ROOT

SIZE = 24


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    """Six coloured images in a folder whose name is not ASCII."""
    folder = tmp_path / "dätä" / "ring" / "train" / "good"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / f"{number:03d}.png")
    return sorted(folder.iterdir())


def expected(paths: list[Path]) -> np.ndarray:
    return np.stack([read_image(path, SIZE) for path in paths])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_equals_reading(cached, workers, paths, tmp_path):
    found = decoded_images(paths, SIZE, tmp_path / "cache" if cached else None, workers)
    np.testing.assert_array_equal(found, expected(paths))
    assert isinstance(found, np.memmap) == cached


def test_decoded_once_and_nothing_is_written_beside_the_images(paths, tmp_path, monkeypatch):
    before = sorted(paths[0].parent.iterdir())
    first = decoded_images(paths, SIZE, tmp_path / "cache", 0)
    monkeypatch.setattr(cache, "read_image", None)  # a second decoding would fail
    np.testing.assert_array_equal(decoded_images(paths, SIZE, tmp_path / "cache", 0), first)
    assert sorted(paths[0].parent.iterdir()) == before
    assert len(list((tmp_path / "cache").iterdir())) == 1


def change_content(paths: list[Path]) -> None:
    Image.new("RGB", (40, 30), "red").save(paths[2])


def change_time(paths: list[Path]) -> None:
    os.utime(paths[2], ns=(1, 1))


def rename(paths: list[Path]) -> None:
    paths[2] = paths[2].rename(paths[2].with_name("002b.png"))


@pytest.mark.parametrize("change", [change_content, change_time, rename])
def test_a_changed_image_renews_the_cache(change, paths, tmp_path):
    decoded_images(paths, SIZE, tmp_path / "cache", 0)
    (old,) = (tmp_path / "cache").iterdir()
    change(paths)
    np.testing.assert_array_equal(decoded_images(paths, SIZE, tmp_path / "cache", 0), expected(paths))
    (new,) = (tmp_path / "cache").iterdir()
    assert new != old


def test_each_size_has_its_own_file(paths, tmp_path):
    for size in (SIZE, 16):
        decoded_images(paths, size, tmp_path / "cache", 0)
    assert decoded_images(paths, SIZE, tmp_path / "cache", 0).shape == (6, SIZE, SIZE, 3)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_killed_writer_leaves_no_cache_file(paths, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from datasets import cache\n"
        "def slow(*a): time.sleep(0.2); return original(*a)\n"
        "original, cache.read_image = cache.read_image, slow\n"
        f"cache.decoded_images([Path(p) for p in sys.argv[2:]], {SIZE}, Path(sys.argv[1]), 0)\n"
    )
    folder = tmp_path / "cache"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), *map(str, paths)], cwd=PROJECT_ROOT)
    while not (folder.is_dir() and any(folder.iterdir())):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [entry.suffix for entry in folder.iterdir()] == [".tmp"]
    np.testing.assert_array_equal(decoded_images(paths, SIZE, folder, 0), expected(paths))


def _decode(arguments: tuple) -> bool:
    paths, folder = arguments
    return bool((decoded_images(paths, SIZE, folder, 0) == expected(paths)).all())


def test_concurrent_writers_all_get_the_right_images(paths, tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert all(pool.map(_decode, [(paths, tmp_path / "cache")] * 6, chunksize=1))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_damaged_image_is_named_and_no_cache_is_left(paths, tmp_path):
    paths[3].write_bytes(paths[3].read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot read the image .*003\.png") as caught:
        decoded_images(paths, SIZE, tmp_path / "cache", 2)
    assert "\n" not in str(caught.value) and not list((tmp_path / "cache").glob("*.npy"))


def test_a_cache_folder_that_cannot_be_written(paths, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write the cache .*--cache_dir none"):
        decoded_images(paths, SIZE, tmp_path / "cache", 0)


def test_episodes_are_gathered_by_name(paths, tmp_path):
    images = SourceImages({"ring": paths}, SIZE, tmp_path / "cache", 0, torch.device("cpu"))
    episode = Episode("ring", ("004.png", "001.png"), (("000.png", "000.png"), ("005.png", "003.png")))
    query, support = images.episode(episode)
    whole = torch.from_numpy(expected(paths)).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(query, whole[[4, 1]]) and torch.equal(support, whole[[0, 0, 5, 3]].view(2, 2, 3, SIZE, SIZE))
    assert query.is_contiguous(memory_format=torch.channels_last)
