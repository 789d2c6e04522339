"""What a recipe keeps is kept to the bit, what it trains changes; the release's leaves fingerprints as they were."""

from __future__ import annotations

import json

import pytest
import torch

import train
from models.regad import RegAD
from tests.training.test_training import SIZE, WITHOUT_SCORES, arguments, files, interrupt_in_step, weights
from training.config import TrainingConfig
from utils.errors import UserError

PARTS = {
    "trunk": ("STN.conv1", "STN.bn1", "STN.layer"),
    "stn": ("STN.stn",),
    "heads": ("ENC.", "PRED."),
}
UNUSED = "ENC.bn3"  # the encoder does not use it
LEARNING = {  # the parts that learn, and the part whose batch norm alone does not
    ("all", "train"): ({"trunk", "stn", "heads"}, None),
    ("all", "frozen"): ({"trunk", "stn", "heads"}, "trunk"),
    ("heads", "train"): ({"stn", "heads"}, None),
    ("stn", "train"): ({"stn"}, None),
}


def start() -> dict[str, torch.Tensor]:
    """The networks of a run before training."""
    torch.manual_seed(668)
    model = RegAD("rotation_scale", SIZE)
    parts = {"STN": model.stn, "ENC": model.encoder, "PRED": model.predictor}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}


def is_of_batch_norm(name: str, values: dict[str, torch.Tensor]) -> bool:
    return f"{name.rpartition('.')[0]}.running_mean" in values


@pytest.mark.parametrize("recipe", LEARNING)
def test_what_learns(recipe, demo_data, tmp_path):
    learning, frozen_norm = LEARNING[recipe]
    train.main(arguments(demo_data, tmp_path, train=recipe[0], batch_norm=recipe[1], **WITHOUT_SCORES))
    before, after = start(), weights(files(tmp_path).last)
    assert before.keys() == after.keys()
    for part, beginnings in PARTS.items():
        values = {name: value for name, value in before.items() if name.startswith(beginnings)}
        changed = {name for name, value in values.items() if not torch.equal(value, after[name])}
        norms = {name for name in values if is_of_batch_norm(name, values)}
        statistics = {name for name in norms if "running" in name and not name.startswith(UNUSED)}
        matrices = {name for name, value in values.items() if value.ndim > 1}
        if part in learning:  # scales of 1 with a small gradient need not change
            assert matrices <= changed, part
            assert norms.isdisjoint(changed) if part == frozen_norm else statistics <= changed, part
        else:
            assert not changed, part


def test_support_target_each_and_fewer_steps(demo_data, tmp_path):
    """With one support image per query the targets are the same image; steps: the first ones of the epoch."""
    losses = {}
    for name, given in {"mean": {}, "each": {"support_target": "each"}, "steps": {"steps": 2}}.items():
        train.main(arguments(demo_data, tmp_path / name, epochs=1, **WITHOUT_SCORES, **given))
        record = json.loads(files(tmp_path / name).record.read_text())
        losses[name] = record["epochs"][1]["loss"]
        assert record["epochs"][1]["steps"] == (2 if name == "steps" else 3)
        assert record["config"]["support_target"] == ("each" if name == "each" else "mean")
    assert losses["mean"] == pytest.approx(losses["each"], abs=1e-6)
    assert losses["mean"] != pytest.approx(losses["steps"], abs=1e-4)


def test_a_recipe_is_resumed_with_the_same_bits(demo_data, tmp_path, monkeypatch):
    given = {"train": "heads", **WITHOUT_SCORES}
    train.main(arguments(demo_data, tmp_path / "whole", **given))
    in_parts = arguments(demo_data, tmp_path / "parts", save_every=0, **given)
    interrupt_in_step(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train.main(in_parts)
    train.main([*in_parts, "--resume"])
    whole, parts = (weights(files(tmp_path / name).last) for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_the_fingerprint_names_a_recipe_only_where_it_is_not_the_release(demo_data, tmp_path):
    config = train.get_args_parser().parse_config(arguments(demo_data, tmp_path))
    names = {"train", "batch_norm", "support_target", "steps"}
    assert not names & config.results_part().keys()
    assert names <= config.plain().keys()
    changed = {"train": "stn", "batch_norm": "frozen", "support_target": "each", "steps": 3}
    other = TrainingConfig.from_plain(config.plain() | changed)
    assert {name: other.results_part()[name] for name in names} == changed


def test_an_unknown_recipe():
    with pytest.raises(UserError, match="--train trunk: choose from all, heads, stn"):
        TrainingConfig.from_plain({"obj": "ring", "train": "trunk"})
