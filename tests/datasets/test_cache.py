"""The cache of decoded images: equal to the reader, decoded once, safe against kills, renewed after a change."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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


def test_decoded_once_and_nothing_is_written_next_to_the_images(paths, tmp_path, monkeypatch):
    before = sorted(paths[0].parent.iterdir())
    first = decoded_images(paths, SIZE, tmp_path / "cache", 0)
    monkeypatch.setattr(cache, "in_threads", None)  # a second decoding would fail
    np.testing.assert_array_equal(decoded_images(paths, SIZE, tmp_path / "cache", 0), first)
    assert sorted(paths[0].parent.iterdir()) == before
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


def change_content(paths: list[Path]) -> None:
    Image.new("RGB", (40, 30), "red").save(paths[2])


def change_content_but_neither_size_nor_time(paths: list[Path]) -> None:
    before = paths[2].stat()
    paths[2].write_bytes(paths[1].read_bytes().ljust(before.st_size, b"x")[: before.st_size])
    os.utime(paths[2], ns=(before.st_atime_ns, before.st_mtime_ns))


def rename(paths: list[Path]) -> None:
    paths[2] = paths[2].rename(paths[2].with_name("002b.png"))


@pytest.mark.parametrize("change", [change_content, change_content_but_neither_size_nor_time, rename])
def test_a_changed_image_renews_the_cache(change, paths, tmp_path):
    decoded_images(paths, SIZE, tmp_path / "cache", 0)
    (old,) = (tmp_path / "cache").glob("*.npy")
    change(paths)
    np.testing.assert_array_equal(decoded_images(paths, SIZE, tmp_path / "cache", 0), expected(paths))
    (new,) = (tmp_path / "cache").glob("*.npy")
    assert new != old
    assert [file.name for file in (tmp_path / "cache").glob(".*")] == [f".{new.name}.lock"]


@pytest.mark.parametrize("damage", [b"", b"x" * 500, None])
def test_a_damaged_cache_is_made_again(damage, paths, tmp_path, capsys):
    decoded_images(paths, SIZE, tmp_path / "cache", 1)
    (file,) = (tmp_path / "cache").glob("*.npy")
    file.write_bytes(file.read_bytes()[:300] if damage is None else damage)
    np.testing.assert_array_equal(decoded_images(paths, SIZE, tmp_path / "cache", 1), expected(paths))
    assert "is damaged; it is made again" in capsys.readouterr().out


def test_another_method_decodes_again(paths, tmp_path, monkeypatch):
    """METHOD_VERSION is raised where images are read differently; records hold it in their fingerprint."""
    decoded_images(paths, SIZE, tmp_path / "cache", 0)
    monkeypatch.setattr(cache, "METHOD_VERSION", cache.METHOD_VERSION + 1)
    monkeypatch.setattr(cache, "read_image", lambda path, **how: 255 - read_image(path, **how))
    np.testing.assert_array_equal(decoded_images(paths, SIZE, tmp_path / "cache", 0), 255 - expected(paths))
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


def test_each_size_has_its_own_file_of_the_last_depth(paths, tmp_path):
    for path in paths:
        Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(40, 30)).save(path)
    for size, bits in [(SIZE, 10), (16, 10), (SIZE, 12)] * 2:
        found = decoded_images(paths, size, tmp_path / "cache", 0, bits=bits)
        assert all((image == read_image(path, size, bits=bits)).all() for image, path in zip(found, paths, strict=True))
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


READER = """
import os, sys, time
from pathlib import Path
from datasets import cache

def read(path, **rest):
    with open(os.environ["LOG"], "a") as log:
        log.write(f"{os.getpid()} {path.name}\\n")
    time.sleep(float(os.environ["SECONDS"]))
    return original(path, **rest)

original, cache.read_image = cache.read_image, read
folder, *paths = map(Path, sys.argv[1:])
folder.with_name("ready").open("a").write(".")
while not folder.with_name("go").exists():
    time.sleep(0.01)
