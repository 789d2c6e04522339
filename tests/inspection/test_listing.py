"""What counts as an image below a folder: hidden and system entries, other suffixes, links, folders that vanish."""

from __future__ import annotations

import errno
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
from datasets.layouts import list_images
from datasets.listing import Listing
from datasets.mvtec import category_names, list_source_images, list_test_items
from inspection.inputs import Watcher, list_inputs
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
    with pytest.raises(UserError, match="root/g: it is a link to nothing"):
        list_inputs([root])  # images may lie there once it is mounted
    (root / "g").unlink()
    assert list_inputs([root / "b/up/b"]) == [root / "b/up/b/real.png"]  # by name, whatever it is a link to
    assert list_inputs([root / "b", root]) == [root / name for name in ("b/real.png", *below(root)[1:])]


def test_pipes_and_folders_named_like_images_are_no_images(tmp_path):
    """Pipes that are named, or in a data set, are refused: they may block their reader for ever."""
    os.mkfifo(tmp_path / "a.png")
    image(tmp_path / "b.png/c.png")
    assert below(tmp_path) == ["b.png/c.png"]
    sentence = f"{tmp_path}/a.png is a pipe or device, not an image file"
    for listed in (lambda: list_inputs([tmp_path / "a.png"]), lambda: list_images(tmp_path)):
        with pytest.raises(UserError, match=sentence):
            listed()


def test_the_output_is_not_entered_unless_asked_for(tmp_path):
    image(tmp_path / "in/a.png")
    image(tmp_path / "in/out/images/a.jpg")
    (tmp_path / "in/z").symlink_to(tmp_path / "in/out/images")
    assert below(tmp_path / "in", output=tmp_path / "in/out") == ["a.png"]
    assert below(tmp_path / "in/out/images", output=tmp_path / "in/out") == ["a.jpg"]


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
    watcher = Watcher(tmp_path, tmp_path / "out", set())
    assert [watcher.scan(), watcher.scan()] == [[], [tmp_path / "a/x.png", tmp_path / "z/x.png"]]
    assert str(tmp_path / "gone") in scanned


def test_the_check_of_a_data_set_ignores_them(tmp_path, demo_data):
    data = Path(shutil.copytree(demo_data / "ring", tmp_path / "ring")).parent
    for name in SYSTEM:
        for place in ("train/good", "test", "test/scratch", "ground_truth", "ground_truth/scratch"):
            image(data / "ring" / place / name / "000-checkpoint.png")
    assert check_category(data, "folder", "ring").problems == []


@pytest.fixture
def shut(monkeypatch):
    """Makes a folder that cannot be entered. Access rights do not bind root."""
    places: set[str] = set()

    def guarded(function):
        def refuse(place=".", *arguments, **options):
            if any(str(place).startswith(one) for one in places):
                raise PermissionError(13, "Permission denied", str(place))
            return function(place, *arguments, **options)

        return refuse

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    return lambda folder: places.add(str(folder))


@pytest.mark.parametrize("depth", range(3))
def test_a_folder_that_cannot_be_entered_is_named(depth, tmp_path, shut, capsys):
    kept = image(tmp_path / "a.png")
    inner = tmp_path.joinpath(*"bcd"[: depth + 1])
    image(inner / "x.png")
    shut(inner)
    with pytest.raises(UserError, match=f"1 folder.* cannot list the folder {inner}: Permission denied"):
        list_inputs([tmp_path])
    listing = Listing()
    assert list_inputs([tmp_path], listing=listing) == [kept] and listing.is_partial
    assert f"left out: 1 folder(s), e.g. cannot list the folder {inner}" in capsys.readouterr().out
    with pytest.raises(UserError, match="Permission denied"):
        list_inputs([inner], listing=Listing())


def test_a_category_that_cannot_be_entered_is_a_problem_and_no_traceback(tmp_path, demo_data, shut):
    data = shutil.copytree(demo_data, tmp_path / "data")
    shut(data / "weave/train/good")
    assert "Permission denied" in " ".join(check_category(data, "folder", "weave").problems)
    with pytest.raises(UserError, match=r"cannot list the folder .*weave/train/good: Permission denied"):
        list_source_images(data, "folder", "ring")


