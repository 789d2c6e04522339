"""Manifests: the draw, the file, files that are rejected, and the committed manifests of MVTec AD."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import make_support
from benchmarks.reference import DATA, GOLDEN, golden_rounds
from datasets.manifest import (
    category_manifest,
    draw_from_folder,
    draw_manifest,
    load_manifest,
    save_manifest,
    verify,
    with_hashes,
)
from datasets.support import find_names, find_support_rounds, read_support_images, support_file
from tests.flags import words
from tests.reference import needs_reference
from utils.errors import UserError
from utils.files import PROJECT_ROOT, save_tensors, sha256

SIZE = 64
NAMES = st.lists(st.text(min_size=1, max_size=9).map(lambda text: f"{text}.png"), min_size=1, max_size=40, unique=True)


@given(NAMES, st.integers(1, 5), st.integers(0, 2**64), st.data())
def test_draws_are_nested_distinct_and_do_not_depend_on_order(names, rounds, seed, data):
    shot = data.draw(st.integers(1, len(names)))
    drawn = draw_manifest("bolt", names, shot, rounds, seed)
    assert drawn.rounds == draw_manifest("bolt", data.draw(st.permutations(names)), shot, rounds, seed).rounds
    for of_round in drawn.rounds:
        assert len(set(of_round)) == len(of_round) == shot and set(of_round) <= set(names)
    fewer = data.draw(st.integers(1, shot))
    assert drawn.part(fewer, 1).rounds == draw_manifest("bolt", names, fewer, 1, seed).rounds


def test_names_that_are_not_utf_8_are_drawn_too():
    names = ["gr\udcfcn.png", "b.png"]
    assert set(draw_manifest("bolt", names, 2, 1, 0).rounds[0]) == set(names)


ODD_NAMES = st.text("ab é\\\"'<", min_size=1).map(lambda text: f"{text}.png")
ROUNDS_OF_2 = st.lists(st.lists(ODD_NAMES, min_size=2, max_size=2, unique=True), min_size=1, max_size=4)


@given(ROUNDS_OF_2)
def test_saved_manifests_come_back(tmp_path_factory, rounds):
    manifest = draw_manifest("bolt", ["x"], 1, 1, 5)._replace(rounds=rounds, shot=2, sha256={"x.png": "00"})
    file = tmp_path_factory.mktemp("manifest") / "2_1.json"
    save_manifest(file, manifest)
    assert load_manifest(file) == manifest


NEEDED = ("category", "shot", "rounds")
RIGHT = draw_manifest("bolt", ["a.png", "b.png", "c.png"], 2, 2, 0)._asdict()
WRONG = {
    "no JSON": ("{", "cannot read the manifest"),
    "nested without end": ("[" * 100_000, "cannot read the manifest"),
    "lacks the shot": (
        {key: value for key, value in RIGHT.items() if key != "shot"},
        "needs the entries category",
    ),
    "a further entry": (RIGHT | {"more": 1}, "cannot read the manifest"),
    "rounds of numbers": (RIGHT | {"rounds": [[1, 2], [3, 4]]}, "needs a list of file names per round"),
    "a shot that is no number": (RIGHT | {"shot": True, "rounds": [["a.png"]]}, "needs .* the number `shot`"),
    "another depth": (RIGHT | {"bits": "x"}, r"`bits` \(8, 10, 12, 14, 16\)"),
    "no rounds": (RIGHT | {"rounds": []}, "needs a list of file names per round"),
    "a path": (RIGHT | {"rounds": [["../a.png", "b.png"]]}, "needs a list of file names per round"),
    "uneven": (RIGHT | {"rounds": [["a.png", "b.png"], ["a.png"]]}, "has 2 shots, but its round 1 has 1"),
    "twice": (RIGHT | {"rounds": [["a.png", "a.png"], ["a.png", "b.png"]]}, r"has a\.png twice in round 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_manifests_are_rejected(case, tmp_path):
    content, sentence = WRONG[case]
    file = tmp_path / "2_2.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=sentence) as caught:
        load_manifest(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(["category", "shot", "rounds", "sha256", "bits", "keep_aspect"]), ANYTHING)
def test_any_value_gives_a_manifest_or_a_user_error(tmp_path_factory, key, value):
    file = tmp_path_factory.mktemp("manifest") / "2_2.json"
    file.write_text(json.dumps(RIGHT | {key: value}))
    try:
        found = load_manifest(file)
    except UserError as error:
        assert str(file) in str(error)
        return
    assert found.part(1, 1).names() and all(len(names) == found.shot for names in found.rounds)


@given(st.sets(st.sampled_from(sorted(set(RIGHT) - set(NEEDED)))))
def test_entries_that_nobody_knows_may_be_left_out(tmp_path_factory, known):
    file = tmp_path_factory.mktemp("manifest") / "2_2.json"
    file.write_text(json.dumps({key: value for key, value in RIGHT.items() if key in NEEDED or key in known}))
    found = load_manifest(file)
    assert all(getattr(found, key) == RIGHT[key] for key in {*NEEDED, *known})
    save_manifest(file, found)
    assert load_manifest(file) == found


@pytest.fixture
def category(demo_data, tmp_path) -> Path:
    """A copy of the training images of a category, for tests that change them."""
    folder = tmp_path / "data" / "ring"
    (folder / "train" / "good").mkdir(parents=True)
    for path in (demo_data / "ring/train/good").iterdir():
        (folder / "train/good" / path.name).write_bytes(path.read_bytes())
    return folder


def test_verify(category):
    manifest = with_hashes(draw_from_folder(category, 3, 2, 0), category)
    capitals = {name: digest.upper() for name, digest in manifest.sha256.items()}  # as of Windows
    assert verify(manifest, category) == [] == verify(manifest._replace(sha256=capitals), category)
    first, second = (category / "train/good" / name for name in manifest.names()[:2])
    first.unlink()
    second.write_bytes(second.read_bytes() + b"x")
    missing, changed = verify(manifest, category)
    assert missing.startswith(first.name) and str(second) in changed


def test_a_manifest_of_another_category_needs_every_hash(category):
    """Names such as 000.png are in every category."""
    own = with_hashes(draw_from_folder(category, 3, 2, 0), category)
    other = own._replace(category="weave")
    assert verify(other, category) == [] == verify(own._replace(sha256={}), category)
    for known in ({}, dict([*own.sha256.items()][1:])):
        assert verify(other._replace(sha256=known), category) == ["it is of the category weave, not ring"]


def test_fewer_images_than_shots(category):
    with pytest.raises(UserError, match=r"train/good has 5 image\(s\), 6 are needed"):
        draw_from_folder(category, 6, 1, 0)


def find(support_path: Path | None, category: Path, shot: int = 2, rounds: int = 2):
    return find_support_rounds(support_path, category, shot, rounds, SIZE)


def test_order_of_the_sources_of_support_rounds(category, tmp_path, monkeypatch):
    """The order: tensor file, manifest next to it, manifest of the category, draw. `source` names which it was."""
    monkeypatch.chdir(tmp_path)
    root = Path("support_set")
    drawn = find(None, category)
    assert "with seed 0 (there is no support_set/ring/2_2.pt)" in drawn.source and drawn.file is None
    large = with_hashes(draw_from_folder(category, 4, 3, 7), category)
    save_manifest(category_manifest(root, "ring"), large)
    from_category = find(None, category)
    assert from_category.names == large.part(2, 2).rounds and from_category.file == category_manifest(root, "ring")
    own = with_hashes(draw_from_folder(category, 2, 2, 8), category)
    save_manifest(support_file(root, "ring", 2, 2).with_suffix(".json"), own)
    assert find(None, category).names == own.rounds
    save_tensors(support_file(root, "ring", 2, 2), drawn.images)
    stored = find(None, category)
    assert stored.names is None and "make_support.py can find them" in stored.source
    for a, b in zip(stored.images, drawn.images, strict=True):
        assert torch.equal(a, b)
    for found in (drawn, from_category):
        for names, images in zip(found.names, found.images, strict=True):
            assert torch.equal(images, read_support_images([category / "train/good" / name for name in names], SIZE))


def test_a_manifest_with_names_only(category, tmp_path, capsys):
    """Written by hand: it is used, and one line says that the content of the images is not verified."""
    file = support_file(tmp_path, "ring", 2, 1).with_suffix(".json")
    file.parent.mkdir()
    file.write_text('{"category": "ring", "shot": 2, "rounds": [["003.png", "001.png"]]}')
    found = find(tmp_path, category, rounds=1)
    expected = [category / "train/good" / name for name in ("003.png", "001.png")]
    assert torch.equal(found.images[0], read_support_images(expected, SIZE))
    sentence = "2 of 2 without a SHA-256: their content is not verified"
    assert found.source == f"images named in {file} ({sentence})"
    flags = ["--verify", str(file), "--data_type", "folder", "--data_path", str(category.parent)]
    make_support.main(flags)
    assert f"2 images found, 0 with a SHA-256; {sentence}" in capsys.readouterr().out
    make_support.main([*flags, "--write_hashes"])
    assert find(tmp_path, category, rounds=1).source == f"images named in {file}"
    assert "not verified" not in capsys.readouterr().out


def test_a_manifest_that_does_not_fit_the_data(category, tmp_path):
    file = category_manifest(tmp_path, "ring")
    save_manifest(file, draw_manifest("ring", ["000.png", "9.png", "8.png"], 3, 2, 0))
    with pytest.raises(
        UserError, match=r"ring\.json does not match the images in .*: 2 problem\(s\), first: 8\.png is not"
    ):
        find(tmp_path, category, shot=3)


def test_default_manifests_without_hashes_are_optional(category, tmp_path, monkeypatch):
    """A user's category may have the name of one of MVTec AD's, whose manifest does not fit it."""
    monkeypatch.chdir(tmp_path)
    file = category_manifest(Path("support_set"), "ring")
    other = draw_manifest("ring", ["8.png", "9.png"], 2, 2, 0)
    save_manifest(file, other)
    found = find(None, category)
    assert found.file is None and f"{file} belongs to other data: 8.png is not" in found.source
    assert found.names == draw_from_folder(category, 2, 2, 0).rounds
    save_manifest(file, other._replace(sha256={"8.png": "00"}))
    with pytest.raises(UserError, match="does not match the images"):
        find(None, category)


def test_tensors_of_make_support_have_names_and_an_aspect(category, tmp_path):
    make(category, tmp_path, "--obj", "ring", "--shots", "2", "--rounds", "2", "--keep_aspect")
    found = find_support_rounds(tmp_path, category, 2, 2, SIZE, keep_aspect=True)
    assert found.names == draw_from_folder(category, 2, 2, 0).rounds and "names in 2_2.json" in found.source
    with pytest.raises(UserError, match=r"2_2\.pt holds padded images, not stretched ones; create it again"):
        find(tmp_path, category)


def make(category: Path, folder: Path, *flags: str) -> None:
    given = {"data_type": "folder", "data_path": category.parent, "support_path": folder, "img_size": SIZE}
    make_support.main([*words(**given), *flags])


def test_names_are_found_again(category, tmp_path, capsys):
    make(category, tmp_path / "a", "--obj", "ring", "--shots", "2", "--rounds", "3")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  round")]
    made = tmp_path / "a/ring/2_3.pt"
    foreign = tmp_path / "b/ring/2_3.pt"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(made.read_bytes())
    make(category, tmp_path / "b", "--from_pt", str(foreign))
    found = capsys.readouterr().out.splitlines()
    assert [line for line in found if line.startswith("  round")] == printed
    assert "0 image(s) as the nearest, all others bit for bit" in "".join(found)
    assert load_manifest(foreign.with_suffix(".json")).tensors == sha256(foreign)
    with pytest.raises(UserError, match=r"^no support set \S+/2_9\.pt$"):
        make(category, tmp_path / "b", "--from_pt", str(foreign.with_name("2_9.pt")))


def test_nearest_images_within_a_tolerance(category, tmp_path):
    names = ["000.png", "003.png"]
    images = read_support_images([category / "train/good" / name for name in names], SIZE)
    file = tmp_path / "ring/2_1.pt"
    save_tensors(file, [(images + 2 / 255).clamp(max=1)])
    manifest, differences = find_names(file, category)
    assert manifest.rounds == [names] and set(differences) == set(names)
    assert all(0.5 < difference < 3 for difference in differences.values())
    save_tensors(file, [1 - images])
    with pytest.raises(UserError, match="holds an image that is not in"):
        find_names(file, category)


def test_verify_command(category, tmp_path, capsys):
    file = category_manifest(tmp_path, "ring")
    save_manifest(file, draw_from_folder(category, 3, 2, 0))
    make(category, tmp_path, "--verify", str(file), "--write_hashes")
    assert len(load_manifest(file).sha256) == len(load_manifest(file).names())
    (category / "train/good" / load_manifest(file).names()[0]).write_bytes(b"x")
    with pytest.raises(UserError, match=r"1 of 1 manifest\(s\) do not fit the data"):
        make(category, tmp_path, "--verify", str(file))
    assert "its SHA-256 is not the one in the manifest" in capsys.readouterr().out


def test_foreign_tensors_are_not_overwritten(category, tmp_path):
    file = tmp_path / "ring/2_2.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"official")
    with pytest.raises(UserError, match="was not written by this command"):
        make(category, tmp_path, "--obj", "ring", "--shots", "2", "--rounds", "2")
    assert file.read_bytes() == b"official"


TRAINING_IMAGES = {  # of MVTec AD, named from 000.png on
    **{"bottle": 209, "cable": 224, "capsule": 219, "carpet": 280, "grid": 264, "hazelnut": 391, "leather": 245},
    **{"metal_nut": 220, "pill": 267, "screw": 320, "tile": 230, "toothbrush": 60, "transistor": 213, "wood": 247},
    "zipper": 240,
}


@pytest.mark.parametrize("name", TRAINING_IMAGES)
def test_committed_manifests(name):
    """For K = 1, 2, 4, 8, 16 and 10 rounds, they equal what make_support.py draws with seed 0."""
    committed = load_manifest(category_manifest(PROJECT_ROOT / "support_set", name))
    names = [f"{number:03d}.png" for number in range(TRAINING_IMAGES[name])]
    assert committed.category == name and committed.seed == 0
    for shot in (1, 2, 4, 8, 16):
        assert committed.part(shot, 10).rounds == draw_manifest(name, names, shot, 10, 0).rounds


@needs_reference
def test_names_of_the_release_s_support_set(tmp_path, capsys):
    make(DATA / "screw", tmp_path, "--from_pt", str(GOLDEN / "support_set/screw/8_1.pt"))
    printed = capsys.readouterr().out
    assert f"round 0: {' '.join(golden_rounds()['8'][0]['support'])}\n" in printed
