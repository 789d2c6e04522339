"""train.py --sources and --source_path: which categories are trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import train
from datasets import episodes
from datasets.mvtec import list_source_images
from examples.demo_data import write_dataset
from tests.training.test_training import WITHOUT_SCORES, arguments
from utils.errors import UserError


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> tuple[Path, Path]:
    """Two data sets that both have a category called ring, with different images."""
    root = tmp_path_factory.mktemp("roots")
    write_dataset(root / "a", categories=("board", "ring", "weave"), train=4, good=3, defective=1, size=64)
    write_dataset(root / "b", categories=("board", "ring"), train=5, good=2, defective=1, size=64)
    return root / "a", root / "b"


def record(data: Path, folder: Path, *flags: str, **changes: object) -> dict:
    train.main([*arguments(data, folder, epochs=1, **changes), *flags])
    (file,) = (folder / "save").rglob("*_record.json")
    return json.loads(file.read_text())


def test_only_the_named_categories_are_trained_on(roots, tmp_path):
    """--sources weave is the run on a data set that has no other category, and decides on resuming."""
    few = tmp_path / "few"
    few.mkdir()
    for name in ("ring", "weave"):
        (few / name).symlink_to(roots[0] / name)
    named = record(roots[0], tmp_path / "named", "--sources", "weave", **WITHOUT_SCORES)
    alone, everything = (
        record(data, tmp_path / name, **WITHOUT_SCORES) for data, name in ((few, "alone"), (roots[0], "all"))
    )
    assert [run["epochs"][1]["steps"] for run in (named, alone, everything)] == [2, 2, 4]
    assert named["epochs"][1]["loss"] == alone["epochs"][1]["loss"]
    assert named["config"]["sources"] == ["weave"] and named["fingerprint"] == alone["fingerprint"]
    with pytest.raises(UserError, match=r"other sources"):
        record(roots[0], tmp_path / "named", "--resume", **WITHOUT_SCORES)


def test_another_data_set_may_have_a_category_of_the_target_s_name(roots, tmp_path, capsys):
    across = record(roots[0], tmp_path, "--source_path", str(roots[1]), **WITHOUT_SCORES)
    assert list(across["fingerprint"]["inputs"]["sources"]) == ["board", "ring"] and across["epochs"][1]["steps"] == 6
    assert across["config"]["source_path"] == str(roots[1])
    assert f"training on 2 categories of {roots[1]}, 10 images; target ring" in capsys.readouterr().out


def test_the_target_s_folder_is_no_source_under_any_name(roots, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    for alias, name in (("ring", "ring"), ("alias", "ring"), ("weave", "weave")):
        (links / alias).symlink_to(roots[0] / name)
    assert list(list_source_images(roots[0], "folder", "ring", source_path=links)) == ["weave"]
    for name in ("ring", "alias"):
        with pytest.raises(UserError, match="the sources include the target ring"):
            list_source_images(roots[0], "folder", "ring", only=[name, "weave"], source_path=links)
    with pytest.raises(UserError, match="the sources include the target ring"):
        list_source_images(roots[0], "folder", "ring", only=["ring"])


def test_the_same_folder_by_another_path_is_the_same_data_set(roots):
    by_detour = roots[0] / ".." / roots[0].name
    assert list(list_source_images(roots[0], "folder", "ring", source_path=by_detour)) == ["board", "weave"]


def test_a_copy_of_the_target_is_refused(roots, tmp_path):
    shutil.copytree(roots[0], tmp_path / "copy")
    with pytest.raises(UserError, match=r"copy/ring is a copy of the target .*; list the categories"):
        list_source_images(roots[0], "folder", "ring", source_path=tmp_path / "copy")
    named = list_source_images(roots[0], "folder", "ring", only=["weave", "board"], source_path=tmp_path / "copy")
    assert list(named) == ["board", "weave"]


def test_the_held_out_category_is_one_of_the_sources(roots, tmp_path):
    across = record(roots[0], tmp_path, "--source_path", str(roots[1]), "--select", "source", "--held_out", "board")
    assert list(across["fingerprint"]["inputs"]["sources"]) == ["ring"] and across["epochs"][1]["image_auroc"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--sources", "bolt"], r"lacks 1 of the 1 categories to train on: bolt; it has board, ring, weave"),
        (["--source_path", "/nowhere"], r"no data folder /nowhere"),
    ],
)
def test_mistakes_get_one_sentence(flags, sentence, roots, tmp_path):
    with pytest.raises(UserError, match=sentence):
        record(roots[0], tmp_path, *flags)


def test_errors_of_too_few_categories_name_the_flag(roots, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    (few / "ring").symlink_to(roots[0] / "ring")
    errors = []
    for add in (None, "weave"):
        if add:  # a category with one image
            one = few / add / "train/good/000.png"
            one.parent.mkdir(parents=True)
            shutil.copy(roots[0] / "weave/train/good/000.png", one)
        with pytest.raises(UserError) as caught:
            list_source_images(few, "folder", "ring")
        errors.append(caught.value)
    with pytest.raises(UserError) as caught:
        list_source_images(few, "folder", "ring", ["weave", "board"])
    sentences = ["no category to train on", "has one image", "lacks 1 of the 2 categories"]
    for error, sentence in zip([*errors, caught.value], sentences, strict=True):
        assert sentence in str(error) and "sources" in error.options


def test_the_printed_episodes_are_those_of_the_same_sources(roots, capsys):
    common = ["--obj", "ring", "--data_type", "folder", "--data_path", str(roots[0]), "--shot", "1"]
    episodes.main([*common, "--source_path", str(roots[1]), "--sources", "board"])
    assert {episode["category"] for episode in json.loads(capsys.readouterr().out)} == {"board"}