@pytest.mark.parametrize("code", [None, errno.ENOTCONN, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("place", ["in/gone", "data/gone", "data/ring/test/gone"])
def test_links_to_nothing_and_mounts_that_are_gone_are_named(code, place, tmp_path, demo_data, monkeypatch):
    """They look like files without a suffix."""
    gone, stat = tmp_path / place, os.stat
    shutil.copytree(demo_data, tmp_path / "data")
    kept = image(tmp_path / "in/a.png")
    gone.symlink_to(tmp_path / "nowhere")
    if code:

        def refuse(path, *arguments, **options):
            if path == gone and options.get("follow_symlinks", True):
                raise OSError(code, os.strerror(code), str(path))
            return stat(path, *arguments, **options)

        monkeypatch.setattr(os, "stat", refuse)
    sentence = f"cannot use {gone}: {os.strerror(code) if code else 'it is a link to nothing'}"
    if place.startswith("in"):
        listing = Listing()
        assert list_inputs([tmp_path / "in"], listing=listing) == [kept] and listing.unreadable == [sentence]
    elif place == "data/gone":
        with pytest.raises(UserError, match=sentence):
            list_source_images(tmp_path / "data", "folder", "ring")
    else:
        assert sentence in check_category(tmp_path / "data", "folder", "ring").problems
        with pytest.raises(UserError, match=sentence):
            list_test_items(tmp_path / "data/ring")


@pytest.mark.parametrize(("left_out", "is_partial"), [("a.heic", True), ("a", True), ("a.json", False)])
def test_what_may_be_an_image_makes_a_listing_partial(left_out, is_partial, tmp_path):
    image(tmp_path / left_out)
    listing = Listing()
    listing.images_below(tmp_path)
    assert listing.is_partial == is_partial


@pytest.mark.parametrize("place", ["run1", "deep/run1", "."])
@pytest.mark.parametrize("asked", [None, "elsewhere"])
def test_output_of_this_tool_is_no_input_wherever_it_lies(place, asked, tmp_path, capsys):
    kept, run = image(tmp_path / "a.png"), tmp_path / place
    image(run / "images/a.png.jpg")
    image(run / "maps/a.png.png")
    (run / "results.jsonl").write_text("")
    assert list_inputs([tmp_path], asked and tmp_path / asked) == [kept]
    assert "left out: 2 image(s) that this tool wrote, in an output folder\n" in capsys.readouterr().out
    assert list_inputs([run / "images"]) == [run / "images/a.png.jpg"]


def test_galleries_and_curves_are_no_images(tmp_path):
    kept = image(tmp_path / "a_curve.png")
    for name in ("gallery/contact_sheet.jpg", "gallery/scratch_000.jpg", "saved/x_curve.png"):
        image(tmp_path / name)
    (tmp_path / "gallery/report.html").touch()
    (tmp_path / "saved/x_epochs.jsonl").touch()
    assert list_inputs([tmp_path]) == [kept]


@pytest.mark.parametrize("name", ["10_GT.png", "10_label.bmp", "10-mask.png", "10_Mask.JPG", "10.seg.png"])
def test_label_files_beside_images_are_never_normal_images(name, tmp_path, demo_data, capsys):
    images = [image(tmp_path / "10.png"), image(tmp_path / name)]
    with pytest.raises(UserError, match=f"1 image.*{name}: named like label files"):
        list_inputs([tmp_path])
    assert list_inputs([tmp_path], listing=Listing()) == sorted(images)
    assert "note: 1 image" in capsys.readouterr().out
    data = shutil.copytree(demo_data, tmp_path / "data")
    image(data / "ring/train/good" / f"000{name[2:]}")
    assert "1 training image(s) are named like masks" in " ".join(check_category(data, "folder", "ring").problems)


def test_mvtec_ad_2_is_read(tmp_path, demo_data):
    category = Path(shutil.copytree(demo_data / "ring", tmp_path / "ring"))
    (category / "test").rename(category / "test_public")
    (category / "ground_truth").rename(category / "test_public/ground_truth")
    image(category / "test_private/000.png")
    items = list_test_items(category, strict=True)
    assert {item.defect for item in items} > {"good"} and all(item.has_ground_truth for item in items)
    assert not check_category(tmp_path, "folder", "ring").problems  # the private images have no labels


def test_a_category_with_another_name_for_normal_images_is_not_left_out(tmp_path, demo_data):
    data = Path(shutil.copytree(demo_data, tmp_path / "data"))
    (data / "weave/train/good").rename(data / "weave/train/Good")
    (data / "notes").mkdir()
    assert category_names(data, "folder") == ["ring", "weave"]
    with pytest.raises(UserError, match=r"no folder .*weave/train/good"):
        list_source_images(data, "folder", "ring")


@pytest.mark.parametrize("target", ["Ring", "RING", "rings"])
def test_a_target_in_another_spelling_is_refused(target, demo_data):
    for data_type in ("folder", "mvtec"):
        with pytest.raises(UserError, match="no category folder"):
            list_source_images(demo_data, data_type, target)
