"""Checkpoints as safetensors files and on the hub: the same networks as from a .pt file."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from models.networks import scoring_network
from models.regad import RegAD, checkpoint, load_checkpoint, local_file, save_portable, selection
from training.config import TrainingConfig
from utils import errors, files
from utils.config import read_config
from utils.errors import UserError
from utils.files import load_state_dict, load_tensors, save_tensors
from utils.naming import stored

MODE, SIZE = "affine", 64
COMMIT = "0123456789abcdef0123456789abcdef01234567"
RECIPE = {"config": {"obj": "ring", "stn_mode": MODE, "select": "source", "lr": 0.01}, "epoch": 3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Path]:
    """One checkpoint in both formats. Its layers are in the memory order of training on some processors."""
    torch.manual_seed(0)
    content = checkpoint(RegAD(MODE, SIZE).to(memory_format=torch.channels_last), RECIPE)
    folder = tmp_path_factory.mktemp("saved")
    save_tensors(folder / "model.pt", content)
    save_portable(folder / "model.safetensors", content)
    return folder / "model.pt", folder / "model.safetensors"


def test_both_files_hold_the_same(saved):
    models = [load_checkpoint(file, MODE, SIZE) for file in saved]
    for (name, one), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert selection(saved[0]) == selection(saved[1]) == ("source", 3)
    configs = [read_config(file, TrainingConfig) for file in saved]
    assert configs[0] == configs[1] == {"obj": "ring", "stn_mode": MODE, "select": "source", "lr": 0.01}


def test_the_file_holds_weights_and_plain_values_only(saved):
    with safe_open(saved[1], "pt") as file:
        assert json.loads(file.metadata()["recipe"]) == RECIPE
        assert {name.partition(".")[0] for name in file.keys()} == {"STN", "ENC", "PRED"}  # noqa: SIM118


def test_what_does_not_fit_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match=r"model\.safetensors was trained with stn_mode affine, not rotation"):
        load_checkpoint(saved[1], "rotation", SIZE)
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*missing\.pt: No such file or directory"):
        load_checkpoint(tmp_path / "missing.pt", MODE, SIZE)
    (tmp_path / "damaged.safetensors").write_bytes(saved[1].read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        load_checkpoint(tmp_path / "damaged.safetensors", MODE, SIZE)
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="is not RegAD's: it lacks one of the entries STN, ENC, PRED"):
        load_checkpoint(tmp_path / "other.safetensors", MODE, SIZE)
    save_file({"recipe.x": torch.zeros(1)}, tmp_path / "recipe.safetensors", {"recipe": "5"})
    with pytest.raises(UserError, match="is not RegAD's"):
        load_checkpoint(tmp_path / "recipe.safetensors", MODE, SIZE)
    assert list(load_tensors(tmp_path / "other.safetensors", "file")) == ["conv1.weight"]


ODD = {
    "a name that is no text": {1: torch.zeros(1)},
    "without values": {"stn1.fc.2.bias": torch.zeros(2, device="meta")},
    "integer weights": {"conv1.weight": torch.ones(2, dtype=torch.int32)},
    "complex weights": {"conv1.weight": torch.ones(2, dtype=torch.complex64)},
}


@pytest.mark.parametrize("case", ODD)
def test_odd_tensors_are_refused(case, tmp_path):
    for content, read, sentence in (
        (
            dict.fromkeys(("STN", "ENC", "PRED"), ODD[case]),
            partial(load_checkpoint, stn_mode=MODE, img_size=SIZE),
            "PRED",
        ),
        (ODD[case], load_state_dict, "is not a state dict"),
    ):
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(UserError, match=f"{sentence}.* plain tensors.* floating point"):
            read(tmp_path / "odd.pt")


@pytest.fixture
def hub(saved, tmp_path, monkeypatch) -> Path:
    """The cache of huggingface_hub with one repository, as its library lays it out; nothing can be downloaded."""
    constants = pytest.importorskip("huggingface_hub.constants")
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(saved[1])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot / "model.safetensors"


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_an_address_on_the_hub_is_a_checkpoint(revision, hub, saved):
    address = Path(f"hf:owner/name{revision}")
    assert local_file(address) == hub
    network = scoring_network("resnet18", MODE, SIZE, address, "none")
    expected = load_checkpoint(saved[0], MODE, SIZE).stn
    assert torch.equal(network.state_dict()["conv1.weight"], expected.state_dict()["conv1.weight"])


@pytest.mark.parametrize("address", ["hf:owner/name@v2", "hf:owner/other"])
def test_what_is_not_in_the_cache_and_cannot_be_downloaded_is_one_sentence(address, hub):
    with pytest.raises(UserError, match=f"cannot get model.safetensors of {address} from the hub: .+") as caught:
        local_file(Path(address))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["hf:", "hf:name", "hf:owner/name@", "hf:a/b/c", "hf:owner/name@a b"])
def test_malformed_addresses(address):
    with pytest.raises(UserError, match="is not an address on the hub: hf:OWNER/NAME"):
        local_file(Path(address))


def test_without_the_package_one_sentence_and_other_files_need_no_package(monkeypatch, saved):
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^no package huggingface_hub: run pip install huggingface_hub$"):
        local_file(Path("hf:owner/name"))
    assert local_file(saved[0]) == saved[0]


def test_files_appear_whole(saved, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        save_portable(tmp_path / "model.safetensors", checkpoint(RegAD(MODE, SIZE), RECIPE))
    assert not list(tmp_path.iterdir())


def test_a_safetensors_file_alone_stands_in_for_the_weights(saved, tmp_path):
    weights = tmp_path / "ring_1_affine_model.pt"
    assert stored(weights) == weights
    weights.with_suffix(".safetensors").symlink_to(saved[1])
    assert stored(weights) == weights.with_suffix(".safetensors")
    weights.symlink_to(saved[0])
    assert stored(weights) == weights
