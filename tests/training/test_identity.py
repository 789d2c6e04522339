"""What identifies a run: content, not spelling. Other content is refused, the same content in another place is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import train
from models.regad import RegAD
from tests.training.test_training import SIZE, arguments, assert_equal_bits, files, interrupt_in_step
from training.identity import UNKNOWN_EARLIER, identified, require_same
from utils.errors import UserError

SCORER = "from scorers.gaussian import Gaussian\n\n\nclass Mine(Gaussian):\n    name = 'mine'\n"


@pytest.fixture(scope="module")
def inputs(demo_data, tmp_path_factory) -> Path:
    """A folder with the files that a run names."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(demo_data, folder / "data")
    torch.manual_seed(0)
    torch.save(RegAD("rotation_scale", SIZE).stn.state_dict(), folder / "weights.pth")
    (folder / "scorer.py").write_text(SCORER)
    support = [torch.rand(1, 3, SIZE, SIZE) for _ in range(2)]
    (folder / "support/ring").mkdir(parents=True)
    torch.save(support, folder / "support/ring/1_2.pt")
    return folder


def call(folder: Path, save: Path, *flags: str, **changes: object) -> None:
    given = {"weights": folder / "weights.pth", "support_path": folder / "support", "save_dir": save / "save"}
    given |= {"scorer": f"{folder / 'scorer.py'}:Mine"} | changes
    train.main([*arguments(folder / "data", folder, **given), *flags])


@pytest.fixture(scope="module")
def finished(inputs: Path) -> Path:
    call(inputs, inputs)
    return inputs


def test_the_same_content_in_another_place_is_the_same_run(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "moved", ignore=shutil.ignore_patterns("save", "cache"))
    (tmp_path / "moved/weights.pth").rename(tmp_path / "other_name.pth")
    call(tmp_path / "moved", finished, "--resume", weights=tmp_path / "other_name.pth", cache_dir="none")
    assert "already finished" in capsys.readouterr().out


def blacken(image: Path) -> None:
    with Image.open(image) as before:
        size = before.size
    Image.new("RGB", size).save(image)


def other_weights(folder: Path) -> None:
    state = torch.load(folder / "weights.pth", weights_only=True)
    torch.save({name: value * 2 for name, value in state.items()}, folder / "weights.pth")


def other_support(folder: Path) -> None:
    torch.save([torch.rand(1, 3, SIZE, SIZE) for _ in range(2)], folder / "support/ring/1_2.pt")


OTHER_CONTENT = {
    "source image": (lambda folder: blacken(next((folder / "data/weave/train/good").iterdir())), "other source images"),
    "test image": (lambda folder: blacken(next((folder / "data/ring/test/good").iterdir())), "other test images"),
    "mask": (lambda folder: blacken(next((folder / "data/ring/ground_truth").rglob("*.png"))), "other test images"),
    "support set": (other_support, "support images"),
    "weights": (other_weights, r"has weights sha256:\w{12}, not sha256:\w{12};"),
    "scorer": (lambda folder: (folder / "scorer.py").write_text(SCORER + "\n"), r"has scorer \[sha256:"),
}


@pytest.mark.parametrize("change", OTHER_CONTENT)
def test_other_content_under_the_same_name_is_another_run(change, finished, tmp_path):
    modify, sentence = OTHER_CONTENT[change]
    shutil.copytree(finished, tmp_path / "changed", ignore=shutil.ignore_patterns("save", "cache"))
    modify(tmp_path / "changed")
    with pytest.raises(UserError, match=sentence) as caught:
        call(tmp_path / "changed", finished, "--resume", cache_dir="none")
    assert "--overwrite" in str(caught.value) and "\n" not in str(caught.value)


def test_compile_is_decisive(finished):
    with pytest.raises(UserError, match="has compile False, not True"):
        call(finished, finished, "--resume", "--compile")


@given(st.binary(max_size=40), st.binary(max_size=40), st.sampled_from(("weights", "episodes", "scorer")))
def test_files_are_known_by_their_content(tmp_path_factory, first, second, argument):
    folder = tmp_path_factory.mktemp("files")
    (folder / "a.py").write_bytes(first)
    (folder / "b.py").write_bytes(second)

    def value(name: str) -> object:
        return [f"{folder / name}:Mine", "gaussian"] if argument == "scorer" else str(folder / name)

    same = identified({argument: value("a.py")}) == identified({argument: value("b.py")})
    assert same == (first == second)
    known = identified({argument: value("a.py")})
    assert identified(known) == known


def test_names_and_missing_files_stay_as_they_are():
    plain = {"weights": "imagenet", "episodes": None, "scorer": ["gaussian", "/nowhere.py:Mine"], "obj": __file__}
    assert identified(plain) == plain


def to_earlier_version(state: Path, spelled: dict) -> None:
    """Rewrites a state as versions before this one stored it: without the selected weights and all digests of content,
    with the spelled paths.
    """
    content = torch.load(state, weights_only=True)
    del content["selected"]
    for name in (*UNKNOWN_EARLIER, "bits"):
        del content["arguments"][name]
    content["arguments"] |= spelled
    torch.save(content, state)


def test_a_run_of_an_earlier_version_is_continued(finished, tmp_path, monkeypatch):
    folder = finished
    interrupt_in_step(monkeypatch, 5)  # in the second epoch
    with pytest.raises(KeyboardInterrupt):
        call(folder, tmp_path / "run")
    monkeypatch.undo()
    found, expected = files(tmp_path / "run"), files(finished)
    spelled = {"weights": str(folder / "weights.pth"), "scorer": [f"{folder / 'scorer.py'}:Mine"]}
    to_earlier_version(found.state, spelled)
    call(folder, tmp_path / "run", "--resume")
    assert_equal_bits(expected.last, found.last)
    assert_equal_bits(expected.selected, found.selected)
    assert json.loads(found.record.read_text())["decisive"] == json.loads(expected.record.read_text())["decisive"]


def test_weights_that_an_earlier_version_did_not_select_are_refused(inputs, tmp_path, monkeypatch):
    """Earlier versions, killed between weights and state, left weights that their history does not select."""
    folder = inputs
    interrupt_in_step(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        call(folder, tmp_path)
    monkeypatch.undo()
    found = files(tmp_path)
    to_earlier_version(found.state, {})
    checkpoint = torch.load(found.selected, weights_only=True)
    checkpoint["recipe"]["epoch"] += 1
    torch.save(checkpoint, found.selected)
    with pytest.raises(UserError, match=r"does not hold the weights of epoch \d, which .* selected"):
        call(folder, tmp_path, "--resume")


def test_earlier_versions_had_the_scorer_and_backbone_of_the_release():
    current = {"obj": "ring", "scorer": ["gaussian"], "backbone": "resnet18", "images": "digest"}
    require_same(Path("state.pt"), {"obj": "ring"}, current)
    with pytest.raises(UserError, match=r"has scorer \[gaussian\], not \[neighbours\]"):
        require_same(Path("state.pt"), {"obj": "ring"}, current | {"scorer": ["neighbours"]})
