"""train.py --select source: a held-out source category selects the epoch; no file of the target is read."""

from __future__ import annotations

import builtins
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from datasets.mvtec import held_out_category
from examples.demo_data import write_dataset
from models.regad import selection
from tests.training.test_training import arguments
from utils.errors import UserError


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("four")
    write_dataset(root, categories=("board", "ring", "weave"), train=5, good=3, defective=1, size=64)
    write_dataset(root / "other", categories=("ring",), train=5, good=3, defective=1, size=64, seed=1)
    (root / "other/ring").rename(root / "nut")
    (root / "other").rmdir()
    return root


@pytest.fixture(scope="module")
def three(four, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("three")
    for name in ("board", "ring", "weave"):
        shutil.copytree(four / name, root / name)
    return root


def call(data: Path, folder: Path, **flags) -> dict:
    """The record of a run."""
    train.main(arguments(data, folder, **{"select": "source", "cache_dir": "none", "save_dir": folder} | flags))
    (record,) = folder.rglob("*_record.json")
    return json.loads(record.read_text())


@pytest.mark.parametrize(("target", "expected"), [("a", "b"), ("b", "c"), ("c", "a"), ("bb", "c"), ("z", "a")])
def test_the_category_after_the_target_is_held_out(target, expected):
    assert held_out_category(["c", "a", "b"], target) == expected


@pytest.fixture(scope="module")
def without_the_target(three, tmp_path_factory) -> tuple[dict, Path]:
    """The record and folder of a run that fails if it opens a file of the target, lists its folders or decodes images.

    So nothing of the target is read.
    """
    target, folder = str(three / "ring"), tmp_path_factory.mktemp("guarded")

    def guarded(original):
        def call(path, *rest, **options):
            assert not str(path).startswith(target), f"{path} was read"
            return original(path, *rest, **options)

        return call

    with pytest.MonkeyPatch.context() as patched:
        for module, name in ((builtins, "open"), (os, "open"), (os, "scandir"), (os, "listdir"), (Image, "open")):
            patched.setattr(module, name, guarded(getattr(module, name)))
        patched.setattr(Path, "iterdir", guarded(Path.iterdir))
        return call(three, folder), folder


def test_a_target_that_does_not_exist_is_refused(three, tmp_path):
    """It may be another spelling of a category, which would then be trained on."""
    with pytest.raises(UserError, match="no category folder"):
        call(three, tmp_path, obj="nut")


def test_the_epoch_is_the_best_of_the_held_out_category(without_the_target, three, tmp_path):
    """The held-out category is scored and not trained on; nothing of the target is read."""
    record, folder = without_the_target
    epochs = record["epochs"]
    assert record["resolved"]["held_out"] == "weave"
    selected_by = [epoch["image_auroc"]["mean"] + epoch["pixel_auroc"]["mean"] for epoch in epochs]
    assert record["selected_epoch"] == selected_by.index(max(selected_by))
    assert {epoch["steps"] for epoch in epochs[1:]} == {3}  # five images of board only, two at a time
    (weights,) = folder.rglob("*_model.pt")
    assert selection(weights) == ("source", record["selected_epoch"])
    other = call(three, tmp_path, obj="board", held_out="weave")
    assert other["epochs"][1]["loss"] != epochs[1]["loss"]  # trained on the other category
    assert all(torch.isfinite(torch.tensor(metric)) for metric in selected_by)


def auroc(entry: dict) -> float:
    return entry["image_auroc"]["mean"] + entry["pixel_auroc"]["mean"]


@pytest.fixture(scope="module")
def two_held_out(four, tmp_path_factory) -> tuple[dict, Path]:
    """The record and the folder of a run with two held-out categories."""
    folder = tmp_path_factory.mktemp("two")
    return call(four, folder, held_out=("weave", "nut")), folder


def test_several_held_out_categories(four, two_held_out, tmp_path):
    """The epochs hold the means over both, round by round, and the numbers of each; neither is trained on."""
    record, _ = two_held_out
    assert record["resolved"]["held_out"] == ["nut", "weave"]
    for epoch in record["epochs"]:
        own = [epoch["categories"][name] for name in ("nut", "weave")]
        assert auroc(epoch) == pytest.approx(sum(map(auroc, own)) / 2)
    sums = [auroc(epoch) for epoch in record["epochs"]]
    assert record["selected_epoch"] == sums.index(max(sums)) and record["epochs"][1]["steps"] == 3
    single = call(four, tmp_path, held_out="nut", sources=("board", "nut"))
    assert single["epochs"][0]["rounds"] != record["epochs"][0]["rounds"]
    assert single["epochs"][0]["image_auroc"] == record["epochs"][0]["categories"]["nut"]["image_auroc"]


def test_one_training_selects_twice(four, two_held_out, tmp_path):
    """With --select best, the held-out categories select further weights; all else is as if they selected alone."""
    alone, folder = two_held_out
    both = call(four, tmp_path, held_out=("weave", "nut"), select="best")
    (source,), (last,) = tmp_path.rglob("*_source.pt"), tmp_path.rglob("*_last.pt")
    assert both["source_epoch"] == alone["selected_epoch"]
    assert [epoch["held_out"]["rounds"] for epoch in both["epochs"]] == [epoch["rounds"] for epoch in alone["epochs"]]
    sums = [auroc(epoch) for epoch in both["epochs"]]
    assert both["selected_epoch"] == sums.index(max(sums)) and both["resolved"]["held_out"] == ["nut", "weave"]
    assert selection(source) == ("source", both["source_epoch"]) and selection(last)[0] == "last"
    (expected,) = folder.rglob("*_model.pt")
    first, second = (torch.load(file, weights_only=True)["STN"] for file in (source, expected))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"held_out": "ring"}, r"--held_out ring is not a source category; choose from board, weave"),
        ({"select": "last", "held_out": "weave"}, "--held_out is for --select source and --select best"),
        ({"held_out": ("weave", "board")}, "--held_out leaves no source category to train on"),
        ({"eval_every": 0}, "--select source needs scores; give --select last"),
    ],
)
def test_mistakes_get_one_sentence(three, change, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        call(three, tmp_path, **change)


def test_a_single_source_cannot_be_held_out(three, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for name in ("board", "ring"):
        (few / name).symlink_to(three / name)
    with pytest.raises(UserError, match="needs two source categories"):
        call(few, tmp_path)