sys.stdout.buffer.write(cache.decoded_images(paths, SIZE, folder, 0).tobytes())
"""


class Readers:
    """Processes that fill one cache. They log their process id and the name of every image that they decode."""

    def __init__(self, folder: Path, paths: list[Path], prefix: tuple[str, ...] = (), seconds: float = 0.05):
        self.folder, self.log, self.ready = folder, folder.with_name("log"), folder.with_name("ready")
        code = READER.replace("SIZE", str(SIZE))
        self.command = [*prefix, sys.executable, "-c", code, str(folder), *map(str, paths)]
        self.environment = os.environ | {"LOG": str(self.log), "SECONDS": str(seconds)}
        self.processes: list[subprocess.Popen] = []

    def start(self, count: int) -> None:
        for _ in range(count):
            self.processes.append(
                subprocess.Popen(self.command, cwd=PROJECT_ROOT, env=self.environment, stdout=subprocess.PIPE)
            )

    def go(self) -> None:
        while not self.ready.is_file() or self.ready.stat().st_size < len(self.processes):
            assert all(process.poll() is None for process in self.processes)
            time.sleep(0.01)
        self.folder.with_name("go").touch()

    def results(self) -> list[bytes]:
        return [process.communicate(timeout=120)[0] for process in self.processes]

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text().splitlines()] if self.log.is_file() else []


NAMESPACE = ("unshare", "--pid", "--fork", "--user", "--map-root-user")


def namespaces_problem() -> str | None:
    """Why no process can have process ids of its own here; None if it can."""
    try:
        done = subprocess.run([*NAMESPACE, "sh", "-c", "echo $$"], capture_output=True, text=True)
    except OSError as error:
        return f"unshare cannot be run: {error}"
    return None if done.stdout.strip() == "1" else f"no process id namespaces here: {done.stderr.strip()}"


@pytest.mark.slow
def test_processes_with_the_same_id_decode_each_image_once(paths, tmp_path):
    """As two containers that share a cache folder: both processes have the id 1."""
    if problem := namespaces_problem():
        pytest.skip(problem)
    readers = Readers(tmp_path / "cache", paths, NAMESPACE)
    readers.start(2)
    readers.go()
    whole = expected(paths).tobytes()
    assert all(result.endswith(whole) for result in readers.results())  # one of them has printed that it waits
    assert sorted(readers.lines()) == [["1", path.name] for path in paths]
    assert sorted(entry.suffix for entry in (tmp_path / "cache").iterdir()) == [".lock", ".npy"]


def test_a_crashed_holder_blocks_nobody(paths, tmp_path):
    """The first process is killed while it decodes and the second one waits for it."""
    first, second = (Readers(tmp_path / "cache", paths, seconds=seconds) for seconds in (30, 0))
    first.start(1)
    first.go()
    while not first.lines():
        time.sleep(0.01)
    second.start(1)
    waiting = second.processes[0].stdout.readline()
    assert waiting.decode().startswith("waiting for another process, which decodes")
    first.processes[0].kill()
    first.processes[0].communicate()
    assert second.results() == [expected(paths).tobytes()]


def test_threads_decode_each_image_once(paths, tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(cache, "read_image", lambda path, **rest: (decoded.append(path), read_image(path, **rest))[1])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: decoded_images(paths, SIZE, tmp_path / "cache", 0), range(8)))
    assert all((images == expected(paths)).all() for images in found) and sorted(decoded) == paths


def test_a_file_that_another_run_removes_is_made_again(paths, tmp_path, monkeypatch):
    """Another run may take the file for outdated between its writing and its mapping."""
    original, removed = np.load, []

    def load(file: Path, **options):
        if file.is_file() and not removed:
            removed.append(file.unlink())
        return original(file, **options)

    monkeypatch.setattr(np, "load", load)
    np.testing.assert_array_equal(decoded_images(paths, SIZE, tmp_path / "cache", 0), expected(paths))
    assert removed


def test_damaged_image_is_named_and_no_cache_is_left(paths, tmp_path):
    paths[3].write_bytes(paths[3].read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot read the image .*003\.png") as caught:
        decoded_images(paths, SIZE, tmp_path / "cache", 2)
    assert "\n" not in str(caught.value) and not list((tmp_path / "cache").glob("*.npy"))


def test_a_cache_folder_that_cannot_be_written(paths, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot write the cache"):
        decoded_images(paths, SIZE, tmp_path / "cache", 0)


def test_episodes_are_gathered_by_name(paths, tmp_path):
    images = SourceImages({"ring": paths}, SIZE, tmp_path / "cache", 0, torch.device("cpu"))
    episode = Episode("ring", ("004.png", "001.png"), (("000.png", "000.png"), ("005.png", "003.png")))
    query, support = images.episode(episode)
    whole = torch.from_numpy(expected(paths)).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(query, whole[[4, 1]]) and torch.equal(support, whole[[0, 0, 5, 3]].view(2, 2, 3, SIZE, SIZE))
    assert query.is_contiguous(memory_format=torch.channels_last)
