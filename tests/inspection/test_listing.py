"""What counts as an image below a folder: hidden and system entries, other suffixes, links, folders that vanish."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datasets.check import check_category
from datasets.images import IGNORED_NAMES, IMAGE_SUFFIXES, is_ignored, read_image
from datasets.mvtec import category_names, list_images
from inspection.inputs import Listing, Watcher, list_inputs
from utils.errors import UserError

SYSTEM = (".ipynb_checkpoints", ".Trash-1000", ".uploading", "@eaDir", "@EADIR", "__MACOSX", "Thumbs.db", "desktop.ini")


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), 90).save(path, "PNG")
    return path


def below(folder: Path, **more) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in Listing(**more).images_below(folder)]


@pytest.mark.parametrize("name", SYSTEM)
def test_hidden_and_system_entries_never_count(name, tmp_path):
    kept = image(tmp_path / "good" / "a.png")
    for place in (tmp_path, tmp_path / "good"):
        image(place / name / "x.png")
        image(place / name / "deeper" / "x.png")
    assert list_inputs([tmp_path]) == [kept] and list_images(tmp_path / "good") == [kept]
    assert category_names(tmp_path, "folder") == []
    assert list_inputs([tmp_path / name]) == [tmp_path / name / "deeper/x.png", tmp_path / name / "x.png"]  # by name


@pytest.mark.parametrize("name", ("Thumbs.db", "desktop.ini", ".DS_Store", "._a.png", ".a.png"))
def test_hidden_and_system_files_are_not_even_counted(name, tmp_path, capsys):
    kept, hidden = image(tmp_path / "a.png"), image(tmp_path / name)
    assert list_inputs([tmp_path]) == [kept] and capsys.readouterr().out == ""
    assert list_inputs([hidden]) == [hidden]


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name not in (".", "..") and len(name.encode()) < 100
)
ANY_NAME = NAMES | st.sampled_from(sorted(IGNORED_NAMES)) | NAMES.map(lambda name: f".{name}")
ENDINGS = st.sampled_from(["", ".heic", ".GIF", *IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES)])


@given(st.lists(st.tuples(st.lists(ANY_NAME, max_size=2), ANY_NAME, ENDINGS), max_size=6))
def test_any_tree_of_names(trees):
    """An image counts exactly if no part of its path below the folder is ignored; all other such files are counted."""
    with tempfile.TemporaryDirectory() as folder:
        root, made = Path(folder), set()
        for folders, stem, ending in trees:
            path = root.joinpath(*folders, stem + ending)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            except OSError:  # a file of this name is there, or a folder
                continue
            made |= {path} if path.is_file() else set()
        listing = Listing()
        found = listing.images_below(root)
        counted = {path for path in made if not any(map(is_ignored, path.relative_to(root).parts))}
        images = {path for path in counted if path.suffix.lower() in IMAGE_SUFFIXES}
        assert found == sorted(images) and listing.left_out.total() == len(counted - images)


def test_what_is_left_out_is_counted_by_suffix(tmp_path, capsys):
    kept = [image(tmp_path / "a.jfif"), image(tmp_path / "b.JFIF"), image(tmp_path / "c.png")]
    for name in ("1.heic", "2.HEIC", "sub/3.heic", "4.gif", "README", ".5.heic", "@eaDir/6.heic"):
        image(tmp_path / name)
    assert list_inputs([tmp_path]) == kept
    assert capsys.readouterr().out == "left out: 3 .heic, 1 without suffix, 1 .gif\n"
    assert read_image(kept[0], 4).shape == (4, 4, 3)
    with pytest.raises(UserError, match="no images"):
        list_inputs([tmp_path / "sub"])
    assert capsys.readouterr().out == "left out: 1 .heic\n"
    assert list_inputs([tmp_path / "4.gif"]) == [tmp_path / "4.gif"]  # by name, with any suffix


def test_linked_folders_are_entered_once(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    image(root / "b/real.png")
    image(elsewhere / "far.png")
    image(elsewhere / "deep/farther.png")
    image(tmp_path / "neighbour.png")
    (root / "a link").symlink_to(root / "b")  # sorts before the folder itself
    (root / "c").symlink_to(elsewhere)
    (root / "d").symlink_to(elsewhere)
    (root / "e").symlink_to(elsewhere / "deep")
    (root / "b/up").symlink_to(root)
    (root / "b/higher").symlink_to(tmp_path)
    (elsewhere / "back").symlink_to(root)
    (root / "f.png").symlink_to(root / "f.png")  # to itself
    (root / "g").symlink_to(tmp_path / "nowhere")
    (root / "h.png").symlink_to(tmp_path / "nowhere.png")
    assert below(root) == ["b/real.png", "c/deep/farther.png", "c/far.png", "f.png", "h.png"]
    (elsewhere / "back").unlink()
    assert list_inputs([root / "c", root / "d"]) == [root / "c/deep/farther.png", root / "c/far.png"]
    assert list_inputs([root / "b", root]) == [root / name for name in ("b/real.png", *below(root)[1:])]


def test_pipes_and_folders_named_like_images_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    image(tmp_path / "b.png/c.png")
    assert below(tmp_path) == ["b.png/c.png"]


def test_the_output_is_not_entered_unless_asked_for(tmp_path):
    image(tmp_path / "in/a.png")
    image(tmp_path / "in/out/images/a.jpg")
    (tmp_path / "in/z").symlink_to(tmp_path / "in/out/images")
    assert below(tmp_path / "in", output=tmp_path / "in/out") == ["a.png"]
    assert below(tmp_path / "in/out/images", output=tmp_path / "in/out") == ["a.jpg"]


def arrivals(folder: Path) -> list[Path]:
    """What a watch of `folder` finds: files that two scans see the same."""
    watcher = Watcher(folder, folder / "out", set())
    assert watcher.scan() == []
    return watcher.scan()


def test_a_sub_folder_that_vanishes_does_not_end_a_watch(tmp_path, monkeypatch):
    for name in ("a", "gone", "z"):
        image(tmp_path / name / "x.png")
    scan, scanned = os.scandir, []

    def vanish(place):
        scanned.append(place)
        if str(place).endswith("gone"):
            shutil.rmtree(place, ignore_errors=True)
        return scan(place)

    monkeypatch.setattr(os, "scandir", vanish)
    assert arrivals(tmp_path) == [tmp_path / "a/x.png", tmp_path / "z/x.png"]
    assert str(tmp_path / "gone") in scanned


def test_the_check_of_a_data_set_ignores_them(tmp_path, demo_data):
    data = Path(shutil.copytree(demo_data / "ring", tmp_path / "ring")).parent
    for name in SYSTEM:
        for place in ("train/good", "test", "test/scratch", "ground_truth", "ground_truth/scratch"):
            image(data / "ring" / place / name / "000-checkpoint.png")
    assert check_category(data, "folder", "ring").problems == []
