"""train.py --select source: a held-out source category selects the epoch; no file of the target is read."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from datasets.mvtec import held_out_category
from examples.demo_data import write_dataset
from models.regad import selection
from utils.errors import UserError


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("three")
    write_dataset(root, categories=("board", "ring", "weave"), train=5, good=3, defective=1, size=64)
    return root


@pytest.fixture
def arguments(three, tmp_path):
    return {"--obj": "ring", "--shot": "1", "--epochs": "2", "--inferences": "2", "--data_type": "folder"} | {
        **{"--data_path": str(three), "--weights": "none", "--img_size": "64", "--batch_size": "2", "--lr": "0.01"},
        **{"--num_workers": "0", "--device": "cpu", "--cache_dir": "none", "--save_dir": str(tmp_path)},
        "--select": "source",
    }


def call(arguments):
    train.main([part for pair in arguments.items() for part in pair])
    (record,) = Path(arguments["--save_dir"]).rglob("*_record.json")
    return json.loads(record.read_text())


@pytest.mark.parametrize(("target", "expected"), [("a", "b"), ("b", "c"), ("c", "a"), ("bb", "c"), ("z", "a")])
def test_the_category_after_the_target_is_held_out(target, expected):
    assert held_out_category(["c", "a", "b"], target) == expected


def test_nothing_of_the_target_is_read(arguments, three, monkeypatch):
    """Opening a file of the target, listing its folders or decoding its images would fail the test."""
    target = str(three / "ring")

    def guarded(original):
        def call(path, *rest, **options):
            assert not str(path).startswith(target), f"{path} was read"
            return original(path, *rest, **options)

        return call

    for module, name in ((builtins, "open"), (os, "open"), (os, "scandir"), (os, "listdir"), (Image, "open")):
        monkeypatch.setattr(module, name, guarded(getattr(module, name)))
    monkeypatch.setattr(Path, "iterdir", guarded(Path.iterdir))
    record = call(arguments)
    assert record["resolved"]["held_out"] == "weave"
    monkeypatch.undo()
    arguments["--save_dir"] += "/best"
    assert call(arguments | {"--select": "best"})["resolved"]["held_out"] is None


def test_the_target_need_not_exist(arguments):
    record = call(arguments | {"--obj": "nut"})
    assert record["resolved"]["held_out"] == "ring"


def test_the_epoch_is_the_best_of_the_held_out_category(arguments):
    """The held-out category is scored and not trained on."""
    record = call(arguments)
    epochs = record["epochs"]
    selected_by = [epoch["image_auroc"]["mean"] + epoch["pixel_auroc"]["mean"] for epoch in epochs]
    assert record["selected_epoch"] == selected_by.index(max(selected_by))
    assert {epoch["steps"] for epoch in epochs[1:]} == {3}  # five images of board only, two at a time
    (weights,) = Path(arguments["--save_dir"]).rglob("*_model.pt")
    assert selection(weights) == ("source", record["selected_epoch"])

    other = arguments | {"--obj": "board", "--held_out": "weave", "--save_dir": arguments["--save_dir"] + "/other"}
    assert call(other)["epochs"][1]["loss"] != epochs[1]["loss"]  # trained on the other category
    assert all(torch.isfinite(torch.tensor(metric)) for metric in selected_by)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--held_out": "ring"}, r"--held_out ring is not a source category; choose from board, weave"),
        ({"--select": "best", "--held_out": "weave"}, "--held_out is for --select source"),
        ({"--eval_every": "0"}, "--select source needs scores; give --select last"),
    ],
)
def test_mistakes_get_one_sentence(arguments, change, sentence):
    with pytest.raises(UserError, match=sentence):
        call(arguments | change)


def test_a_single_source_cannot_be_held_out(arguments, three, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for name in ("board", "ring"):
        (few / name).symlink_to(three / name)
    with pytest.raises(UserError, match="needs two source categories"):
        call(arguments | {"--data_path": str(few)})
