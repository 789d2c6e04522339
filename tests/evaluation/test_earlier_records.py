"""Records and checkpoints that commit 369ac53 wrote are read, and --config of a record repeats its numbers.

tests/data/369ac53: record.json of `test.py --obj ring --shot 1 --inferences 2 --data_type folder --img_size 64
--weights none --device cpu --num_workers 0 --untrained`; training_record.json of `train.py` with `--epochs 1` and
`--batch_size 2`, otherwise the same flags; both on the data of the fixture demo_data. A checkpoint has 15 MB: the test
writes one in the layout of that commit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from experiments.results import read_results
from models.regad import CHECKPOINT_PARTS, RegAD, load_checkpoint, selection
from tests.commands.test_commands import test_command
from utils.errors import UserError
from utils.files import PROJECT_ROOT
from utils.naming import CheckpointFiles

DATA = PROJECT_ROOT / "tests/data/369ac53"
RECORD, TRAINING = (json.loads((DATA / name).read_text()) for name in ("record.json", "training_record.json"))


def repeat(record: Path, data: Path, output: Path) -> dict:
    """The record of test.py with the configuration in another record."""
    test_command.main(["--config", str(record), "--data_path", str(data), "--output", str(output)])
    return json.loads((output / "ring_1_rotation_scale_untrained.json").read_text())


def test_config_repeats_a_record(demo_data, tmp_path):
    """One of that commit to the last digits of another machine; one of this version exactly."""
    first = repeat(DATA / "record.json", demo_data, tmp_path / "first")
    for one, other in zip(first["rounds"], RECORD["rounds"], strict=True):
        assert one == pytest.approx(other, abs=2e-3)
    again = repeat(tmp_path / "first/ring_1_rotation_scale_untrained.json", demo_data, tmp_path / "again")
    assert again["rounds"] == first["rounds"] and again["fingerprint"] == first["fingerprint"]


def test_config_repeats_a_training(demo_data, tmp_path):
    """Of that commit, and from the checkpoint of this version."""
    flags = ["--data_path", str(demo_data), "--save_dir"]
    train.main(["--config", str(DATA / "training_record.json"), *flags, str(tmp_path / "first")])
    first, again = (CheckpointFiles.of(tmp_path / name, "rotation_scale", 1, "ring") for name in ("first", "again"))
    record = json.loads(first.record.read_text())
    assert record["epochs"][1]["loss"] == pytest.approx(TRAINING["epochs"][1]["loss"], abs=1e-3)
    train.main(["--config", str(first.last), *flags, str(tmp_path / "again")])
    repeated = json.loads(again.record.read_text())
    assert repeated["fingerprint"] == record["fingerprint"]
    assert repeated["epochs"][1]["loss"] == record["epochs"][1]["loss"]


def test_a_checkpoint_is_read(tmp_path):
    torch.manual_seed(0)
    model, file = RegAD("rotation_scale", 64), tmp_path / "ring_1_rotation_scale_model.pt"
    parts = {part: getattr(model, name).state_dict() for part, name in CHECKPOINT_PARTS.items()}
    recipe = {key: TRAINING[key] for key in ("arguments", "scored_bits", "commit", "versions")} | TRAINING["epochs"][1]
    torch.save({**parts, "recipe": recipe}, file)
    loaded = load_checkpoint(file, "rotation_scale", 64)
    assert torch.equal(loaded.stn.conv1.weight, model.stn.conv1.weight) and selection(file) == ("best", 1)
    with pytest.raises(UserError, match="was trained with img_size 64, not 80"):
        load_checkpoint(file, "rotation_scale", 80)


def test_tables_show_a_record(tmp_path):
    shutil.copy(DATA / "record.json", tmp_path)
    found = read_results(tmp_path)
    assert list(found.records) == [("ring", 1, "untrained")]
    assert found.records["ring", 1, "untrained"][0]["config"]["img_size"] == 64


@pytest.mark.parametrize("name", ["record", "state"])
def test_a_training_of_that_commit_is_not_resumed(name, demo_data, tmp_path):
    """One sentence says that a new run replaces it."""
    files = CheckpointFiles.of(tmp_path, "rotation_scale", 1, "ring")
    files.state.parent.mkdir(parents=True)
    if name == "record":
        shutil.copy(DATA / "training_record.json", files.record)
    else:
        progress = {"epoch": 1, "step": 0, "losses": [], "history": [], "selected": 0}
        content = {"arguments": TRAINING["decisive"], "model": {}, "optimizer": {}, "progress": progress}
        torch.save(content, files.state)
    config = ["--config", str(DATA / "training_record.json"), "--data_path", str(demo_data)]
    with pytest.raises(UserError, match="start a new run in its place") as caught:
        train.main([*config, "--save_dir", str(tmp_path), "--resume"])
    assert "\n" not in str(caught.value)
