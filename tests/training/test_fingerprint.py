"""What identifies a training: its settings and the content of its inputs, not their paths. Known without training."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
import training.run
from datasets.episodes import draw_episodes, write_episodes
from datasets.mvtec import list_source_images
from tests.training.test_training import SIZE, arguments, files
from training.config import TrainingConfig
from training.run import read_inputs
from utils.errors import UserError
from utils.files import load_tensors
from utils.fingerprint import changes

SCORER = "from scorers.gaussian import Gaussian\n\n\nclass Mine(Gaussian):\n    name = 'mine'\n"


@pytest.fixture
def inputs(demo_data, tmp_path) -> Path:
    """A folder with the files that a run names."""
    shutil.copytree(demo_data, tmp_path / "data")
    torch.manual_seed(0)
    torch.save({"weight": torch.rand(3)}, tmp_path / "weights.pth")
    (tmp_path / "scorer.py").write_text(SCORER)
    (tmp_path / "support/ring").mkdir(parents=True)
    write_support(tmp_path, 0)
    return tmp_path


def write_support(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    torch.save([torch.rand(1, 3, SIZE, SIZE) for _ in range(2)], folder / "support/ring/1_2.pt")


def config(folder: Path) -> TrainingConfig:
    given = {"weights": folder / "weights.pth", "support_path": folder / "support"}
    given |= {"scorer": f"{folder / 'scorer.py'}:Mine"}
    return train.get_args_parser().parse_config(arguments(folder / "data", folder, **given))


def blacken(image: Path) -> None:
    with Image.open(image) as before:
        size = before.size
    Image.new("RGB", size).save(image)


OTHER_CONTENT = {
    "source image": (lambda folder: blacken(next((folder / "data/weave/train/good").iterdir())), "other sources"),
    "test image": (lambda folder: blacken(next((folder / "data/ring/test/good").iterdir())), "other test images"),
    "mask": (lambda folder: blacken(next((folder / "data/ring/ground_truth").rglob("*.png"))), "other test images"),
    "support set": (lambda folder: write_support(folder, 1), "other support images"),
    "weights": (lambda folder: torch.save({"weight": torch.zeros(3)}, folder / "weights.pth"), "other weights"),
    "scorer": (lambda folder: (folder / "scorer.py").write_text(SCORER + "\n"), "other scorers"),
}


@pytest.mark.parametrize("change", OTHER_CONTENT)
def test_other_content_under_the_same_name_is_another_run(change, inputs):
    modify, phrase = OTHER_CONTENT[change]
    before = read_inputs(config(inputs)).fingerprint
    modify(inputs)
    assert changes(before, read_inputs(config(inputs)).fingerprint) == [phrase]


def test_the_same_content_in_another_place_is_the_same_run(inputs):
    before = read_inputs(config(inputs)).fingerprint
    shutil.move(inputs / "data", inputs / "moved/data")
    for name in ("support", "weights.pth", "scorer.py"):
        shutil.move(inputs / name, inputs / "moved" / name)
    moved = replace(config(inputs / "moved"), num_workers=1, cache_dir="none", resume=True)
    assert changes(before, read_inputs(moved).fingerprint) == []


@pytest.mark.parametrize(("name", "value"), [("compile", True), ("lr", 0.5), ("seed", 1), ("keep_aspect", True)])
def test_settings_that_affect_results_are_part_of_it(name, value, inputs):
    before = read_inputs(config(inputs)).fingerprint
    changed = replace(config(inputs), support_path=None, **{name: value}, inferences=1)
    assert any(phrase.startswith(name) for phrase in changes(before, read_inputs(changed).fingerprint))


def test_episodes_of_another_number_of_support_images_are_refused(demo_data, tmp_path):
    names = {
        category: [path.name for path in paths]
        for category, paths in list_source_images(demo_data, "folder", "ring").items()
    }
    (tmp_path / "episodes.json").write_text(write_episodes(draw_episodes(names, 4, 2, 0, 1)))
    with pytest.raises(UserError, match=r"episodes\.json has 4 support images per query, not --shot 1") as caught:
        train.main(arguments(demo_data, tmp_path, episodes=tmp_path / "episodes.json"))
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("*.pt"))


def test_two_trainings_at_once_leave_one_whole_run(demo_data, tmp_path, monkeypatch):
    """The second starts when the first has written its first epoch."""
    refused, original = [], training.run.save_history

    def start_another(*history):
        original(*history)
        if not refused:
            with pytest.raises(UserError, match="another process writes") as caught:
                train.main([*arguments(demo_data, tmp_path, lr=0.002), "--overwrite"])
            refused.append(caught.value)

    monkeypatch.setattr(training.run, "save_history", start_another)
    train.main(arguments(demo_data, tmp_path, lr=0.001, epochs=1))
    assert refused and json.loads(files(tmp_path).record.read_text())["config"]["lr"] == 0.001
    for file in (files(tmp_path).selected, files(tmp_path).last):
        assert load_tensors(file, "checkpoint")["recipe"]["config"]["lr"] == 0.001
    assert not files(tmp_path).state.exists()


def test_images_whose_names_are_no_text_are_trained_on_and_scored(demo_data, tmp_path):
    data = shutil.copytree(demo_data, tmp_path / os.fsdecode(b"d\xe4ta"))
    for image in [*data.glob("*/train/good/000.png"), *data.glob("ring/test/*/000.png")]:
        image.rename(image.with_name(os.fsdecode(b"gr\xfcn.png")))
    train.main(arguments(data, tmp_path, epochs=1))
    assert json.loads(files(tmp_path).record.read_text())["epochs"][1]["image_auroc"]
